"""How our rollout and our step grow: with slots, with length, and with the model's size.

    python -m benchmarks.growth /tmp/checkpoints --out benchmarks/growth.svg

Prints a table and draws it. The rollout's tokens a second should rise with the slots until products
take all the time; its seconds should rise with the tokens drawn, and a little more, for attention;
the step's with the operations of the model, and a little less: wider products are nearer the peak.
"""

import argparse
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from benchmarks import checkpoints, rollout, rollout_ours, update, update_ours
from pgrpo_jax import allocator

PROMPT = 64  # tokens


def drawing(slots: int, length: int) -> dict[str, Any]:
    """A job of one full batch."""
    ids = np.random.default_rng(0).integers(1, checkpoints.VOCABULARY, (slots, PROMPT))
    return {"prompts": ids.tolist(), "limits": [length] * slots, "slots": slots, "group": 1}


def seconds(answer: Any, job: dict[str, Any], times: int) -> float:
    """The median of some runs, after one that compiles."""
    answer(job)
    return statistics.median(answer(job)["seconds"] for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/growth.svg"))
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 4, 16, 64, 256])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    allocator.keep_freed_memory()
    checkpoints.make(arguments.folder)
    nano = rollout_ours.Answers(str(arguments.folder / "nano"))
    times = arguments.times
    by_slots = [n * 128 / seconds(nano, drawing(n, 128), times) for n in arguments.slots]
    by_length = [seconds(nano, drawing(8, n), times) for n in arguments.lengths]
    sizes = list(checkpoints.SIZES)
    by_size = [
        seconds(update_ours.Answers(str(arguments.folder / s)), update.job("full"), times)
        for s in sizes
    ]
    giga = [rollout.operations(size) / 1e9 for size in sizes]
    show("slots", arguments.slots, "tokens/s", by_slots)
    show("tokens a completion, 8 slots", arguments.lengths, "seconds", by_length)
    show("Gigaoperations a token", giga, "seconds of a step", by_size)
    figure = matplotlib.figure.Figure((12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    plot(axes[0], "slots", arguments.slots, "tokens/s", by_slots)
    plot(axes[1], "tokens a completion, 8 slots", arguments.lengths, "seconds", by_length)
    plot(axes[2], "Gigaoperations a token", giga, "seconds of a step", by_size)
    figure.savefig(arguments.out)


def show(x_name: str, xs: Sequence[float], y_name: str, ys: Sequence[float]) -> None:
    """Prints pairs, and how y grows from each x to the next: 1 is linear, 0 not at all."""
    print(f"{x_name} -> {y_name}")
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        power = np.log(y / ys[i - 1]) / np.log(x / xs[i - 1]) if i else float("nan")
        print(f"  {x:>10,.3f} {y:>12,.3f}  power {power:.2f}")


def plot(axes: Any, x_name: str, xs: Sequence[float], y_name: str, ys: Sequence[float]) -> None:
    """One plot with logarithmic axes and a line of power 1 through its first point."""
    axes.loglog(xs, ys, "o-", label="measured")
    axes.loglog(xs, [ys[0] * x / xs[0] for x in xs], ":", color="grey", label="linear")
    axes.set_xticks(xs, [f"{x:,.2g}" if x < 1 else f"{x:,.0f}" for x in xs])
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.minorticks_off()
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.legend()


if __name__ == "__main__":
    main()
