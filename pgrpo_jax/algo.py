"""The mathematics of P-GRPO as functions of arrays: no model, config or token is known here."""

import jax
import jax.numpy as jnp

from pgrpo_jax import masked


def bradley_terry_loss(
    chosen_C: jax.Array,
    rejected_C: jax.Array,
    margin_C: jax.Array,
    valid_C: jax.Array,
    *,
    center_coefficient: float,
) -> jax.Array:
    """mean over valid pairs of  -log sigmoid(s+ - s- - margin) + center_coefficient (s+ + s-)^2.

    arXiv 2508.05170, section 3.1; the margin is Llama 2's (2307.09288), the centring term 2312.09244's.
    """
    gap_C = jnp.where(valid_C, chosen_C - rejected_C - margin_C, 0)
    sum_C = jnp.where(valid_C, chosen_C + rejected_C, 0)
    return masked.mean(-jax.nn.log_sigmoid(gap_C) + center_coefficient * sum_C**2, valid_C)
