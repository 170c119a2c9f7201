"""Compiles the two Qwen2.5-Coder configurations for the slices they are meant for, without one.

    python -m benchmarks.fits

Needs the `tpu` extra and no TPU. Prints one table; the figures of each program are what
`python -m pgrpo_jax.compile` prints for the same configuration and slice. Ends with status 1 if
anything does not fit. Takes some minutes of one core for each row.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import rich.console
import rich.table

from pgrpo_jax.topology import GIB

# A configuration, a slice, and options that the slice needs.
CASES = (
    ("qwen2_5_coder_7b", "v5p:2x2x2", ()),
    ("qwen2_5_coder_7b", "v5p:4x4x4", ()),
    ("qwen2_5_coder_7b", "v4:4x4x4", ()),
    ("qwen2_5_coder_0_5b", "v5e:1x1", ()),
    ("qwen2_5_coder_0_5b", "v5e:2x4", ("--update.micro-batch-size", "16")),
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


def main() -> None:
    table = rich.table.Table(title="GiB of HBM a device at the peak of each program")
    for column in ("configuration", "slice", "program", "GiB", "limit", "fits", "s a step", "MFU"):
        table.add_column(column)
    fits = True
    for case in CASES:
        for row in compiled(*case):
            estimate = row["estimate"]
            table.add_row(
                *case[:2],
                row["name"],
                "?" if row["failure"] else f"{row['total'] / GIB:.2f}",
                f"{row['limit'] / GIB:.2f}",
                "yes" if row["fits"] else "no",
                f"{row['seconds']:.3g}",
                f"{estimate['mfu']:.0%}" if estimate else "-",
            )
            fits &= row["fits"]
        table.add_section()
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
