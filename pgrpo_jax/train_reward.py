"""Bradley-Terry training of the reward model on preference pairs of reasonings (arXiv 2508.05170,
section 3.1).

    python -m pgrpo_jax.train_reward --config tiny

Leaves a Hugging Face folder `reward_model/` (AutoModelForSequenceClassification, one label) in the
run's folder, and is skipped when that is there.
"""

import functools
from collections import defaultdict
from typing import Any

import jax
import numpy as np

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
)
from pgrpo_jax.models import load


@start.stage
def run(cfg: config.Config) -> None:
    """The whole stage."""
    out, settings = start.folder(cfg, start.REWARD_MODEL), cfg.reward_training
    if not settings.steps or start.is_done(out):
        return
    cfg, mesh = start.resolved(cfg), sharding.make_mesh(cfg.mesh)
    words = tokenizer.load(cfg.data.tokenizer)
    rows = data.read_rows(settings.data or str(start.folder(cfg, start.PAIRS)))
    held = max(1, round(len(rows) * settings.evaluation_fraction))
    examples = data.pair_examples(rows[held:], words, settings.max_length)
    unseen = data.pair_examples(rows[:held], words, settings.max_length)
    batches = data.example_batches(examples, settings.batch_size, cfg.seed)
    arch, params = start.initial_reward_model(cfg, mesh)
    state = optimizer.init_state(params, optimizer.build(settings.optimizer, settings.steps), mesh)
    step = supervised.compile_reward_update(cfg, arch, mesh)

    def measure(state: optimizer.TrainState) -> dict[str, float]:
        return pair_accuracy(cfg, arch, mesh, state.params, unseen)

    name = start.REWARD_MODEL
    state = fit.fit(cfg, name, settings.steps, mesh, state, step, batches, measure)
    fit.publish(
        out, words, functools.partial(load.save_reward_model, arch=arch, params=state.params)
    )


def pair_accuracy(
    cfg: config.Config,
    arch: config.Architecture,
    mesh: jax.sharding.Mesh,
    params: Any,
    examples: data.Examples,
) -> dict[str, float]:
    """The share of pairs whose chosen side scores higher: over all, by `dimension` and by `kind`
    where rows have them."""
    score = supervised.compile_scores(cfg, arch, mesh)
    size, right = cfg.reward_training.batch_size, []
    for begin in range(0, len(examples), size):
        batch = examples.take(np.arange(begin, begin + size) % len(examples))
        chosen_C, rejected_C = (
            score(
                params,
                getattr(batch, f"{side}_ids_CT"),
                getattr(batch, f"{side}_positions_CT"),
                getattr(batch, f"{side}_segments_CT"),
            )
            for side in ("chosen", "rejected")
        )
        right += list(np.asarray(chosen_C > rejected_C))
    by = defaultdict(list)
    for row, value in zip(examples.rows, right, strict=False):  # the last batch went round
        by["accuracy"].append(value)
        for column in ("dimension", "kind"):
            if column in row:
                by[f"accuracy/{row[column]}"].append(value)
    return {f"eval/{name}": float(np.mean(values)) for name, values in by.items()}


if __name__ == "__main__":
    cli.run(run, __doc__)
