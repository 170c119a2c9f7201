"""Which metrics of a run become which charts of its report."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pgrpo_jax import charts, metrics

PHASE_COLORS: tuple[charts.Color, ...] = ("blue", "teal", "amber", "violet", "green", "red")

Series = Mapping[str, tuple[list[int], list[float]]]  # of a metric, its steps and its values


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend of (label, colour), and a sentence on how to read it."""

    title: str
    svg: str
    legend: tuple[tuple[str, charts.Color], ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Plot:
    """A chart to be: which metrics of a stage are its lines, (metric, label, colour) each."""

    title: str
    metrics: tuple[tuple[str, str, charts.Color], ...]
    percent: bool = False
    note: str = ""


PLOTS: Mapping[str, tuple[Plot, ...]] = {
    "Rewards": (
        Plot(
            "Thinking reward",
            (
                ("rewards/thinking/passing", "passing completions", "green"),
                ("rewards/thinking/failing", "failing completions", "red"),
            ),
            note="Failing completions are scored to be seen here; the gate gives them none of it.",
        ),
        Plot(
            "Format reward",
            (
                ("rewards/format/passing", "passing completions", "green"),
                ("rewards/format/failing", "failing completions", "red"),
                ("rewards/format/mean", "all", "muted"),
            ),
            percent=True,
        ),
        Plot(
            "Outcome reward",
            (("rewards/outcome/mean", "all", "green"),),
            percent=True,
            note="The share of completions that pass every test: 1 for passing and 0 for failing.",
        ),
        Plot(
            "Total reward", (("reward", "mean", "blue"), ("reward_std", "std in a group", "amber"))
        ),
    ),
    "Groups": (
        Plot(
            "What became of the groups",
            (
                ("groups/all_pass", "all pass", "green"),
                ("groups/all_fail", "all fail", "red"),
                ("frac_reward_zero_std", "reward has no variance", "muted"),
            ),
            percent=True,
        ),
        Plot(
            "Rescued by the process reward",
            (("groups/rescued", "rescued", "violet"),),
            percent=True,
            note="Groups whose reward varies only because reasonings were ranked.",
        ),
        Plot(
            "Advantage in all-failing groups",
            (("groups/phantom_advantage", "share of |advantage|", "red"),),
            percent=True,
            note="Phantom advantage: there the format reward alone makes the difference.",
        ),
        Plot(
            "Standard deviation in all-passing groups",
            (("groups/all_pass_std", "mean std of the reward", "amber"),),
            note="Below the floor, advantages are divided by the floor.",
        ),
    ),
    "Policy": (
        Plot("Completion length", (("completions/mean_length", "mean, in tokens", "blue"),)),
        Plot(
            "Completions cut at the length limit",
            (("completions/clipped_ratio", "truncated", "amber"),),
            percent=True,
        ),
        Plot("Entropy", (("entropy", "nats a token", "teal"),)),
        Plot(
            "Clipped tokens",
            (
                ("clip_ratio/high_mean", "above 1 + epsilon_high", "amber"),
                ("clip_ratio/low_mean", "below 1 − epsilon", "blue"),
            ),
            percent=True,
        ),
        Plot("KL to the reference policy", (("kl", "k3 estimate", "violet"),)),
        Plot(
            "Sampler against trainer",
            (("mismatch_kl", "mismatch_kl", "red"),),
            note="The same tokens, the same parameters: all but rounding is an error.",
        ),
        Plot("Gradient norm", (("grad_norm", "before clipping", "blue"),)),
        Plot("Learning rate", (("learning_rate", "learning rate", "muted"),)),
    ),
}
PASS_AT_1: tuple[tuple[str, str, charts.Color], ...] = (
    ("eval/pass@1", "sampled", "blue"),
    ("eval/pass@1_greedy", "greedy", "amber"),
)
ORACLE = Plot(
    "Oracle-perfect reasonings",
    (
        ("eval/oracle/perfect_of_passing", "of passing, held out", "violet"),
        ("oracle/perfect_of_passing", "of passing, in training", "teal"),
        ("oracle/perfect", "of all, in training", "muted"),
    ),
    percent=True,
    note="The world's own oracle grades them; it is never a reward.",
)
ORACLE_AUC = Plot(
    "Reward model against the oracle",
    (("oracle/thinking_auc", "sound above flawed", "violet"),),
    percent=True,
    note="On the policy's own reasonings; 50 % is a coin.",
)
REWARD_MODEL = (
    Plot("Bradley-Terry loss", (("loss", "nats a pair", "blue"),)),
    Plot(
        "Accuracy on training pairs",
        (("accuracy", "chosen above rejected", "green"),),
        percent=True,
    ),
)
WARM_UP = Plot("Loss", (("loss", "nats a token", "blue"),))
SPEED = Plot("Tokens a second", (("tokens_per_s", "training", "blue"),))


def read_stages(rows: Iterable[dict[str, Any]]) -> Mapping[str, Series]:
    """The series of each stage from the rows of metrics.jsonl; null becomes NaN."""
    stages: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for row in rows:
        step, stage = row.pop("step"), row.pop("stage")
        series = stages.setdefault(stage, {})
        for name, value in row.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(math.nan if value is None else value)
    return stages


def sections(stages: Mapping[str, Series], summary: Mapping[str, Any]) -> dict[str, list[Figure]]:
    """The figures by section, only those that have data."""
    training = stages.get("grpo", {})
    reward_model = stages.get("reward_model", {})
    found = {
        "Held-out problems": evaluation(stages, summary),
        "Rewards": draw_all(PLOTS["Rewards"], training) + own_rewards(training),
        "Groups": draw_all(PLOTS["Groups"], training),
        "Policy": draw_all(PLOTS["Policy"], training),
        "Reward model": draw_all(REWARD_MODEL, reward_model) + pair_accuracy(reward_model),
        "Warm-up": draw_all([WARM_UP], stages.get("sft", {})),
        "Time": phase_times(summary) + step_times(training) + draw_all([SPEED], training),
    }
    return {title: drawn for title, drawn in found.items() if drawn}


def draw_all(plots: Iterable[Plot], series: Series) -> list[Figure]:
    """A chart for each plot of which there is any metric."""
    figures = []
    for plot in plots:
        present = [entry for entry in plot.metrics if entry[0] in series]
        if present:
            drawn = [charts.Line(label, color, *series[name]) for name, label, color in present]
            svg, legend = charts.lines(drawn, percent=plot.percent), legend_of(drawn)
            figures.append(Figure(plot.title, svg, legend, plot.note))
    return figures


def legend_of(drawn: Iterable[charts.Line]) -> tuple[tuple[str, charts.Color], ...]:
    """(label, colour) of each line."""
    return tuple((line.label, line.color) for line in drawn)


def evaluation(stages: Mapping[str, Series], summary: Mapping[str, Any]) -> list[Figure]:
    """pass@1 with its intervals over steps, and the oracle's word where there is an oracle."""
    merged: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for series in stages.values():
        for name, points in series.items():
            if name.startswith(("eval/", "oracle/")):
                merged[name].update(zip(*points, strict=True))
    ordered = {name: (sorted(p), [p[step] for step in sorted(p)]) for name, p in merged.items()}
    count = answers(summary)
    drawn = [
        with_interval(charts.Line(label, color, *ordered[name]), count)
        for name, label, color in PASS_AT_1
        if name in ordered
    ]
    figures = []
    if drawn:
        note = f"Bands: 95 % Wilson intervals of {count} answers." if count else ""
        figures.append(Figure("pass@1", charts.lines(drawn, percent=True), legend_of(drawn), note))
    return figures + draw_all([ORACLE, ORACLE_AUC], ordered)


def answers(summary: Mapping[str, Any]) -> int:
    """How many answers a held-out pass@1 is a share of; 0 if that is not known (yet)."""
    return summary.get("pass@1", {}).get("after", {}).get("sampled", {}).get("n", 0)


def with_interval(line: charts.Line, count: int) -> charts.Line:
    """The line with the Wilson intervals of shares of `count` answers, if that is known."""
    if not count:
        return line
    bounds = [metrics.wilson_interval(share * count, count) for share in line.y]
    low, high = zip(*bounds, strict=True)
    return dataclasses.replace(line, low=low, high=high)


def own_rewards(series: Series) -> list[Figure]:
    """A chart for each reward function of the user's."""
    names = [m for name in series if (m := re.fullmatch(r"rewards/(.+)/mean", name))]
    own = [m for m in names if m[1] not in ("format", "outcome", "thinking")]
    return draw_all([Plot(f"Reward: {m[1]}", ((m[0], "mean", "blue"),)) for m in own], series)


def pair_accuracy(series: Series) -> list[Figure]:
    """The last accuracy on held-out pairs, over all and of each dimension and kind, as bars."""
    last = {
        name.removeprefix("eval/accuracy").removeprefix("/") or "all": values[-1]
        for name, (_, values) in series.items()
        if name.startswith("eval/accuracy")
    }
    if not last:
        return []
    svg = charts.bars(last, percent=True, color="green")
    return [Figure("Accuracy on held-out pairs", svg, note="50 % is a coin.")]


def phase_times(summary: Mapping[str, Any]) -> list[Figure]:
    """Seconds by phase of the whole run."""
    seconds = {name: phase["seconds"] for name, phase in summary.get("phases", {}).items()}
    if not seconds:
        return []
    return [Figure("Time by phase", charts.bars(seconds, percent=False, unit=" s"))]


def step_times(series: Series) -> list[Figure]:
    """Where the seconds of a training step go."""
    timed = {
        match[1]: dict(zip(*points, strict=True))
        for name, points in series.items()
        if (match := re.fullmatch(r"time/(\w+)_s", name)) and match[1] != "step"
    }
    if not timed:
        return []
    steps = sorted(set().union(*timed.values()))
    parts = {name: [points.get(step, 0.0) for step in steps] for name, points in timed.items()}
    colors = PHASE_COLORS[: len(parts)]
    svg = charts.stacked(steps, parts, colors)
    return [Figure("Seconds a training step", svg, tuple(zip(parts, colors, strict=False)))]
