"""How a program is judged: the runs that its tests need, and the verdict on what came back.

Each function here is a generator that drives one slot: it yields while it waits and returns the
result as a dict of `types.Result`'s fields. Wanted values live in these frames and nowhere else.
Part of the sandbox: standard library only.
"""

import ast
import functools
import os
import socket
import time
from collections.abc import Callable, Generator
from typing import Any

from pgrpo_jax import compare, sandbox_check, sandbox_probes, sandbox_slot, sandbox_wire

Work = Generator[None, None, dict[str, Any]]
LONGEST_FAILURE = 600  # characters
KEPT_TESTS = 256  # problems' tests that are parsed once; they may be a megabyte each
# What a program returns is read if it is as small, or no so many times larger than what is wanted.
SMALL_REPLY, MORE = 1 << 16, 8
AHEAD, SHORT = 16, 0.01  # calls that a program may be ahead while each takes this share of its time
WEAK = "the tests passed in the program's own interpreter, which proves nothing"


class Tally:
    """The verdicts of a program's tests as they come, and what it cost."""

    def __init__(self, job: dict[str, Any]):
        self.total = total(job)
        self._limits = job["limits"]
        self._denied: set[str] = set()
        self._runs = 0
        self.verdicts: list[str] = []
        self.failure = ""
        self.cpu_s = self.peak_mb = 0.0
        self.started = time.monotonic()

    def add(self, verdict: str, why: str = "") -> bool:
        """Notes the next test's verdict. False if the rest need not be tried: it would cost as much
        again."""
        self.verdicts.append(verdict)
        if verdict != "pass" and not self.failure:
            self.failure = f"test {len(self.verdicts)}: {why}"[:LONGEST_FAILURE]
        return verdict not in ("timeout", "memory")

    def spent(self, run: sandbox_slot.Run) -> None:
        self.cpu_s += run.cpu_s
        self.peak_mb = max(self.peak_mb, run.peak_mb)
        self._denied |= run.denied
        self._runs += 1

    def limits(self, parts: int = 1) -> sandbox_slot.Limits:
        """Of the next run, of so many tests: what is left for the whole program bounds it too."""
        limits = self._limits
        left = max(limits["program_timeout_s"] - self.cpu_s, 0.001)
        cpu_s = min(limits["timeout_s"], left)
        sizes = limits["memory_mb"], limits["output_kb"], sandbox_slot.SCRATCH_MB
        return sandbox_slot.Limits(cpu_s, *sizes, min(left, cpu_s * parts))

    def out_of_time(self) -> bool:
        """True, and noted, if the tests so far have used up what all of them may."""
        whole_s = self._limits["program_timeout_s"]
        waited = time.monotonic() - self.started
        most = sandbox_slot.WALL_FACTOR * whole_s + sandbox_slot.WALL_MORE_S
        over = self.cpu_s >= whole_s or waited > most
        if over:
            self.add("timeout", f"all tests together took more than {whole_s:g} s of CPU")
        return over

    def result(self) -> dict[str, Any]:
        """Passed only if every test ran and passed."""
        passed = self.verdicts.count("pass")
        whole = passed == self.total == len(self.verdicts) and passed > 0
        verdict = "pass" if whole else next((v for v in self.verdicts if v != "pass"), "error")
        return {
            "verdict": verdict,
            "passed": passed,
            "total": self.total,
            "verdicts": tuple(self.verdicts),
            "failure": self.failure,
            "cpu_s": self.cpu_s,
            "wall_s": time.monotonic() - self.started,
            "peak_mb": self.peak_mb,
            "denied": tuple(sorted(self._denied)),
            "runs": self._runs,
        }


def judge(slot: sandbox_slot.Slot, job: dict[str, Any]) -> Work:
    """The work of one job: `program`, the fields of `types.Tests`, and `limits`."""
    if not job["program"].strip():
        tally = Tally(job)
        tally.add("error", "the program is empty")
        return tally.result()
    return (yield from _KINDS[job["kind"]](slot, job))


def probe(slot: sandbox_slot.Slot, outside: str) -> Generator[None, None, list[str]]:
    """The attacks that this slot does not hold off; what is odd about the attempt itself counts."""
    limits = sandbox_slot.Limits(20.0, 512, 64, sandbox_slot.SCRATCH_MB)
    file = sandbox_slot.sealed_file(sandbox_probes.program().encode())
    trace = f"judge-probe-{os.urandom(8).hex()}"
    stdin = sandbox_probes.stdin(outside, trace)
    run = slot.start(sandbox_wire.SCRIPT, file, limits, stdin)
    os.close(file)
    while not run.over:
        yield
    lines = bytes(run.output).decode().split("\n")
    if run.status != 0 or lines[-2:] != ["done", ""]:
        return [f"the attacks could not be tried: {_last_line(run) or run.stopped}"]
    return lines[:-2] + sandbox_probes.left_behind(trace)


def total(job: dict[str, Any]) -> int:
    """How many tests a job has."""
    return len(job["inputs"]) or len(job["code"])


def _stopped(run: sandbox_slot.Run) -> tuple[str, str] | None:
    """The verdict if the judge ended the run or it never began."""
    limits = run.limits
    if not run.pid:
        run.slot.broken = True
        raise sandbox_slot.InfraError("a process could not be started")
    if run.stopped == "busy":
        raise sandbox_slot.InfraError(f"no time on a busy machine in {limits.wall_s:g} s")
    if run.stopped == "timeout":
        return "timeout", f"stopped after {limits.cpu_s:g} s of CPU, or as long a sleep"
    if run.stopped == "memory" or run.peak_mb > limits.memory_mb:
        return "memory", f"used more than {limits.memory_mb} MB"
    if run.stopped == "output":
        return (
            "fail",
            f"wrote more than {limits.output // 1024} kB of output or "
            f"{limits.scratch_mb} MB of files",
        )
    return None


# --- scripts


def _scripts(slot: sandbox_slot.Slot, job: dict[str, Any]) -> Work:
    tally = Tally(job)
    file = sandbox_slot.sealed_file(job["program"].encode("utf-8", "surrogatepass"))
    try:
        for text, want in zip(job["inputs"], job["outputs"], strict=True):
            if tally.out_of_time():
                break
            stdin = text.encode("utf-8", "surrogatepass")
            run = slot.start(sandbox_wire.SCRIPT, file, tally.limits(), stdin)
            while not run.over:
                yield
            tally.spent(run)
            verdict, why = _failure(run) or ("pass", "")
            if verdict == "pass":
                got = bytes(run.output)
                why = yield from sandbox_check.difference(slot, job, text, want, got)
                verdict = "fail" if why else "pass"
            if not tally.add(verdict, why) or _does_not_compile(run):
                break
    finally:
        os.close(file)
    return tally.result()


def _failure(run: sandbox_slot.Run) -> tuple[str, str] | None:
    """The verdict on a script that did not come to a good end."""
    stopped = _stopped(run)
    if stopped:
        return stopped
    if run.cpu_s > run.limits.cpu_s:
        return "timeout", f"took {run.cpu_s:.2f} s of CPU, more than {run.limits.cpu_s:g} s"
    if run.status is None:
        raise RuntimeError("a verdict was asked for a program that still runs")
    if run.status != 0:
        last = _last_line(run)
        verdict = "memory" if last.startswith("MemoryError") else "error"
        ending = f"signal {-run.status}" if run.status < 0 else f"exit status {run.status}"
        return verdict, f"{ending} {last}"
    return None


def _last_line(run: sandbox_slot.Run) -> str:
    lines = bytes(run.errors[-2000:]).decode("utf-8", "replace").strip().split("\n")
    return lines[-1][:300]


def _does_not_compile(run: sandbox_slot.Run) -> bool:
    """To be taken for such a program, others can only lose."""
    return run.status == 1 and _last_line(run).startswith(
        ("SyntaxError:", "IndentationError:", "TabError:")
    )


# --- calls


def _calls(slot: sandbox_slot.Slot, job: dict[str, Any]) -> Work:
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (job["function"], arguments, {}) for arguments in job["inputs"]
    ]
    equal = compare.wrapped_values if job["wrapped"] else compare.values
    return (yield from _call_all(slot, job, calls, job["outputs"], equal))


def _call_all(
    slot: sandbox_slot.Slot,
    job: dict[str, Any],
    calls: list[tuple[str, Any, Any]],
    wanted: tuple[Any, ...],
    equal: Callable[[Any, Any], str],
) -> Work:
    tally = Tally(job)
    texts = [sandbox_wire.dumps(call).decode() for call in calls]
    body = sandbox_wire.dumps({"program": job["program"], "calls": texts})
    channel = sandbox_slot.Channel(slot, sandbox_wire.REPLY_LIMIT)
    file = sandbox_slot.sealed_file(body)
    try:
        run = slot.start(sandbox_wire.CALLS, file, tally.limits(len(calls)), more=(channel.given,))
        run.channel, granted = channel, 1
        channel.go_on()  # so that it need not wait between the load and its first call
        for number, want in enumerate((None, *wanted)):  # the first message is of the load
            while not channel.messages and not channel.ended:
                yield
            if not channel.messages:
                break
            verdict, why = _reply_verdict(channel.messages.pop(0), want, equal, number == 0)
            part_s = run.part_s()
            if part_s > run.limits.cpu_s and not channel.unread():
                verdict, why = "timeout", f"took more than {run.limits.cpu_s:g} s of CPU"
            if not (number == 0 and verdict == "pass") and (
                not tally.add(verdict, why) or number == 0
            ):
                break
            run.begin_part()
            ahead = AHEAD if part_s < SHORT * run.limits.cpu_s else 1
            if granted <= number + ahead // 2 and granted < len(calls):
                channel.go_on(number + ahead - granted)
                granted = number + ahead
        if len(tally.verdicts) == tally.total:
            run.leave()
        else:
            run.stop("over")
        while not run.over:
            yield
    finally:
        channel.close()
        os.close(file)
    tally.spent(run)
    if len(tally.verdicts) < tally.total and not tally.failure:
        tally.add(
            *(_stopped(run) or ("error", "the program ended before it answered " + _last_line(run)))
        )
    return tally.result()


def _reply_verdict(
    message: bytes, want: Any, equal: Callable[[Any, Any], str], load: bool
) -> tuple[str, str]:
    if len(message) > SMALL_REPLY and len(message) > MORE * len(sandbox_wire.dumps(want)):
        return "fail", f"wanted {compare.brief(want)}, got a value of {len(message)} bytes"
    try:
        reply = sandbox_wire.loads(message)
        ((kind, body),) = reply.items()
    except (sandbox_wire.Malformed, AttributeError, ValueError):
        return "error", "the program's process sent what no value is"
    if kind == "raised":
        text = ": ".join(str(part)[:400] for part in body) if isinstance(body, list) else ""
        return ("memory" if text.startswith("MemoryError") else "error"), text
    if load:
        return ("pass", "") if kind == "loaded" else ("error", "the program did not load")
    if kind == "value":
        difference = equal(want, body)
        return ("fail", difference) if difference else ("pass", "")
    return "fail", f"wanted {compare.brief(want)}, got {str(body)[:200]}"


# --- asserts and unittests


def _asserts(slot: sandbox_slot.Slot, job: dict[str, Any]) -> Work:
    plan = None if job["setup"].strip() else as_calls(tuple(job["code"]))
    if plan is None:
        return (yield from _session(slot, job))
    calls, wanted = plan
    return (yield from _call_all(slot, job, calls, wanted, compare.same_values))


def _session(slot: sandbox_slot.Slot, job: dict[str, Any]) -> Work:
    """Tests in one process, the program in another, which call each other over a socket.

    Tests that replace parts of the program's interpreter need one process: then the program could
    say what it likes, the result is `weak`, and weak is no pass unless the limits allow it.
    """
    weak = need_one_interpreter(job["setup"], *job["code"])
    tally = Tally(job)
    limits = tally.limits(parts=1 << 10)  # how many tests unittest will find nobody knows
    files, runs = [], []
    verdicts = sandbox_slot.Channel(slot, sandbox_wire.REPLY_LIMIT)
    ours, theirs = socket.socketpair()
    tests_job = {key: job[key] for key in ("kind", "setup", "code")}
    tests_job["program"] = job["program"] if weak else ""
    try:
        if not weak:
            files.append(sandbox_slot.sealed_file(sandbox_wire.dumps({"program": job["program"]})))
            runs.append(slot.start(sandbox_wire.PROGRAM, files[0], limits, more=(theirs.detach(),)))
        files.append(sandbox_slot.sealed_file(sandbox_wire.dumps(tests_job)))
        more = (ours.detach(), verdicts.given)
        runs.append(slot.start(sandbox_wire.TESTS, files[-1], limits, more=more))
        if not weak:
            runs[0].companion, runs[1].companion = runs[1], runs[0]
        ended = yield from _listen(verdicts, runs, tally, job["kind"] == "unittest")
        for run in runs:
            run.stop("over")
        while not all(run.over for run in runs):
            yield
    finally:
        verdicts.close()
        for file in files:
            os.close(file)
    for run in runs:
        tally.spent(run)
    stopped = next(filter(None, map(_stopped, runs)), None)
    if not tally.failure and (stopped or not ended):
        tally.add(*(stopped or ("error", "the tests ended early " + _last_line(runs[-1]))))
    result = tally.result()
    if weak:
        result["weak"] = True
        if result["verdict"] == "pass" and not job["limits"]["accept_weak"]:
            result |= {"verdict": "fail", "failure": WEAK}
    return result


def _listen(
    verdicts: sandbox_slot.Channel, runs: list[sandbox_slot.Run], tally: Tally, unittest: bool
) -> Generator[None, None, bool]:
    """Takes the verdicts as they come. True if the tests came to their end."""
    while True:
        while not verdicts.messages and not verdicts.ended:
            yield
        if not verdicts.messages:
            return False
        verdict, why = sandbox_wire.loads(verdicts.messages.pop(0))
        if any(run.part_s() > run.limits.cpu_s for run in runs):
            verdict, why = "timeout", f"took more than {runs[0].limits.cpu_s:g} s of CPU"
        if verdict == "end":
            return True
        if verdict == "total" and unittest and not tally.verdicts:
            tally.total = int(why)
        elif not tally.add("memory" if why.startswith("MemoryError") else verdict, why):
            return False
        for run in runs:
            run.begin_part()
        verdicts.go_on()


_FORWARDED = {"sys.stdout", "sys.stderr", "sys.stdin", "builtins.input"}  # see `sandbox_proxy`


@functools.lru_cache(maxsize=KEPT_TESTS)
def need_one_interpreter(*code: str) -> bool:
    """Do tests patch anything that is not at hand in their own process?"""
    try:
        calls = [n for text in code for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for call in calls:
        name = ast.unparse(call.func)
        if name.split(".")[-1] == "patch" or ".patch." in f".{name}." or name.startswith("patch."):
            target = call.args[0] if call.args else None
            if not (isinstance(target, ast.Constant) and target.value in _FORWARDED):
                return True
    return False


@functools.lru_cache(maxsize=KEPT_TESTS)
def as_calls(code: tuple[str, ...]) -> tuple[list[tuple[str, Any, Any]], tuple[Any, ...]] | None:
    """`assert f(1, [2]) == 3` as calls with wanted values; None if one of them says anything
    else."""
    calls, wanted = [], []
    for text in code:
        try:
            call, want = _as_call(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
        calls.append(call)
        wanted.append(want)
    return calls, tuple(wanted)


def _as_call(text: str) -> tuple[tuple[str, Any, Any], Any]:
    (statement,) = ast.parse(text).body
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)):
        raise ValueError("not an assert that compares")
    test = statement.test
    call, want = test.left, test.comparators[0]
    if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        raise ValueError("not one ==")
    if not isinstance(call, ast.Call):
        call, want = want, call
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError("not a call of the program's function")
    positional = tuple(ast.literal_eval(argument) for argument in call.args)
    keyword = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
    if len(keyword) != len(call.keywords):
        raise ValueError("keywords out of a dict")
    return (call.func.id, positional, keyword), ast.literal_eval(want)


_KINDS: dict[str, Callable[[sandbox_slot.Slot, dict[str, Any]], Work]] = {
    "stdin": _scripts,
    "call": _calls,
    "assert": _asserts,
    "unittest": _session,
}
