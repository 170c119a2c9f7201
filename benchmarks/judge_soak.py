"""Judges many programs while slots are killed: no verdict may change, and nothing may grow.

    python -m benchmarks.judge_soak --programs 100000

Programs are those of tests/data/judge, hostile and honest, each made different so that the cache
does not answer: all of them once, then those that were done in QUICK_S again and again.
At the end: exit status 1 if a hostile program passed, an honest one did not, or the judge grew.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import time
from collections import Counter
from typing import Any

from pgrpo_jax import config, sandbox, types

DATA = pathlib.Path(__file__).parent.parent / "tests" / "data" / "judge"
BATCH = 1000
QUICK_S = 0.1  # on the wall, of a loaded machine
HOSTILE_S, HONEST_S = 0.05, 10.0  # CPU seconds
MOST_GROWTH = 1.3  # of memory, and of descriptors, from a tenth of the way on
WORD = "7919-kestrel"
TESTS = {
    "stdin": types.Tests("stdin", ("1\n",), (WORD,)),
    "call": types.Tests("call", ((1,),), (WORD,), function="solve"),
    "assert": types.Tests("assert", code=(f"assert solve(1) == {WORD!r}",), setup="limit = 3"),
    "unittest": types.Tests(
        "unittest",
        code=(
            "import unittest\nclass T(unittest.TestCase):\n"
            f"    def test_a(self):\n        self.assertEqual(solve(1), {WORD!r})\n",
        ),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tier", choices=("auto", "namespaces", "landlock"), default="auto")
    parser.add_argument("--kills-per-batch", type=int, default=3)
    options = parser.parse_args()
    chance, pool = random.Random(0), hostile() + honest()
    wrong: list[str] = []
    sizes: list[tuple[float, int]] = []
    seen: Counter[str] = Counter()
    settings = config.JudgeConfig(workers=options.workers, tier=options.tier, memory_mb=256)
    with sandbox.Judge(settings) as judge:
        server = children(os.getpid())[0]
        for begin in range(0, options.programs, BATCH):
            since = time.monotonic()
            batch = [pool[i % len(pool)] for i in range(begin, begin + BATCH)] if begin else pool
            futures = [
                judge.submit(f"{program}\n# {begin + i}", tests, HONEST_S if right else HOSTILE_S)
                for i, (_, program, tests, right) in enumerate(batch)
            ]
            kill_slots(server, futures, options.kills_per_batch, chance)
            quick = []
            for entry, future in zip(batch, futures, strict=True):
                (name, _, _, right), result = entry, future.result()
                if result.wall_s < QUICK_S:
                    quick.append(entry)
                seen[result.verdict] += 1
                if (result.verdict == "pass") != right or result.verdict == "infra":
                    wrong.append(f"{name}: {result.verdict} {result.failure}")
                    print(wrong[-1])
            pool = pool if begin else quick
            sizes.append(size(server))
            memory_mb, files = sizes[-1]
            speed = len(batch) / (time.monotonic() - since)
            print(
                f"{begin + BATCH} programs, {speed:.0f} programs/s, {len(wrong)} wrong, judge "
                f"{memory_mb:.0f} MB and {files} descriptors, {judge.counters}",
                flush=True,
            )
    grown = growth(sizes)
    print(f"{dict(seen)}; growth of memory {grown[0]:.2f}, of descriptors {grown[1]:.2f}")
    return int(bool(wrong) or max(grown) > MOST_GROWTH)


def kill_slots(server: int, futures: list[Any], count: int, chance: random.Random) -> None:
    """Kills a slot each time that another part of the batch is judged."""
    for part in range(1, count + 1):
        futures[part * len(futures) // (count + 1)].result()
        if slots := children(server):
            os.kill(chance.choice(slots), signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def size(pid: int) -> tuple[float, int]:
    """Megabytes in memory, and descriptors."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


def growth(sizes: list[tuple[float, int]]) -> tuple[float, float]:
    first = sizes[len(sizes) // 10]
    return sizes[-1][0] / first[0], sizes[-1][1] / first[1]


# --- programs


def sections(name: str) -> list[tuple[str, str]]:
    """(heading, program) pairs of a file."""
    parts = (DATA / name).read_text(encoding="utf-8").split("\n======== ")[1:]
    return [(heading, program) for heading, _, program in (p.partition("\n") for p in parts)]


def hostile() -> list[tuple[str, str, types.Tests, bool]]:
    found = []
    for heading, program in sections("hostile.txt"):
        name, _, kinds = heading.rpartition(" [")
        found += [(name, program, TESTS[kind], False) for kind in kinds.rstrip("]").split()]
    return found


def honest() -> list[tuple[str, str, types.Tests, bool]]:
    found = []
    for heading, program in sections("honest.txt"):
        name, _, text = heading.partition(" {")
        fields = json.loads("{" + text)
        if fields["kind"] == "call":
            fields["inputs"] = [tuple(arguments) for arguments in fields["inputs"]]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        found.append((name, program, types.Tests(**fields), True))
    return found


if __name__ == "__main__":
    sys.exit(main())
