"""Compiles the two Qwen2.5-Coder configurations for the slices they are meant for, without one.

    python -m benchmarks.fits [--slices v5e:1x1 v5e:2x4]

Needs the `tpu` extra and no TPU. Prints one table: GiB of HBM a device at the peak of each program,
and what `python -m pgrpo_jax.compile` says more of, for the same configuration and slice. Ends with
status 1 if anything does not fit. Takes some minutes of one core for each row.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from pgrpo_jax.topology import GIB

# A configuration, a slice, and options that the slice needs.
CASES = (
    ("qwen2_5_coder_7b", "v5p:2x2x2", ()),
    ("qwen2_5_coder_7b", "v5p:4x4x4", ()),
    ("qwen2_5_coder_7b", "v4:4x4x4", ()),
    ("qwen2_5_coder_0_5b", "v5e:1x1", ()),
    (
        "qwen2_5_coder_0_5b",
        "v5e:2x4",
        ("--update.micro-batch-size", "32", "--policy.compute.logprob-mb", "5120"),
    ),
)


def compiled(config: str, slice_: str, options: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of `--json`, one a program."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "figures.json"
        command = [sys.executable, "-m", "pgrpo_jax.compile", "--config", config]
        command += ["--topology", slice_, "--json", str(file), *options]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode > 1:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}")
        return json.loads(file.read_text())["programs"]


def row(case: tuple[str, str, tuple[str, ...]], found: list[dict[str, Any]]) -> str:
    config, slice_, options = case
    cells = ["?" if one["failure"] else f"{one['total'] / GIB:.2f}" for one in found]
    fits = all(one["fits"] for one in found)
    update = next(one for one in found if one["name"] == "update")
    mfu = f"{update['estimate']['mfu']:.0%}" if update["estimate"] else "-"
    name = f"`{' '.join((config, *options))}`"
    cells = [name, slice_, f"{found[0]['limit'] / GIB:.2f}", *cells, "yes" if fits else "no"]
    return f"| {' | '.join(cells)} | {sum(one['seconds'] for one in found):.3g} | {mfu} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", nargs="+", choices=[case[1] for case in CASES])
    chosen = parser.parse_args().slices
    fits = True
    programs: list[str] = []
    for case in CASES:
        if chosen and case[1] not in chosen:
            continue
        found = compiled(*case)
        if not programs:
            programs = [one["name"] for one in found]
            head = ["configuration", "slice", "limit", *programs, "fits"]
            head += ["s a step, lower bound", "MFU of the update, upper bound"]
            print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
        print(row(case, found), flush=True)
        fits &= all(one["fits"] for one in found)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
