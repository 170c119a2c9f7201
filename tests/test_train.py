"""The whole job, from the settings to the report, with every real part."""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import chat_tokenizer
import numpy as np
import pytest
import safetensors.numpy

from pgrpo_jax import cli, config, fit, metrics, start, train

MBPP = str(pathlib.Path(__file__).parent / "data/problems/mbpp.jsonl")
STEPS = 4


class Presses:
    """Whether Ctrl-C is pressed in a call of `brevity`, and how many calls there were."""

    at: int | None = None
    calls: int = 0


def brevity(prompts, completions, **columns):
    """A reward that even a policy of random tokens gets some of."""
    Presses.calls += 1
    if Presses.calls == Presses.at:
        os.kill(os.getpid(), signal.SIGINT)
    return [-len(completion) / 100 for completion in completions]


def replace(settings, **fields):
    """The tree with some fields of some branches changed: section=dict(field=value)."""
    changed = {
        name: dataclasses.replace(getattr(settings, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in fields.items()
    }
    return dataclasses.replace(settings, **changed)


def small(workdir: pathlib.Path, **fields) -> config.Config:
    """`tiny` in a few steps of a few rows; it learns nothing, but all of it runs."""
    arch = config.Architecture(
        vocab_size=76, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16
    )
    model = config.ModelConfig(architecture=arch)
    cfg = replace(
        cli.load("tiny"),
        policy=model,
        reward_model=model,
        workdir=str(workdir),
        world={"train_problems": 40, "heldout_problems": 8},
        sft={"steps": 2, "batch_size": 8},
        pairs={"problems": 20},
        reward_training={"steps": 2, "batch_size": 8},
        rollout={"prompts_per_step": 4, "num_generations": 2},
        rewards={"thinking_batch_size": 8, "functions": (f"{__name__}:brevity",)},
        update={"steps": STEPS},
        evaluation={"every_steps": 0},
    )
    return replace(cfg, **fields)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cfg = small(tmp_path_factory.mktemp("straight"))
    train.run(cfg)
    return cfg


def weights(cfg: config.Config) -> dict[str, np.ndarray]:
    folder = start.folder(cfg, start.POLICY)
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


def rows(cfg: config.Config, stage: str) -> list[dict]:
    found = metrics.read_rows(pathlib.Path(cfg.workdir) / "metrics.jsonl")
    return [row for row in found if row["stage"] == stage]


def test_a_run_leaves_what_the_readme_lists(finished):
    here = {path.name for path in pathlib.Path(finished.workdir).iterdir()}
    wanted = "config.json metrics.jsonl completions.jsonl checkpoints tensorboard report.html"
    assert set(wanted.split()) <= here
    assert {"summary.json", "sft", "pairs.jsonl", "reward_model", "policy"} <= here
    assert cli.from_json((pathlib.Path(finished.workdir) / "config.json").read_text()) == finished


def test_every_completion_is_kept_with_its_rewards(finished):
    kept = list(metrics.read_rows(pathlib.Path(finished.workdir) / "completions.jsonl"))
    assert len(kept) == STEPS * 4 * 2
    assert {r["step"] for r in kept} == set(range(STEPS))
    for row in kept:
        assert row["rewards"]["outcome"] == (row["verdict"] == "pass")
        assert row["prompt"] and row["length"] >= 1
        assert not row["verdicts"] or row["tier"] in ("namespaces", "landlock")


def test_the_policy_that_is_left_is_not_the_one_that_was_warmed_up(finished):
    warmed = safetensors.numpy.load_file(
        next(start.folder(finished, start.SFT).glob("*.safetensors"))
    )
    trained = weights(finished)
    assert warmed.keys() == trained.keys()
    assert any(not np.array_equal(warmed[name], trained[name]) for name in warmed)


def test_a_finished_run_does_nothing_twice(finished):
    before = (pathlib.Path(finished.workdir) / "metrics.jsonl").read_bytes()
    train.run(finished)
    assert (pathlib.Path(finished.workdir) / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_other_settings_is_refused_before_anything_is_done(finished):
    with pytest.raises(ValueError, match="update.std_floor: 0.2 there, 0.5 here"):
        train.run(replace(finished, update={"std_floor": 0.5}))


def test_a_folder_in_which_another_command_is_at_work_is_refused_with_a_sentence(tmp_path):
    command = [sys.executable, "-m", "pgrpo_jax.make_pairs", "--workdir", str(tmp_path)]
    with start.held(tmp_path), start.held(tmp_path):  # a stage within a stage
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"another command is at work in {tmp_path}; wait" in refused.stderr
    assert "Traceback" not in refused.stderr and not list(tmp_path.iterdir())
    with start.held(tmp_path):
        pass  # it was given back


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with start.held(tmp_path):
        assert "cannot be locked (no locks available): start no second command" in caplog.text


def test_ctrl_c_saves_and_the_same_command_ends_where_a_straight_run_ends(finished, tmp_path):
    cfg = small(tmp_path)
    for name in ("sft", "pairs.jsonl", "reward_model"):  # the same start, not trained again
        source = pathlib.Path(finished.workdir) / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    Presses.calls, Presses.at = 0, 2
    with pytest.raises(fit.Interrupted, match="grpo stopped at step 2 of 4"):
        train.run(cfg)
    assert not start.folder(cfg, start.POLICY).exists()
    train.run(cfg)
    assert Presses.calls == STEPS, "a step was taken twice, or never"
    straight, continued = weights(finished), weights(cfg)
    for name in straight:
        assert np.array_equal(straight[name], continued[name]), name
    timeless = [
        [
            {
                k: v
                for k, v in r.items()
                if not k.startswith(("time/", "tokens_per_s", "judge/", "rollout/", "compil"))
            }
        ]
        for r in rows(finished, "grpo")
    ]
    again = [{k: r[k] for k in t[0]} for t, r in zip(timeless, rows(cfg, "grpo"), strict=True)]
    assert again == [t[0] for t in timeless]


def test_real_problems_a_chat_template_and_a_hugging_face_checkpoint_train(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    tokenizer_folder = chat_tokenizer.save(tmp_path / "tokenizer")
    checkpoint = str(tmp_path / "checkpoint")
    shape = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.Qwen2ForCausalLM(shape).save_pretrained(checkpoint)
    model = config.ModelConfig(checkpoint=checkpoint)
    cfg = small(
        tmp_path / "run",
        policy=model,
        reward_model=model,
        data={
            "train": MBPP,
            "evaluation": MBPP,
            "tokenizer": tokenizer_folder,
            "max_prompt_length": 512,
        },
        sft={"steps": 0},
        pairs={"problems": 0},
        reward_training={"steps": 0, "trunk": "policy"},
        rollout={"prompts_per_step": 4, "num_generations": 2, "prompt_buckets": (512,)},
        update={"steps": 3},
    )
    train.run(cfg)
    kept = list(metrics.read_rows(tmp_path / "run" / "completions.jsonl"))
    assert len(kept) == 3 * 4 * 2
    assert all(r["length"] and r["verdict"] in ("fail", "error") for r in kept)
    assert {r["rewards/outcome/mean"] for r in rows(cfg, "grpo")} == {0.0}, "random tokens pass"
    left = json.loads((start.folder(cfg, start.POLICY) / "config.json").read_text())
    assert left["model_type"] == "qwen2"
    transformers.AutoModelForCausalLM.from_pretrained(start.folder(cfg, start.POLICY))
