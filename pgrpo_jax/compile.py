"""Compiles every program of a configuration for a TPU slice, without one, and says whether it fits.

    python -m pgrpo_jax.compile --config qwen2_5_coder_7b --topology v5p:4x4x4
    python -m pgrpo_jax.compile --config qwen2_5_coder_0_5b --topology v5e:1x1 --suggest

Runs on any x86-64 Linux machine with the `tpu` extra. Prints for each program the memory of a
device by kind, and a roofline estimate of its time. Ends with status 1 when a program does not fit,
after saying what takes the room and which settings change it. --suggest searches the mesh, the rows
of a micro-batch and the rematerialisation for the fastest estimate that fits. --json FILE writes
all that is printed.
"""

import dataclasses
import json
import logging
import pathlib
import sys
from typing import Any

import rich.console
import rich.table
import tyro

from pgrpo_jax import cli, config, footprint, programs, roofline, suggest
from pgrpo_jax.footprint import Report
from pgrpo_jax.topology import GIB


@dataclasses.dataclass(frozen=True)
class Line(cli.CommandLine):
    """The command line of this command."""

    topology: str = ""  # chip and slice, such as v5p:4x4x4 or v5e:1x1
    suggest: tyro.conf.FlagCreatePairsOff[bool] = False  # search for the fastest that fits
    json: str = ""  # a file for the figures


# --- what is printed


def print_reports(found: list[Report], name: str, console: rich.console.Console) -> None:
    """Two tables, then the assumptions of the second."""
    memory = rich.table.Table(title=f"GiB of HBM a device of {name}, limit {_gib(found[0].limit)}")
    times = rich.table.Table(title="Roofline of one execution, and of one P-GRPO step")
    for table, columns in (
        (memory, ("params", "optimizer", "cache", "batch, results", "activations, temporaries")),
        (times, ("compile s", "TFLOP", "HBM GB", "links GB", "compute s", "HBM s", "links s")),
    ):
        table.add_column("program")
        for column in columns:
            table.add_column(column, justify="right")
    for column in ("other residents", "total", "fits"):
        memory.add_column(column, justify="right")
    for column in ("MFU", "x a step", "s a step"):
        times.add_column(column, justify="right")
    for report in found:
        memory.add_row(report.name, *_memory_cells(report))
        times.add_row(report.name, *_time_cells(report))
    console.print(memory)
    console.print(times)
    step = sum(report.seconds for report in found)
    console.print(f"One P-GRPO step: {step:.1f} s by this estimate. Assumptions:")
    for sentence in roofline.ASSUMPTIONS:
        console.print(f"* {sentence}.")


_OWN = ("parameters", "optimizer", "cache", "batch", "results", "temporaries", "code")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _memory_cells(report: Report) -> list[str]:
    hbm = report.hbm
    others = sum(size for kind, size in hbm.items() if kind not in _OWN)
    cells = [_gib(hbm.get(kind, 0)) for kind in ("parameters", "optimizer", "cache")]
    if report.failure:
        return [*cells, "?", "?", _gib(others), "?", "no"]
    small = sum(hbm[kind] for kind in ("batch", "results", "code"))
    return [
        *cells,
        _gib(small),
        _gib(hbm["temporaries"]),
        _gib(others),
        _gib(report.total),
        "yes" if report.fits else "no",
    ]


def _time_cells(report: Report) -> list[str]:
    cells = [f"{report.compile_s:.0f}", f"{report.work.model / 1e12:.4g}"]
    if report.estimate is None:
        return [*cells, *"-------", f"{report.executions}", "-"]
    estimate = report.estimate
    return [
        *cells,
        f"{report.hbm_traffic / 1e9:.4g}",
        f"{sum(report.collectives.values()) / 1e9:.4g}",
        f"{estimate.compute_s:.4g}",
        f"{estimate.hbm_s:.4g}",
        f"{estimate.links_s:.4g}",
        f"{estimate.mfu:.0%}",
        f"{report.executions}",
        f"{report.seconds:.4g}",
    ]


def explain(report: Report) -> str:
    """Why a program does not fit, and which settings change it."""
    largest = sorted(report.hbm.items(), key=lambda item: -item[1])[:4]
    parts = ", ".join(f"{kind} {_gib(size)} GiB" for kind, size in largest)
    lines = [f"{report.name} does not fit {_gib(report.limit)} GiB: {parts}"]
    if report.failure:
        lines += [f"  {line}" for line in report.failure.splitlines() if line.strip()][:24]
    remedy = KERNEL if "memory space vmem" in report.failure else REMEDIES[report.name]
    return "\n".join([*lines, f"  What to change: {remedy}"])


KERNEL = (
    "the kernel's block sizes, which are too large for this chip; or compute.attention reference"
)
_STATE = "more devices on the fsdp axis"
_MODEL = "compute.remat full"
REMEDIES = {
    "sft": f"a smaller --sft.batch-size, --policy.{_MODEL}, {_STATE}",
    "reward training": f"a smaller --reward-training.batch-size or --reward-training.max-length, "
    f"--reward-model.{_MODEL}, {_STATE}",
    "reshard for rollout": "a longer --mesh.tensor, --rewards.offload",
    "prefill": "a smaller --rollout.batch-size, a longer --mesh.tensor, --rewards.offload",
    "decode": "a smaller --rollout.batch-size, a longer --mesh.tensor, --rewards.offload",
    "reward scoring": f"a smaller --rewards.thinking-batch-size, --rewards.offload, {_STATE}",
    "policy logprobs": f"a smaller --policy.compute.logprob-mb, {_STATE}",
    "reference logprobs": f"a smaller --policy.compute.logprob-mb, --update.kl none, {_STATE}",
    "update": f"a smaller --update.micro-batch-size, --policy.{_MODEL}, a smaller "
    f"--policy.compute.logprob-mb, --rewards.offload, {_STATE}",
}


# --- the command


def main(line: Line) -> None:
    """Compiles, prints, and ends the process with status 1 unless everything fits."""
    console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
    config.require(
        bool(line.topology), "--topology is missing: name a slice, such as --topology v5p:4x4x4"
    )
    cfg = programs.on_tpu(line.run)
    if line.suggest:
        sys.exit(0 if suggest.search(cfg, line.topology, console) else 1)
    found = []
    for report in footprint.reports(cfg, line.topology):
        size = "more" if report.failure else _gib(report.total)
        print(
            f"{report.name}: {size} of {_gib(report.limit)} GiB, "
            f"{report.compile_s:.0f} s to compile",
            file=sys.stderr,
        )
        found.append(report)
    print_reports(found, line.topology, console)
    if line.json:
        write(pathlib.Path(line.json), line, found)
    misfits = [report for report in found if not report.fits]
    for report in misfits:
        console.print(explain(report), markup=False)
    sys.exit(1 if misfits else 0)


def write(path: pathlib.Path, line: Line, found: list[Report]) -> None:
    """All figures, and the settings they belong to."""
    rows: list[dict[str, Any]] = [
        dataclasses.asdict(report)
        | {"total": report.total, "fits": report.fits, "seconds": report.seconds}
        for report in found
    ]
    tree = {
        "topology": line.topology,
        "assumptions": roofline.ASSUMPTIONS,
        "programs": rows,
        "settings": dataclasses.asdict(line.run),
    }
    path.write_text(json.dumps(tree, indent=2) + "\n")


def run(line: Line) -> None:
    """`main`, whose complaints are sentences on the terminal."""
    logging.basicConfig(format="%(message)s")
    try:
        main(line)
    except (ValueError, ImportError) as error:
        print(f"python -m pgrpo_jax.compile: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli.run_line(run, Line, __doc__)
