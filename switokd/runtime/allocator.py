"""The C library's allocator, told to keep what a step frees for the next step, in huge pages.

By default glibc takes each large tensor from the system and gives it back when it is freed, so
that every step faults in tens of thousands of pages anew. PyTorch has a cache of its own on GPUs
and none on CPUs.

Not covered: other C libraries and allocators (jemalloc, tcmalloc), which decide by themselves;
memory of other threads than the main one, where no step's tensors are made.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER = -1  # as a size_t: the largest
CONTAINERS_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""As a container sees its own, in cgroups of either version."""
GROW_BY = 64 * 2**20
NEVER_OVERCOMMIT = "2"  # proc(5): the system counts what is only reserved


def keep_freed_memory() -> bool:
    """Let this process keep freed memory, from now on; whether its C library can."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    keeps = all(
        mallopt(parameter, value) == 1
        for parameter, value in (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, NEVER),
            (M_TOP_PAD, GROW_BY),
        )
    )
    if keeps:
        _ask_for_huge_pages()
    return keeps


def give_back_freed_memory() -> None:
    """Return to the system what is free now, once: what was used before training is another."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
        _ask_for_huge_pages()  # the end of the heap went, and its advice with it


def _ask_for_huge_pages() -> None:
    """Let the heap grow into huge pages, which are read faster, where the system has them on offer.

    glibc asks for them only if GLIBC_TUNABLES says so before the process starts. So the heap is
    made as large as most of the machine's memory, advised, and freed: that reserves addresses, no
    memory.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or not _may_reserve():
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size = machine_memory() // 4 * 3  # all of it would be refused
    start = libc.malloc(ctypes.c_size_t(size))
    if start is None:
        return
    first, end = (-(-address // mmap.PAGESIZE) * mmap.PAGESIZE for address in (start, start + size))
    length = end - mmap.PAGESIZE - first
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(start))


def machine_memory() -> int:
    """Bytes of this machine's memory, or of what this process's container may take of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    for path in CONTAINERS_LIMITS:
        with suppress(OSError, ValueError):  # of the other version of cgroups; "max"
            limits.append(int(path.read_text()))
    return min(limits)


def _may_reserve() -> bool:
    """Whether addresses without memory cost this process nothing."""
    try:
        policy = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    except OSError:
        return False
    unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    return policy != NEVER_OVERCOMMIT and unlimited
