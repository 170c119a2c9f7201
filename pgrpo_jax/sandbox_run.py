"""The code around a judged program inside its process: run it as a script, or serve calls to it.

Everything here shares the interpreter with the program and can be changed by it. That is no matter:
nothing here knows what is wanted, and what it says is taken for values, never for verdicts.

Part of the sandbox: standard library only.
"""

import _sitebuiltins
import atexit
import builtins
import io
import os
import sys
import threading
import types
from typing import Any

from pgrpo_jax import sandbox_proxy, sandbox_wire

JOB, CHANNEL, VERDICTS = 3, 4, 5  # descriptors, if the role has them
FILE = "program.py"
_FRAMES_BELOW = 12  # of the sandbox's own, under a program's first: about as many as there are

# What LeetCode, and LiveCodeBench's runner after it, give a `class Solution`.
PRELUDE = """
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator
import random, re
import statistics, string, sys, time, typing
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from json import *
from builtins import *
from typing import *
import random, copy, datetime, bisect, re
"""

_REHEARSALS = 20  # the interpreter has made up its mind after about half as many
_REHEARSED_INPUT = b"2\n3 4\n5 6\n"
_REHEARSED = """
import sys
count = int(input())
a, b = map(int, input().split())
print(a + b)
for line in sys.stdin:
    numbers = [int(word) for word in line.split()]
    print(f"{count} {sum(numbers)}")
"""
_REHEARSED_FUNCTION = """
def add(a, b):
    return a + b
"""


def install_builtins() -> None:
    """`exit`, `quit` and the like, which the site module would have put there."""
    end = "Ctrl-D (i.e. EOF)"
    builtins.exit = _sitebuiltins.Quitter("exit", end)  # type: ignore[assignment]
    builtins.quit = _sitebuiltins.Quitter("quit", end)  # type: ignore[assignment]
    builtins.help = _sitebuiltins._Helper()  # type: ignore[assignment]


def run(role: int) -> None:
    """Plays a role with the descriptors that lie at their places. Never returns."""
    job = read_job()
    if role == sandbox_wire.SCRIPT:
        _script(job.decode("utf-8", "surrogatepass"))
    elif role == sandbox_wire.CALLS:
        _calls(sandbox_wire.loads(job))
    elif role == sandbox_wire.CHECKER:
        _checker(sandbox_wire.loads(job))
    else:
        _serve(sandbox_wire.loads(job))


def read_job() -> bytes:
    """What the judge wrote for this run. By position: the runs of a program share the
    description."""
    size = os.fstat(JOB).st_size
    data = b""
    while len(data) < size:
        data += os.pread(JOB, size - len(data), len(data))
    os.close(JOB)
    return data


def open_streams() -> None:
    """sys.stdin, stdout and stderr as a new interpreter makes them."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        raw = io.FileIO(descriptor, mode, closefd=False)
        raw.name = f"<{name}>"
        buffer = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        errors = "backslashreplace" if name == "stderr" else "surrogateescape"
        stream = io.TextIOWrapper(buffer, "utf-8", errors, line_buffering=name == "stderr")
        stream.mode = mode  # type: ignore[misc]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def module(name: str) -> types.ModuleType:
    """An empty module in `sys.modules`, for a program of a file."""
    made = types.ModuleType(name)
    file = f"{os.getcwd()}/{FILE}"
    made.__dict__.update(__builtins__=builtins, __file__=file, __annotations__={})
    sys.modules[name] = made
    sys.argv = [FILE]
    sys.setrecursionlimit(1000 + _FRAMES_BELOW)
    return made


def rehearse() -> None:
    """Runs and calls small programs on the descriptors 0, 1 and 2, before there are children.

    An interpreter learns as it goes: which attributes types have, what its instructions meet. Each
    child would learn that anew, and write it into pages that it has to copy first.
    """
    kept, limit = sys.modules["__main__"], sys.getrecursionlimit()
    call = sandbox_wire.dumps(("add", (1, 2), {}))
    os.write(0, _REHEARSED_INPUT)
    for _ in range(_REHEARSALS):
        os.lseek(0, 0, os.SEEK_SET)
        open_streams()
        main = module("__main__")
        if _execute(_REHEARSED, main) != 0 or not _flush():
            raise OSError("a first small program failed in the jail")
        main.__dict__.clear()
        program = module("solution")
        load(_REHEARSED_FUNCTION, program)
        _answer(program, sandbox_wire.loads(call), sandbox_wire.dumps)
    del sys.modules["solution"]
    sys.modules["__main__"] = kept
    sys.setrecursionlimit(limit)


# --- a script


def _script(source: str) -> None:
    main = module("__main__")
    _leave_source(source)
    _leave(_execute(source, main), main)


def _leave_source(source: str) -> None:
    """Where programs that read themselves find it; the others do without, which is quicker."""
    if "__file__" in source or "sys.argv" in source or "inspect" in source:
        with open(FILE, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(source)


def _checker(job: dict[str, Any]) -> None:
    """A script with files for arguments, whose exceptions are not to be taken for its answer."""
    main = module("__main__")
    for name, content in job["files"].items():
        with open(name, "wb") as file:
            file.write(content if type(content) is bytes else content.encode("utf-8", "replace"))
    sys.argv = [FILE, *job["files"]]
    _leave(_execute(job["program"], main, failed=3), main)


def _execute(source: str, main: types.ModuleType, failed: int = 1) -> int:
    """Runs a program as `python program.py` does, and returns its exit status."""
    try:
        exec(_compiled(source), main.__dict__)
    except SystemExit as exit_:
        return _status(exit_.code)
    except BaseException as error:
        _show(error)
        return failed
    return 0


def _compiled(source: str) -> types.CodeType:
    """A file may begin with a byte order mark, which `compile` takes for a part of text."""
    return compile(source.removeprefix("\ufeff"), FILE, "exec", dont_inherit=True)


def _status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return int(code) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _show(error: BaseException) -> None:
    """The traceback, without the frame that called the program."""
    trace = error.__traceback__ and error.__traceback__.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def _leave(status: int, main: types.ModuleType) -> None:
    """What an interpreter does at its end: threads, atexit, buffers, its own streams back in their
    places, `__del__`."""
    whole = True
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        whole = _flush()
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        main.__dict__.clear()
    except SystemExit:
        pass
    except BaseException as error:
        _show(error)
    os._exit(status if _flush() and whole else status or 120)


def _flush() -> bool:
    whole = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            whole = False
    return whole


# --- calls


def _calls(job: dict[str, Any]) -> None:
    """Loads the program, then answers the calls of a job in order, one message each, after one for
    the load. The judge lets it begin with each: its clock counts from there."""
    dumps, loads, read, say = sandbox_wire.dumps, sandbox_wire.loads, os.read, speaker(CHANNEL)
    program = module("solution")
    try:
        load(job["program"], program)
    except BaseException as error:
        say(dumps({"raised": describe(error)}))
        os._exit(0)
    say(dumps({"loaded": True}))
    for call in job["calls"]:
        if not read(CHANNEL, 1):
            break
        say(_answer(program, loads(call), dumps))
    os._exit(0)


def load(source: str, program: types.ModuleType) -> None:
    """Executes a program that is not the main script. A `class Solution` gets its usual prelude."""
    if "class Solution" in source:
        exec(PRELUDE, program.__dict__)
        sys.setrecursionlimit(50_000)
    _leave_source(source)
    exec(_compiled(source), program.__dict__)


def find(program: types.ModuleType, name: str) -> Any:
    """A method of the module's `class Solution`, or a function."""
    if hasattr(program.__dict__.get("Solution"), name):
        return getattr(program.__dict__["Solution"](), name)
    for known in (program.__dict__, vars(builtins)):
        if name in known:
            return known[name]
    raise NameError(f"name {name!r} is not defined")


def _answer(program: types.ModuleType, call: tuple[Any, Any, Any], dumps: Any) -> bytes:
    name, positional, keyword = call
    try:
        value = find(program, name)(*positional, **keyword)
    except BaseException as error:
        return dumps({"raised": describe(error)})
    try:
        said = dumps({"value": value})
    except sandbox_wire.Unpackable as problem:
        return dumps({"other": str(problem)})
    except BaseException as error:
        return dumps({"raised": describe(error)})
    return (
        said
        if len(said) <= sandbox_wire.REPLY_LIMIT
        else dumps({"other": "a value too large to read"})
    )


def describe(error: BaseException) -> list[str]:
    """The kind of an exception and what it says."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return [str(type(error).__name__)[:100], text[:400]]


# --- serving the tests' process


def _serve(job: dict[str, Any]) -> None:
    """Loads the program, then does what the tests' process asks for, until that ends."""
    program = module("solution")
    failure: list[BaseException] = []

    def names(classes: bool) -> dict[str, Any]:
        if failure:
            raise failure[0]
        public = [(k, v) for k, v in program.__dict__.items() if not k.startswith("__")]
        return {k: v for k, v in public if not classes or isinstance(v, type)}

    link = sandbox_proxy.Link(CHANNEL, guarded=False, names=names)
    sys.stdout = link.printed
    builtins.input = lambda prompt="": link.ask("input", str(prompt))
    try:
        load(job["program"], program)
    except BaseException as error:
        failure.append(error)
    link.serve()
    os._exit(0)


def speaker(descriptor: int) -> Any:
    """A function that sends one message."""

    def say(body: bytes) -> None:
        data = memoryview(sandbox_wire.frame(body))
        while data:
            data = data[os.write(descriptor, data) :]

    return say
