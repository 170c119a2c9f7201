"""How fast programs are judged, beside other ways of running them, and how long real work takes.

    python -m benchmarks.judge
    PYTHONHASHSEED=0 python -m benchmarks.judge \\
        --humaneval-plus HumanEvalPlus.jsonl.gz --mbpp-plus MbppPlus.jsonl.gz

Programs are trivial and all different, so what is measured is the judge. "CPU ms" is of everything
that ran for a program, the judge's own process included. EvalPlus's way is measured where
`evalplus` can be imported. The other ways hold nothing off: they are the floor of what peers pay.
The last row is about the floor of what the judge pays: a fork, the page faults of a judged program
and an exit. The little Python that forks has some faults of its own.
The hash seed is the one of jails: the order of some solutions' outputs hangs on it.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from pgrpo_jax import config, sandbox, sandbox_wire, types

SCRIPT = "a, b = map(int, input().split())\nprint(a + b)\n# {}"
FUNCTION = "def add(a, b):\n    return a + b\n# {}"
ARRAYS = "import numpy as np\nprint(int(np.array(input().split(), int).sum()))\n# {}"
STDIN = types.Tests("stdin", ("3 4\n",), ("7\n",))
FAULTS = "import resource\nprint(sum(map(int, input().split())), resource.getrusage(0).ru_minflt)"
FORKS = """
import mmap, os, sys
count, pages = map(int, sys.argv[1:])
stride = 10 * mmap.PAGESIZE
block = mmap.mmap(-1, pages * stride, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block.write(bytes(pages * stride))
for _ in range(count):
    child = os.fork()
    if not child:
        for place in range(0, pages * stride, stride):
            block[place] = 1
        os._exit(0)
    os.waitpid(child, 0)
"""
TESTS_A_PROGRAM = 500
SOLUTION_S = 20.0  # of CPU a test; one of MBPP+'s canonical solutions takes 4 on a slow machine
PART_BYTES = sandbox_wire.REPLY_LIMIT


def call_tests(count: int) -> types.Tests:
    inputs = tuple((i, 2 * i) for i in range(count))
    return types.Tests("call", inputs, tuple(a + b for a, b in inputs), function="add")


ASSERTS = types.Tests("assert", code=("x = add(1, 2)\nassert x == 3",))
WAYS: dict[str, tuple[str, types.Tests, str]] = {
    "stdin tests": (SCRIPT, STDIN, "tests"),
    "stdin tests of numpy programs": (ARRAYS, STDIN, "tests"),
    "call programs": (FUNCTION, call_tests(1), "programs"),
    f"call tests, {TESTS_A_PROGRAM} a program": (FUNCTION, call_tests(TESTS_A_PROGRAM), "tests"),
    "asserts in a second interpreter": (FUNCTION, ASSERTS, "programs"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tier", choices=("auto", "namespaces", "landlock"), default="auto")
    parser.add_argument("--humaneval-plus", type=pathlib.Path)
    parser.add_argument("--mbpp-plus", type=pathlib.Path)
    options = parser.parse_args()
    cfg = config.JudgeConfig(workers=options.workers, tier=options.tier)
    print("| way | jailed | a second | CPU ms a program |\n|---|---|---|---|")
    with sandbox.Judge(cfg) as judge:
        for name, (source, tests, unit) in WAYS.items():
            count = max(options.programs // len(tests), options.programs // 20)
            judged(judge, source, tests, options.workers)
            row(
                f"judge: {name}",
                judge.tier,
                count,
                len(tests),
                unit,
                children_cpu_s,
                functools.partial(judged, judge, source, tests, count),
            )
        faults = page_faults(judge)
    others(options.programs // 5, options.workers)
    name = f"fork, {faults} page faults, exit"
    count = options.programs // options.workers * options.workers
    work = functools.partial(forked, count, faults, options.workers)
    row(name, "no", count, 1, "children", ended_cpu_s, work)
    for name, path, read in (
        ("HumanEval+", options.humaneval_plus, humaneval_plus),
        ("MBPP+", options.mbpp_plus, mbpp_plus),
    ):
        if path is not None:
            real_work(name, path, read, cfg)


def row(
    name: str,
    jailed: str,
    count: int,
    tests: int,
    unit: str,
    cpu_s: Callable[[], float],
    work: Callable[[], None],
) -> None:
    """Does the work, and prints a row of the table."""
    cpu_before, begin = cpu_s(), time.monotonic()
    work()
    seconds = time.monotonic() - begin
    cpu_ms = 1000 * (cpu_s() - cpu_before) / count
    speed = count * (tests if unit == "tests" else 1) / seconds
    print(f"| {name} | {jailed} | {speed:.0f} {unit} | {cpu_ms:.2f} |", flush=True)


def judged(judge: sandbox.Judge, source: str, tests: types.Tests, count: int) -> None:
    marks = (os.urandom(8).hex() for _ in range(count))  # or the cache would answer
    results = judge.batch((source.format(mark), tests) for mark in marks)
    wrong = [result for result in results if result.verdict != "pass"]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {count} right programs did not pass: {wrong[0]}")


def page_faults(judge: sandbox.Judge) -> int:
    """Of a trivial program until its last line, by what it prints itself."""
    said = re.search(r"got b'7 (\d+)'", judge.submit(FAULTS, STDIN).result().failure)
    assert said is not None
    return int(said[1])


def forked(count: int, faults: int, workers: int) -> None:
    """Children of processes of some megabytes, which write to as many pages and end."""
    command = [sys.executable, "-I", "-S", "-c", FORKS, str(count // workers), str(faults)]
    for process in [subprocess.Popen(command) for _ in range(workers)]:
        if process.wait():
            raise RuntimeError(f"a process that forks ended with {process.returncode}")


def ended_cpu_s() -> float:
    """CPU seconds of all processes below this one that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children_cpu_s() -> float:
    """CPU seconds of all processes below this one, those that have ended included."""
    ticks, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        tasks = pathlib.Path(f"/proc/{pid}/task")
        for task in tasks.iterdir():
            waiting += map(int, (task / "children").read_text().split())
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if pid != os.getpid():
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


# --- other ways


def others(count: int, workers: int) -> None:
    def by_subprocess(flags: list[str]) -> None:
        def one(number: int) -> None:
            command = [sys.executable, *flags, "-c", SCRIPT.format(number)]
            done = subprocess.run(command, input=b"3 4\n", capture_output=True)
            if done.stdout != b"7\n":
                raise RuntimeError(f"wanted 7, got {done}")

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(count)))

    for flags in (["-I", "-S"], ["-I"]):
        name = f"`python {' '.join(flags)}` by subprocess"
        row(name, "no", count, 1, "tests", ended_cpu_s, functools.partial(by_subprocess, flags))
    try:
        from evalplus.eval import untrusted_check  # which nothing else here needs
    except ImportError:
        print("| EvalPlus's `untrusted_check` | no | not installed | |")
        return

    def by_evalplus() -> None:
        def one(number: int) -> None:
            source = FUNCTION.format(number)
            said = untrusted_check("humaneval", source, [[3, 4]], "add", [7], 0, [1.0], True)
            if said[0] != "pass":
                raise RuntimeError(f"wanted a pass, got {said}")

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(count)))

    row("EvalPlus's `untrusted_check`", "no", count, 1, "programs", ended_cpu_s, by_evalplus)


# --- real work


def real_work(name: str, path: pathlib.Path, read: Any, cfg: config.JudgeConfig) -> None:
    """Judges the canonical solutions of a benchmark with all its inputs."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        tasks = [read(json.loads(line)) for line in file]
    pairs = []
    for program, function, inputs in tasks:
        try:
            split = list(parts(inputs, outputs(program, function, inputs)))
        except Exception as error:  # an input that JSON has changed, an output that is no data
            print(f"    {function} is left out: {error!r}")
            continue
        pairs += [
            (program, types.Tests("call", given, wanted, function=function))
            for given, wanted in split
        ]
    programs = len({program for program, _ in pairs})
    with sandbox.Judge(dataclasses.replace(cfg, timeout_s=SOLUTION_S)) as judge:
        begin = time.monotonic()
        results = judge.batch(pairs)
        seconds = time.monotonic() - begin
    failed = {p for (p, _), result in zip(pairs, results, strict=True) if result.verdict != "pass"}
    tests = sum(len(tests) for _, tests in pairs)
    print(
        f"{name}: {programs - len(failed)} of {programs} canonical solutions pass, {tests} tests "
        f"in {seconds:.1f} s on {cfg.workers} workers"
    )
    for (_, tests_), result in zip(pairs, results, strict=True):
        if result.verdict != "pass":
            print(f"    {tests_.function}: {result.verdict} {result.failure}")


def parts(inputs: tuple[Any, ...], wanted: tuple[Any, ...]) -> Iterator[list[Any]]:
    """Tests of a program, as many together as a message holds, but for those that alone are more:
    some have outputs of a gigabyte."""
    part: list[tuple[Any, Any]] = []
    size = 0
    for test in zip(inputs, wanted, strict=True):
        length = len(sandbox_wire.dumps(test))
        if length > PART_BYTES:
            print(f"    a test is left out: {length >> 20} MB")
            continue
        if size + length > PART_BYTES:
            yield [tuple(column) for column in zip(*part, strict=True)]
            part, size = [], 0
        part.append(test)
        size += length
    yield [tuple(column) for column in zip(*part, strict=True)]


def humaneval_plus(row: dict[str, Any]) -> tuple[str, str, tuple[Any, ...]]:
    """Program, function and the arguments of all its tests."""
    program = row["prompt"] + row["canonical_solution"]
    inputs = list(row["base_input"]) + list(row["plus_input"])
    return program, row["entry_point"], tuple(map(tuple, inputs))


def mbpp_plus(row: dict[str, Any]) -> tuple[str, str, tuple[Any, ...]]:
    """The same. JSON has no tuples: the arguments of the assertions say where they belong."""
    asserted = next(
        n
        for n in ast.walk(ast.parse(row["assertion"]))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == row["entry_point"]
    )
    models = [ast.literal_eval(argument) for argument in asserted.args]
    inputs = list(row["base_input"]) + list(row["plus_input"])
    shaped = [
        tuple(map(like, models, given)) if len(models) == len(given) else tuple(given)
        for given in inputs
    ]
    return row["prompt"] + row["canonical_solution"], row["entry_point"], tuple(shaped)


def like(model: Any, value: Any) -> Any:
    """A value out of JSON with the types that a model of it has."""
    if isinstance(model, list | tuple | set) and isinstance(value, list):
        if isinstance(model, tuple) and len(model) == len(value):
            return tuple(map(like, model, value))
        kinds = {isinstance(part, list | tuple | set): part for part in reversed(list(model))}
        return type(model)(like(kinds.get(isinstance(item, list)), item) for item in value)
    if isinstance(model, dict) and isinstance(value, dict):
        inner = next(iter(model.values()), None)
        return {key: like(inner, item) for key, item in value.items()}
    if isinstance(model, int | complex) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # JSON has no complex numbers either
            return complex(value)
    return value


def outputs(program: str, function: str, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the solution, which is trusted, returns."""
    module: dict[str, Any] = {}
    exec(program, module)
    return tuple(module[function](*json_copy(arguments)) for arguments in inputs)


def json_copy(value: Any) -> Any:
    """As deep as plain values go: solutions may change their arguments."""
    if isinstance(value, list | tuple | set):
        return type(value)(map(json_copy, value))
    if isinstance(value, dict):
        return {key: json_copy(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    main()
