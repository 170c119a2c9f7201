"""Seconds of one training step of ours, of TRL's and of Tunix's, side by side, on the same batch.

    python -m benchmarks.update /tmp/checkpoints --trl PYTHON --tunix PYTHON

PYTHON are the interpreters of environments with the peers from PyPI (`trl` and `torch`;
`google-tunix` and `safetensors<0.8`). GRPO: 64 completions of up to 128 tokens behind prompts of
64, drawn by a policy that is not the trained one, so that ratios are clipped and the loss is not 0.
Bradley-Terry: 16 pairs of 256 tokens a side. float32: loss, gradient, clipping, AdamW. Engines take
turns, each in a process of its own. Medians; two steps to warm up are left out, but the loss and
gradient norm of the first are compared: they must agree to 1e-4, or this fails. A share of the
roofline is that of the machine's measured matrix product, for the operations that the batch needs
without any padding. For CPU seconds on one core: `taskset --cpu-list 0 python -m ...`.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import rich.console
import rich.table

from benchmarks import checkpoints, machine, rollout, workers

B, G, PROMPT, LONGEST, SHORTEST = 64, 8, 64, 128, 8
PAIRS, PAIR_LENGTH = 16, 256
STD_FLOOR = 0.2  # of our group advantage
WARM_UP = 2  # steps; Tunix compiles in both
AGREE = 1e-4  # relative
COLUMNS = ("work", "engine", "seconds", "CPU s", "of the roofline", "peak MB", "loss", "|gradient|")


def job(lengths: str) -> dict[str, Any]:
    """Prompts, completions with the sampler's log-probabilities, rewards 0 or 1, and the advantages
    that these make."""
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
        "old_logps": [random.normal(-np.log(words), 0.3, count).tolist() for count in counts],
        "rewards": rewards.tolist(),
        "advantages": ((groups - groups.mean(1, keepdims=True)) / std).reshape(-1).tolist(),
    }


def pairs() -> dict[str, Any]:
    """Token rows of both sides, and the head that every engine begins with."""
    random = np.random.default_rng(0)
    shape, width = (PAIRS, PAIR_LENGTH), checkpoints.SIZES["small"]["hidden_size"]
    chosen, rejected = random.integers(1, checkpoints.VOCABULARY, (2, *shape)).tolist()
    head = random.normal(0, width**-0.5, width).tolist()
    return {"chosen": chosen, "rejected": rejected, "head": head}


def operations(checkpoint: str, batch: dict[str, Any]) -> float:
    """Floating-point operations of a step in products with weights: forward, and twice that back.
    Only tokens of completions meet the vocabulary."""
    layers = rollout.operations(checkpoint, vocabulary=False)
    if "chosen" in batch:
        return 3 * layers * 2 * PAIRS * PAIR_LENGTH
    drawn = sum(map(len, batch["completions"]))
    everything = drawn + sum(map(len, batch["prompts"]))
    vocabulary = rollout.operations(checkpoint) - layers
    return 3 * (layers * everything + vocabulary * drawn)


@dataclasses.dataclass(frozen=True)
class Work:
    """A step on a checkpoint; ours should take at most `target` of the faster peer's seconds."""

    checkpoint: str
    kind: str
    batch: Callable[[], dict[str, Any]]
    target: float


WORKS = {
    "nano GRPO, full": Work("nano", "update", lambda: job("full"), 0.6),
    "nano GRPO, ragged": Work("nano", "update", lambda: job("ragged"), 0.35),
    "small GRPO, full": Work("small", "update", lambda: job("full"), 0.8),
    "small GRPO, ragged": Work("small", "update", lambda: job("ragged"), 0.45),
    "small Bradley-Terry": Work("small", "reward", pairs, 0.9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--trl", help="interpreter with trl and torch")
    parser.add_argument("--tunix", help="interpreter with google-tunix")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS))
    arguments = parser.parse_args()
    checkpoints.make(arguments.folder)
    gemm, bandwidth = machine.gemm_rate(), machine.bandwidth()
    print(f"this machine: {gemm / 1e9:.0f} GFLOP/s in products, {bandwidth / 1e9:.1f} GB/s")
    table = rich.table.Table(title=f"one step, medians of {arguments.times}")
    for column in (*COLUMNS, "of the faster peer's seconds"):
        table.add_column(column, justify="left" if column in ("work", "engine") else "right")
    agree = True
    for name in arguments.only:
        work, batch = WORKS[name], WORKS[name].batch()
        answers = measure(arguments, work, batch)
        roofline_s = operations(work.checkpoint, batch) / gemm
        add_rows(table, name, answers, work.target, roofline_s)
        agree = agree and same_first_step(answers)
    rich.console.Console(width=130).print(table)
    if not agree:
        sys.exit(f"first losses or gradient norms differ by more than {AGREE} of themselves")


def measure(
    arguments: argparse.Namespace, work: Work, batch: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Each engine's answers, step by step."""
    folder = str(arguments.folder / work.checkpoint)
    commands = {"ours": [sys.executable, "-m", f"benchmarks.{work.kind}_ours", folder]}
    for peer in ("trl", "tunix"):
        python = getattr(arguments, peer)
        if python and (peer, work.kind) != ("tunix", "reward"):  # it trains no reward models
            commands[peer] = [python, "-m", f"benchmarks.{work.kind}_{peer}", folder]
    running = {name: workers.Worker(command) for name, command in commands.items()}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for _ in range(WARM_UP + arguments.times):
        for name, worker in running.items():
            answers[name].append(worker.run(batch))
    for worker in running.values():
        worker.close()
    return answers


def same_first_step(answers: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether all engines' first loss and gradient norm are ours."""
    return all(
        abs(steps[0][name] - answers["ours"][0][name]) <= AGREE * abs(answers["ours"][0][name])
        for steps in answers.values()
        for name in ("loss", "grad_norm")
    )


def add_rows(
    table: rich.table.Table,
    work: str,
    answers: dict[str, list[dict[str, Any]]],
    target: float,
    roofline_s: float,
) -> None:
    """One engine's figures a row; ours beside the faster peer and the target."""

    def median(name: str, figure: str) -> float:
        return statistics.median(a[figure] for a in answers[name][WARM_UP:])

    peers = [median(name, "seconds") for name in answers if name != "ours"]
    for name, steps in answers.items():
        seconds, against = median(name, "seconds"), ""
        if name == "ours" and peers:
            against = f"{seconds / min(peers):.2f} (target {target})"
        table.add_row(
            work,
            name,
            f"{seconds:.3f}",
            f"{median(name, 'cpu_s'):.2f}",
            f"{roofline_s / seconds:.0%}",
            f"{max(a['peak_mb'] for a in steps):,.0f}",
            f"{steps[0]['loss']:.6f}",
            f"{steps[0]['grad_norm']:.5f}",
            against,
        )


if __name__ == "__main__":
    main()
