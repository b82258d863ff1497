"""Sets the number of CPU threads, and how long an idle thread spins before it sleeps.

PyTorch uses GNU OpenMP. Its threads spin for about ten milliseconds between two operations before
they sleep. On a busy machine the spinning takes the core from other processes: beside one busy
process, three small networks on two cores took more than 1 s per step instead of 0.1 s. Sleeping
at once (OMP_WAIT_POLICY=passive) makes an eager step on a quiet machine 20 % longer. Spinning for
one millisecond makes an eager step 2 to 4 % longer, and a compiled step no longer.

Imported without torch, because OpenMP reads its variables when PyTorch is loaded.

Not covered: a process that has loaded PyTorch already, such as a notebook; other OpenMP libraries.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

from switokd.runtime.environment import cores

SPINS = "20000"
"""Number of spins; takes about one millisecond."""
THREADS = "OMP_NUM_THREADS"
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which the user chooses; if one is set, nothing is changed."""


def drop_unusable_threads(say: Callable[[str], object]) -> None:
    """Unset OMP_NUM_THREADS for this process and its children if OpenMP cannot use its value.

    OpenMP would take a thread per core instead, in each rank. say: receives a sentence for the
    user. Must be called before PyTorch is loaded.
    """
    given = os.environ.get(THREADS)
    if given is None or re.fullmatch(r"\s*\+?0*[1-9]\d{0,4}\s*(,\s*\+?0*[1-9]\d{0,4}\s*)*", given):
        return
    del os.environ[THREADS]
    if given.strip():  # empty: as if it were not set
        say(f"{THREADS}={given} is left out; allowed: a number of threads, from 1 to 99999")


def wait_briefly() -> None:
    """Set a short spinning time for this process and its children, unless the user has set one.

    Must be called before PyTorch is loaded.
    """
    if not any(choice in os.environ for choice in CHOICES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def fix_threads() -> None:
    """Let this process and its children compute with one thread, unless OMP_NUM_THREADS is set.

    The sums in a convolution's gradient depend on the number of threads, and the usual number
    depends on the number of processes. PyTorch may be loaded already.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)


def stay_within_limits() -> None:
    """Limit PyTorch's threads to the available cores, unless OMP_NUM_THREADS is set.

    PyTorch counts the cores of the machine; a container may be limited to fewer cores.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
