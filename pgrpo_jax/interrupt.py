"""Ctrl-C and SIGTERM as a question asked between steps, so that the state can be saved first."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """`requested` turns true at the first signal and stays so."""

    requested: bool = False


@contextlib.contextmanager
def delayed() -> Iterator[Interrupt]:
    """In its block the first SIGINT or SIGTERM sets the flag, the second raises KeyboardInterrupt.

    Works in the main thread only, as Python's signals do. The old handlers come back at the end.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        # os.write, because `print` may be the very call that the signal broke into.
        os.write(2, b"\nStopping after this step, with a checkpoint. Once more to stop at once.\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
