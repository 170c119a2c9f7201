"""Tokens a second of our engine, Hugging Face `generate` and Tunix's sampler, side by side.

    python -m benchmarks.checkpoints /tmp/checkpoints
    python -m benchmarks.rollout /tmp/checkpoints --hf PYTHON --tunix PYTHON

PYTHON are the interpreters of environments with the peers from PyPI (`transformers` and `torch`;
`google-tunix` and `safetensors<0.8`). Engines take turns, each in a process of its own, float32,
temperature 1, random weights, no stop token: a completion ends at its limit, and only tokens up to
it count. The peers write static batches. Medians; the first run of each, which compiles, is left
out. A share of the roofline is that of the machine's measured matrix product.
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

PROMPT, LONGEST, SHORTEST = 64, 128, 8  # tokens
TARGETS = {
    "nano, 32 prompts": 2.0,
    "nano, 128 prompts": 2.0,
    "small, 32 prompts": 1.6,
    "nano, ragged": 3.0,
    "nano, ragged, groups of 8": 3.5,
}


def jobs() -> dict[str, tuple[str, dict[str, Any]]]:
    """(checkpoint, job) by name."""
    random = np.random.default_rng(0)
    full, ragged = [LONGEST] * 128, random.integers(SHORTEST, LONGEST + 1, 128).tolist()

    def job(prompts: int, limits: list[int], slots: int, group: int = 1) -> dict[str, Any]:
        ids = random.integers(1, checkpoints.VOCABULARY, (prompts // group, PROMPT))
        repeated = ids.repeat(group, axis=0).tolist()
        return {"prompts": repeated, "limits": limits, "slots": slots, "group": group}

    return {
        "nano, 32 prompts": ("nano", job(32, full[:32], 32)),
        "nano, 128 prompts": ("nano", job(128, full, 128)),
        "small, 32 prompts": ("small", job(32, full[:32], 32)),
        "nano, ragged": ("nano", job(128, ragged, 32)),
        "nano, ragged, groups of 8": ("nano", job(128, ragged, 32, group=8)),
    }


def operations(name: str, *, vocabulary: bool = True) -> float:
    """Floating-point operations a token takes in products with weights; without `vocabulary` those
    of the layers alone."""
    size = checkpoints.SIZES[name]
    D, F = size["hidden_size"], size["intermediate_size"]
    KH = D // size["num_attention_heads"] * size["num_key_value_heads"]
    layer = 2 * D * D + 2 * D * KH + 3 * D * F
    return 2.0 * (size["num_hidden_layers"] * layer + vocabulary * D * checkpoints.VOCABULARY)


def commands(arguments: argparse.Namespace, checkpoint: str) -> dict[str, list[str]]:
    """How each engine's worker is started."""
    folder = str(arguments.folder / checkpoint)
    found = {"ours": [sys.executable, "-m", "benchmarks.rollout_ours", folder]}
    for name in ("hf", "tunix"):
        python = getattr(arguments, name)
        if python:
            found[name] = [python, "-m", f"benchmarks.rollout_{name}", folder]
    return found


def measure(
    arguments: argparse.Namespace, checkpoint: str, wanted: dict[str, dict[str, Any]]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Answers by job and engine, from engines that take turns."""
    running = {name: workers.Worker(c) for name, c in commands(arguments, checkpoint).items()}
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for job_name, job in wanted.items():
        answers[job_name] = {name: [] for name in running}
        for time in range(arguments.times + 1):
            for name, worker in running.items():
                answer = worker.run(job)
                if time:
                    answers[job_name][name].append(answer)
    for worker in running.values():
        worker.close()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--hf", help="interpreter with transformers and torch")
    parser.add_argument("--tunix", help="interpreter with google-tunix")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    arguments = parser.parse_args()
    checkpoints.make(arguments.folder)
    gemm, bandwidth = machine.gemm_rate(), machine.bandwidth()
    print(f"this machine: {gemm / 1e9:.0f} GFLOP/s in products, {bandwidth / 1e9:.1f} GB/s")
    table = rich.table.Table(title=f"tokens/s, medians of {arguments.times}")
    for column in ("work", "engine", "tokens/s", "of the roofline", "peak MB", "times the faster"):
        table.add_column(column, justify="left" if column in ("work", "engine") else "right")
    for checkpoint in checkpoints.SIZES:
        wanted = {
            n: job for n, (c, job) in jobs().items() if c == checkpoint and n in arguments.only
        }
        if not wanted:
            continue
        for job_name, by_engine in measure(arguments, checkpoint, wanted).items():
            add_rows(table, job_name, by_engine, gemm / operations(checkpoint))
    rich.console.Console(width=120).print(table)


def add_rows(
    table: rich.table.Table, job: str, by_engine: dict[str, list[dict[str, Any]]], roofline: float
) -> None:
    """One engine's figures a row; ours beside the faster peer and the target."""
    rates = {
        name: statistics.median(a["tokens"] / a["seconds"] for a in answers)
        for name, answers in by_engine.items()
    }
    peers = [rate for name, rate in rates.items() if name != "ours"]
    for name, rate in rates.items():
        against = ""
        if name == "ours" and peers:
            against = f"{rate / max(peers):.2f} (target {TARGETS[job]})"
        peak_mb = max(a["peak_mb"] for a in by_engine[name])
        share = f"{rate / roofline:.0%}"
        table.add_row(job, name, f"{rate:,.0f}", share, f"{peak_mb:,.0f}", against)


if __name__ == "__main__":
    main()
