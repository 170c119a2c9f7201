"""The supervised programs: the policy learns tokens, the reward model learns preferences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pgrpo_jax import algo, config, data, masked, optimizer, sharding
from pgrpo_jax.models import decoder, logprobs, reward

Metrics = dict[str, jax.Array]


def compile_sft(
    cfg: config.Config, arch: config.Architecture, mesh: jax.sharding.Mesh
) -> Callable[[optimizer.TrainState, data.SFTBatch], tuple[optimizer.TrainState, Metrics]]:
    """The jitted step of next-token training; its state is donated.

    Metrics: loss (mean over tokens), entropy, tokens, grad_norm, learning_rate.
    """
    compute = cfg.policy.compute
    sharding.check_rows(mesh, **{"sft.batch_size": cfg.sft.batch_size})
    tx = optimizer.build(cfg.sft.optimizer, cfg.sft.steps)
    learning_rate = optimizer.schedule(cfg.sft.optimizer, cfg.sft.steps)

    def loss(params, batch: data.SFTBatch):
        x_BTD = decoder.forward(
            params, arch, compute, batch.ids_BT, batch.positions_BT, batch.segments_BT
        )
        logp_BT, entropy_BT = logprobs.token_logprobs(
            x_BTD,
            decoder.unembedding(params, arch),
            batch.ids_BT,
            batch.loss_BT,
            1.0,
            logprobs.chunk_tokens(compute.logprob_mb, arch.vocab_size),
        )
        return -masked.mean(logp_BT, batch.loss_BT), masked.mean(entropy_BT, batch.loss_BT)

    def step(state: optimizer.TrainState, batch: data.SFTBatch):
        (value, entropy), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        metrics = {
            "loss": value,
            "entropy": entropy,
            "tokens": jnp.sum(batch.loss_BT),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        return optimizer.apply(state, grads, tx), metrics

    params = jax.eval_shape(lambda key: decoder.init(arch, compute, key), jax.random.key(0))
    return _jitted(step, params, tx, mesh)


def compile_reward_update(
    cfg: config.Config, arch: config.Architecture, mesh: jax.sharding.Mesh
) -> Callable[[optimizer.TrainState, data.PairBatch], tuple[optimizer.TrainState, Metrics]]:
    """The jitted Bradley-Terry step; its state is donated.

    Metrics: loss, accuracy (share of pairs with s+ > s-), gap (mean s+ - s-), score (mean of both),
    grad_norm, learning_rate.
    """
    settings, A = cfg.reward_training, cfg.reward_training.micro_batches
    sharding.check_rows(
        mesh, **{"reward_training.batch_size / micro_batches": settings.batch_size // A}
    )
    tx = optimizer.build(settings.optimizer, settings.steps)
    learning_rate = optimizer.schedule(settings.optimizer, settings.steps)
    gradient = _in_micro_batches(_pair_loss(cfg, arch), A)

    def step(state: optimizer.TrainState, batch: data.PairBatch):
        (value, (chosen_C, rejected_C)), grads = gradient(state.params, batch)
        metrics = {
            "loss": value,
            "accuracy": masked.mean(chosen_C > rejected_C, batch.valid_C),
            "gap": masked.mean(chosen_C - rejected_C, batch.valid_C),
            "score": masked.mean((chosen_C + rejected_C) / 2, batch.valid_C),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        return optimizer.apply(state, grads, tx), metrics

    compute = cfg.reward_model.compute
    params = jax.eval_shape(lambda key: reward.init(arch, compute, key), jax.random.key(0))
    return _jitted(step, params, tx, mesh)


def _jitted(step: Callable[..., Any], params: Any, tx: Any, mesh: jax.sharding.Mesh) -> Any:
    """(state, batch) -> (state, metrics), of a state with parameters like `params`."""
    places = optimizer.state_shardings(params, tx, mesh)
    return jax.jit(
        sharding.on(mesh, step),
        donate_argnums=0,
        in_shardings=(places, sharding.batch(mesh)),
        out_shardings=(places, sharding.replicated(mesh)),
    )


def _pair_loss(cfg: config.Config, arch: config.Architecture) -> Callable[..., Any]:
    """loss(params, batch) -> (Bradley-Terry loss, (chosen_C, rejected_C))."""
    settings, compute = cfg.reward_training, cfg.reward_model.compute

    def loss(params, batch: data.PairBatch):
        both = [  # one forward over [2C, T]
            (batch.chosen_ids_CT, batch.rejected_ids_CT),
            (batch.chosen_positions_CT, batch.rejected_positions_CT),
            (batch.chosen_segments_CT, batch.rejected_segments_CT),
        ]
        scores_B = reward.score(params, arch, compute, *(jnp.concatenate(sides) for sides in both))
        chosen_C, rejected_C = jnp.split(scores_B, 2)
        value = algo.bradley_terry_loss(
            chosen_C,
            rejected_C,
            batch.margin_C,
            batch.valid_C,
            center_coefficient=settings.center_coefficient,
        )
        return value, (chosen_C, rejected_C)

    return loss


def _in_micro_batches(loss: Callable[..., Any], A: int) -> Callable[..., Any]:
    """gradient(params, batch) -> ((loss, scores), gradient), as of the whole batch at once."""
    if A == 1:
        return jax.value_and_grad(loss, has_aux=True)

    def share(params, batch: data.PairBatch, share_C: jax.Array):
        value, scores = loss(params, batch)
        return value * share_C.sum(), scores

    def gradient(params, batch: data.PairBatch):
        share_C = jnp.asarray(batch.valid_C) / masked.count(jnp.asarray(batch.valid_C))
        # Every A-th pair: rows that devices hold side by side go to different micro-batches.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, A, *x.shape[1:]).swapaxes(0, 1), (batch, share_C)
        )
        value, scores, grads = optimizer.accumulate(share, params, parts, A)
        return (value, jax.tree.map(lambda x_AC: x_AC.swapaxes(0, 1).reshape(-1), scores)), grads

    return gradient


def compile_scores(
    cfg: config.Config, arch: config.Architecture, mesh: jax.sharding.Mesh
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
    """The jitted (params, ids_CT, positions_CT, segments_CT) -> scores_C, the same everywhere."""
    compute = cfg.reward_model.compute

    def scores(params: Any, *rows_CT: jax.Array) -> jax.Array:
        return reward.score(params, arch, compute, *rows_CT)

    params = jax.eval_shape(lambda key: reward.init(arch, compute, key), jax.random.key(0))
    rows = sharding.batch(mesh)
    return jax.jit(
        sharding.on(mesh, scores),
        in_shardings=(sharding.shardings(params, mesh), rows, rows, rows),
        out_shardings=sharding.replicated(mesh),
    )
