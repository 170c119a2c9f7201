"""What is written is read back; a continued stage leaves the files that a straight one leaves."""

import json
import math
import pathlib
import signal
import struct
import subprocess
import sys
import types

import hypothesis
import pytest
from hypothesis import strategies
from tensorboardX.proto import event_pb2

from pgrpo_jax import metrics

# Runs as a process of its own: argv is workdir, first step, last step, "kill" or "end".
RUN = """
import os, signal, sys
sys.modules["torch"] = None  # tensorboardX would import it, and do nothing with it
from pgrpo_jax import metrics
workdir, first, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
log = metrics.Log(workdir, "grpo", first_step=first)
for step in range(first, last):
    row = metrics.CompletionRow(
        problem_id=f"p{step}", prompt="é?", completion="<think>\\n", reasoning="", code="",
        verdict="fail", verdicts=("pass", "fail"), tier="landlock",
        rewards={"format": 0.0, "thinking": None}, advantage=step / 7, length=3, truncated=False)
    log.metrics(step, {"reward": step / 3})
    log.completions(step, [row, row])
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
log.close()
"""


def run_stage(workdir: pathlib.Path, first: int, last: int, end: str) -> int:
    command = [sys.executable, "-c", RUN, str(workdir), str(first), str(last), end]
    root = pathlib.Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, check=False).returncode


def row(**values) -> metrics.CompletionRow:
    plain = metrics.CompletionRow(
        problem_id="p",
        prompt="add",
        completion="<think>x</think><answer>y</answer>",
        reasoning="x",
        code="y",
        verdict="pass",
        verdicts=("pass",),
        tier="landlock",
        rewards={"format": 1.0, "outcome": 1.0, "thinking": 0.5, "short": 0.1},
        advantage=0.25,
        length=9,
        truncated=False,
    )
    return metrics.dataclasses.replace(plain, **values)


def test_a_killed_and_continued_run_has_the_files_of_a_straight_one(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_stage(straight, 0, 9, "end") == 0
    assert run_stage(broken, 0, 7, "kill") == -signal.SIGKILL
    for name in ("metrics.jsonl", "completions.jsonl"):  # a row that the kill cut short
        with open(broken / name, "a") as file:
            file.write('{"step": 7, "stage": "gr')
    assert run_stage(broken, 4, 9, "end") == 0  # the checkpoint was of step 4
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes()
        assert len(list(metrics.read_rows(broken / name))) == (9 if name[0] == "m" else 18)


def test_a_stage_drops_no_row_of_another(tmp_path):
    for stage in ("sft", "grpo"):
        with metrics.Log(tmp_path, stage) as log:
            for step in range(4):
                log.metrics(step, {"loss": step})
    with metrics.Log(tmp_path, "sft", first_step=2) as log:
        log.metrics(2, {"loss": 20})
    seen = [
        (r["stage"], r["step"], r["loss"]) for r in metrics.read_rows(tmp_path / "metrics.jsonl")
    ]
    grpo = [("grpo", step, step) for step in range(4)]
    assert seen == [("sft", 0, 0), ("sft", 1, 1), *grpo, ("sft", 2, 20)]


def test_a_completion_comes_back_as_it_was(tmp_path):
    with metrics.Log(tmp_path, "grpo") as log:
        log.completions(3, [row(), row(reasoning="line\n\u2028 é", verdicts=("pass", "timeout"))])
    first, second = metrics.read_rows(tmp_path / "completions.jsonl")
    assert first["step"] == 3 and first["stage"] == "grpo"
    assert first["rewards"] == {"format": 1.0, "outcome": 1.0, "thinking": 0.5, "short": 0.1}
    assert second["reasoning"] == "line\n\u2028 é" and second["verdicts"] == ["pass", "timeout"]


def test_a_value_that_is_not_finite_is_null_so_that_the_file_stays_json(tmp_path):
    with metrics.Log(tmp_path, "grpo") as log:
        log.metrics(0, {"loss": math.nan, "grad_norm": math.inf, "entropy": 0.5})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 0, "stage": "grpo", "loss": None, "grad_norm": None, "entropy": 0.5}
    assert json.loads(text, parse_constant=refuse) == expected


def test_a_broken_line_inside_a_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is not JSON"):
        list(metrics.read_rows(path))


def test_a_process_that_is_not_primary_writes_nothing(tmp_path):
    with metrics.Log(tmp_path / "run", "grpo", primary=False, wandb_project="p") as log:
        log.metrics(0, {"loss": 1.0})
        log.completions(0, [row()])
    assert not (tmp_path / "run").exists()


def events(folder: pathlib.Path) -> list[event_pb2.Event]:
    """The events of a TensorBoard folder; a record is its length (8), crc (4), event, crc (4)."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_tensorboard_gets_every_value_and_is_told_where_a_continued_stage_begins(tmp_path):
    with metrics.Log(tmp_path, "grpo", first_step=5) as log:
        log.metrics(5, {"loss": 0.5, "eval/pass@1": 0.25})
    seen = events(tmp_path / "tensorboard" / "grpo")
    values = [(e.step, v.tag, v.simple_value) for e in seen for v in e.summary.value]
    assert values == [(5, "loss", 0.5), (5, "eval/pass_1", 0.25)]
    assert [e.step for e in seen if e.session_log.status == 1] == [5]  # START: purge steps >= 5


def test_wandb_that_is_missing_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb is not installed: `pip install wandb`"):
        metrics.Log(tmp_path, "sft", wandb_project="mine")


def test_wandb_gets_the_rows_and_a_continued_stage_goes_on_in_its_own_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    wandb = types.SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 1):
        with metrics.Log(
            tmp_path / "r", "sft", first_step=first_step, wandb_project="p", settings={"seed": 1}
        ) as log:
            log.metrics(first_step, {"loss": 0.5})
    assert logged == [(0, {"loss": 0.5}), "end", (1, {"loss": 0.5}), "end"]
    assert started[0] == started[1]
    assert started[0]["resume"] == "allow" and started[0]["name"] == "r/sft"
    assert started[0]["config"] == {"seed": 1}


def test_a_json_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "summary.json"
    metrics.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        metrics.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_wilson_by_hand():
    # 8 of 10, z = 1.96, z^2 = 3.8415: center (0.8 + 0.192073) / 1.384146 = 0.716739,
    # half 1.416023 * sqrt(0.016 + 0.0096036) = 1.416010 * 0.160011 = 0.226577.
    assert metrics.wilson_interval(8, 10) == pytest.approx((0.490162, 0.943316), abs=2e-6)
    # 0 of 10: both halves are z^2 / (2 n (1 + z^2 / n)), so low is 0 and high 0.384146 / 1.384146.
    assert metrics.wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=2e-6)


@hypothesis.given(strategies.integers(1, 2000), strategies.floats(0, 1))
def test_wilson_holds_the_share_and_mirrors(n, share):
    passed = share * n
    low, high = metrics.wilson_interval(passed, n)
    assert 0 <= low <= passed / n + 1e-12 and passed / n - 1e-12 <= high <= 1
    assert metrics.wilson_interval(n - passed, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("passed", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_an_interval_of_nothing_is_refused(passed, n):
    with pytest.raises(ValueError, match="0 <= passed <= n and n >= 1"):
        metrics.wilson_interval(passed, n)


def test_two_stages_write_side_by_side_and_neither_loses_a_row(tmp_path):
    with metrics.Log(tmp_path, "grpo") as steps, metrics.Log(tmp_path, "evaluate") as tests:
        steps.metrics(0, {"loss": 1.0})
        tests.metrics(0, {"eval/pass@1": 0.5})
        steps.metrics(1, {"loss": 0.5})
    rows = [(row["stage"], row["step"]) for row in metrics.read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [("grpo", 0), ("evaluate", 0), ("grpo", 1)]
