"""Progress of a long loop: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import rich.console
import rich.progress
import rich.text


class Advance(Protocol):
    """Says that `count` more are done, and what the figures beside the bar are now."""

    def __call__(self, count: int = 1, **figures: float) -> None: ...


@contextlib.contextmanager
def bar(
    name: str,
    total: int,
    done: int = 0,
    *,
    unit: str = "step",
    every_s: float = 30.0,
    primary: bool = True,
    console: rich.console.Console | None = None,
) -> Iterator[Advance]:
    """Shows how far `name` is: done of total, rate, remaining time, figures.

    `done` are those of an earlier, interrupted run; they do not count into the rate. On a console
    that is no terminal one line is printed every `every_s` seconds and one at the end. A process
    that is not primary shows nothing.
    """
    console = console or rich.console.Console(stderr=True)
    console.quiet = not primary
    shown = _terminal if console.is_terminal else _lines
    with shown(console, name, total, done, unit, every_s) as advance:
        yield advance


@contextlib.contextmanager
def _terminal(
    console: rich.console.Console, name: str, total: int, done: int, unit: str, every_s: float
) -> Iterator[Advance]:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=28),
        rich.progress.MofNCompleteColumn(),
        _RateColumn(unit),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("[dim]{task.fields[figures]}"),
    )
    with rich.progress.Progress(*columns, console=console, speed_estimate_period=60) as progress:
        task = progress.add_task(name, total=total, completed=done, figures="")

        def advance(count: int = 1, **figures: float) -> None:
            progress.update(task, advance=count, figures=_words(figures))

        yield advance


class _RateColumn(rich.progress.ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(_rate(task.finished_speed or task.speed, self._unit))


@contextlib.contextmanager
def _lines(
    console: rich.console.Console,
    name: str,
    total: int,
    done: int,
    unit: str,
    every_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    begin = said = clock()
    first, words = done, ""

    def say() -> None:
        speed = (done - first) / max(clock() - begin, 1e-9)
        rate = _rate(speed, unit)
        left = "" if done >= total or not speed else f"{_duration((total - done) / speed)} left"
        parts = (f"{name} {done}/{total}", rate, left, words)
        console.print("  ".join(part for part in parts if part), highlight=False, soft_wrap=True)

    def advance(count: int = 1, **figures: float) -> None:
        nonlocal done, said, words
        done, words = done + count, _words(figures)
        if clock() - said >= every_s:
            said = clock()
            say()

    yield advance
    say()


def _rate(speed: float | None, unit: str) -> str:
    if not speed:
        return ""
    return f"{speed:.1f} {unit}s/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _words(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
