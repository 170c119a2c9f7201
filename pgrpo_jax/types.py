"""The plain values that the parts hand to each other: problems, tests, results, completions."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # a judge at a command line starts without
    import numpy as np

Verdict = Literal["pass", "fail", "timeout", "memory", "error", "infra"]
TestKind = Literal["stdin", "call", "assert", "unittest"]
Comparison = Literal["lines", "tokens", "floats", "unordered_lines", "exact"]


@dataclasses.dataclass(frozen=True)
class Tests:
    """Every test of one problem, in one of four kinds.

    stdin     the program is a script; `inputs[i]` is its standard input, `outputs[i]` its output
    call      `function` is called with the arguments `inputs[i]` (a tuple) for `outputs[i]`;
              `wrapped`: an output that is a list of one may stand for what is in it
    assert    `code[i]` is a statement that must not raise, run after the program and `setup`
    unittest  `code` holds one module with `unittest.TestCase` classes

    What scripts print is compared as `compare` says, see `compare.TEXT`, unless there is a
    `checker`: "module:function" of yours, f(input, wanted, printed) -> bool, which is trusted, or
    the source of a program that is not, see `sandbox_check`.
    """

    kind: TestKind
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    code: tuple[str, ...] = ()
    function: str = ""
    setup: str = ""
    compare: Comparison = "lines"
    checker: str = ""
    wrapped: bool = False

    def __post_init__(self):
        for name, value, known in (
            ("kind", self.kind, get_args(TestKind)),
            ("compare", self.compare, get_args(Comparison)),
        ):
            if value not in known:
                raise ValueError(f"{name!r} must be one of {', '.join(known)}, got {value!r}")
        if self.kind != "stdin" and (self.checker or self.compare != "lines"):
            raise ValueError(f"`compare` and `checker` are for stdin tests, got kind {self.kind!r}")
        if self.kind in ("stdin", "call") and len(self.inputs) != len(self.outputs):
            raise ValueError(
                f"tests of kind {self.kind!r} need one output for each input, got "
                f"{len(self.inputs)} inputs and {len(self.outputs)} outputs"
            )
        if self.kind == "call" and not self.function:
            raise ValueError("tests of kind 'call' need `function`, the name to call")
        if len(self) == 0:
            raise ValueError(
                f"a problem has no tests of kind {self.kind!r}; "
                "a program cannot pass nothing: drop the problem"
            )

    def __len__(self) -> int:
        return len(self.code) if self.kind in ("assert", "unittest") else len(self.inputs)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One task: what the policy is asked, and how its program is judged.

    `columns` are the row's other columns; a user's reward function gets them by name.
    """

    id: str
    statement: str
    tests: Tests
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """The judge's word on one program.

    `verdicts` has one entry a test that ran. `failure` says in words what the first failing test
    wanted and got, trimmed. "infra" is a failure of the judge: retried, then left out of the
    batch, never a zero. `cpu_s` and `wall_s` are seconds over all tests, `peak_mb` is megabytes.
    `tier` is the jail that held the program and `denied` names the system calls that it refused.
    `weak`: the tests need the program's own interpreter, where it can say what it likes.
    """

    verdict: Verdict
    passed: int
    total: int
    verdicts: tuple[Verdict, ...] = ()
    failure: str = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_mb: float = 0.0
    weak: bool = False
    tier: str = ""
    denied: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer, its token ids carried end to end.

    `ids` and `logps` (float32, of the sampled tokens at the sampling temperature) have equal length
    and include the stop token, unless `truncated`: then the length limit cut the answer. `group`
    numbers the prompt inside its batch, `sample` the answer inside its group.
    """

    problem: Problem
    prompt_ids: "np.ndarray"
    ids: "np.ndarray"
    logps: "np.ndarray"
    truncated: bool
    group: int
    sample: int
