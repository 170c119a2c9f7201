"""Attention in blocks is the reference, values and gradients, and holds no square of a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.kernels import attention, blocked_attention

B, N, K, H = 2, 4, 2, 8


def inputs(T: int, dtype=jnp.float32):
    """Rows of two segments between padding: the second begins in the midst of a block."""
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    keys = jax.random.split(jax.random.key(T), len(shapes))
    q, k, v, cotangent = (jax.random.normal(*x, dtype) for x in zip(keys, shapes, strict=True))
    column_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    begin, middle, end = 3, T // 2 + 1, T - 2
    segments_BT = jnp.where(column_BT < middle, 1, 2)
    segments_BT = jnp.where((column_BT < begin) | (column_BT >= end), 0, segments_BT)
    positions_BT = jnp.where(column_BT < middle, column_BT - begin, column_BT - middle)
    return q, k, v, cotangent, positions_BT, segments_BT


blocked = blocked_attention.blocked_attention


def reference(q, k, v, positions_BT, segments_BT, prefixes_BT=None):
    rows = (positions_BT, segments_BT)
    return attention.reference(q, k, v, *rows, *rows, prefixes_BT)


def outcome(function, q, k, v, cotangent, *rows):
    """Values and gradients."""
    out, pull = jax.vjp(lambda *heads: function(*heads, *rows), q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("T", [10, 64, 131])
def test_blocks_are_the_reference(T):
    assert len(blocked_attention._blocks(T)) == {10: 1, 64: 2, 131: 4}[T]
    both = (jax.jit(functools.partial(outcome, f))(*inputs(T)) for f in (blocked, reference))
    for got, want in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_segment_attends_the_one_that_it_continues():
    q, k, v, cotangent, positions_BT, segments_BT = inputs(131)
    second = segments_BT == 2
    rows = (jnp.where(second, positions_BT + 70, positions_BT), segments_BT)
    both = [outcome(f, q, k, v, cotangent, *rows, second.astype(int)) for f in (blocked, reference)]
    for got, want in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    # What is before the second segment is its own past now: one segment says the same.
    whole = outcome(reference, q, k, v, cotangent, rows[0], jnp.minimum(segments_BT, 1))
    for got, want in zip(both[0], whole, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_is_near_float32():
    *rounded, positions_BT, segments_BT = inputs(64, jnp.bfloat16)
    half = outcome(blocked, *rounded, positions_BT, segments_BT)
    rounded = [x.astype(jnp.float32) for x in rounded]
    whole = outcome(blocked, *rounded, positions_BT, segments_BT)
    for got, want in zip(half, whole, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.06)


def test_padding_gives_zeros_and_reaches_no_gradient():
    q, k, v, cotangent, positions_BT, segments_BT = inputs(64)
    blank = (segments_BT == 0)[:, :, None, None]
    poisoned = [jnp.where(blank, 1e30, x) for x in (q, k, v)]
    clean = outcome(blocked, q, k, v, cotangent, positions_BT, segments_BT)
    dirty = outcome(blocked, *poisoned, cotangent, positions_BT, segments_BT)
    for one, other in zip(clean, dirty, strict=True):
        assert not np.any(jnp.where(blank, one, 0))
        np.testing.assert_array_equal(one, other)


def test_the_scores_of_a_whole_row_never_exist():
    T = 512
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(T)]
    text = jax.jit(functools.partial(outcome, blocked)).lower(*shapes).compile().as_text()
    assert f",{N // K * T // blocked_attention.BLOCKS},{T}]" in text  # of the last block
    assert f"{T},{T}]" not in text
