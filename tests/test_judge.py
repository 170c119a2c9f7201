"""The command that judges files of programs: all lines answered, in order, when they are judged."""

import io
import json
import subprocess
import sys
import time

import judges
import pytest

from pgrpo_jax import canaries, config, judge, sandbox, types

ADDS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
LINES = [
    {"id": "right", "program": "print(sum(map(int, input().split())))", "tests": ADDS},
    {"id": 2, "program": "print(3)", "tests": ADDS},
    {"id": "slow", "program": "while True: pass", "tests": ADDS, "timeout_s": 0.2},
    {"id": "large", "program": "x = bytearray(10**8)", "tests": ADDS, "memory_mb": 64},
    {
        "id": "call",
        "program": "def f(x): return -x",
        "tests": ["assert f(1) == -1"],
        "kind": "assert",
    },
]
VERDICTS = ["pass", "fail", "timeout", "memory", "pass"]


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pgrpo_jax.judge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **more)


def test_each_line_is_answered_in_order_with_its_id_and_all_that_a_result_has(tmp_path):
    file = tmp_path / "programs.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES)))
    done = run(str(file), "--workers", "2")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["id"] for f in found] == [line["id"] for line in LINES]
    assert [f["verdict"] for f in found] == VERDICTS
    assert done.returncode == 0 and "2 pass" in done.stderr
    fields = {"id", *types.Result.__dataclass_fields__}
    assert all(f.keys() == fields for f in found)


def test_malformed_lines_are_answered_in_their_place_and_no_other_is_lost(tmp_path):
    file = tmp_path / "programs.jsonl"
    good = json.dumps(LINES[0])
    bad = ["{", "[1]", '{"id": 7, "program": "x"}', good.replace('"timeout', "")]
    bad[3] = json.dumps({**LINES[0], "timeout_s": "2"})
    file.write_text("\n".join([good, *bad, "", good]))
    done = run(str(file))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["verdict"] for f in found] == ["pass", *["infra"] * 4, "pass"]
    assert [f["id"] for f in found] == ["right", None, None, 7, "right", "right"]
    sentences = [f["failure"] for f in found[1:-1]]
    for number, (sentence, words) in enumerate(
        zip(
            sentences,
            ("no JSON", "got a list", "'tests' is missing", "above 0, got '2'"),
            strict=True,
        ),
        2,
    ):
        assert f"line {number}" in sentence and words in sentence and sentence in done.stderr
    assert done.returncode == 1


def test_a_line_of_standard_input_is_answered_before_the_next_is_written():
    command = [sys.executable, "-m", "pgrpo_jax.judge", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        for line in LINES[:2]:
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == line["id"]
        process.stdin.close()
        assert process.wait(20) == 0


def test_the_command_needs_the_standard_library_only():
    program = "import sys, pgrpo_jax.judge; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    foreign = set(done.stdout.split()) - sys.stdlib_module_names - {"pgrpo_jax", "__main__"}
    assert not {name for name in foreign if not name.startswith("_")}


def test_the_self_test_names_what_is_held_off_in_each_tier_that_is_possible():
    possible = [tier for tier in judge.TIERS if judges.tier_is_possible(tier)]
    done = run("--self-test")
    assert done.returncode == (0 if possible else 1)
    for tier in possible:
        assert f"\n{tier}: " in "\n" + done.stdout
    assert done.stdout.count("read a file outside") == len(possible)
    assert done.stdout.count("known-bad programs: none passed") == len(possible)


def test_without_a_file_or_with_limits_that_are_none_it_says_so():
    assert "wanted either a file" in run().stderr
    done = run("-", "--timeout-s", "-1", input="")
    assert done.returncode == 2 and "timeout_s must be above 0" in done.stderr
    assert run("/nonexistent.jsonl").returncode == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"\xff", "no JSON at all"),
        (b'{"id": true, "program": "", "tests": []}', "'id' must be text or an integer, got True"),
        (b'{"id": 1, "program": 3, "tests": []}', "'program' must be text, got 3"),
        (b'{"id": 1, "program": "", "tests": [], "timeout": 3}', "did you mean 'timeout_s'"),
        (b'{"id": 1, "program": "", "tests": [], "memory_mb": 0}', "megabytes above 0, got 0"),
        (b'{"id": 1, "program": "", "tests": []}', "no tests"),
    ],
)
def test_a_malformed_line_is_refused_with_a_sentence_that_names_it(line, sentence):
    with pytest.raises(ValueError, match=f"^f, line 3.*{sentence}"):
        judge.parse(line, "f, line 3")


def test_a_reader_that_is_slower_than_the_judge_loses_nothing():
    lines = [json.dumps({**LINES[0], "id": i, "program": f"print({i})"}) for i in range(300)]
    stream = io.BytesIO("\n".join(lines).encode())
    with sandbox.Judge(config.JudgeConfig(workers=1, queue=8)) as made:
        for number, answer in enumerate(judge.answers(made, stream, "f")):
            assert answer["id"] == number
            time.sleep(0.001)
    assert number == 299


def test_no_canary_passes_and_a_judge_that_is_fooled_is_found_out():
    with sandbox.Judge(config.JudgeConfig(workers=1)) as made:
        assert canaries.passing(made) == []

    class Fooled:
        def __init__(self, verdict):
            self.verdict = verdict

        def batch(self, pairs):
            return [types.Result(self.verdict, 1, 1) for _ in pairs]

    assert len(canaries.passing(Fooled("pass"))) == 4 * len(canaries.CANARIES)
    with pytest.raises(RuntimeError, match="could not judge its canaries: leaves early"):
        canaries.passing(Fooled("infra"))


def test_training_stops_with_a_sentence_when_a_canary_passes():
    class Fooled:
        def batch(self, pairs):
            return [types.Result("pass", 1, 1) for _ in pairs]

    with pytest.raises(
        canaries.FooledError, match=r"before step 50 .* training stops: leaves early"
    ):
        canaries.stop_if_fooled(Fooled(), 50)
