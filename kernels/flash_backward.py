"""Flash attention, backward: dq, dk and dv in one kernel.

Its scores are transposed, keys in sublanes: then the statistics of the queries lie along lanes as
rows, and only dq needs a transposed operand. dk and dv of a span stay in VMEM in float32 over all
query blocks and all heads of the group; dq of a block is summed over the passes of a step, and
outside over spans, if there is more than one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgrpo_jax.kernels.flash_blocks import (
    LANES,
    PRODUCT,
    ROWS,
    SUMS,
    BlockSizes,
    Static,
    capped,
    ceil_div,
    compiler_params,
    dot,
    first_passes,
    in_sublanes,
    iota,
    meet,
    repeat_lanes,
    step_of,
)


def _backward_kernel(
    first_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,  # [1, queries]
    delta_ref,  # [1, queries]
    q_ids_ref,  # [M, queries], the M segments that each token attends
    k_segments_ref,  # [span, LANES]
    dq_ref,
    dk_ref,
    dv_ref,
    dq_acc_ref,
    dk_acc_ref,
    dv_acc_ref,
    *,
    sizes: BlockSizes,
    static: Static,
):
    s, g, i = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    groups, blocks = pl.num_programs(3), pl.num_programs(4)
    step = step_of(first_ref[pl.program_id(0) * blocks + i], i, s, sizes)
    inputs = (q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_ids_ref, k_segments_ref)
    sums = (dq_acc_ref, dk_acc_ref, dv_acc_ref)

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

    @pl.loop(step.begin, step.end)
    def _(p):
        start = pl.multiple_of(p * sizes.keys, sizes.keys)
        for column in range(0, sizes.keys, sizes.part):
            columns = pl.ds(start + column, sizes.part)
            _gradients(inputs, sums, columns, pl.ds(0, sizes.queries), False, static)

    @pl.when(step.is_last & ~step.is_padding)
    def _():
        for column in range(0, sizes.queries, sizes.tile):
            columns = pl.ds(step.own + column, sizes.tile)
            rows = pl.ds(column, sizes.queries - column)
            _gradients(inputs, sums, columns, rows, True, static)

    dq_ref[...] = (dq_acc_ref[...] * static.scale).astype(dq_ref.dtype)

    @pl.when((g == groups - 1) & (i == blocks - 1))
    def _():
        dk_ref[...] = (dk_acc_ref[...] * static.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def _gradients(inputs, sums, columns, rows, is_causal: bool, static: Static) -> None:
    """Adds what `columns` of keys and `rows` of queries give to dq, dk (both unscaled) and dv.

    If `is_causal`, the first column and the first row are one token.
    """
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_ids_ref, k_segments_ref = inputs
    dq_ref, dk_ref, dv_ref = sums
    q, dout, k, v = q_ref[rows, :], dout_ref[rows, :], k_ref[columns, :], v_ref[columns, :]
    scores = dot(k, q, ROWS, static)
    q_ids = [q_ids_ref[pl.ds(m, 1), rows] for m in range(q_ids_ref.shape[0])]
    mask = meet(q_ids, repeat_lanes(k_segments_ref[columns, :], scores.shape[1]))
    if is_causal:
        mask &= iota(scores.shape, 0) <= iota(scores.shape, 1)
    x, factor = capped(scores, static)
    p = jnp.where(mask, jnp.exp2(x * factor - lse_ref[:, rows]), 0)
    dv_ref[columns, :] += dot(p.astype(dout.dtype), dout, PRODUCT, static)
    dp = dot(v, dout, ROWS, static)
    ds = p * (dp - delta_ref[:, rows])
    if static.soft_cap is not None:
        ds *= 1 - x * x
    # p is 0 where the mask is, but padding may hold what is infinite after a product.
    ds = jnp.where(mask, ds, 0).astype(q.dtype)
    dk_ref[columns, :] += dot(ds, q, PRODUCT, static)
    dq_ref[rows, :] += dot(ds, k, SUMS, static)


def backward(q_BNTH, k_BKTH, v_BKTH, ids_BMT, dout_BNTH, lse_BN1T, delta_BN1T, static):
    """(dq_BNTH, dk_BKTH, dv_BKTH) of rows that are padded to whole blocks."""
    T, K, sizes = q_BNTH.shape[2], k_BKTH.shape[1], static.backward
    spans = ceil_div(T, sizes.span)
    partial_dtype = q_BNTH.dtype if spans == 1 else jnp.float32
    dq_SBNTH, dk_BKTH, dv_BKTH = pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, static=static),
        out_shape=[
            jax.ShapeDtypeStruct((spans, *q_BNTH.shape), partial_dtype),
            jax.ShapeDtypeStruct(k_BKTH.shape, k_BKTH.dtype),
            jax.ShapeDtypeStruct(v_BKTH.shape, v_BKTH.dtype),
        ],
        grid_spec=_grid(q_BNTH.shape, K, ids_BMT.shape[1], sizes),
        compiler_params=compiler_params(static, sequential=3),
        interpret=static.interpret,
        name="flash_attention_backward",
    )(
        first_passes(ids_BMT, sizes),
        q_BNTH,
        k_BKTH,
        v_BKTH,
        dout_BNTH,
        lse_BN1T,
        delta_BN1T,
        ids_BMT,
        in_sublanes(ids_BMT[:, :1])[:, 0],
    )
    dq_BNTH = dq_SBNTH[0] if spans == 1 else dq_SBNTH.sum(0).astype(q_BNTH.dtype)
    return dq_BNTH, dk_BKTH, dv_BKTH


def _grid(shape, K: int, M: int, sizes: BlockSizes) -> pltpu.PrefetchScalarGridSpec:
    """Rows, key heads, spans, the heads of a group, blocks of queries; and what each step holds."""
    B, N, T, H = shape
    G, spans, blocks = N // K, ceil_div(T, sizes.span), sizes.span // sizes.queries

    def block(s, i):  # a block before the span is not fetched
        return jnp.maximum(i, s * blocks)

    rows = pl.BlockSpec(
        (None, None, sizes.queries, H), lambda b, k, s, g, i, _: (b, k * G + g, block(s, i), 0)
    )
    statistics = pl.BlockSpec(
        (None, None, 1, sizes.queries), lambda b, k, s, g, i, _: (b, k * G + g, 0, block(s, i))
    )
    columns = pl.BlockSpec((None, None, sizes.span, H), lambda b, k, s, g, i, _: (b, k, s, 0))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B, K, spans, G, T // sizes.queries),
        in_specs=[
            rows,
            columns,
            columns,
            rows,
            statistics,
            statistics,
            pl.BlockSpec((None, M, sizes.queries), lambda b, k, s, g, i, _: (b, 0, block(s, i))),
            pl.BlockSpec((None, sizes.span, LANES), lambda b, k, s, g, i, _: (b, s, 0)),
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, sizes.queries, H),
                lambda b, k, s, g, i, _: (s, b, k * G + g, i, 0),
            ),
            columns,
            columns,
        ],
        scratch_shapes=[
            pltpu.VMEM((sizes.queries, H), jnp.float32),
            pltpu.VMEM((sizes.span, H), jnp.float32),
            pltpu.VMEM((sizes.span, H), jnp.float32),
        ],
    )
