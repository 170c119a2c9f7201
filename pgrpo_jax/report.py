"""The report of a run: one HTML file that needs nothing else, and a table on the terminal.

    python -m pgrpo_jax.report runs/tiny

Reads what a run leaves (config.json, summary.json, metrics.jsonl, completions.jsonl), also of a run
that is not done. What has no data is left out.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import jinja2
import rich.box
import rich.console
import rich.table
import tyro

from pgrpo_jax import figures, metrics

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")


@dataclasses.dataclass(frozen=True)
class Run:
    """What was read from a run's folder."""

    name: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    stages: Mapping[str, figures.Series]
    samples: list[dict[str, Any]]


def report(workdir: Annotated[pathlib.Path, tyro.conf.Positional]) -> None:
    """Writes report.html into a run's folder and prints its headline.

    Args:
      workdir: the run's folder.
    """
    run = read(workdir)
    page = workdir / "report.html"
    page.write_text(render(run), encoding="utf-8")
    console = rich.console.Console()
    for table in terminal_tables(run.summary):
        console.print(table)
    console.print(f"Report: {page}", soft_wrap=True)


def read(workdir: pathlib.Path) -> Run:
    """Everything the report shows. Completions are streamed: there may be gigabytes of them."""
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{workdir} is not a run's folder: it holds no config.json")
    stages = figures.read_stages(metrics.read_rows(workdir / "metrics.jsonl"))
    trained = sorted({step for steps, _ in stages.get("grpo", {}).values() for step in steps})
    shown = {trained[0], trained[len(trained) // 2], trained[-1]} if trained else set()
    rows = metrics.read_rows(workdir / "completions.jsonl")
    return Run(
        name=workdir.resolve().name,
        settings=_read_json(workdir / "config.json"),
        summary=_read_json(workdir / "summary.json"),
        stages=stages,
        samples=pick_samples(row for row in rows if row["step"] in shown),
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def pick_samples(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each step the first completion that passes and the first that does not."""
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["step"], row["verdict"] != "pass"), row)
    return [found[key] for key in sorted(found)]


# --- the headline


@dataclasses.dataclass(frozen=True)
class Score:
    """A line of the headline: a share before and after, with 95 % intervals where known."""

    name: str
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def change(self) -> str:
        """In points."""
        return f"{100 * (self.after['value'] - self.before['value']):+.1f}"


def scores(summary: Mapping[str, Any]) -> list[Score]:
    """pass@1 sampled and greedy, and oracle-perfect reasonings among passing samples."""
    found = []
    both = summary.get("pass@1", {})
    for kind in ("sampled", "greedy"):
        if kind in both.get("before", {}) and kind in both.get("after", {}):
            found.append(Score(f"pass@1, {kind}", both["before"][kind], both["after"][kind]))
    oracle = summary.get("oracle_perfect_of_passing", {})
    if oracle.get("before") is not None and oracle.get("after") is not None:
        before, after = ({"value": oracle[when]} for when in ("before", "after"))
        found.append(Score("oracle-perfect of passing", before, after))
    return found


def share(value: Mapping[str, float]) -> str:
    """`41.2 %`, the interval after it if there is one."""
    word = f"{100 * value['value']:.1f} %"
    if "low" in value:
        word += f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
    return word


def terminal_tables(summary: Mapping[str, Any]) -> list[rich.table.Table]:
    """The headline and the phases, as far as the run has come."""
    tables = []
    if found := scores(summary):
        headline = _table("Held-out problems", "before", "after", "points")
        for score in found:
            headline.add_row(score.name, share(score.before), share(score.after), score.change)
        tables.append(headline)
    if phases := summary.get("phases"):
        times = _table("Phase", "seconds", "tokens/s")
        for name, phase in phases.items():
            times.add_row(name, f"{phase['seconds']:,.1f}", speed(phase))
        times.add_row("all", f"{whole_seconds(phases):,.1f}", "")
        tables.append(times)
    return tables


def _table(first: str, *others: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def whole_seconds(phases: Mapping[str, Any]) -> float:
    """Of all phases; `grpo/rollout` is a part of `grpo`, and adding it would count it twice."""
    return sum(phase["seconds"] for name, phase in phases.items() if "/" not in name)


def speed(phase: Mapping[str, Any]) -> str:
    """Tokens a second of a phase, empty if it handles none."""
    return f"{phase['tokens_per_s']:,.0f}" if phase.get("tokens_per_s") else ""


# --- the page


def render(run: Run) -> str:
    """The HTML page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "speed": speed, "number": number}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        run=run,
        scores=scores(run.summary),
        answers=figures.answers(run.summary),
        phases=run.summary.get("phases", {}),
        whole_seconds=whole_seconds(run.summary.get("phases", {})),
        sections=figures.sections(run.stages, run.summary),
        samples=run.samples,
        settings=json.dumps(run.settings, indent=2),
    )


def number(value: float | None) -> str:
    """Four significant digits, a dash for what is not there."""
    return "–" if value is None else f"{value:,.4g}"


if __name__ == "__main__":
    try:
        tyro.cli(report, description=__doc__)
    except FileNotFoundError as error:
        sys.exit(f"python -m pgrpo_jax.report: {error}")
