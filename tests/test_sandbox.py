"""A verdict of the judge can be trusted: honest programs pass, others do not, nothing is left
behind."""

import asyncio
import dataclasses
import os
import pathlib
import platform
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time

import judges
import pytest

from benchmarks import judge_soak
from pgrpo_jax import config, sandbox, types
from pgrpo_jax import sandbox_jail as jail
from pgrpo_jax import sandbox_slot as slots

ROOT = str(pathlib.Path(sandbox.__file__).parent.parent)
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
        ours = str(pathlib.Path(__file__).parent.parent) in line  # others judge here too
        if ours and ("import sandbox_server" in line or "import sandbox_zygote" in line):
            found.append(f"{pid} {line}")
    return found


def children_of(pid: int) -> list[int]:
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processes_below(pid: int) -> list[int]:
    return [p for child in children_of(pid) for p in (child, *processes_below(child))]


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


def left_behind(processes_before: set[str], folders_before: set[pathlib.Path], within_s: float):
    """What there still is after that time and was not there before."""
    deadline = time.monotonic() + within_s
    while True:
        ours = processes_below(os.getpid())  # the fixture's slots may be starting all the while
        left = set(processes_of_the_judge()) - processes_before
        left = {line for line in left if int(line.split()[0]) not in ours}
        folders = scratch_folders() - folders_before
        if not (left or folders) or time.monotonic() > deadline:
            return left, folders
        time.sleep(0.05)


def test_killing_the_trainer_leaves_nothing_behind(judge):
    before = set(processes_of_the_judge()), scratch_folders()
    command = [sys.executable, "-c", TRAINER, judge.tier]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        assert len(processes_of_the_judge()) > len(before[0])
        trainer.send_signal(signal.SIGKILL)
    assert left_behind(*before, within_s=20) == (set(), set())


STARTING = """
import sys
from pgrpo_jax import config, sandbox
slow = "from pgrpo_jax import sandbox_slot as s; boot = s._PYTHON[-1].replace("
slow += "'sandbox_zygote.main', 'import time; time.sleep(600); sandbox_zygote.main'); "
slow += "s._PYTHON = (*s._PYTHON[:-1], boot); "
sandbox._BOOT = sandbox._BOOT.replace("sandbox_server.main", slow + "sandbox_server.main")
sandbox.Judge(config.JudgeConfig(workers=2, tier=sys.argv[1]))
"""


def test_killing_the_trainer_while_slots_start_leaves_nothing_behind(judge):
    before = set(processes_of_the_judge()), scratch_folders()
    with subprocess.Popen([sys.executable, "-c", STARTING, judge.tier]) as trainer:
        deadline = time.monotonic() + 20
        while len(processes_below(trainer.pid)) < 2:  # the server and its first slot
            assert time.monotonic() < deadline
            time.sleep(0.01)
        trainer.send_signal(signal.SIGKILL)
    assert left_behind(*before, within_s=5) == (set(), set())


SLOW = "import time, pgrpo_jax.sandbox_jail as j; j.build_root = lambda *_: time.sleep(600); "


def test_a_slot_that_is_closed_while_it_starts_leaves_nothing_behind(judge, monkeypatch):
    if judge.tier != "namespaces":
        pytest.skip("its slots are one process")
    boot = slots._PYTHON[-1].replace("sandbox_zygote.main", SLOW + "sandbox_zygote.main")
    monkeypatch.setattr(slots, "_PYTHON", (*slots._PYTHON[:-1], boot))
    settings = {"tier": judge.tier, "scratch": "/tmp", "packages": [], "hidden": [], "readable": []}
    slot = slots.Slot(slots.Loop(), settings | {"scratch_mb": 1, "preload": []}, ROOT)
    deadline = time.monotonic() + 20
    while not (inner := children_of(slot._pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    slot.close()
    while any(os.path.exists(f"/proc/{pid}") for pid in inner):
        assert time.monotonic() < deadline, "process 1 of the slot's namespace lives on"
        time.sleep(0.01)


def test_a_judge_whose_slots_are_killed_still_gives_right_verdicts(judge):
    programs = [
        (PRINTS + f"\n# {i}", SUM) if i % 2 else (f"print('no {i}')", SUM) for i in range(60)
    ]
    futures = [judge.submit(*pair) for pair in programs]
    for slot in children_of(next(pid for pid in children_of(os.getpid()) if is_server(pid))):
        os.kill(slot, signal.SIGKILL)
    assert [f.result().verdict for f in futures] == ["pass" if i % 2 else "fail" for i in range(60)]


# --- what a result says, limits, queues


def test_a_result_names_its_tier_and_the_system_calls_that_were_refused(judge):
    socket = "import socket\ntry:\n    socket.socket()\nexcept OSError:\n    pass\n"
    result = judge.submit(socket + PRINTS, SUM).result()
    assert (result.verdict, result.tier, result.denied) == ("pass", judge.tier, ("socket",))
    fork = "import os\nfor _ in range(99):\n  try:\n    os.fork()\n  except OSError:\n    pass\n"
    assert judge.submit(fork + ADDS, ADD).result().denied == ("clone",)
    assert judge.submit(PRINTS, SUM).result().denied == ()


def test_all_tests_of_a_program_together_have_a_deadline():
    slow = "import time\nwhile time.process_time() < 0.3: pass\n" + PRINTS
    tests = types.Tests("stdin", SUM.inputs * 5, SUM.outputs * 5)
    with sandbox.Judge(dataclasses.replace(LIMITS, program_timeout_s=1.0)) as judge:
        result = judge.submit(slow, tests).result()
    assert result.verdict == "timeout" and 2 <= result.passed <= 4
    assert result.cpu_s < 1.3


def test_a_batchs_deadline_costs_only_what_was_not_judged_by_then():
    loops = [(f"while True: pass\n# {i}", SUM) for i in range(12)]
    with sandbox.Judge(dataclasses.replace(LIMITS, workers=1)) as judge:
        judge.submit(PRINTS, SUM).result()
        results = judge.batch([(PRINTS, SUM), *loops], timeout_s=2.5)
        assert results[0].verdict == "pass"
        assert results[-1].verdict == "infra" and "2.5 s of its batch" in results[-1].failure
        assert judge.submit(PRINTS + "\n# again", SUM).result().verdict == "pass"


def test_whoever_hands_in_more_than_the_queue_holds_waits_and_nothing_is_lost():
    with sandbox.Judge(dataclasses.replace(LIMITS, queue=3)) as judge:
        futures = [judge.submit(f"{PRINTS}\n# {i}", SUM) for i in range(30)]
        assert sum(not f.done() for f in futures) <= 3
        assert all(f.result().verdict == "pass" for f in futures)


def test_coroutines_may_wait_for_results(judge):
    async def both():
        return await asyncio.gather(judge.judge(PRINTS, SUM), judge.judge("print(1)", SUM))

    assert [r.verdict for r in asyncio.run(both())] == ["pass", "fail"]


def test_limits_may_be_given_with_a_program(judge):
    result = judge.submit("while True: pass\n#", SUM, timeout_s=0.2).result()
    assert result.verdict == "timeout" and result.cpu_s < 0.5
    assert judge.submit("x = bytearray(10**8)", SUM, memory_mb=64).result().verdict == "memory"


def test_the_counters_tell_runs_and_rebuilt_slots():
    with sandbox.Judge(LIMITS) as judge:
        judge.submit(PRINTS, SUM).result()
        assert judge.counters == sandbox.Counters(runs=2, slot_rebuilds=0)
        for slot in children_of(judge._process.pid):
            os.kill(slot, signal.SIGKILL)
        assert judge.submit(PRINTS + "\n#", SUM).result().verdict == "pass"
        assert judge.counters.slot_rebuilds >= 1


CHECKER = """
import sys
given, printed, answer = (open(path).read() for path in sys.argv[1:])
a, b = map(int, printed.split())
sys.exit(0 if a + b == int(answer) else 1)
"""


def test_a_checker_program_decides_and_its_own_failure_is_the_judges(judge):
    tests = types.Tests("stdin", ("", ""), ("7", "7"), checker=CHECKER)
    assert verdict(judge, "print(3, 4)", tests) == "pass"
    assert verdict(judge, "print(3, 5)", tests) == "fail"
    assert verdict(judge, "print(3)", tests) == "infra"


def close_enough(given, wanted, printed):
    return abs(int(wanted) - int(printed)) <= 1


def test_a_trusted_checker_is_a_function_of_the_callers():
    name = f"{__name__}:close_enough"
    tests = types.Tests("stdin", ("", ""), ("7", "7"), checker=name)
    with sandbox.Judge(LIMITS) as judge:
        assert verdict(judge, "print(8)", tests) == "pass"
        assert verdict(judge, "print(9)", tests) == "fail"
        assert verdict(judge, "print('x')", tests) == "infra"


def test_weak_passes_count_only_where_the_user_says_so():
    case = (
        "import unittest\nfrom unittest.mock import patch\nclass T(unittest.TestCase):\n"
        "    @patch('time.time', return_value=5)\n    def test(self, _):\n"
        "        self.assertEqual(now(), 5)\n"
    )
    program, tests = (
        "import time\ndef now():\n    return time.time()",
        types.Tests("unittest", code=(case,)),
    )
    for accept, wanted in ((False, "fail"), (True, "pass")):
        with sandbox.Judge(dataclasses.replace(LIMITS, accept_weak=accept)) as judge:
            result = judge.submit(program, tests).result()
            assert (result.verdict, result.weak) == (wanted, True)


def test_packages_in_the_machines_temporary_folder_do_not_break_the_jail(monkeypatch):
    folder = pathlib.Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    (folder / "inmytmp.py").write_text("x = 7")
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(folder)])
    with sandbox.Judge(LIMITS) as judge:
        program = "import inmytmp\nprint(inmytmp.x)"
        assert verdict(judge, program, types.Tests("stdin", ("",), ("7",))) == "pass"
    shutil.rmtree(folder)


HEADERS = {  # of the kernel, as Debian's linux-libc-dev lays them down
    0: pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: pathlib.Path("/usr/include/asm-generic/unistd.h"),  # aarch64 takes the generic numbers
}


@pytest.mark.parametrize("column", HEADERS)
def test_system_calls_have_the_numbers_of_the_kernels_headers(column):
    if not HEADERS[column].is_file():
        pytest.skip("the kernel's headers are not installed")
    text = HEADERS[column].read_text()
    defined = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.MULTILINE)
    there = {"newfstatat" if n == "fstatat" else n: int(number) for n, number in defined}
    tables = (jail._CALLS, jail._IGNORED, jail._UNSUPPORTED, jail._REFUSED)
    ours = {name: numbers[column] for table in tables for name, numbers in table.items()}
    newer = {"fchmodat2"}  # than the oldest headers in use
    wrong = {n: x for n, x in ours.items() if there.get(n) != x and n not in newer - set(there)}
    assert not wrong
    assert len(ours) > 200
    assert jail._PIVOT[("x86_64", "aarch64")[column]] == there["pivot_root"]


MACHINE_CODE = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="no 32-bit calls from 64-bit code")
def test_a_call_by_the_numbers_of_32_bit_programs_ends_the_program(judge):
    result = judge.submit(MACHINE_CODE, types.Tests("stdin", ("",), ("",))).result()
    assert result.verdict == "error"
    assert re.search(r"signal (31|11)\b", result.failure)  # 11 where the kernel has no such calls


def test_below_both_tiers_nothing_is_judged_unless_the_user_insists(monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", NO_JAIL + sandbox._BOOT)
    with pytest.raises(RuntimeError, match="no way to hold programs.*namespaces: .*landlock: "):
        sandbox.Judge(LIMITS)
    with pytest.warns(UserWarning, match="UNSAFE JUDGE.*read a file outside.*Do not train"):
        judge = sandbox.Judge(dataclasses.replace(LIMITS, allow_unsafe=True))
    with judge:
        result = judge.submit(PRINTS, SUM).result()
        assert (result.verdict, result.tier) == ("pass", "unsafe")


def test_an_interpreter_built_on_an_old_c_library_judges_as_any_other(judge, monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", OLD_LIBRARY + sandbox._BOOT)
    with sandbox.Judge(dataclasses.replace(LIMITS, tier=judge.tier)) as old:
        pairs = [(PRINTS, SUM), (ADDS, ADD), (ADDS, ASSERTS), ("print(7)", SUM)]
        assert [r.verdict for r in old.batch(pairs)] == ["pass", "pass", "pass", "fail"]


LOCALE = """
import locale
locale.setlocale(locale.LC_ALL, "")
with open("/dev/stdout", "w") as file:  # by the encoding that a program gets without asking
    print("\u00fc", locale.format_string("%d", 1000000, grouping=True), file=file)
"""


def test_where_the_machine_lacks_the_locale_programs_may_ask_for_theirs(judge, monkeypatch):
    server = "from pgrpo_jax import sandbox_slot as s; s._ENVIRONMENT['LC_ALL'] = 'no_WHERE.UTF-8'"
    boot = f"import sys; sys.path.append(sys.argv[1]); {server}; {sandbox._BOOT}"
    monkeypatch.setattr(sandbox, "_BOOT", boot)
    with sandbox.Judge(dataclasses.replace(LIMITS, tier=judge.tier)) as bare:
        tests = types.Tests("stdin", ("",), ("\u00fc 1000000",))
        assert verdict(bare, LOCALE, tests) == "pass"


def test_the_judge_keeps_no_outputs_even_where_garbage_is_never_collected(judge, monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", f"import gc; gc.disable(); {sandbox._BOOT}")
    limits = dataclasses.replace(LIMITS, tier=judge.tier, output_kb=1024)
    in_two_processes = types.Tests("assert", code=("x = add(3, 4)\nassert x == 7",))
    with sandbox.Judge(limits) as never_collects:

        def flood(programs: int) -> float:
            """Megabytes that the judge holds after so many more of output."""
            program = f"{ADDS}\nprint(1000000 * 'x')  # {programs} "
            pairs = [(f"{program}{i}", in_two_processes) for i in range(programs)]
            assert {r.verdict for r in never_collects.batch(pairs)} == {"pass"}
            return judge_soak.size(never_collects._process.pid)[0]

        before = flood(10)
        assert flood(30) < before + 10


# What portable builds of CPython, those that uv installs for one, leave out in server and slots.
LACKS = """
import fcntl, os, sys
for name in [n for n in vars(os) if n.startswith(("memfd", "MFD", "pidfd"))]:
    delattr(os, name)
for name in [n for n in vars(fcntl) if n.endswith("_SEALS") or n.startswith("F_SEAL")]:
    delattr(fcntl, name)
"""
OLD_LIBRARY = f"""{LACKS}
sys.path.append(sys.argv[1])
from pgrpo_jax import sandbox_slot as slot
slot._PYTHON = *slot._PYTHON[:-1], {LACKS!r} + slot._PYTHON[-1]
spawn = os.posix_spawn
def posix_spawn(*arguments, **more):
    if "setsid" in more:
        raise NotImplementedError("posix_spawn: setsid unavailable on this platform")
    return spawn(*arguments, **more)
os.posix_spawn = posix_spawn
"""

# The server as on a machine where both tiers fail: its slots ask for jails that there are not.
NO_JAIL = """
import sys
sys.path.append(sys.argv[1])
from pgrpo_jax import sandbox_slot as slot
call = "sandbox_zygote.main"
no_jail = (
    "j = __import__('pgrpo_jax.sandbox_jail', fromlist=[1]); "
    "j.landlock = j.enter = lambda *_: (_ for _ in ()).throw(OSError('none')); "
)
slot._PYTHON = *slot._PYTHON[:-1], slot._PYTHON[-1].replace(call, no_jail + call)
"""
