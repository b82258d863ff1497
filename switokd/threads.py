"""How long a thread waits awake for the others of its process: briefly.

Between two operations the threads of GNU's OpenMP, which PyTorch brings along, spin for some ten
milliseconds before they sleep. Where another program wants the core that is what it has to
wait for, and what a step of many short operations then consists of: beside one busy process, three
small networks on two cores took more than a second a step instead of a tenth. Waking a thread that
sleeps costs a little: passive waiting makes an eager step on a quiet machine a fifth longer, this
one 2 to 4 %, and compiled ones no longer.

Torch-free.

Not covered: a process that has loaded PyTorch before (a notebook), which keeps what it has; other
OpenMP libraries.
"""

from __future__ import annotations

import os

SPINS = "20000"
"""About a millisecond."""
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """For this process, before it loads PyTorch, and those that it starts; the user's word goes."""
    if not any(choice in os.environ for choice in CHOICES):
        os.environ["GOMP_SPINCOUNT"] = SPINS
