"""The P-GRPO step: from token rows and rewards to the next state, one jitted program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from pgrpo_jax import algo, config, masked, optimizer, packing, sharding, types
from pgrpo_jax.models import decoder, logprobs

Metrics = dict[str, jax.Array]


class Rows(struct.PyTreeNode):
    """Packed rows of tokens: [A, R, T], A micro-batches of R rows, or one of these, [R, T].

    ids, positions, segments, prefixes (int32) are the decoder's. A prompt up to its last token is a
    segment of its own, which its completions in the row continue: each of them is a segment that
    begins with the prompt's last token. completion (bool) keeps the completions' tokens, their stop
    tokens among them. owner (int32) is the completion that a token belongs to; that of shared
    prompts and of padding is any. old_logp (float32) is what the sampler saw, at each completion
    token's own position.
    """

    ids: jax.Array
    positions: jax.Array
    segments: jax.Array
    prefixes: jax.Array
    completion: jax.Array
    owner: jax.Array
    old_logp: jax.Array


class UpdateBatch(struct.PyTreeNode):
    """P x G completions, the G of a prompt in consecutive entries of what ends in `_B`.

    Their tokens lie packed in `rows` [A, R, T], of which the first `micro_batches` (int32) hold
    any. r_format_B, r_outcome_B (0 or 1) and r_thinking_B (0 to 1) are the three terms; R_t of a
    failing completion is read only by gates that say so. r_extra_B is the sum of the user's own
    reward functions, 0 without any; NaN (none had an opinion) adds nothing.
    valid_B (bool) is False for what nobody could judge: out of the statistics and of the loss.
    truncated_B (bool) marks completions cut by the length limit.
    ref_logp_ART is a frozen policy's, needed by kl="k3" only. old_logp_ART is the trainer's own
    before the first of several iterations, needed with `importance_cap` only. `compile_logprobs`
    makes both.
    """

    rows: Rows
    micro_batches: jax.Array
    r_format_B: jax.Array
    r_outcome_B: jax.Array
    r_thinking_B: jax.Array
    r_extra_B: jax.Array
    valid_B: jax.Array
    truncated_B: jax.Array
    ref_logp_ART: jax.Array | None = None
    old_logp_ART: jax.Array | None = None


class Terms(struct.PyTreeNode):
    """What the loss reads beside the tokens, [A, R, T] or [R, T]: mask (bool) of the tokens in the
    loss, their advantage, their weight, and `UpdateBatch`'s log-probabilities, if any."""

    mask: jax.Array
    advantage: jax.Array
    weight: jax.Array
    ref_logp: jax.Array | None
    old_logp: jax.Array | None


def plan(
    cfg: config.Config, mesh: jax.sharding.Mesh, completions: Sequence[types.Completion]
) -> packing.Packed:
    """Which row each completion goes into. The shape of the rows depends on the prompts' bucket,
    and on which of a few lengths of row suits the completions best, alone."""
    prompt = max(len(c.prompt_ids) for c in completions)
    bucket = next(b for b in cfg.rollout.prompt_buckets if b >= prompt)
    sequences = packing.Sequences(
        own=[len(c.ids) + 1 for c in completions],
        shared=[len(c.prompt_ids) - 1 for c in completions],
        prompts=[c.prompt_ids.tobytes() for c in completions],
    )
    return packing.pack(
        sequences,
        own=cfg.rollout.max_completion_length + 1,
        shared=bucket - 1,
        rows_at_once=cfg.update.micro_batch_size,
        parts=sharding.row_parts(mesh),
    )


def packed(completions: Sequence[types.Completion], plan: packing.Packed) -> tuple[Rows, np.int32]:
    """The completions with their prompts, as planned; and how many micro-batches hold any."""
    shape_ART = plan.limit, plan.rows, plan.capacity
    kinds = {"completion": bool, "old_logp": np.float32}
    rows = Rows(
        **{name: np.zeros(shape_ART, kinds.get(name, np.int32)) for name in Rows.__annotations__}
    )
    for a, batch in enumerate(plan.batches):
        for r, row in enumerate(batch):
            end = segment = prefix = 0
            prompt = None
            for i in row:
                c = completions[i]
                if prompt is None or not np.array_equal(prompt, c.prompt_ids):
                    prompt = c.prompt_ids
                    begin, end = end, end + len(prompt) - 1
                    segment = prefix = segment + 1
                    shared = (a, r, slice(begin, end))
                    rows.ids[shared], rows.positions[shared] = prompt[:-1], np.arange(end - begin)
                    rows.segments[shared], rows.owner[shared] = segment, i
                begin, end = end, end + 1 + len(c.ids)
                segment += 1
                whole, own = (a, r, slice(begin, end)), (a, r, slice(begin + 1, end))
                rows.ids[whole] = np.concatenate([prompt[-1:], c.ids])
                rows.positions[whole] = len(prompt) - 1 + np.arange(end - begin)
                rows.segments[whole], rows.prefixes[whole] = segment, prefix
                rows.owner[whole] = i
                rows.completion[own], rows.old_logp[own] = True, c.logps
    return rows, np.int32(len(plan.batches))


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
        groups = fold_rewards(
            cfg,
            batch.r_format_B,
            batch.r_outcome_B,
            batch.r_thinking_B,
            batch.r_extra_B,
            batch.valid_B,
        )
        advantage_PG = advantages(cfg.update, groups)
        advantage_B = advantage_PG.reshape(-1)
        terms = loss_terms(cfg, batch, advantage_B)
        value, (logp_ART, entropy_ART), grads = optimizer.accumulate(
            lambda params, rows, terms: policy_loss(cfg, arch, params, rows, terms),
            state.params,
            (batch.rows, terms),
            batch.micro_batches,
        )
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
            "entropy": masked.mean(entropy_ART, terms.mask),
            "update/padding": padding(batch),
            **group_metrics(groups, advantage_PG),
            **token_metrics(cfg.update, batch.rows, terms, logp_ART),
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
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, everywhere, everywhere),
    )


def compile_logprobs(
    cfg: config.Config, arch: config.Architecture, mesh: jax.sharding.Mesh
) -> Callable[[Any, UpdateBatch], jax.Array]:
    """The jitted (params, batch) -> logp_ART, some policy's word on the completions."""
    shapes = jax.eval_shape(
        lambda key: decoder.init(arch, cfg.policy.compute, key), jax.random.key(0)
    )

    def every_row(params: Any, batch: UpdateBatch) -> jax.Array:
        def one(i, logp_ART, rows):
            logp_RT, _ = completion_logprobs(cfg, arch, params, rows, rows.completion)
            return logp_ART.at[i].set(logp_RT)

        empty_ART = jnp.zeros(batch.rows.ids.shape, jnp.float32)
        return optimizer.over_micro_batches(one, empty_ART, batch.rows, batch.micro_batches)

    return jax.jit(
        sharding.on(mesh, every_row),
        in_shardings=(sharding.shardings(shapes, mesh), batch_sharding(mesh)),
        out_shardings=sharding.micro_batches(mesh),
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> UpdateBatch:
    """Rows of a micro-batch over data and fsdp; what is one number a completion, everywhere."""
    rows, everywhere = sharding.micro_batches(mesh), sharding.replicated(mesh)
    numbers = {name: everywhere for name in UpdateBatch.__annotations__ if name.endswith("_B")}
    return UpdateBatch(rows, everywhere, **numbers, ref_logp_ART=rows, old_logp_ART=rows)


def fold_rewards(
    cfg: config.Config,
    r_format_B: jax.Array,
    r_outcome_B: jax.Array,
    r_thinking_B: jax.Array,
    r_extra_B: jax.Array,
    valid_B: jax.Array,
) -> Groups:
    """The gated reward, plus what the user's own functions gave."""

    def grouped(x_B):
        return x_B.reshape(-1, cfg.rollout.num_generations)

    r_f, r_o, r_t = map(grouped, (r_format_B, r_outcome_B, r_thinking_B))
    extra_PG = jnp.nan_to_num(grouped(r_extra_B), posinf=jnp.inf, neginf=-jnp.inf)
    weighted_PG = cfg.update.thinking_weight * r_t
    gated_PG = {
        "posterior": lambda: algo.posterior_gate(r_f, r_o, weighted_PG),
        "additive": lambda: algo.additive_gate(r_f, r_o, weighted_PG),
        "outcome": lambda: algo.outcome_gate(r_f, r_o),
        "process": lambda: algo.process_gate(r_f, weighted_PG),
    }[cfg.update.gate]()
    return Groups(
        format_PG=r_f,
        outcome_PG=r_o,
        thinking_PG=r_t,
        base_PG=algo.outcome_gate(r_f, r_o) + extra_PG,
        total_PG=gated_PG + extra_PG,
        valid_PG=grouped(valid_B),
    )


def advantages(settings: config.UpdateConfig, groups: Groups) -> jax.Array:
    """advantage_PG, 0 for completions that do not count."""
    total_PG, valid_PG, floor = groups.total_PG, groups.valid_PG, settings.std_floor
    return {
        "group": lambda: algo.group_advantage(total_PG, valid_PG, std_floor=floor),
        "group_no_std": lambda: algo.group_no_std_advantage(total_PG, valid_PG),
        "batch_std": lambda: algo.batch_std_advantage(total_PG, valid_PG, std_floor=floor),
        "decoupled": lambda: algo.decoupled_advantage(
            groups.base_PG,
            groups.thinking_PG,
            groups.outcome_PG == 1,
            valid_PG,
            std_floor=floor,
            weight=settings.thinking_weight,
        ),
    }[settings.advantage]()


def loss_terms(cfg: config.Config, batch: UpdateBatch, advantage_B: jax.Array) -> Terms:
    """What each token of the batch takes part in the loss with.

    Truncated completions stay in the group statistics, as in TRL, and as in TRL a valid completion
    counts also when its tokens are masked.
    """
    rows, valid_B = batch.rows, batch.valid_B
    kept_B = valid_B
    if cfg.update.mask_truncated_completions:
        kept_B = kept_B & ~batch.truncated_B
    mask_ART = rows.completion & kept_B[rows.owner]
    owner_E, mask_E = rows.owner.reshape(-1), mask_ART.reshape(-1)
    length_B = jnp.zeros_like(advantage_B).at[owner_E].add(mask_E)
    sequences = masked.count(valid_B)
    weights_ART = {
        "token": lambda: algo.token_weights(mask_ART),
        "sequence": lambda: algo.sequence_weights(mask_ART, length_B[rows.owner], sequences),
        "constant": lambda: algo.constant_weights(
            mask_ART, sequences, length=cfg.rollout.max_completion_length
        ),
    }[cfg.update.loss_type]()
    return Terms(
        mask=mask_ART,
        advantage=advantage_B[rows.owner],
        weight=weights_ART,
        ref_logp=batch.ref_logp_ART,
        old_logp=batch.old_logp_ART,
    )


def completion_logprobs(
    cfg: config.Config, arch: config.Architecture, params: Any, rows: Rows, mask_RT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(logp_RT, entropy_RT) of the tokens in the mask, at the sampling temperature."""
    compute = cfg.policy.compute
    x_RTD = decoder.forward(
        params, arch, compute, rows.ids, rows.positions, rows.segments, rows.prefixes
    )
    return logprobs.token_logprobs(
        x_RTD,
        decoder.unembedding(params, arch),
        rows.ids,
        mask_RT,
        cfg.rollout.temperature,
        logprobs.chunk_tokens(compute.logprob_mb, arch.vocab_size),
    )


def policy_loss(
    cfg: config.Config, arch: config.Architecture, params: Any, rows: Rows, terms: Terms
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The weighted sum of clipped loss and, if configured, beta KL; and (logp_RT, entropy_RT)."""
    settings = cfg.update
    logp_RT, entropy_RT = completion_logprobs(cfg, arch, params, rows, terms.mask)
    old_logp_RT = _before_update(settings, rows, terms, logp_RT)
    loss_RT = algo.clipped_loss(
        logp_RT,
        old_logp_RT,
        terms.advantage,
        terms.mask,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
    )
    if settings.importance_cap:
        loss_RT *= algo.importance_weights(
            old_logp_RT, rows.old_logp, terms.mask, cap=settings.importance_cap
        )
    loss_RT += {
        "none": lambda: jnp.zeros_like(loss_RT),
        "k3": lambda: settings.beta * algo.k3(logp_RT, _reference(terms), terms.mask),
    }[settings.kl]()
    return jnp.sum(loss_RT * terms.weight), (logp_RT, entropy_RT)


def _before_update(
    settings: config.UpdateConfig, rows: Rows, terms: Terms, logp: jax.Array
) -> jax.Array:
    """What the clipped ratio's denominator is: the sampler's log-probabilities, or, where their
    distance to the trainer is corrected for by weights, the trainer's own before the update."""
    if not settings.importance_cap:
        return rows.old_logp
    if settings.num_iterations == 1:
        return lax.stop_gradient(logp)
    if terms.old_logp is None:
        raise ValueError(
            "update.importance_cap with several update.num_iterations needs "
            "UpdateBatch.old_logp_ART, got None; `compile_logprobs` makes it"
        )
    return terms.old_logp


def padding(batch: UpdateBatch) -> jax.Array:
    """The share of the computed tokens that belong to no completion's row."""
    _, R, T = batch.rows.segments.shape
    computed = jnp.maximum(batch.micro_batches * (R * T), 1)
    return 1 - jnp.sum(batch.rows.segments > 0) / computed


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
    settings: config.UpdateConfig, rows: Rows, terms: Terms, logp_ART: jax.Array
) -> Metrics:
    """Over the tokens in the loss: clip fractions, distances to the sampler and to the reference.

    mismatch_kl estimates KL(sampler || policy) by k3, mismatch_p99 and _max are of |log ratio|.
    """
    mask_ART = terms.mask
    low_ART, high_ART = algo.clipped(
        logp_ART,
        _before_update(settings, rows, terms, logp_ART),
        terms.advantage,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
    )
    distance_ART = jnp.abs(logp_ART - rows.old_logp)
    metrics = {
        "clip_ratio/low_mean": masked.mean(low_ART, mask_ART),
        "clip_ratio/high_mean": masked.mean(high_ART, mask_ART),
        "mismatch_kl": masked.mean(algo.k3(rows.old_logp, logp_ART, mask_ART), mask_ART),
        "mismatch_p99": masked.quantile(distance_ART, mask_ART, 0.99),
        "mismatch_max": masked.peak(distance_ART, mask_ART),
    }
    if settings.importance_cap:
        old_logp_ART = _before_update(settings, rows, terms, logp_ART)
        cap = settings.importance_cap
        weights_ART = algo.importance_weights(old_logp_ART, rows.old_logp, mask_ART, cap=cap)
        metrics["importance/mean"] = masked.mean(weights_ART, mask_ART)
        metrics["importance/capped"] = masked.mean(weights_ART == cap, mask_ART)
    if settings.kl == "k3":
        metrics["kl"] = masked.mean(algo.k3(logp_ART, _reference(terms), mask_ART), mask_ART)
    return metrics


def _reference(terms: Terms) -> jax.Array:
    if terms.ref_logp is None:
        raise ValueError(
            "update.kl='k3' needs UpdateBatch.ref_logp_ART, got None; `compile_logprobs` makes it"
        )
    return terms.ref_logp
