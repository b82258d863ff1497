"""The program that torchrun starts once per rank: `torchrun ... -m switokd.train RECIPE`.

As a name in Python, `switokd.train` is the function of `api.py`, also after `import switokd.train`.

Not covered: what a rank does (`worker.py`), its command line (`cli/worker.py`).
"""

import sys
from types import ModuleType
from typing import cast

from switokd.runtime.console import quiet_grpc
from switokd.runtime.environment import Environment, environment
from switokd.runtime.lifecycle import follow_launcher, one_line_errors

if __name__ == "__main__":
    # Before the long import of PyTorch, because the launcher may die meanwhile.
    with one_line_errors(Environment()):
        follow_launcher(environment())
    quiet_grpc()
    from switokd.cli.worker import worker_main

    worker_main()
elif __name__ == "switokd.train":  # not in a child of multiprocessing, where it is __mp_main__
    from switokd import api

    # The import system binds the entry of sys.modules to the name `train` of the package.
    # importlib.util.find_spec reads the entry's __spec__.
    api.train.__spec__ = __spec__  # type: ignore[attr-defined]
    sys.modules[__name__] = cast(ModuleType, api.train)
