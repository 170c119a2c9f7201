"""The main job: warm-up, preference pairs, reward model, P-GRPO, evaluation, report.

    python -m pgrpo_jax.train
    python -m pgrpo_jax.train --config qwen2_5_coder_0_5b --workdir runs/coder

Every stage is skipped when its output is in the run's folder, so the same command continues a run
that was stopped. Without arguments it trains on the built-in world, on two CPU cores, from nothing.
"""

import dataclasses
import functools
import pathlib
import sys

import jax

from pgrpo_jax import (
    cli,
    config,
    fit,
    grpo,
    make_pairs,
    metrics,
    report,
    rewards,
    sandbox,
    sft,
    sharding,
    start,
    summary,
    tokenizer,
    train_reward,
)
from pgrpo_jax.models import load


@start.stage
def run(cfg: config.Config) -> None:
    """The whole job; ends with a table and `report.html`."""
    config.require(
        cfg.update.steps > 0, "update.steps is 0: there is nothing to train; set --update.steps"
    )
    claim_folder(cfg)
    cfg = start.resolved_to_decode(cfg)
    try:
        sft.run(cfg)
        make_pairs.run(cfg)
        train_reward.run(cfg)
        train_policy(cfg)
    except fit.Interrupted as stop:
        print(stop, file=sys.stderr)
        raise
    if jax.process_index() == 0:
        summary.write(cfg)
        report.report(pathlib.Path(cfg.workdir))


def claim_folder(cfg: config.Config) -> None:
    """Writes the settings into the run's folder.

    Raises:
      ValueError: another run, with other settings, is in that folder.
    """
    path = pathlib.Path(cfg.workdir) / "config.json"
    if path.is_file():
        earlier = cli.from_json(path.read_text())
        config.require(
            earlier == cfg,
            f"{path.parent} holds a run with other settings ({different(earlier, cfg)}); continue "
            "it with its own settings, or name another folder with --workdir",
        )
    elif jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_json(path, dataclasses.asdict(cfg))


def different(a: object, b: object, path: str = "") -> str:
    """The fields in which two trees of settings differ, as words."""
    if not hasattr(a, "__dataclass_fields__") or type(a) is not type(b):
        return "" if a == b else f"{path}: {a!r} there, {b!r} here"
    fields = a.__dataclass_fields__
    found = (different(getattr(a, f), getattr(b, f), f"{path}.{f}".lstrip(".")) for f in fields)
    return "; ".join(words for words in found if words)


def train_policy(cfg: config.Config) -> None:
    """P-GRPO from the warmed-up policy and the trained reward model; leaves `policy/`."""
    out = start.folder(cfg, start.POLICY)
    if start.is_done(out):
        return
    mesh, words = sharding.make_mesh(cfg.mesh), tokenizer.load(cfg.data.tokenizer)
    arch, params = start.policy(cfg, mesh)
    with sandbox.Judge(cfg.judge) as judge:
        print(f"Programs are judged {judge.workers} at a time in the tier {judge.tier!r}.")
        loop = grpo.Loop(cfg, mesh, words, (arch, params), scorer(cfg, mesh, words), judge)
        loop.run()
    fit.publish(
        out, words, functools.partial(load.save_policy, arch=arch, params=loop.state.params)
    )


def scorer(
    cfg: config.Config, mesh: jax.sharding.Mesh, words: tokenizer.Tokenizer
) -> rewards.ThinkingScorer:
    """The trained reward model, which no variable keeps on the device."""
    arch, params = start.reward_model(cfg, mesh)
    return rewards.ThinkingScorer(params, arch, cfg.reward_model.compute, cfg.rewards, words, mesh)


if __name__ == "__main__":
    cli.run(run, __doc__)
