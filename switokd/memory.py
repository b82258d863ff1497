"""The C library's allocator, told to keep what a step frees for the next step.

By default glibc takes each large tensor from the system and gives it back when it is freed, so
that every step faults in tens of thousands of pages anew. PyTorch has a cache of its own on GPUs
and none on CPUs.

Not covered: other C libraries and allocators (jemalloc, tcmalloc), which decide by themselves.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER = 2**31 - 1
GROW_BY = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep freed memory, from now on; whether its C library can."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, NEVER),
            (M_TOP_PAD, GROW_BY),
        )
    )


def give_back_freed_memory() -> None:
    """Return to the system what is free now, once: what was used before training is another."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
