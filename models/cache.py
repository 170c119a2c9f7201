"""The key/value cache of a decoder: fixed length, columns written from left to right."""

import flax.struct
import jax
import jax.numpy as jnp

from pgrpo_jax.config import Architecture, Compute


class Cache(flax.struct.PyTreeNode):
    """Keys and values of the tokens seen so far.

    positions_BS and segments_BS (int32) belong to the columns; segment 0 marks a column that no
    query reads: padding, or not yet written. `index` (int32 scalar) is the next column to write,
    the same for all rows. Writing past the last column overwrites the last ones without a word
    (the index is traced): size the cache to the run.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array
    index: jax.Array


def empty(arch: Architecture, compute: Compute, batch: int, length: int) -> Cache:
    """A cache of `length` columns in which nothing is written yet."""
    shape = (arch.layers, batch, length, arch.kv_heads, arch.head_dim)
    return Cache(
        k_LBSKH=jnp.zeros(shape, compute.dtype),
        v_LBSKH=jnp.zeros(shape, compute.dtype),
        positions_BS=jnp.zeros((batch, length), jnp.int32),
        segments_BS=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def write_rows(cache: Cache, positions_BT: jax.Array, segments_BT: jax.Array) -> Cache:
    """Notes positions and segments of T new columns, before the layers write theirs."""
    if positions_BT.shape[1] > cache.positions_BS.shape[1]:
        raise ValueError(
            f"{positions_BT.shape[1]} new tokens do not fit a cache of "
            f"{cache.positions_BS.shape[1]} columns"
        )
    at = (0, cache.index)
    return cache.replace(
        positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, at),
        segments_BS=jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, at),
    )


def write_layer(cache: Cache, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Writes one layer's keys and values of T new columns at `index`."""
    at = (layer, 0, cache.index, 0, 0)
    k_1BTKH = k_BTKH[None].astype(cache.k_LBSKH.dtype)
    v_1BTKH = v_BTKH[None].astype(cache.v_LBSKH.dtype)
    return cache.replace(
        k_LBSKH=jax.lax.dynamic_update_slice(cache.k_LBSKH, k_1BTKH, at),
        v_LBSKH=jax.lax.dynamic_update_slice(cache.v_LBSKH, v_1BTKH, at),
    )


def read_layer(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k_BSKH and v_BSKH of one layer."""
    k_BSKH = jax.lax.dynamic_index_in_dim(cache.k_LBSKH, layer, keepdims=False)
    v_BSKH = jax.lax.dynamic_index_in_dim(cache.v_LBSKH, layer, keepdims=False)
    return k_BSKH, v_BSKH
