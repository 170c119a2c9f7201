"""Multiprocessing's semaphore for programs that cannot have one.

The C library makes semaphores in /dev/shm, which the tier of Landlock keeps closed: what lies
there outlives the program. As no program can have a second process, one among threads does the
same; pools of threads and `multiprocessing.Lock` need it.

Part of the sandbox: standard library only.
"""

import _multiprocessing  # type: ignore[import-not-found]
import threading

_RECURSIVE = 0  # multiprocessing.synchronize.RECURSIVE_MUTEX


class SemLock:
    """Has the interface of `_multiprocessing.SemLock`."""

    SEM_VALUE_MAX = _multiprocessing.SemLock.SEM_VALUE_MAX

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool):
        self.kind, self.maxvalue = kind, maxvalue
        self.name, self.handle = None, 0  # it has none that another process could open
        self._value = value
        self._changed = threading.Condition()
        self._owner = self._depth = 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if self.kind == _RECURSIVE and self._is_mine():
            self._depth += 1
            return True
        with self._changed:
            if not self._changed.wait_for(lambda: self._value > 0, timeout if block else 0):
                return False
            self._value -= 1
            self._owner = threading.get_ident()
            self._depth += 1
        return True

    def release(self) -> None:
        if self.kind == _RECURSIVE:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self._depth > 1:
                self._depth -= 1
                return
        with self._changed:
            if self._value >= self.maxvalue:
                raise ValueError("semaphore or lock released too many times")
            self._value += 1
            self._depth -= 1
            self._changed.notify()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _count(self) -> int:
        return self._depth

    def _is_mine(self) -> bool:
        return self._depth > 0 and self._owner == threading.get_ident()

    def _get_value(self) -> int:
        return self._value

    def _is_zero(self) -> bool:
        return self._value == 0


def install() -> None:
    _multiprocessing.SemLock = SemLock
