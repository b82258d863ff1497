"""What every test is kept apart by: modules of its own, signals as a terminal has them, no GPU."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest

# References are the CPU's, and `device: auto` would take a GPU: none is to be seen, here or by the
# processes that inherit this. Torch is not imported before.
GPUS = os.environ.setdefault("SWITOKD_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
"""What was visible before, for `test_gpu.py`. pytest-xdist's processes have it from the one that
starts them, for they see none any more.
"""
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Test processes start hundreds of interpreters: the package's modules are compiled only once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell ignores SIGINT for what it starts in the background, and nohup ignores SIGHUP. All that
# tests start would ignore them too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what a test has imported from its own folder: the next one's may have that name."""
    before = list(sys.path)
    yield
    sys.path[:] = before
    folder = str(tmp_path_factory.getbasetemp()) + os.sep
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _own_output() -> Iterator[None]:
    """Undo what a command of a test has set for the output of this process and its children."""
    variables = ("SWITOKD_LOG_FORMAT", "SWITOKD_QUIET", "SWITOKD_VERBOSE")
    before = {name: os.environ[name] for name in variables if name in os.environ}
    streams, hook = (sys.stdout, sys.stderr), sys.excepthook
    yield
    for name in variables:
        os.environ.pop(name, None)
    os.environ.update(before)
    sys.stdout, sys.stderr = streams
    sys.excepthook = hook
    logging.disable(logging.NOTSET)
