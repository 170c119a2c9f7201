"""glibc's malloc, told to keep what is freed.

XLA's CPU programs take their temporaries from malloc at every call and free them at its end. By
default glibc gets each of some size fresh from the kernel and gives it back, so that every step
pays for page faults: a third of its CPU seconds on the built-in world (`benchmarks/allocator.py`).
"""

import ctypes
import platform

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -4, -1, -2, -8  # malloc.h
_MOST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> None:
    """From here on the process keeps its peak of host memory. Does nothing without glibc.

    To be called before threads are started, each of which would begin an arena of its own.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in (
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, _MOST),
        (_TOP_PAD, 256 << 20),
        (_ARENA_MAX, 1),
    ):
        libc.mallopt(option, value)
