"""Configures glibc's allocator to keep freed memory for the next step, in huge pages.

By default glibc returns the memory of a large tensor to the system when the tensor is freed. Every
step then causes tens of thousands of page faults. PyTorch caches freed memory on GPUs, but not on
CPUs.

Not covered: other C libraries and allocators (jemalloc, tcmalloc); memory of other threads than
the main thread, which creates the tensors of a step.
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
NEVER = -1  # as a size_t: the largest value
CONTAINERS_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Memory limit of this process's container, in cgroups version 2 and version 1."""
GROW_BY = 64 * 2**20
"""Bytes by which the heap grows."""
NEVER_OVERCOMMIT = "2"  # proc(5): reserved addresses count as used memory


def keep_freed_memory() -> bool:
    """Make this process keep freed memory; return whether its C library supports that."""
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
    """Return freed memory to the system once.

    Training reuses little of the memory that measurements before it have freed.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
        _ask_for_huge_pages()  # trimming the heap has removed the earlier advice


def _ask_for_huge_pages() -> None:
    """Ask for huge pages for the heap, which make memory access faster.

    glibc itself asks only if GLIBC_TUNABLES is set before the process starts. This function
    allocates most of the machine's memory, calls madvise and frees the block. That reserves
    addresses, but no memory.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or not _may_reserve():
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size = machine_memory() // 4 * 3  # the system refuses a block of the full size
    start = libc.malloc(ctypes.c_size_t(size))
    if start is None:
        return
    first, end = (-(-address // mmap.PAGESIZE) * mmap.PAGESIZE for address in (start, start + size))
    length = end - mmap.PAGESIZE - first
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(start))


def machine_memory() -> int:
    """Return the memory of this machine in bytes, or the limit of this process's container."""
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    for path in CONTAINERS_LIMITS:
        with suppress(
            OSError, ValueError
        ):  # the file of the other cgroups version is missing; "max" is no number
            limits.append(int(path.read_text()))
    return min(limits)


def _may_reserve() -> bool:
    """Return whether this process may reserve addresses without using memory."""
    try:
        policy = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    except OSError:
        return False
    unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    return policy != NEVER_OVERCOMMIT and unlimited
