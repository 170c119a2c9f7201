"""Attention with grouped queries over segments: the plain-jnp reference.

A query attends a key iff the key lies in the query's own segment (a nonzero one), or in the one
that this continues, and the key's position is not after the query's. Left padding, right padding,
packed rows and a cache that is partly empty are then one thing: segment 0 is padding. So are the
completions of one prompt: segments that continue the prompt's, which a row holds once for all. A
query without any key gives zeros, and zero gradients.

Layouts: q_BTNH, k_BSKH, v_BSKH, positions and segments int32. N is a multiple of K; query head
n reads key head n // (N / K). Scores and softmax are float32, the output has q's dtype.
"""

import jax
import jax.numpy as jnp


def meets(
    segments_BT: jax.Array, segments_BS: jax.Array, prefixes_BT: jax.Array | None = None
) -> jax.Array:
    """meets_BTS: True where the segment at t, or the one it continues, is that at s; never for 0.

    `prefixes_BT` names the segments that are continued, 0 where that is none.
    """
    found_BTS = _same(segments_BT, segments_BS)
    return found_BTS if prefixes_BT is None else found_BTS | _same(prefixes_BT, segments_BS)


def _same(segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    same_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
    return same_BTS & (segments_BT != 0)[:, :, None]


def mask(
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    prefixes_BT: jax.Array | None = None,
) -> jax.Array:
    """mask_BTS: True where the query at t attends the key at s."""
    past_BTS = positions_BS[:, None, :] <= positions_BT[:, :, None]
    return meets(segments_BT, segments_BS, prefixes_BT) & past_BTS


def reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    prefixes_BT: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v -> out_BTNH; logits are soft_cap * tanh(logits / soft_cap)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    if N % K or k_BSKH.shape != v_BSKH.shape or k_BSKH.shape[3] != H:
        raise ValueError(
            f"attention wants k and v of one shape [B, S, K, {H}] with K dividing the {N} query "
            f"heads, got k {k_BSKH.shape} and v {v_BSKH.shape}"
        )
    # Query heads of one key head stand together (G), so that keys and values are never repeated.
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if soft_cap is not None:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    mask_BTS = mask(positions_BT, segments_BT, positions_BS, segments_BS, prefixes_BT)
    weights_BKGTS = _softmax(scores_BKGTS, mask_BTS[:, None, None]).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where `mask`; zeros elsewhere, also where nothing is left.

    A finite floor stands for the masked: with -inf a fully masked row would have NaN gradients.
    """
    floor = jnp.finfo(scores.dtype).min
    scores = jnp.where(mask, scores, floor)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)
