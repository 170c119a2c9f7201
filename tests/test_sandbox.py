"""A verdict of the judge can be trusted: honest programs pass, others do not, nothing is left
behind."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import judges
import pytest

from pgrpo_jax import config, sandbox, types

LIMITS = config.JudgeConfig(workers=2, timeout_s=1.0, memory_mb=256, output_kb=64)
SUM = types.Tests("stdin", ("3 4\n", "10 -4\n"), ("7\n", "6\n"))
ADD = types.Tests("call", ((3, 4), (10, -4)), (7, 6), function="add")
ASSERTS = types.Tests("assert", code=("assert add(3, 4) == 7", "assert 6 == add(10, b=-4)"))
PRINTS = "a, b = map(int, input().split())\nprint(a + b)"
ADDS = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def judge(request):
    if not judges.tier_is_possible(request.param):
        pytest.skip(f"this kernel or container has no {request.param}")
    with sandbox.Judge(dataclasses.replace(LIMITS, tier=request.param)) as made:
        yield made


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def processes_of_the_judge() -> list[str]:
    """Command lines of everything that the judge starts, wherever it now hangs in the tree."""
    found = []
    for pid in processes():
        try:
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "import sandbox_server" in line or "import sandbox_zygote" in line:
            found.append(f"{pid} {line}")
    return found


def children_of(pid: int) -> list[int]:
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_server(pid: int) -> bool:
    return b"import sandbox_server" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


def verdict(judge, program, tests):
    return judge.submit(program, tests).result().verdict


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (PRINTS, SUM),
        (ADDS, ADD),
        (ADDS, ASSERTS),
        ("class Solution:\n    add = staticmethod(int.__add__)", ADD),
    ],
)
def test_a_right_program_passes_all_tests(judge, program, tests):
    result = judge.submit(program, tests).result()
    assert (result.verdict, result.passed, result.total) == ("pass", 2, 2)


@pytest.mark.parametrize(
    ("program", "tests"), [("print(7)", SUM), ("def add(a, b):\n    return 7", ADD)]
)
def test_a_program_that_fails_one_test_fails_and_the_test_is_told(judge, program, tests):
    result = judge.submit(program, tests).result()
    assert (result.verdict, result.verdicts) == ("fail", ("pass", "fail"))
    assert "test 2" in result.failure and "6" in result.failure and "7" in result.failure


@pytest.mark.parametrize("tests", [SUM, ADD, ASSERTS])
@pytest.mark.parametrize(
    "program", ["", "  \n", "def f(:", "raise ValueError('no')", "\0", "x" * 10]
)
def test_a_broken_program_is_an_error_and_never_the_judges(judge, program, tests):
    assert verdict(judge, program, tests) == "error"


def test_an_endless_loop_costs_its_cpu_limit_and_no_more(judge):
    result = judge.submit("while True: pass", SUM).result()
    assert result.verdict == "timeout"
    assert 0.9 < result.cpu_s < 1.3


@pytest.mark.parametrize("tests", [SUM, ADD])
def test_the_limits_have_their_own_verdicts(judge, tests):
    assert verdict(judge, "import time\ntime.sleep(1000)", tests) == "timeout"
    assert verdict(judge, "x = bytearray(300_000_000)\nwhile True: pass", tests) == "memory"
    assert verdict(judge, "x = [0] * 10**10", tests) == "memory"
    assert verdict(judge, "while True: print('x' * 1000)", tests) == "fail"


def test_results_come_in_order_and_equal_programs_run_once(judge):
    programs = [PRINTS + f"\n# {i % 4}" if i % 3 else f"print({i})" for i in range(40)]
    results = judge.batch([(program, SUM) for program in programs])
    assert [r.verdict for r in results] == ["pass" if i % 3 else "fail" for i in range(40)]
    assert (
        results[1] is not results[5] and results[1] == results[5]
    )  # the clock says they are one run


def test_nothing_is_left_after_close():
    before = processes()
    with sandbox.Judge(LIMITS) as judge:
        judge.submit("while True: pass", SUM)
        judge.submit(PRINTS, SUM).result()
        assert processes_of_the_judge()
    assert not [line for line in processes_of_the_judge() if int(line.split()[0]) not in before]


def test_a_closed_judge_answers_infra():
    judge = sandbox.Judge(LIMITS)
    waiting = judge.submit("while True: pass", SUM)
    judge.close()
    assert waiting.result().verdict == "infra"
    assert judge.submit(PRINTS, SUM).result().verdict == "infra"


TRAINER = """
import sys
from pgrpo_jax import config, sandbox, types
judge = sandbox.Judge(config.JudgeConfig(workers=2, tier=sys.argv[1]))
judge.submit("while True: pass", types.Tests("stdin", ("",), ("",)))
judge.submit("print()", types.Tests("stdin", ("",), ("",))).result()
print("ready", flush=True)
judge.submit("import time\\ntime.sleep(100)", types.Tests("stdin", ("",), ("",))).result()
"""


def scratch_folders() -> set[pathlib.Path]:
    return {
        p for place in ("/dev/shm", "/var/tmp", "/tmp") for p in pathlib.Path(place).glob("judge-*")
    }


def test_killing_the_trainer_leaves_nothing_behind(judge):
    processes_before, folders_before = set(processes_of_the_judge()), scratch_folders()
    command = [sys.executable, "-c", TRAINER, judge.tier]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        assert len(processes_of_the_judge()) > len(processes_before)
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = set(processes_of_the_judge()) - processes_before
        if not left and scratch_folders() <= folders_before:
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {left} {scratch_folders() - folders_before}")


def test_a_judge_whose_slots_are_killed_still_gives_right_verdicts(judge):
    programs = [
        (PRINTS + f"\n# {i}", SUM) if i % 2 else (f"print('no {i}')", SUM) for i in range(60)
    ]
    futures = [judge.submit(*pair) for pair in programs]
    for slot in children_of(next(pid for pid in children_of(os.getpid()) if is_server(pid))):
        os.kill(slot, signal.SIGKILL)
    assert [f.result().verdict for f in futures] == ["pass" if i % 2 else "fail" for i in range(60)]
