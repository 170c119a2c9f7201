"""Supervised warm-up: the policy learns to reason and to answer in the format, from rows of prompt
and completion.

    python -m pgrpo_jax.sft --config tiny

Leaves a Hugging Face folder `sft/` in the run's folder, and is skipped when that is there.
"""

import functools

from pgrpo_jax import (
    cli,
    config,
    data,
    fit,
    optimizer,
    sharding,
    start,
    supervised,
    tokenizer,
    world,
)
from pgrpo_jax.models import load


@start.stage
def run(cfg: config.Config) -> None:
    """The whole stage."""
    out = start.folder(cfg, start.SFT)
    if not cfg.sft.steps or start.is_done(out):
        return
    cfg, mesh = start.resolved(cfg), sharding.make_mesh(cfg.mesh)
    words = tokenizer.load(cfg.data.tokenizer)
    examples = data.sft_examples(rows(cfg), words, cfg.data, cfg.sft.max_length)
    batches = data.example_batches(examples, cfg.sft.batch_size, cfg.seed)
    arch, params = start.initial_policy(cfg, mesh)
    state = optimizer.init_state(params, optimizer.build(cfg.sft.optimizer, cfg.sft.steps), mesh)
    step = supervised.compile_sft(cfg, arch, mesh)
    state = fit.fit(cfg, start.SFT, cfg.sft.steps, mesh, state, step, batches)
    fit.publish(out, words, functools.partial(load.save_policy, arch=arch, params=state.params))


def rows(cfg: config.Config) -> list[dict[str, str]]:
    """The rows to learn from; the world makes as many as the stage takes."""
    if cfg.sft.data != "world":
        return data.read_rows(cfg.sft.data)
    count = cfg.sft.steps * cfg.sft.batch_size
    return list(world.sft_rows(start.problems(cfg, "train"), count, cfg.seed))


if __name__ == "__main__":
    cli.run(run, __doc__)
