"""Judges programs from a file of JSON lines, each in a jail, and prints a JSON line for each.

    python -m pgrpo_jax.judge FILE.jsonl
    python -m pgrpo_jax.judge -               # lines from standard input, each answered when judged
    python -m pgrpo_jax.judge --self-test     # what holds on this machine

A line is {"id", "program", "tests", "kind"?, "timeout_s"?, "memory_mb"?}; `tests` are in any
dialect that `pgrpo_jax.problems` reads. Answers come in the order of the lines. A line that cannot
be read gets the verdict "infra" and a sentence, and the others are judged all the same; then the
exit status is 1. Needs nothing but Python's standard library.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, BinaryIO

from pgrpo_jax import canaries, config, problems, sandbox, sandbox_probes, types

REQUIRED = ("id", "program", "tests")
LIMITS = ("timeout_s", "memory_mb")
DEFAULTS = config.JudgeConfig()
TIERS: tuple[config.Tier, ...] = ("namespaces", "landlock")
AHEAD = 1024  # lines that are read before the answer to the first is printed


@dataclasses.dataclass(frozen=True)
class Line:
    """A line that can be judged."""

    id: str | int
    program: str
    tests: types.Tests
    timeout_s: float | None
    memory_mb: int | None


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 if a line was not judged or a self-test failed, 2 without a judge."""
    command = parser()
    options = command.parse_args(arguments)
    if (options.file is None) != options.self_test:
        command.error("wanted either a file of JSON lines (- for standard input) or --self-test")
    try:
        cfg = config.JudgeConfig(
            workers=options.workers or len(os.sched_getaffinity(0)),
            timeout_s=options.timeout_s,
            program_timeout_s=options.program_timeout_s,
            memory_mb=options.memory_mb,
            output_kb=options.output_kb,
            queue=AHEAD,
            tier=options.tier,
            allow_unsafe=options.allow_unsafe,
            accept_weak=options.accept_weak,
        )
        return self_test(cfg) if options.self_test else _judge_file(options.file, cfg)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m pgrpo_jax.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = made.add_argument
    option("file", nargs="?", metavar="FILE", help="JSON lines, - for standard input")
    option("--self-test", action="store_true", help="try each jail with attacks and report")
    option("--workers", type=int, default=0, help="programs at one time; 0: the machine's cores")
    option("--timeout-s", type=float, default=DEFAULTS.timeout_s, help="CPU seconds a test")
    option(
        "--program-timeout-s",
        type=float,
        default=DEFAULTS.program_timeout_s,
        help="CPU seconds of all tests of a program",
    )
    option("--memory-mb", type=int, default=DEFAULTS.memory_mb)
    option("--output-kb", type=int, default=DEFAULTS.output_kb)
    option("--tier", choices=("auto", *TIERS), default=DEFAULTS.tier)
    option("--allow-unsafe", action="store_true", help="judge even where no jail holds")
    option(
        "--accept-weak",
        action="store_true",
        help="count passes of tests that patch the program's own interpreter",
    )
    return made


# --- lines


def parse(raw: bytes, where: str) -> Line:
    """A line as it is to be judged. ValueError, naming `where`, if it is none."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: wanted a JSON object, got no JSON at all: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: wanted a JSON object, got a {type(row).__name__}")
    for name in REQUIRED:
        if name not in row:
            raise ValueError(f"{where}: {name!r} is missing; got {', '.join(row) or 'nothing'}")
    _refuse_near_misses(row, where)
    number = (int, float)
    for name, kinds, wanted in (
        ("id", (str, int), "text or an integer"),
        ("program", (str,), "text"),
        ("timeout_s", number, "a number of seconds above 0"),
        ("memory_mb", (int,), "a whole number of megabytes above 0"),
    ):
        value = row.get(name)
        right = isinstance(value, kinds) and not isinstance(value, bool)
        if name in LIMITS:
            right = value is None or (right and 0 < value < float("inf"))
        if not right:
            raise ValueError(f"{where}: {name!r} must be {wanted}, got {value!r:.100}")
    tests = problems.tests(row, where)
    return Line(row["id"], row["program"], tests, row.get("timeout_s"), row.get("memory_mb"))


def _refuse_near_misses(row: dict[str, Any], where: str) -> None:
    """Other columns may stand in a line, but no limit that is misspelt."""
    for name in row:
        for known in LIMITS:
            if name != known and name.startswith(known.partition("_")[0]):
                raise ValueError(f"{where}: unknown limit {name!r}; did you mean {known!r}?")


def _id(raw: bytes) -> Any:
    """What names a line that cannot be read, if anything does."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(raw)
        if isinstance(row, dict) and isinstance(row.get("id"), str | int):
            return row["id"]
    return None


# --- judging


def _judge_file(file: str, cfg: config.JudgeConfig) -> int:
    with contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if file == "-" else stack.enter_context(open(file, "rb"))
        judge = stack.enter_context(sandbox.Judge(cfg))
        begin = time.monotonic()
        verdicts: Counter[str] = Counter()
        for answer in answers(judge, stream, "standard input" if file == "-" else file):
            verdicts[answer["verdict"]] += 1
            print(json.dumps(answer), flush=True)
        seconds = time.monotonic() - begin
        runs = judge.counters.runs
    mix = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    print(
        f"{verdicts.total()} programs ({mix or 'none'}) in {seconds:.2f} s, {runs / seconds:.0f} "
        f"runs/s, {cfg.workers} workers, tier {judge.tier}",
        file=sys.stderr,
    )
    return int(verdicts["infra"] > 0)


def answers(judge: sandbox.Judge, lines: Iterable[bytes] | BinaryIO, name: str):
    """An answer for each line, in order, as soon as it and all before it are judged. Lines are read
    in a thread: a slow writer of them holds no answer up."""
    waiting: queue.Queue[tuple[Any, Any] | None] = queue.Queue(maxsize=AHEAD)

    def read() -> None:
        try:
            for number, raw in enumerate(lines, 1):
                if raw.strip():
                    waiting.put(_submitted(judge, raw, f"{name}, line {number}"))
        except OSError as error:
            waiting.put((None, types.Result("infra", 0, 0, failure=f"{name}: {error}")))
        finally:
            waiting.put(None)

    threading.Thread(target=read, name="lines", daemon=True).start()
    while (entry := waiting.get()) is not None:
        line_id, found = entry
        result = found if isinstance(found, types.Result) else found.result()
        yield {"id": line_id, **dataclasses.asdict(result)}


def _submitted(judge: sandbox.Judge, raw: bytes, where: str) -> tuple[Any, Any]:
    """The line's id, and its result or a future of it."""
    try:
        line = parse(raw, where)
        return line.id, judge.submit(line.program, line.tests, line.timeout_s, line.memory_mb)
    except ValueError as error:
        print(error, file=sys.stderr)
        return _id(raw), types.Result("infra", 0, 0, failure=str(error))


# --- the self-test

_HONEST = {
    "stdin": "print(sum(map(int, open(0).read().split())))",
    "call": "def solve(x):\n    return x + 1",
}
_WANTED = {
    "stdin": types.Tests("stdin", ("1 2\n", "3 4\n"), ("3", "7")),
    "call": types.Tests("call", ((1,), (2,)), (2, 3), function="solve"),
}


def self_test(cfg: config.JudgeConfig) -> int:
    """Tries each tier on this machine and says what holds. 0 if one of them can be trusted."""
    trusted = []
    for tier in TIERS if cfg.tier == "auto" else (cfg.tier,):
        try:
            with sandbox.Judge(dataclasses.replace(cfg, tier=tier, allow_unsafe=False)) as judge:
                print(f"{tier}: {judge.said}; held off:")
                for name in (*sandbox_probes.PROBES, "write to the machine's folders"):
                    print(f"    {name}")
                if _says_right(judge):
                    trusted.append(tier)
        except RuntimeError as error:
            print(f"{tier}: not here. {error}")
    print(f"Programs will be judged in the tier {trusted[0]}." if trusted else "No tier holds.")
    return 0 if trusted else 1


def _says_right(judge: sandbox.Judge) -> bool:
    passing = canaries.passing(judge)
    count = len(canaries.CANARIES) * len(canaries.tests())
    print(f"  {count} known-bad programs: {', '.join(passing) or 'none'} passed")
    results = judge.batch((_HONEST[kind], _WANTED[kind]) for kind in _HONEST)
    failing = [f"{r.verdict} {r.failure}" for r in results if r.verdict != "pass"]
    print(f"  {len(results)} good programs: {', '.join(failing) or 'none'} failed")
    return not passing and not failing


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        sys.exit(main())
    os._exit(130)  # whoever read the answers has gone, or has had enough
