"""How many threads compute, and how long one waits awake for the others: briefly.

Between two operations the threads of GNU's OpenMP, which PyTorch brings along, spin for some ten
milliseconds before they sleep. Where another program wants the core that is what it has to
wait for, and what a step of many short operations then consists of: beside one busy process, three
small networks on two cores took more than a second a step instead of a tenth. Waking a thread that
sleeps costs a little: passive waiting makes an eager step on a quiet machine a fifth longer, this
one 2 to 4 %, and compiled ones no longer.

Imported without torch.

Not covered: a process that has loaded PyTorch before (a notebook), which keeps what it has; other
OpenMP libraries.
"""

from __future__ import annotations

import os

from switokd.runtime.environment import cores

SPINS = "20000"
"""About a millisecond."""
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """For this process, before it loads PyTorch, and those that it starts; the user's word goes."""
    if not any(choice in os.environ for choice in CHOICES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def stay_within_limits() -> None:
    """Compute with no more threads than there are cores for; the user's word goes.

    PyTorch asks the machine how many there are, and a container may use fewer.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
