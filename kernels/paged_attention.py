"""Decode attention over a paged key/value cache: one query token a slot, ragged lengths.

Layouts (X pages of the pool, M pages of a slot, S positions of a page, I = 2H):

    pages_LXKSI   keys and values side by side: pages[l, x, k, s, :H] is a key, [..., H:] its value
    table_BM      int32: token t of slot b lies in page table[b, t // S] at offset t % S
    lengths_B     int32: keys of a slot, its newest token among them
    q_BNH, k_BKH, v_BKH   one token a slot; query head n reads key head n // (N / K)

A slot of length 0 is idle: its output is zeros, nothing is read and nothing is written. Table
entries behind a slot's last page are never read as data but must name some page: leave 0 there.
Scores and softmax are float32, the output has q's dtype, the scale is 1 / sqrt(H).

What writes a token wants the page that it writes to for that slot alone; full pages may be shared.
"""

import jax
import jax.numpy as jnp

from pgrpo_jax.kernels import attention


def reference(
    q_BNH: jax.Array,
    pages_LXKSI: jax.Array,
    layer: jax.Array,
    table_BM: jax.Array,
    lengths_B: jax.Array,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the `lengths_B` keys of each slot -> out_BNH."""
    B, _, H = q_BNH.shape
    _, _, K, S, _ = pages_LXKSI.shape
    T = table_BM.shape[1] * S
    gathered_BTKI = pages_LXKSI[layer, table_BM].swapaxes(2, 3).reshape(B, T, K, 2 * H)
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    live_BT = positions_BT < lengths_B[:, None]
    # What is not live may be anything, infinite too, and 0 * inf would reach the output.
    gathered_BTKI = jnp.where(live_BT[:, :, None, None], gathered_BTKI, 0)
    out_B1NH = attention.reference(
        q_BNH[:, None],
        gathered_BTKI[..., :H],
        gathered_BTKI[..., H:],
        jnp.full((B, 1), T, jnp.int32),
        jnp.ones((B, 1), jnp.int32),
        positions_BT,
        live_BT.astype(jnp.int32),
    )
    return out_B1NH[:, 0]


def reference_write(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    pages_LXKSI: jax.Array,
    layer: jax.Array,
    table_BM: jax.Array,
    lengths_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Writes each slot's new token at `lengths_B - 1`, then attends -> (out_BNH, pages_LXKSI)."""
    X, S = pages_LXKSI.shape[1], pages_LXKSI.shape[3]
    at_B = jnp.maximum(lengths_B - 1, 0)
    page_B = jnp.take_along_axis(table_BM, (at_B // S)[:, None], axis=1)[:, 0]
    page_B = jnp.where(lengths_B > 0, page_B, X)  # out of range: dropped
    kv_BKI = jnp.concatenate((k_BKH, v_BKH), axis=-1).astype(pages_LXKSI.dtype)
    pages_LXKSI = pages_LXKSI.at[layer, page_B, :, at_B % S].set(kv_BKI, mode="drop")
    return reference(q_BNH, pages_LXKSI, layer, table_BM, lengths_B), pages_LXKSI
