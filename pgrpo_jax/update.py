"""The P-GRPO step: from token rows and rewards to the next state, one jitted program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from pgrpo_jax import algo, config, masked, optimizer, sharding
from pgrpo_jax.models import decoder, logprobs

Metrics = dict[str, jax.Array]


class UpdateBatch(struct.PyTreeNode):
    """P x G completions, the G of a prompt in consecutive rows, one completion a row.

    ids_BT, positions_BT, segments_BT (int32) are the decoder's: prompt and completion.
    completion_BT (bool) keeps the completion's tokens, the stop token among them.
    old_logp_BT (float32) is what the sampler saw, at each completion token's own position.
    r_format_B, r_outcome_B (0 or 1) and r_thinking_B (0 to 1) are the three terms; R_t of a failing
    completion is read only by gates that say so. r_extra_B is the sum of the user's own reward
    functions, 0 without any; NaN (none had an opinion) adds nothing.
    valid_B (bool) is False for what nobody could judge: out of the statistics and of the loss.
    truncated_B (bool) marks completions cut by the length limit.
    ref_logp_BT is `compile_reference`'s, needed by kl="k3" only.
    """

    ids_BT: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array
    completion_BT: jax.Array
    old_logp_BT: jax.Array
    r_format_B: jax.Array
    r_outcome_B: jax.Array
    r_thinking_B: jax.Array
    r_extra_B: jax.Array
    valid_B: jax.Array
    truncated_B: jax.Array
    ref_logp_BT: jax.Array | None = None


class Groups(struct.PyTreeNode):
    """The rewards of a batch by group, all [P, G]; `base_PG` is the total without R_t."""

    format_PG: jax.Array
    outcome_PG: jax.Array
    thinking_PG: jax.Array
    base_PG: jax.Array
    total_PG: jax.Array
    valid_PG: jax.Array


def compile_update(
    cfg: config.Config, arch: config.Architecture, mesh: jax.sharding.Mesh
) -> Callable[[optimizer.TrainState, UpdateBatch], tuple[optimizer.TrainState, Metrics, jax.Array]]:
    """The jitted step (state, batch) -> (state, metrics, advantage_B); the state is donated.

    Call it `num_iterations` times with the same batch. Only in the first of these calls does
    mismatch_* compare the sampler with the trainer at equal parameters.
    """
    sharding.check_rows(mesh, **{"update.micro_batch_size": cfg.update.micro_batch_size})
    tx = optimizer.build(cfg.update.optimizer, cfg.update.steps * cfg.update.num_iterations)
    learning_rate = optimizer.schedule(
        cfg.update.optimizer, cfg.update.steps * cfg.update.num_iterations
    )

    def update(state: optimizer.TrainState, batch: UpdateBatch):
        groups = fold_rewards(cfg, batch)
        advantage_PG = advantages(cfg.update, groups)
        advantage_B = advantage_PG.reshape(-1)
        mask_BT = loss_mask(cfg.update, batch)
        weights_BT = token_weights(cfg, mask_BT, batch.valid_B)
        rows = (batch, advantage_B, mask_BT, weights_BT)
        value, (logp_BT, entropy_BT), grads = accumulate(
            lambda params, rows: policy_loss(cfg, arch, params, *rows),
            state.params,
            rows,
            cfg.update.micro_batch_size,
        )
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
            "entropy": masked.mean(entropy_BT, mask_BT),
            **group_metrics(groups, advantage_PG),
            **token_metrics(cfg.update, batch, logp_BT, advantage_B, mask_BT),
        }
        return optimizer.apply(state, grads, tx), metrics, advantage_B

    params = jax.eval_shape(
        lambda key: decoder.init(arch, cfg.policy.compute, key), jax.random.key(0)
    )
    places = optimizer.state_shardings(params, tx, mesh)
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        sharding.on(mesh, update),
        donate_argnums=0,
        in_shardings=(places, sharding.batch(mesh)),
        out_shardings=(places, everywhere, sharding.batch(mesh)),
    )


def compile_reference(
    cfg: config.Config, arch: config.Architecture, mesh: jax.sharding.Mesh
) -> Callable[[Any, UpdateBatch], jax.Array]:
    """The jitted (params, batch) -> ref_logp_BT, a frozen policy's word on the completions."""
    shapes = jax.eval_shape(
        lambda key: decoder.init(arch, cfg.policy.compute, key), jax.random.key(0)
    )

    def reference(params: Any, batch: UpdateBatch) -> jax.Array:
        return completion_logprobs(cfg, arch, params, batch, batch.completion_BT)[0]

    return jax.jit(
        sharding.on(mesh, reference),
        in_shardings=(sharding.shardings(shapes, mesh), sharding.batch(mesh)),
        out_shardings=sharding.batch(mesh),
    )


def fold_rewards(cfg: config.Config, batch: UpdateBatch) -> Groups:
    """The gated reward, plus what the user's own functions gave."""

    def grouped(x_B):
        return x_B.reshape(-1, cfg.rollout.num_generations)

    r_f, r_o, r_t = map(grouped, (batch.r_format_B, batch.r_outcome_B, batch.r_thinking_B))
    extra_PG = jnp.nan_to_num(grouped(batch.r_extra_B), posinf=jnp.inf, neginf=-jnp.inf)
    gated_PG = {
        "posterior": lambda: algo.posterior_gate(r_f, r_o, r_t),
        "additive": lambda: algo.additive_gate(r_f, r_o, r_t),
        "outcome": lambda: algo.outcome_gate(r_f, r_o),
        "process": lambda: algo.process_gate(r_f, r_t),
    }[cfg.update.gate]()
    return Groups(
        format_PG=r_f,
        outcome_PG=r_o,
        thinking_PG=r_t,
        base_PG=algo.outcome_gate(r_f, r_o) + extra_PG,
        total_PG=gated_PG + extra_PG,
        valid_PG=grouped(batch.valid_B),
    )


def advantages(settings: config.UpdateConfig, groups: Groups) -> jax.Array:
    """advantage_PG, 0 for completions that do not count."""
    total_PG, valid_PG, floor = groups.total_PG, groups.valid_PG, settings.std_floor
    return {
        "group": lambda: algo.group_advantage(total_PG, valid_PG, std_floor=floor),
        "group_no_std": lambda: algo.group_no_std_advantage(total_PG, valid_PG),
        "batch_std": lambda: algo.batch_std_advantage(total_PG, valid_PG, std_floor=floor),
        "decoupled": lambda: algo.decoupled_advantage(
            groups.base_PG, groups.thinking_PG, groups.outcome_PG == 1, valid_PG, std_floor=floor
        ),
    }[settings.advantage]()


def loss_mask(settings: config.UpdateConfig, batch: UpdateBatch) -> jax.Array:
    """mask_BT: the tokens in the loss. Truncated rows stay in the group statistics, as in TRL."""
    kept_B = batch.valid_B
    if settings.mask_truncated_completions:
        kept_B = kept_B & ~batch.truncated_B
    return batch.completion_BT & kept_B[:, None]


def token_weights(cfg: config.Config, mask_BT: jax.Array, valid_B: jax.Array) -> jax.Array:
    """weights_BT of the loss. As in TRL a valid row counts, also when its tokens are masked."""
    rows, length = masked.count(valid_B), cfg.rollout.max_completion_length
    return {
        "token": lambda: algo.token_weights(mask_BT),
        "sequence": lambda: algo.sequence_weights(mask_BT, rows),
        "constant": lambda: algo.constant_weights(mask_BT, rows, length=length),
    }[cfg.update.loss_type]()


def completion_logprobs(
    cfg: config.Config,
    arch: config.Architecture,
    params: Any,
    batch: UpdateBatch,
    mask_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(logp_BT, entropy_BT) of the tokens in the mask, at the sampling temperature."""
    compute = cfg.policy.compute
    x_BTD, _ = decoder.forward(
        params, arch, compute, batch.ids_BT, batch.positions_BT, batch.segments_BT
    )
    return logprobs.token_logprobs(
        x_BTD,
        decoder.unembedding(params, arch),
        batch.ids_BT,
        mask_BT,
        cfg.rollout.temperature,
        compute.logprob_chunk,
    )


def policy_loss(
    cfg: config.Config,
    arch: config.Architecture,
    params: Any,
    batch: UpdateBatch,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The weighted sum of clipped loss and, if configured, beta KL; and (logp_BT, entropy_BT)."""
    settings = cfg.update
    logp_BT, entropy_BT = completion_logprobs(cfg, arch, params, batch, mask_BT)
    advantage_BT = jnp.broadcast_to(advantage_B[:, None], mask_BT.shape)
    loss_BT = algo.clipped_loss(
        logp_BT,
        batch.old_logp_BT,
        advantage_BT,
        mask_BT,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
    )
    loss_BT += {
        "none": lambda: jnp.zeros_like(loss_BT),
        "k3": lambda: settings.beta * algo.k3(logp_BT, _reference(batch), mask_BT),
    }[settings.kl]()
    return jnp.sum(loss_BT * weights_BT), (logp_BT, entropy_BT)


def accumulate(
    loss: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, rows: Any, micro_batch_size: int
) -> tuple[jax.Array, Any, Any]:
    """(value, aux, gradient) of `loss(params, rows) -> (value, aux)`, summed over micro-batches.

    `loss` must be a sum over rows, and `rows` and `aux` hold arrays with rows in front. A
    micro-batch size of 0 takes all rows at once.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    B = jax.tree.leaves(rows)[0].shape[0]
    size = micro_batch_size or B
    if B % size:
        raise ValueError(
            f"update.micro_batch_size={size} does not divide the batch of {B} rows "
            "(rollout.prompts_per_step x rollout.num_generations); choose a divisor of it"
        )
    if size == B:
        (value, aux), grads = gradient(params, rows)
        return value, aux, grads

    # A micro-batch takes rows at a stride of B / size: so it is split over devices as the batch is.
    def split(x):
        return x.reshape(size, B // size, *x.shape[1:]).swapaxes(0, 1)

    def merge(x):
        return x.swapaxes(0, 1).reshape(B, *x.shape[2:])

    def step(carry, rows):
        (value, aux), grads = gradient(params, rows)
        return jax.tree.map(jnp.add, carry, (value, grads)), aux

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, grads), aux = lax.scan(step, zero, jax.tree.map(split, rows))
    return value, jax.tree.map(merge, aux), grads


def group_metrics(groups: Groups, advantage_PG: jax.Array) -> Metrics:
    """What the rewards were; groups/ are shares of the groups, but for two.

    rescued: no variance without R_t, some with it. phantom_advantage: share of |advantage| in
    groups where all fail. all_pass_std: mean std of the total in groups where all pass.
    """
    valid_PG, passed_PG = groups.valid_PG, groups.outcome_PG == 1
    std_P = masked.std(groups.total_PG, valid_PG, axis=1)
    base_std_P = masked.std(groups.base_PG, valid_PG, axis=1)
    some_P = jnp.any(valid_PG, axis=1)
    all_pass_P = some_P & jnp.all(passed_PG | ~valid_PG, axis=1)
    all_fail_P = some_P & jnp.all(~passed_PG | ~valid_PG, axis=1)
    mass_P = jnp.sum(jnp.abs(advantage_PG), axis=1)
    mass = jnp.sum(mass_P)
    return {
        "reward": masked.mean(groups.total_PG, valid_PG),
        "reward_std": masked.mean(std_P, some_P),
        "frac_reward_zero_std": masked.mean(std_P == 0, some_P),
        "rewards/format/mean": masked.mean(groups.format_PG, valid_PG),
        "rewards/outcome/mean": masked.mean(groups.outcome_PG, valid_PG),
        "rewards/thinking/mean": masked.mean(groups.thinking_PG, valid_PG & passed_PG),
        "groups/rescued": masked.mean((base_std_P == 0) & (std_P > 0), some_P),
        "groups/phantom_advantage": masked.total(mass_P, all_fail_P) / jnp.where(mass > 0, mass, 1),
        "groups/all_pass": masked.mean(all_pass_P, some_P),
        "groups/all_fail": masked.mean(all_fail_P, some_P),
        "groups/all_pass_std": masked.mean(std_P, all_pass_P),
    }


def token_metrics(
    settings: config.UpdateConfig,
    batch: UpdateBatch,
    logp_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
) -> Metrics:
    """Over the tokens in the loss: clip fractions, distances to the sampler and to the reference.

    mismatch_kl estimates KL(sampler || policy) by k3, mismatch_p99 and _max are of |log ratio|.
    """
    low_BT, high_BT = algo.clipped(
        logp_BT,
        batch.old_logp_BT,
        jnp.broadcast_to(advantage_B[:, None], mask_BT.shape),
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
    )
    distance_BT = jnp.abs(logp_BT - batch.old_logp_BT)
    metrics = {
        "clip_ratio/low_mean": masked.mean(low_BT, mask_BT),
        "clip_ratio/high_mean": masked.mean(high_BT, mask_BT),
        "mismatch_kl": masked.mean(algo.k3(batch.old_logp_BT, logp_BT, mask_BT), mask_BT),
        "mismatch_p99": masked.quantile(distance_BT, mask_BT, 0.99),
        "mismatch_max": masked.peak(distance_BT, mask_BT),
    }
    if settings.kl == "k3":
        metrics["kl"] = masked.mean(algo.k3(logp_BT, _reference(batch), mask_BT), mask_BT)
    return metrics


def _reference(batch: UpdateBatch) -> jax.Array:
    if batch.ref_logp_BT is None:
        raise ValueError(
            "update.kl='k3' needs UpdateBatch.ref_logp_BT, got None; `compile_reference` makes it"
        )
    return batch.ref_logp_BT
