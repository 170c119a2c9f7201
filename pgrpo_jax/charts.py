"""Small calm charts as SVG text that takes its colours and its font from the page it stands in."""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np

Color = Literal["ink", "muted", "rule", "blue", "green", "red", "amber", "violet", "teal"]

# matplotlib wants fixed colours: each name is drawn as one nobody uses and becomes a CSS variable.
_PLACEHOLDERS: Mapping[Color, str] = {
    name: f"#0000{number:02x}" for number, name in enumerate(get_args(Color), start=1)
}
_SIZE = 6.0, 2.9  # inches of 72 points; the page scales it
_SMOOTHED_FROM = 30  # points


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart, with a band from `low` to `high` if they are given. NaN makes a gap."""

    label: str
    color: Color
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def lines(drawn: Sequence[Line], *, percent: bool, x_label: str = "step") -> str:
    """Lines over steps. A long line is drawn thin, with its moving mean on top."""
    figure, axes = _canvas(percent, x_label)
    for line in drawn:
        color = _PLACEHOLDERS[line.color]
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        if line.low is not None and line.high is not None:
            axes.fill_between(x, line.low, line.high, color=color, alpha=0.13, linewidth=0)
        if len(x) >= _SMOOTHED_FROM:
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
            axes.plot(x, moving_mean(y), color=color, linewidth=1.8)
        else:
            axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5)
    if percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
    return _svg(figure)


def stacked(
    x: Sequence[float], parts: Mapping[str, Sequence[float]], colors: Sequence[Color]
) -> str:
    """Areas on top of each other, in seconds, smoothed like lines."""
    figure, axes = _canvas(percent=False, x_label="step")
    areas = [np.asarray(y, float) for y in parts.values()]
    if len(x) >= _SMOOTHED_FROM:
        areas = [moving_mean(y) for y in areas]
    drawn = [_PLACEHOLDERS[color] for color in colors]
    axes.stackplot(x, areas, colors=drawn, alpha=0.75, linewidth=0)
    axes.set_ylim(bottom=0)
    return _svg(figure)


def bars(
    values: Mapping[str, float], *, percent: bool, unit: str = "", color: Color = "blue"
) -> str:
    """Horizontal bars, the first on top, each with its value."""
    figure, axes = _canvas(percent, x_label="", height=0.5 + 0.34 * len(values))
    names, widths = list(values), list(values.values())
    longest = 1.0 if percent else max(widths)
    axes.barh(range(len(names)), widths, height=0.56, color=_PLACEHOLDERS[color], alpha=0.8)
    for at, width in enumerate(widths):
        word = f"{100 * width:.1f} %" if percent else f"{width:,.4g}{unit}"
        axes.text(
            width + 0.012 * longest, at, word, va="center", fontsize=10, color=_PLACEHOLDERS["ink"]
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.2 * longest)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return _svg(figure)


def moving_mean(y: np.ndarray) -> np.ndarray:
    """The mean of the finite values around each point, up to a tenth of the line wide.

    Towards an end the window shrinks on both sides, so that a steep line keeps its ends.
    """
    widest, n = max(3, len(y) // 20), len(y)
    reaches = (min(widest, at, n - 1 - at) for at in range(n))
    windows = (y[at - reach : at + reach + 1] for at, reach in enumerate(reaches))
    return np.array([w[np.isfinite(w)].mean() if np.isfinite(w).any() else np.nan for w in windows])


def _canvas(
    percent: bool, x_label: str, height: float = _SIZE[1]
) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    figure = matplotlib.figure.Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    ink, muted, rule = (_PLACEHOLDERS[name] for name in ("ink", "muted", "rule"))
    axes.grid(axis="y", color=rule, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(rule)
    axes.tick_params(colors=muted, labelcolor=muted, labelsize=10, length=0, pad=5)
    axes.xaxis.set_major_locator(
        matplotlib.ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10])
    )
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.set_xlabel(x_label, color=muted, fontsize=10, loc="right")
    axes.margins(x=0.01, y=0.12)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 6), useOffset=False)
    return figure, axes


def _svg(figure: matplotlib.figure.Figure) -> str:
    file = io.StringIO()
    # Text stays text, and the same chart is the same file on every day.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pgrpo_jax"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for name, placeholder in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg
