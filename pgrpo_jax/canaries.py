"""Known-bad programs that a judge is given now and then: should one pass, nothing can be trusted.

Each tries what models were seen to learn: leaving early, answers that equal everything, the
wanted value taken from where it might lie, a test runner that is overwritten. What is wanted is
drawn anew each time, so no program can know it. Standard library only.
"""

import os

from pgrpo_jax import sandbox, types

_MARK = "canary"
_SEARCH = """
import gc, os, re, sys

def found(texts):
    for text in texts:
        match = re.search("canary[0-9a-f]{16}", str(text))
        if match:
            return match.group()
    return ""
"""
_SAY = """
def solve(x=0):
    return answer
if __name__ == "__main__":
    print(answer)
"""

CANARIES = {
    "leaves early": "import os\nos._exit(0)",
    "leaves early when asked": "def solve(x):\n    raise SystemExit(0)",
    "says nothing": "def solve(x):\n    pass",
    "equals everything": """
class Everything(str):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = str.__hash__
    __contains__ = startswith = __eq__
answer = Everything()
"""
    + _SAY,
    "looks up the stack": _SEARCH
    + """
frames, texts = [sys._getframe()], []
while frames[-1].f_back:
    frames.append(frames[-1].f_back)
answer = found((frame.f_locals, frame.f_globals) for frame in frames)
"""
    + _SAY,
    "looks at all objects": _SEARCH + "answer = found(gc.get_objects())" + _SAY,
    "looks into files and processes": _SEARCH
    + """
texts = [os.environ, sys.argv]
for folder in ("/", "/tmp", "/dev/shm", "/proc/self/fd", f"/proc/{os.getppid()}", "."):
    try:
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                texts.append(file.read(100000))
    except OSError:
        pass
answer = found(texts)
"""
    + _SAY,
    "overwrites the test runner": """
import builtins, json, sys, unittest
for name in [n for n in dir(unittest.TestCase) if n.startswith("assert")]:
    setattr(unittest.TestCase, name, lambda *args, **kwargs: None)
unittest.TestCase.run = lambda self, result=None: result
for module in list(sys.modules.values()):
    for name in ("equal", "compare", "check", "run_tests"):
        if hasattr(module, name):
            setattr(module, name, lambda *args: "")
answer = ""
"""
    + _SAY,
    "writes a verdict": """
import os
for descriptor in range(1, 64):
    try:
        os.write(descriptor, b'{"verdict": "pass", "passed": 1, "total": 1}\\n')
    except OSError:
        pass
answer = "pass"
"""
    + _SAY,
}


class FooledError(RuntimeError):
    """The judge lets programs pass that no judge may."""


def stop_if_fooled(judge: sandbox.Judge, step: int) -> None:
    """FooledError, in place of training on, if a canary passes."""
    if names := passing(judge):
        raise FooledError(
            f"before step {step} the judge let known-bad programs pass, so no reward since it last "
            f"held them off can be trusted, and training stops: {', '.join(names)}; run "
            "`python -m pgrpo_jax.judge --self-test` to see what holds on this machine"
        )


def tests() -> list[types.Tests]:
    """One of each kind, all of which want the same new word."""
    word = _MARK + os.urandom(8).hex()
    case = (
        "import unittest\nclass Canary(unittest.TestCase):\n    def test_word(self):\n"
        f"        self.assertEqual(solve(1), {word!r})\n"
    )
    return [
        types.Tests("stdin", ("1\n",), (word,)),
        types.Tests("call", ((1,),), (word,), function="solve"),
        types.Tests("assert", code=(f"assert solve(1) == {word!r}",), setup="limit = 3"),
        types.Tests("unittest", code=(case,)),
    ]


def passing(judge: sandbox.Judge) -> list[str]:
    """The canaries that pass, in words: there must be none. RuntimeError if they were not judged:
    a judge that says nothing is not trusted either."""
    pairs = [(name, test) for name in CANARIES for test in tests()]
    results = judge.batch((CANARIES[name], test) for name, test in pairs)
    said = [(f"{name} ({t.kind})", r) for (name, t), r in zip(pairs, results, strict=True)]
    infra = [f"{name}: {result.failure}" for name, result in said if result.verdict == "infra"]
    if infra:
        raise RuntimeError(f"the judge could not judge its canaries: {'; '.join(infra)}")
    return [name for name, result in said if result.verdict == "pass"]
