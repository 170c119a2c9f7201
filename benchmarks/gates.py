"""What the gate of the thinking reward changes: eight ways to train from the same start.

    python -m benchmarks.gates --seeds 0 1 2

For each seed one start is made (warm-up, preference pairs, reward model, as `tiny` has them), then
every variant trains from it with the same prompts and random numbers. Nothing that stands in the
folder is made again: the same command continues, and a finished one draws its table anew. Ends with
a table of means over the seeds with 95 % intervals of Student's t, the paired differences to
`outcome`, and `gates.svg`. Runs share the cores, one core a run: times mean nothing here.
"""

import collections
import concurrent.futures
import dataclasses
import math
import os
import pathlib
import queue
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
import rich.console
import rich.table
import scipy.stats
import tyro

from pgrpo_jax import metrics

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "posterior": (),
    "posterior, no std floor": ("--update.std-floor", "0"),
    "decoupled": ("--update.advantage", "decoupled"),
    "outcome": ("--update.gate", "outcome"),
    "additive": ("--update.gate", "additive"),
    "process": ("--update.gate", "process"),
    "posterior, 4 R_t": ("--update.thinking-weight", "4"),
    "additive, 4 R_t": ("--update.gate", "additive", "--update.thinking-weight", "4"),
}
BASELINE = "outcome"
SHARED = ("sft", "reward_model", "pairs.jsonl")
LAST = 10  # training steps that a figure of the training's end is a mean of


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column: a metric of the last evaluation, or of the last training steps."""

    name: str
    stage: str
    metric: str
    percent: bool = True


MEASURES = (
    Measure("pass@1", "evaluate", "eval/pass@1"),
    Measure("greedy", "evaluate", "eval/pass@1_greedy"),
    Measure("perfect reasonings", "evaluate", "eval/oracle/perfect"),
    Measure("perfect of passing", "evaluate", "eval/oracle/perfect_of_passing"),
    Measure("R_t passing", "grpo", "rewards/thinking/passing", percent=False),
    Measure("R_t failing", "grpo", "rewards/thinking/failing", percent=False),
    Measure("AUC", "grpo", "oracle/thinking_auc", percent=False),
    Measure("reasoning, characters", "grpo", "completions/reasoning_characters", percent=False),
    Measure("entropy", "grpo", "entropy", percent=False),
)

Rows = list[dict[str, Any]]
Runs = dict[tuple[str, int], Rows]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares the gates on the built-in world."""

    workdir: pathlib.Path = pathlib.Path("runs/gates")
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = tuple(VARIANTS)
    jobs: int = os.cpu_count() or 1  # runs at a time, each on a core of its own
    options: str = ""  # of every run: --options="--update.steps 40 --evaluation.every-steps 20"


def main(arguments: Arguments) -> None:
    """Trains what is missing, then tells what came out."""
    unknown = set(arguments.variants) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0))[: arguments.jobs]:
        cores.put(core)
    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(lambda seed: make_start(arguments, seed, cores), arguments.seeds))
        pairs = [(v, seed) for seed in arguments.seeds for v in arguments.variants]
        list(pool.map(lambda pair: train(arguments, pair[0], pair[1], cores), pairs))
    runs = {
        pair: list(metrics.read_rows(folder(arguments, *pair) / "metrics.jsonl")) for pair in pairs
    }
    console = rich.console.Console(width=160)
    console.print(start_line(runs, arguments.seeds))
    console.print(table(runs, arguments.variants))
    if BASELINE in arguments.variants:
        console.print(difference_table(runs, arguments.variants))
    out = arguments.workdir / "gates.svg"
    draw(runs, arguments.variants).savefig(out)
    console.print(f"plot: {out}")


# --- runs


def folder(arguments: Arguments, variant: str, seed: int) -> pathlib.Path:
    return arguments.workdir / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def make_start(arguments: Arguments, seed: int, cores: "queue.Queue[int]") -> None:
    """Warm-up, pairs and reward model of one seed."""
    for stage in ("sft", "make_pairs", "train_reward"):
        command(arguments, stage, folder(arguments, "start", seed), seed, (), cores)


def train(arguments: Arguments, variant: str, seed: int, cores: "queue.Queue[int]") -> None:
    """One variant, from the seed's start."""
    out, start = folder(arguments, variant, seed), folder(arguments, "start", seed)
    if (out / "summary.json").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if not (out / name).exists():
            (out / name).symlink_to((start / name).resolve())
    # Every reasoning is scored, also those whose score no gate reads: for the metrics only.
    options = ("--rewards.shadow-fraction", "1", *VARIANTS[variant])
    command(arguments, "train", out, seed, options, cores)


def command(
    arguments: Arguments,
    stage: str,
    out: pathlib.Path,
    seed: int,
    options: Sequence[str],
    cores: "queue.Queue[int]",
) -> None:
    """Runs a stage in a process of its own on a core of its own; its words go into a file."""
    out.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", f"pgrpo_jax.{stage}", "--workdir", str(out), "--seed", str(seed)]
    words += [*options, *shlex.split(arguments.options)]
    core = cores.get()
    try:
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            done = subprocess.run(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
                check=False,
            )
    finally:
        cores.put(core)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}; see {out}/log.txt")


# --- figures


def last(rows: Rows, measure: Measure) -> float:
    """The metric at the end: of the last evaluation, or the mean over the last steps."""
    values = [
        row[measure.metric]
        for row in rows
        if row["stage"] == measure.stage and row.get(measure.metric) is not None
    ]
    count = LAST if measure.stage == "grpo" else 1
    return statistics.fmean(values[-count:]) if values else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half a 95 % interval of Student's t over the seeds; NaN for a single seed."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    t = float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def words(values: Sequence[float], percent: bool, sign: bool = False) -> str:
    mean, half = interval([100 * v for v in values] if percent else values)
    digits = 1 if percent or abs(mean) >= 10 else 2
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {half:.{digits}f}"


def start_line(runs: Runs, seeds: Sequence[int]) -> str:
    """Where all variants start from."""
    parts = []
    for measure in MEASURES:
        if measure.stage == "evaluate":
            first = [
                next(r[measure.metric] for r in rows if r["stage"] == "evaluate")
                for (variant, _), rows in runs.items()
                if variant == next(iter(runs))[0]
            ]
            parts.append(f"{measure.name} {words(first, measure.percent)} %")
    return f"{len(seeds)} seeds, from: " + ", ".join(parts)


def table(runs: Runs, variants: Sequence[str]) -> rich.table.Table:
    """The end of every variant."""
    return _table("at the end", runs, variants, lambda rows, _, measure: last(rows, measure), False)


def difference_table(runs: Runs, variants: Sequence[str]) -> rich.table.Table:
    """Differences to the baseline, seed by seed: the starts' own spread is out of them."""

    def difference(rows: Rows, seed: int, measure: Measure) -> float:
        return last(rows, measure) - last(runs[BASELINE, seed], measure)

    others = [v for v in variants if v != BASELINE]
    return _table(f"less {BASELINE}, by seed", runs, others, difference, True)


def _table(
    title: str,
    runs: Runs,
    variants: Sequence[str],
    value: Callable[[Rows, int, Measure], float],
    sign: bool,
) -> rich.table.Table:
    found = rich.table.Table(title)
    for measure in MEASURES:
        found.add_column(measure.name + (" %" if measure.percent else ""), justify="right")
    for variant in variants:
        cells = []
        for measure in MEASURES:
            values = [
                value(rows, seed, measure) for (v, seed), rows in runs.items() if v == variant
            ]
            cells.append(words(values, measure.percent, sign))
        found.add_row(variant, *cells)
    return found


def draw(runs: Runs, variants: Sequence[str]) -> matplotlib.figure.Figure:
    """A panel a measure, a line a variant: the mean over the seeds, in a band of all of them."""
    figure = matplotlib.figure.Figure(figsize=(13, 9.5), layout="constrained")
    panels = figure.subplots(3, 3).flat
    for axes, measure in zip(panels, MEASURES, strict=True):
        for number, variant in enumerate(variants):
            steps, values = curves([r for (v, _), r in runs.items() if v == variant], measure)
            if steps.size:
                axes.plot(steps, values.mean(0), color=f"C{number}", label=variant, linewidth=1.6)
                axes.fill_between(
                    steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.12, linewidth=0
                )
        axes.set_title(measure.name, fontsize=10, loc="left")
        axes.grid(axis="y", alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if measure.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=math.ceil(len(variants) / 2),
        frameon=False,
    )
    return figure


def curves(seeds: Sequence[Rows], measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and a row of values a seed; those of training in means over LAST steps."""
    width = LAST if measure.stage == "grpo" else 1
    binned = []
    for rows in seeds:
        bins: dict[int, list[float]] = collections.defaultdict(list)
        for row in rows:
            if row["stage"] == measure.stage and row.get(measure.metric) is not None:
                bins[int(row["step"]) // width * width].append(row[measure.metric])
        binned.append({step: statistics.fmean(values) for step, values in bins.items()})
    steps = sorted(set.intersection(*(set(b) for b in binned)))
    return np.array(steps), np.array([[b[step] for step in steps] for b in binned])


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
