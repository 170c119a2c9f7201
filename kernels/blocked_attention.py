"""Attention in blocks of queries, in plain jnp: for processors without a kernel of their own.

What `attention.reference` computes, for tokens that attend each other in the order of their
columns: within a segment positions rise from left to right, and what it continues lies before it.
A block of queries then needs no key behind its last column, and the gradient computes the weights
again from their normaliser: nothing of [T, T] outlives its block (arXiv 2205.14135, algorithms 1
and 4).

Products are written so that the larger factor lies as it is read: XLA on CPU copies it otherwise.
Layouts: q_BTNH, k_BTKH, v_BTKH, positions and segments int32; out_BTNH in q's dtype. E are the
G = N / K query heads of a key head at the C columns of a block, as one axis.
"""

import jax
import jax.numpy as jnp

from pgrpo_jax.kernels import attention

BLOCKS = 4  # of a row
SMALLEST = 32  # columns of a block


@jax.custom_vjp
def blocked_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    prefixes_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v -> out_BTNH; a token without a segment gives zeros."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT, prefixes_BT)[0]


def _blocks(T: int) -> list[slice]:
    size = max(-(-T // BLOCKS), SMALLEST)
    return [slice(begin, min(begin + size, T)) for begin in range(0, T, size)]


def _by_key_head(x_BCNH: jax.Array, K: int) -> jax.Array:
    """x_BKEH."""
    B, C, N, H = x_BCNH.shape
    return x_BCNH.reshape(B, C, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def _turned(x_BCNH: jax.Array, K: int) -> jax.Array:
    """x_BKHE. Not `_by_key_head` with two axes swapped: XLA would make that swap a part of the
    product, for which it has no fast form on CPUs."""
    B, C, N, H = x_BCNH.shape
    return x_BCNH.reshape(B, C, K, N // K, H).transpose(0, 2, 4, 3, 1).reshape(B, K, H, -1)


def _by_column(x_BKEH: jax.Array, C: int) -> jax.Array:
    """x_BCNH."""
    B, K, E, H = x_BKEH.shape
    return x_BKEH.reshape(B, K, E // C, C, H).transpose(0, 3, 1, 2, 4).reshape(B, C, -1, H)


def _scores(q_BKEH, k_BKSH, mask_BCS):
    """Float32 scores of a block, the least float where a key is not attended; and the mask."""
    scores_BKES = jnp.einsum("BKEH,BKSH->BKES", q_BKEH, k_BKSH, preferred_element_type=jnp.float32)
    B, K, E, S = scores_BKES.shape
    mask_B1GCS = jnp.broadcast_to(
        mask_BCS[:, None, None], (B, 1, E // mask_BCS.shape[1], *mask_BCS.shape[1:])
    )
    mask_B1ES = mask_B1GCS.reshape(B, 1, E, S)
    return jnp.where(mask_B1ES, scores_BKES, jnp.finfo(jnp.float32).min), mask_B1ES


def _forward(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT, prefixes_BT):
    K, H = k_BTKH.shape[2:]
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    rows, outs, normalisers = (positions_BT, segments_BT, prefixes_BT), [], []
    for block in _blocks(q_BTNH.shape[1]):
        mask_BCS = _mask(rows, block)
        q_BKEH = _by_key_head(q_BTNH[:, block] * H**-0.5, K)
        scores_BKES, mask_B1ES = _scores(q_BKEH, k_BKTH[:, :, : block.stop], mask_BCS)
        top_BKE1 = scores_BKES.max(-1, keepdims=True)
        weights_BKES = jnp.where(mask_B1ES, jnp.exp(scores_BKES - top_BKE1), 0)
        total_BKE1 = weights_BKES.sum(-1, keepdims=True)
        total_BKE1 = jnp.where(total_BKE1 == 0, 1, total_BKE1)
        v_BKSH = v_BKTH[:, :, : block.stop]
        out_BKEH = jnp.einsum("BKES,BKSH->BKEH", weights_BKES.astype(v_BKSH.dtype), v_BKSH)
        out_BKEH = (out_BKEH / total_BKE1).astype(q_BTNH.dtype)
        outs.append(_by_column(out_BKEH, mask_BCS.shape[1]))
        normalisers.append(top_BKE1 + jnp.log(total_BKE1))
    out_BTNH = jnp.concatenate(outs, axis=1)
    saved = (q_BTNH, k_BTKH, v_BTKH, rows, out_BTNH, tuple(normalisers))
    return out_BTNH, saved


def _backward(saved, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, rows, out_BTNH, normalisers = saved
    K, H = k_BTKH.shape[2:]
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    dk_BKHT, dv_BKHT = (jnp.zeros((*x.shape[:2], H, x.shape[2]), x.dtype) for x in (k_BKTH, v_BKTH))
    dqs = []
    for block, normaliser_BKE1 in zip(_blocks(q_BTNH.shape[1]), normalisers, strict=True):
        mask_BCS = _mask(rows, block)
        q_BKEH = _by_key_head(q_BTNH[:, block] * H**-0.5, K)
        k_BKSH, v_BKSH = k_BKTH[:, :, : block.stop], v_BKTH[:, :, : block.stop]
        dout_BKEH = _by_key_head(dout_BTNH[:, block], K)
        dot_BKE1 = (_by_key_head(out_BTNH[:, block], K) * dout_BKEH).sum(-1, keepdims=True)
        scores_BKES, mask_B1ES = _scores(q_BKEH, k_BKSH, mask_BCS)
        weights_BKES = jnp.where(mask_B1ES, jnp.exp(scores_BKES - normaliser_BKE1), 0)
        dweights_BKES = jnp.einsum(
            "BKEH,BKSH->BKES", dout_BKEH, v_BKSH, preferred_element_type=jnp.float32
        )
        dscores_BKES = (weights_BKES * (dweights_BKES - dot_BKE1)).astype(q_BTNH.dtype)
        weights_BKES = weights_BKES.astype(q_BTNH.dtype)
        dq_BKEH = jnp.einsum("BKES,BKSH->BKEH", dscores_BKES, k_BKSH) * H**-0.5
        dqs.append(_by_column(dq_BKEH, mask_BCS.shape[1]))
        before = (..., slice(0, block.stop))
        q_BKHE, dout_BKHE = (_turned(x[:, block], K) for x in (q_BTNH * H**-0.5, dout_BTNH))
        dk_BKHT = dk_BKHT.at[before].add(jnp.einsum("BKHE,BKES->BKHS", q_BKHE, dscores_BKES))
        dv_BKHT = dv_BKHT.at[before].add(jnp.einsum("BKHE,BKES->BKHS", dout_BKHE, weights_BKES))
    dq_BTNH = jnp.concatenate(dqs, axis=1)
    dk_BTKH, dv_BTKH = (x.transpose(0, 3, 1, 2) for x in (dk_BKHT, dv_BKHT))
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None, None


def _mask(rows: tuple[jax.Array, jax.Array, jax.Array | None], block: slice) -> jax.Array:
    """mask_BCS of a block of queries and the keys up to its end."""
    positions_BC, segments_BC, prefixes_BC = jax.tree.map(lambda x: x[:, block], rows)
    positions_BS, segments_BS = (x[:, : block.stop] for x in rows[:2])
    return attention.mask(positions_BC, segments_BC, positions_BS, segments_BS, prefixes_BC)


blocked_attention.defvjp(_forward, _backward)
