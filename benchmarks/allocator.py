"""What keeping freed memory, and huge pages, are worth: warm-up steps of `tiny`, in turns.

    python -m benchmarks.allocator

Prints medians of seconds and CPU seconds a step, and page faults, of processes that alternate; and
what they are of the first row's.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import rich.console
import rich.table
import tyro

from pgrpo_jax import allocator, cli, data, optimizer, sft, sharding, start, supervised, tokenizer

STEPS, WARM = 20, 3
KINDS = GIVEN_BACK, KEPT, HUGE = "given back", "kept", "kept in huge pages"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares the three allocators."""

    rounds: int = 3  # processes of each kind
    child: str = ""  # set by the benchmark itself


def main(arguments: Arguments) -> None:
    """Runs the children in turns and prints their medians."""
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind, measured in found.items():
            words = [sys.executable, "-m", "benchmarks.allocator", "--child", kind]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            measured.append(json.loads(done.stdout))
    names = list(found[KINDS[0]][0])
    table = rich.table.Table("freed memory is", *names)
    middle = {
        kind: [statistics.median(m[name] for m in measured) for name in names]
        for kind, measured in found.items()
    }
    first = middle[KINDS[0]]
    for kind, values in middle.items():
        ratios = (value / of for value, of in zip(values, first, strict=True))
        cells = zip(values, ratios, strict=True)
        table.add_row(kind, *(f"{value:,.4g} ({ratio:.2f})" for value, ratio in cells))
    rich.console.Console().print(table)


def measure(kind: str) -> dict[str, float]:
    """Means over STEPS warm-up steps, after WARM that are not counted."""
    if kind != GIVEN_BACK:
        allocator.keep_freed_memory(huge_pages=kind == HUGE)
    cfg = cli.load("tiny")
    cfg = dataclasses.replace(cfg, sft=dataclasses.replace(cfg.sft, steps=STEPS + WARM))
    mesh, words = sharding.make_mesh(cfg.mesh), tokenizer.load(cfg.data.tokenizer)
    examples = data.sft_examples(sft.rows(cfg), words, cfg.data, cfg.sft.max_length)
    batches = data.example_batches(examples, cfg.sft.batch_size, cfg.seed)
    arch, params = start.initial_policy(cfg, mesh)
    tx = optimizer.build(cfg.sft.optimizer, cfg.sft.steps)
    state, step = optimizer.init_state(params, tx, mesh), supervised.compile_sft(cfg, arch, mesh)
    for i in range(WARM + STEPS):
        if i == WARM:
            jax.block_until_ready(state)
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        state, _ = step(state, next(batches))
    jax.block_until_ready(state)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "s a step": seconds / STEPS,
        "CPU s a step": cpu_s / STEPS,
        "faults a step": (after.ru_minflt - before.ru_minflt) / STEPS,
        "peak MB": after.ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
