"""From logits to tokens: truncation, temperature, and one draw a row."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pgrpo_jax import sharding


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Logits, -inf but for the `k` largest of each row and what equals the smallest of these."""
    smallest_B = lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1]
    return jnp.where(logits_BV >= smallest_B[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Logits, -inf outside the nucleus: the fewest tokens of most mass that reach `p`, and ties.

    arXiv 1904.09751, section 3.1. The likeliest token always stays.
    """
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = (before_BV < p).at[:, 0].set(True)
    smallest_B = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1)
    return jnp.where(logits_BV >= smallest_B[:, None], logits_BV, -jnp.inf)


def pick(u_B: jax.Array, weights_VB: jax.Array) -> jax.Array:
    """ids_B: the token in which the share u, in [0, 1), of each column's total weight falls.

    Inverse-CDF sampling: one random number a column where Gumbel's trick takes one a token, which
    on CPU costs ten times as much. First the block of about sqrt(V) tokens is found and then the
    token in it: no running sum over the vocabulary is formed. A token of weight 0 is never picked.

    Where a mesh splits the vocabulary, each device has as many blocks, and passes on their sums and
    the one that is read; all weights would be nearly as many bytes as what the layers pass on.
    """
    V, B = weights_VB.shape
    width = 1 << (V.bit_length() // 2)
    padding = -V % (width * sharding.axis_size("tensor"))
    weights_NWB = jnp.pad(weights_VB, ((0, padding), (0, 0))).reshape(-1, width, B)
    weights_NWB = sharding.constrain(weights_NWB, "NWB")
    sums_NB = weights_NWB.sum(1)
    block_B, rest_B = _descend(u_B * sums_NB.sum(0), sums_NB)
    weights_WB = jnp.take_along_axis(weights_NWB, block_B[None, None], axis=0)[0]
    return block_B * width + _descend(rest_B, weights_WB)[0]


def _descend(target_B: jax.Array, weights_NB: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry at which the running sum passes the target, and the rest of the target."""
    sums_NB = jnp.cumsum(weights_NB, axis=0)
    n_NB = lax.broadcasted_iota(jnp.int32, weights_NB.shape, 0)
    some_NB = weights_NB > 0
    # Running sums are rounded: an entry of weight 0 could seem to be the first past the target, or
    # the target to lie past them all. And not argmax: XLA does not vectorise it on CPU.
    passed_NB = some_NB & (sums_NB > target_B[None])
    first_B = jnp.min(jnp.where(passed_NB, n_NB, len(weights_NB)), axis=0)
    chosen_B = jnp.minimum(first_B, jnp.max(jnp.where(some_NB, n_NB, 0), axis=0))
    before_B = jnp.sum(jnp.where(n_NB < chosen_B[None], weights_NB, 0), axis=0)
    return chosen_B, target_B - before_B


def shares(key_B: jax.Array, index_B: jax.Array) -> jax.Array:
    """u_B in [0, 1): what `draw` needs for the token at each row's place `index_B`."""
    return jax.vmap(lambda key, index: jax.random.uniform(jax.random.fold_in(key, index)))(
        key_B, index_B
    )


def draw(
    u_B: jax.Array,
    logits_VB: jax.Array,
    temperature: jax.Array,
    truncate: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """ids_B drawn from softmax(truncate(logits / temperature)), and their log-probabilities.

    These are float32 and of the distribution before `truncate`. `u_B` are the columns' `shares`. At
    temperature 0 the token is the likeliest (the first of equals) and its log-probability that of
    temperature 1.
    """
    greedy = temperature == 0
    logits_VB = logits_VB / jnp.where(greedy, 1, temperature)
    top_1B = logits_VB.max(0, keepdims=True)
    # One pass of exponentials serves the draw and the normaliser.
    weights_VB = jnp.exp(logits_VB - top_1B)
    kept_VB = weights_VB
    if truncate is not None:
        kept_VB = jnp.where(jnp.isfinite(truncate(logits_VB.T).T), weights_VB, 0)
    # A share of 0 picks the first of those that have weight: let the likeliest be all that has.
    kept_VB = jnp.where(greedy, logits_VB == top_1B, kept_VB)
    ids_B = pick(jnp.where(greedy, 0, u_B), kept_VB)
    chosen_B = (jnp.take_along_axis(logits_VB, ids_B[None], axis=0) - top_1B)[0]
    return ids_B, chosen_B - jnp.log(weights_VB.sum(0))


def truncation(top_k: int, top_p: float) -> Callable[[jax.Array], jax.Array] | None:
    """Top-k and then top-p, each only where it is on; None where both are off."""
    kept = []
    if top_k:
        kept.append(functools.partial(keep_top_k, k=top_k))
    if top_p < 1:
        kept.append(functools.partial(keep_top_p, p=top_p))
    if not kept:
        return None
    return lambda logits_BV: functools.reduce(lambda y, keep: keep(y), kept, logits_BV)
