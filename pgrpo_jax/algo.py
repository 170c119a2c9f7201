"""The mathematics of P-GRPO as functions of arrays: no model, config or token is known here.

Rewards and advantages are [P, G]; `valid_PG` (bool) keeps the completions that count, and what the
others hold (NaN included) reaches nothing. A std is the sample's (ddof = 1), as in TRL.
"""

import jax
import jax.numpy as jnp

from pgrpo_jax import masked

# Gates: how the three terms (arXiv 2508.05170, eq. 1, where none has a coefficient) become one
# reward.


def posterior_gate(
    format_PG: jax.Array, outcome_PG: jax.Array, thinking_PG: jax.Array
) -> jax.Array:
    """R_f + R_o + 1[R_o = 1] R_t, arXiv 2508.05170. R_t of a failing completion may be NaN."""
    return format_PG + outcome_PG + jnp.where(outcome_PG == 1, thinking_PG, 0)


def additive_gate(format_PG: jax.Array, outcome_PG: jax.Array, thinking_PG: jax.Array) -> jax.Array:
    """R_f + R_o + R_t: the ungated sum, which arXiv 2508.05170 shows to be hacked."""
    return format_PG + outcome_PG + thinking_PG


def outcome_gate(format_PG: jax.Array, outcome_PG: jax.Array) -> jax.Array:
    """R_f + R_o: plain GRPO on the tests."""
    return format_PG + outcome_PG


def process_gate(format_PG: jax.Array, thinking_PG: jax.Array) -> jax.Array:
    """R_f + R_t: what the program does is not rewarded. R_f stays: reasoning is found by format."""
    return format_PG + thinking_PG


# Advantages


def group_advantage(rewards_PG: jax.Array, valid_PG: jax.Array, *, std_floor: float) -> jax.Array:
    """(r - mean of its group) / max(std of its group, std_floor).

    GRPO, arXiv 2402.03300, with a floor where others add 1e-4: in a group that passes whole,
    rewards differ by the reward model's noise, and dividing by its std makes unit advantages of it.
    """
    std_P1 = masked.std(rewards_PG, valid_PG, axis=1, keepdims=True)
    return _divide(masked.centred(rewards_PG, valid_PG, axis=1), jnp.maximum(std_P1, std_floor))


def group_no_std_advantage(rewards_PG: jax.Array, valid_PG: jax.Array) -> jax.Array:
    """r - mean of its group: Dr. GRPO, arXiv 2503.20783."""
    return masked.centred(rewards_PG, valid_PG, axis=1)


def batch_std_advantage(
    rewards_PG: jax.Array, valid_PG: jax.Array, *, std_floor: float
) -> jax.Array:
    """(r - mean of its group) / max(std of the batch, std_floor), arXiv 2508.08221."""
    std = masked.std(rewards_PG, valid_PG)
    return _divide(masked.centred(rewards_PG, valid_PG, axis=1), jnp.maximum(std, std_floor))


def decoupled_advantage(
    rewards_PG: jax.Array,
    thinking_PG: jax.Array,
    correct_PG: jax.Array,
    valid_PG: jax.Array,
    *,
    std_floor: float,
    weight: float = 1.0,
) -> jax.Array:
    """The group advantage of `rewards_PG`, plus `weight` times that of R_t among the group's
    correct completions.

    PAPO, arXiv 2603.26535: a process reward normalised by itself is not drowned by the outcome's
    std. With fewer than two correct completions the second part is 0.
    """
    correct_PG = correct_PG & valid_PG
    process_PG = group_advantage(thinking_PG, correct_PG, std_floor=std_floor)
    return group_advantage(rewards_PG, valid_PG, std_floor=std_floor) + weight * process_PG


def _divide(centred_PG: jax.Array, scale: jax.Array) -> jax.Array:
    """The quotient; 0 where the scale is 0, that is without variance and without a floor."""
    return centred_PG / jnp.where(scale > 0, scale, 1)


# Losses


def clipped_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantage_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    epsilon: float,
    epsilon_high: float,
) -> jax.Array:
    """-min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) per token, 0 outside the mask.

    PPO, arXiv 1707.06347, eq. 7, with DAPO's higher upper bound, arXiv 2503.14476.
    """
    advantage_BT = jnp.where(mask_BT, advantage_BT, 0)
    ratio_BT = jnp.exp(jnp.where(mask_BT, logp_BT - old_logp_BT, 0))
    clipped_BT = jnp.clip(ratio_BT, 1 - epsilon, 1 + epsilon_high)
    return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def clipped(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantage_BT: jax.Array,
    *,
    epsilon: float,
    epsilon_high: float,
) -> tuple[jax.Array, jax.Array]:
    """Where `clipped_loss` is flat: below the lower bound (A < 0), above the upper one (A > 0)."""
    ratio_BT = jnp.exp(logp_BT - old_logp_BT)
    low_BT = (ratio_BT < 1 - epsilon) & (advantage_BT < 0)
    return low_BT, (ratio_BT > 1 + epsilon_high) & (advantage_BT > 0)


def importance_weights(
    logp_BT: jax.Array, sampler_logp_BT: jax.Array, mask_BT: jax.Array, *, cap: float
) -> jax.Array:
    """min(policy / sampler, cap) per token, without gradient, 0 outside the mask.

    Truncated importance sampling, F. Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training", 2025, after E. Ionides, 2008: corrects for a sampler whose
    probabilities are not the trainer's, with a bounded variance.
    """
    ratio_BT = jnp.exp(jnp.where(mask_BT, logp_BT - sampler_logp_BT, 0))
    return jax.lax.stop_gradient(jnp.where(mask_BT, jnp.minimum(ratio_BT, cap), 0))


def k3(logp_BT: jax.Array, other_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """r - 1 - log r, r = other / policy; its mean over the policy's tokens is KL(policy || other).

    J. Schulman, "Approximating KL Divergence", 2020, estimator k3; 0 outside the mask.
    """
    log_ratio_BT = jnp.where(mask_BT, other_logp_BT - logp_BT, 0)
    return jnp.expm1(log_ratio_BT) - log_ratio_BT


# Aggregations: the weight of every token, so that  loss = sum(loss_BT * weights_BT). Formed once,
# for the whole batch, they make its rows and micro-batches add up to the same gradient however its
# sequences are packed and split.


def token_weights(mask_BT: jax.Array) -> jax.Array:
    """The mean over all tokens: DAPO, arXiv 2503.14476."""
    return mask_BT / masked.count(mask_BT)


def sequence_weights(mask_BT: jax.Array, length_BT: jax.Array, sequences: jax.Array) -> jax.Array:
    """The mean over `sequences` of each one's mean over its tokens: GRPO, arXiv 2402.03300.

    `length_BT` is the number of tokens in the mask of the sequence that a token belongs to.
    """
    return mask_BT / (jnp.maximum(length_BT, 1) * sequences)


def constant_weights(mask_BT: jax.Array, sequences: jax.Array, *, length: int) -> jax.Array:
    """The sum over tokens by sequences x length, a constant: Dr. GRPO, arXiv 2503.20783."""
    return mask_BT / (sequences * length)


def bradley_terry_loss(
    chosen_C: jax.Array,
    rejected_C: jax.Array,
    margin_C: jax.Array,
    valid_C: jax.Array,
    *,
    center_coefficient: float,
) -> jax.Array:
    """mean over valid pairs of  -log sigmoid(s+ - s- - margin) + center_coefficient (s+ + s-)^2.

    arXiv 2508.05170, section 3.1; margin: Llama 2, 2307.09288; centring: 2312.09244.
    """
    gap_C = jnp.where(valid_C, chosen_C - rejected_C - margin_C, 0)
    sum_C = jnp.where(valid_C, chosen_C + rejected_C, 0)
    return masked.mean(-jax.nn.log_sigmoid(gap_C) + center_coefficient * sum_C**2, valid_C)
