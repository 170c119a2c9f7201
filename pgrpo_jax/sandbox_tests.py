"""The tests' process of a pair: it runs tests of kind assert or unittest, the program runs in
another.

What the tests know of the program goes through `sandbox_proxy`. One message for every test goes to
the judge, over a pipe that the program's process does not have: "pass", or what went wrong.

Part of the sandbox: standard library only.
"""

import builtins
import importlib
import os
import sys
import types
from typing import Any

from pgrpo_jax import sandbox_proxy, sandbox_run, sandbox_wire

NAME = "tests"


def run() -> None:
    """Plays the role with the descriptors at their places. Never returns."""
    job = sandbox_wire.loads(sandbox_run.read_job())
    say = sandbox_run.speaker(sandbox_run.VERDICTS)

    def tell(verdict: str, why: str = "") -> None:
        """The judge lets the next test begin: its clock counts from there."""
        say(sandbox_wire.dumps((verdict, why[:2000])))
        os.read(sandbox_run.VERDICTS, 1)

    try:
        tests = sandbox_run.module(NAME)
        _introduce(job, tests)
        {"assert": _asserts, "unittest": _unittest}[job["kind"]](job, tests, tell)
        tell("end")
    except BaseException as error:
        tell("error", ": ".join(sandbox_run.describe(error)))
    os._exit(0)


def _introduce(job: dict[str, Any], tests: types.ModuleType) -> None:
    """Gives the tests the program's names, in one interpreter (`weak`) or through a link.

    What the tests lean on stays out of the program's reach: builtins and the names of standard
    modules are never taken from it.
    """
    if job["program"]:
        sandbox_run.load(job["program"], tests)
        return
    link = sandbox_proxy.Link(sandbox_run.CHANNEL, guarded=True, names=lambda classes: {})
    mentioned = sandbox_proxy.mentioned_names(job["setup"], *job["code"])
    for name, value in link.ask("names", True).items():
        if name in mentioned and name.lstrip("_")[:1].isupper():
            link.trust(value)
    for name, value in link.ask("names", False).items():
        if name in sys.stdlib_module_names and not name.startswith("_"):
            tests.__dict__[name] = importlib.import_module(name)
        elif name not in vars(builtins):
            tests.__dict__[name] = value


def _asserts(job: dict[str, Any], tests: types.ModuleType, tell: Any) -> None:
    exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), tests.__dict__)
    for text in job["code"]:
        try:
            exec(compile(text, "test.py", "exec", dont_inherit=True), tests.__dict__)
            tell("pass")
        except AssertionError as error:
            tell("fail", f"{_failing_line(error, job)} {error}")
        except sandbox_proxy.Gone:
            raise
        except BaseException as error:
            tell("error", ": ".join(sandbox_run.describe(error)))


def _failing_line(error: BaseException, job: dict[str, Any]) -> str:
    """The line of the tests that raised, as it is written."""
    sources = {"setup.py": job["setup"], "test.py": "\n".join(job["code"])}
    found, trace = "", error.__traceback__
    while trace is not None:
        source = sources.get(trace.tb_frame.f_code.co_filename)
        if source is not None:
            found = source.split("\n")[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return found[:300]


# --- unittest


def _unittest(job: dict[str, Any], tests: types.ModuleType, tell: Any) -> None:
    import unittest  # large, and most runs do without

    unittest.main = lambda *_, **__: None  # type: ignore[assignment, misc]
    exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), tests.__dict__)
    for text in job["code"]:
        exec(compile(text, "test.py", "exec", dont_inherit=True), tests.__dict__)
    suite = unittest.defaultTestLoader.loadTestsFromModule(tests)
    tell("total", str(suite.countTestCases()))
    result = _Result(tell)
    suite.run(result)  # type: ignore[arg-type]  # unittest wants but these methods
    if result.outside:
        raise AssertionError(result.outside)


class _Result:
    """What unittest reports to. Tells the verdict of each test as it ends; a skipped one has not
    passed."""

    shouldStop = failfast = buffer = False

    def __init__(self, tell: Any):
        self._tell = tell
        self._verdict: tuple[str, str] | None = None
        self._running = False
        self.outside = ""  # what failed outside of every test: setUpClass and the like

    def startTest(self, test: Any) -> None:
        self._verdict, self._running = None, True

    def stopTest(self, test: Any) -> None:
        self._running = False
        verdict, why = self._verdict or ("error", "the test did not end")
        self._tell(verdict, f"{test}: {why}" if why else "")

    def _note(self, verdict: str, why: str) -> None:
        if self._running:
            self._verdict = self._verdict or (verdict, why)
        else:
            self.outside = self.outside or why

    def addError(self, test: Any, err: Any) -> None:
        self._note("error", ": ".join(sandbox_run.describe(err[1])))
        if isinstance(err[1], sandbox_proxy.Gone):
            raise err[1]

    def addFailure(self, test: Any, err: Any) -> None:
        self._note("fail", ": ".join(sandbox_run.describe(err[1])))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._note("fail", f"{subtest}: {': '.join(sandbox_run.describe(err[1]))}")

    def addSkip(self, test: Any, reason: str) -> None:
        self._note("fail", f"skipped: {reason}")

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._note("fail", "passed although it was expected to fail")

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self._note("pass", "")

    def addSuccess(self, test: Any) -> None:
        self._note("pass", "")

    def addDuration(self, test: Any, elapsed: float) -> None:
        pass
