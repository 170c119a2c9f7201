"""Who says whether what a script printed is right: a comparer, a trusted function, or a program.

A checker program is jailed like any other, and reads as testlib's checkers do: the files named by
its three arguments hold the input, the output and the answer; exit status 0 is right, 1 and 2 are
wrong, anything else is a failure of the checker. It runs after the judged program has ended and its
scratch folder was emptied, so that the answer meets the program nowhere.

Part of the sandbox: standard library only.
"""

import functools
import importlib
import os
import re
from collections.abc import Callable, Generator
from typing import Any

from pgrpo_jax import compare, sandbox_slot, sandbox_wire

CPU_S, MEMORY_MB, OUTPUT_KB = 10.0, 512, 64
WRONG = (1, 2)
_NAME = re.compile(r"[\w.]+:\w+")


def difference(
    slot: sandbox_slot.Slot, job: dict[str, Any], given: str, want: str, got: bytes
) -> Generator[None, None, str]:
    """ "" if a script may answer `got` where it was given `given`, else what is wrong with it."""
    checker = job["checker"]
    if not checker:
        return compare.TEXT[job["compare"]](want, got)
    if _NAME.fullmatch(checker):
        return _asked(_trusted(checker), checker, given, want, got)
    return (yield from _jailed(slot, checker, given, want, got))


@functools.lru_cache
def _trusted(name: str) -> Callable[[str, str, str], bool]:
    module, _, function = name.partition(":")
    try:
        return vars(importlib.import_module(module))[function]
    except Exception as error:  # importing runs code of any kind
        raise sandbox_slot.InfraError(
            f"the checker {name!r} cannot be imported: {error!r}"
        ) from error


def _asked(
    function: Callable[[str, str, str], bool], name: str, given: str, want: str, got: bytes
) -> str:
    try:
        right = function(given, want, got.decode("utf-8", "surrogateescape"))
    except Exception as error:
        raise sandbox_slot.InfraError(f"the checker {name!r} raised {error!r}") from error
    return "" if right is True else f"{name} refuses {compare.brief(got)}"


def _jailed(
    slot: sandbox_slot.Slot, source: str, given: str, want: str, got: bytes
) -> Generator[None, None, str]:
    files = {"input": given, "output": got, "answer": want}
    file = sandbox_slot.sealed_file(sandbox_wire.dumps({"program": source, "files": files}))
    limits = sandbox_slot.Limits(CPU_S, MEMORY_MB, OUTPUT_KB, sandbox_slot.SCRATCH_MB)
    try:
        run = slot.start(sandbox_wire.CHECKER, file, limits)
        while not run.over:
            yield
    finally:
        os.close(file)
    said = " ".join(bytes(run.errors or run.output)[-300:].decode("utf-8", "replace").split())
    if run.status == 0 and not run.stopped:
        return ""
    if run.status in WRONG and not run.stopped:
        return said or "the checker refuses the output"
    raise sandbox_slot.InfraError(f"the checker ended with {run.stopped or run.status}: {said}")
