"""glibc's malloc, told to keep what is freed and to lie in huge pages.

XLA's CPU programs take their temporaries from malloc at every call and free them at its end. By
default glibc gets each of some size fresh from the kernel and gives it back, so that every step
pays for page faults; and the kernel gives out pages of 4 kB, of which a processor can look up few
at a time, unless it is asked for pages of 2 MB. `benchmarks/allocator.py` shows what either is
worth.
"""

import ctypes
import os
import pathlib
import platform
import resource

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -4, -1, -2, -8  # malloc.h
_NEVER = -1  # as a size, the largest there is
_MADV_HUGEPAGE = 14  # sys/mman.h


def keep_freed_memory(huge_pages: bool = True) -> None:
    """From here on the process keeps its peak of host memory, in huge pages where Linux has them.
    Does nothing without glibc.

    To be called before threads are started, each of which would begin an arena of its own.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in (
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, _NEVER),
        (_TOP_PAD, 256 << 20),
        (_ARENA_MAX, 1),
    ):
        libc.mallopt(option, value)
    if huge_pages and _may_reserve():
        _reserve_in_huge_pages(libc)


def _may_reserve() -> bool:
    """Whether addresses are free here as long as nothing is written to them."""
    strict = pathlib.Path("/proc/sys/vm/overcommit_memory")
    if not strict.exists() or strict.read_text().strip() == "2":
        return False
    limits = (resource.getrlimit(limit) for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return all(soft == resource.RLIM_INFINITY for soft, _ in limits)


def _reserve_in_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap by addresses for half of the machine's memory, and asks for huge pages there:
    what malloc would add later, a piece at a time, would not be asked for."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    begin = libc.malloc(ctypes.c_size_t(size))
    if begin is None:
        return
    end = libc.sbrk(ctypes.c_ssize_t(0))
    if begin < end:  # else the heap could not grow, and this lies somewhere else
        aligned = -(-begin // page) * page
        libc.madvise(aligned, end - aligned, _MADV_HUGEPAGE)
    libc.free(begin)
