"""Judges every hostile and every honest program of tests/data/judge once, in each tier.

    python -m benchmarks.judge_cases
    python -m benchmarks.judge_cases --slower 20   # on an emulated machine: time limits times 20

Prints the wrong verdicts, then a table row for each tier; exit status 1 if there was a wrong one: a
hostile program that passed, an honest one that did not, or either not judged at all. Needs the
standard library only, as the judge does, so that it runs wherever there is a Python.
"""

import argparse
import os
import platform
import sys

from benchmarks import judge_soak
from pgrpo_jax import config, judge, sandbox

HOSTILE_S, HONEST_S = 0.4, 10.0  # CPU seconds a test
HEAD = "| machine | kernel | Python | user | tier | hostile | honest | wrong verdicts |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", choices=judge.TIERS, action="append", help="default: each")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--slower", type=float, default=1.0, help="factor of the time limits")
    options = parser.parse_args()
    rows = [row(tier, options) for tier in options.tier or judge.TIERS]
    print(HEAD, "|---" * HEAD.count(" | ") + "|---|", sep="\n")
    for cells in rows:
        print("| " + " | ".join(map(str, cells)) + " |")
    return int(any(cells[-1] for cells in rows))


def row(tier: config.Tier, options: argparse.Namespace) -> tuple[str | int, ...]:
    """Judges all in a tier. The last cell is the number of wrong verdicts."""
    cases = judge_soak.hostile() + judge_soak.honest()
    settings = config.JudgeConfig(
        workers=options.workers, tier=tier, memory_mb=256, output_kb=600, queue=len(cases)
    )
    wrong = 0
    with sandbox.Judge(settings) as made:
        futures = [
            made.submit(program, tests, options.slower * (HONEST_S if right else HOSTILE_S))
            for _, program, tests, right in cases
        ]
        for (name, _, tests, right), future in zip(cases, futures, strict=True):
            result = future.result()
            if (result.verdict == "pass") != right or result.verdict == "infra":
                wrong += 1
                print(f"{tier}: {name} [{tests.kind}]: {result}", flush=True)
    honest = sum(right for *_, right in cases)
    user = "root" if os.geteuid() == 0 else "ordinary"
    machine = platform.machine(), platform.release(), platform.python_version()
    return *machine, user, tier, len(cases) - honest, honest, wrong


if __name__ == "__main__":
    sys.exit(main())
