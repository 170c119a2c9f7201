"""The attack set and the honest set: no hostile program passes, no honest one fails, nothing
stays."""

import json
import os
import pathlib
import re
import time

import judges
import pytest

from pgrpo_jax import config, sandbox, types

DATA = pathlib.Path(__file__).parent / "data" / "judge"
LIMITS = {"workers": 4, "timeout_s": 0.4, "memory_mb": 256, "output_kb": 600}
WORDS = ("7919-kestrel", "104729-osprey")  # what no program can know
SECRETS = {
    "stdin": types.Tests("stdin", ("1\n", "2\n"), WORDS),
    "call": types.Tests("call", ((1,), (2,)), WORDS, function="solve"),
    "assert": types.Tests(
        "assert",
        code=(f"assert solve(1) == {WORDS[0]!r}", "assert abs(ratio(2) - 0.7919) < 1e-9"),
        setup="limit = 3",
    ),
    "unittest": types.Tests(
        "unittest",
        code=(
            "import unittest\nclass T(unittest.TestCase):\n"
            f"    def test_a(self):\n        self.assertEqual(solve(1), {WORDS[0]!r})\n"
            f"    def test_b(self):\n        self.assertTrue(solve(2).startswith({WORDS[1]!r}))\n",
        ),
    ),
}
OUTSIDE = ("/", "/etc", "/dev/shm", "/var/tmp", "/tmp", "/run", str(pathlib.Path.home()), str(DATA))


def sections(name: str) -> list[tuple[str, str]]:
    """(heading, program) pairs of a file."""
    parts = (DATA / name).read_text(encoding="utf-8").split("\n======== ")[1:]
    return [tuple(part.split("\n", 1)) for part in parts]


def hostile() -> list[tuple[str, str, str]]:
    found = []
    for heading, program in sections("hostile.txt"):
        name, kinds = re.fullmatch(r"(.*) \[(.*)\]", heading).groups()
        found += [(name, kind, program) for kind in kinds.split()]
    return found


def honest() -> list[tuple[str, types.Tests, str]]:
    found = []
    for heading, program in sections("honest.txt"):
        name, _, text = heading.partition(" {")
        fields = json.loads("{" + text)
        if fields["kind"] == "call":
            fields["inputs"] = [tuple(arguments) for arguments in fields["inputs"]]
        found.append(
            (
                name,
                types.Tests(
                    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
                ),
                program,
            )
        )
    return found


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def judge(request):
    if not judges.tier_is_possible(request.param):
        pytest.skip(f"this kernel or container has no {request.param}")
    with sandbox.Judge(config.JudgeConfig(tier=request.param, **LIMITS)) as made:
        yield made


def surroundings() -> set[str]:
    """Files outside of every jail that bear a name from one of the programs: others work here
    too."""
    text = (DATA / "hostile.txt").read_text(encoding="utf-8")
    seen = [(f, name) for f in OUTSIDE if os.access(f, os.R_OK) for name in os.listdir(f)]
    return {os.path.join(folder, name) for folder, name in seen if name in text}


def processes_below(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *processes_below(child))]


def test_no_honest_program_fails(judge):
    names, tests, programs = zip(*honest(), strict=True)
    # More time than the hostile ones get: some compute, and machines are slow at times.
    futures = [judge.submit(p, t, timeout_s=3) for p, t in zip(programs, tests, strict=True)]
    results = [future.result() for future in futures]
    failed = {n: r for n, r in zip(names, results, strict=True) if r.verdict != "pass"}
    assert not failed
    assert len(names) >= 80


def test_no_hostile_program_passes_and_nothing_is_left_behind(judge):
    files, processes = surroundings(), sorted(processes_below(os.getpid()))
    names, kinds, programs = zip(*hostile(), strict=True)
    results = judge.batch((p, SECRETS[k]) for p, k in zip(programs, kinds, strict=True))
    found = list(zip(names, kinds, results, strict=True))
    assert not [(n, k, r) for n, k, r in found if r.verdict == "pass"]
    assert not [(n, k, r) for n, k, r in found if r.verdict == "infra"]
    assert len(set(names)) >= 80
    assert surroundings() <= files
    deadline = time.monotonic() + 5
    while sorted(processes_below(os.getpid())) != processes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes_below(os.getpid())) == len(processes)
    name, tests, program = honest()[0]
    assert judge.submit(program + "\n# after all that", tests).result().verdict == "pass"
