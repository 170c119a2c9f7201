"""Seconds of one GRPO step of ours and of TRL's, side by side, on the same batch.

    python -m benchmarks.update /tmp/checkpoints --trl PYTHON

PYTHON is the interpreter of an environment with `trl` and `torch` from PyPI. 64 completions of up
to 128 tokens behind prompts of 64, float32: loss, gradient, clipping, AdamW. Engines take turns,
each in a process of its own. Medians; the first step, which compiles, is left out, but its loss and
gradient norm are compared: they must agree to 1e-4.
"""

import argparse
import pathlib
import statistics
import sys
from typing import Any

import numpy as np
import rich.console
import rich.table

from benchmarks import checkpoints, machine, workers

B, G, PROMPT, LONGEST, SHORTEST = 64, 8, 64, 128, 8
STD_FLOOR = 0.2  # of our group advantage
TARGETS = {
    ("nano", "full"): 0.6,
    ("nano", "ragged"): 0.35,
    ("small", "full"): 0.8,
    ("small", "ragged"): 0.45,
}


def job(lengths: str) -> dict[str, Any]:
    """Prompts, completions, rewards 0 or 1, and the advantages that these make."""
    random = np.random.default_rng(0)
    counts = [LONGEST] * B if lengths == "full" else random.integers(SHORTEST, LONGEST + 1, B)
    words = checkpoints.VOCABULARY
    prompts = random.integers(1, words, (B // G, PROMPT)).repeat(G, axis=0)
    rewards = np.tile(np.arange(G) % 2, B // G).astype(np.float32)
    groups = rewards.reshape(-1, G)
    std = np.maximum(groups.std(1, ddof=1, keepdims=True), STD_FLOOR)
    return {
        "prompts": prompts.tolist(),
        "completions": [random.integers(1, words, count).tolist() for count in counts],
        "rewards": rewards.tolist(),
        "advantages": ((groups - groups.mean(1, keepdims=True)) / std).reshape(-1).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--trl", help="interpreter with trl and torch")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(checkpoints.SIZES))
    arguments = parser.parse_args()
    checkpoints.make(arguments.folder)
    gemm, bandwidth = machine.gemm_rate(), machine.bandwidth()
    print(f"this machine: {gemm / 1e9:.0f} GFLOP/s in products, {bandwidth / 1e9:.1f} GB/s")
    table = rich.table.Table(title=f"seconds a step, medians of {arguments.times}")
    for column in (
        "model",
        "lengths",
        "engine",
        "seconds",
        "loss",
        "|gradient|",
        "peak MB",
        "ours",
    ):
        table.add_column(column)
    for size in arguments.only:
        for lengths in ("full", "ragged"):
            compare(arguments, size, lengths, table)
    rich.console.Console(width=110).print(table)


def compare(
    arguments: argparse.Namespace, size: str, lengths: str, table: rich.table.Table
) -> None:
    """Runs both engines on one batch and adds their rows."""
    folder = str(arguments.folder / size)
    commands = {"ours": [sys.executable, "-m", "benchmarks.update_ours", folder]}
    if arguments.trl:
        commands["trl"] = [arguments.trl, "-m", "benchmarks.update_trl", folder]
    running = {name: workers.Worker(command) for name, command in commands.items()}
    batch = job(lengths)
    answers = {name: [worker.run(batch)] for name, worker in running.items()}
    for _ in range(arguments.times):
        for name, worker in running.items():
            answers[name].append(worker.run(batch))
    for worker in running.values():
        worker.close()
    seconds = {name: statistics.median(a["seconds"] for a in s[1:]) for name, s in answers.items()}
    for name, steps in answers.items():
        against = ""
        if name == "ours" and "trl" in seconds:
            target = TARGETS[size, lengths]
            against = f"{seconds['ours'] / seconds['trl']:.2f} of TRL's (target {target})"
        first, peak_mb = steps[0], max(a["peak_mb"] for a in steps)
        table.add_row(
            size,
            lengths,
            name,
            f"{seconds[name]:.3f}",
            f"{first['loss']:.6f}",
            f"{first['grad_norm']:.5f}",
            f"{peak_mb:,.0f}",
            against,
        )


if __name__ == "__main__":
    main()
