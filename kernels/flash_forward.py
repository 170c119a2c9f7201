"""Flash attention, forward: the softmax over the pieces of a block, as they come."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgrpo_jax.kernels.flash_blocks import (
    LANES,
    LOG2_E,
    PRODUCT,
    ROWS,
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

LOWEST = -1e30  # where the running maximum begins: finite, so that exp2(-inf - LOWEST) is 0


def _forward_kernel(
    first_ref,
    q_ref,
    k_ref,
    v_ref,
    q_ids_ref,  # [M, queries, LANES], the M segments that each token attends
    k_segments_ref,  # [1, span]
    out_ref,
    lse_ref,  # [1, queries], in base 2
    top_ref,  # [queries, LANES], each lane the maximum
    total_ref,  # [queries, LANES], whose lanes are still to be summed
    acc_ref,
    *,
    sizes: BlockSizes,
    static: Static,
):
    i, s = pl.program_id(2), pl.program_id(3)
    step = step_of(first_ref[pl.program_id(0) * pl.num_programs(2) + i], i, s, sizes)
    inputs = (q_ref, k_ref, v_ref, q_ids_ref, k_segments_ref)
    state = (top_ref, total_ref, acc_ref)

    @pl.when((i == 0) & (s == 0))
    def _():
        _reset(state, pl.ds(0, sizes.queries))

    @pl.loop(step.begin, step.end)
    def _(p):
        start = pl.multiple_of(p * sizes.keys, sizes.keys)
        for row in range(0, sizes.queries, sizes.part):
            rows = pl.ds(row, sizes.part)
            for column in range(0, sizes.keys, sizes.part):
                pieces = [(start + column, sizes.part, False)]
                new = _softmax(inputs, state, rows, pieces, static)
                for ref, x in zip(state, new, strict=True):
                    ref[rows, :] = x

    @pl.when(step.is_last & ~step.is_padding)
    def _():
        *others, widest = range(0, sizes.queries, sizes.tile)
        for row in (widest, *others):  # a narrow one at the end is soon done
            rows = pl.ds(row, sizes.tile)
            pieces = [(step.own, row, False)] if row else []
            pieces.append((step.own + row, sizes.tile, True))
            new = _softmax(inputs, state, rows, pieces, static)
            top, total, acc = new
            done = _finished(top, total, acc, out_ref.dtype, static)
            out_ref[rows, :], lse_ref[:, rows] = done
            # For the next block: here the stores hide behind the matrix units.
            _reset(state, rows)

    @pl.when(step.is_last & step.is_padding)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        lse_ref[...] = jnp.zeros_like(lse_ref)


def _reset(state, rows) -> None:
    for ref, value in zip(state, (LOWEST, 0, 0), strict=True):
        ref[rows, :] = jnp.full((rows.size, ref.shape[1]), value, jnp.float32)


def _softmax(inputs, state, rows, pieces, static: Static):
    """The new (top, total, acc) of `rows` after neighbouring `pieces`: (column, width, causal)."""
    q_ref, k_ref, v_ref, q_ids_ref, k_segments_ref = inputs
    top, total, acc = (ref[rows, :] for ref in state)
    parts = []
    for column, width, is_causal in pieces:
        columns = pl.ds(column, width)
        part = dot(q_ref[rows, :], k_ref[columns, :], ROWS, static)
        q_ids = [repeat_lanes(q_ids_ref[m, rows, :], width) for m in range(q_ids_ref.shape[0])]
        mask = meet(q_ids, k_segments_ref[:, columns])
        if is_causal:
            mask &= iota(part.shape, 0) >= iota(part.shape, 1)
        x, factor = capped(part, static)
        parts.append(jnp.where(mask, x, -jnp.inf))
    x = jnp.concatenate(parts, axis=1)
    width = x.shape[1]
    new_top = jnp.maximum(top, x.max(-1, keepdims=True))
    p = jnp.exp2((x - repeat_lanes(new_top, width)) * factor)
    kept = jnp.exp2((top - new_top) * factor)
    total = kept * total + sum(p[:, lane : lane + LANES] for lane in range(0, width, LANES))
    columns = pl.ds(pieces[0][0], width)
    values = dot(p.astype(v_ref.dtype), v_ref[columns, :], PRODUCT, static)
    return new_top, total, repeat_lanes(kept, acc.shape[1]) * acc + values


def _finished(top, total, acc, dtype, static: Static) -> tuple[jax.Array, jax.Array]:
    """The block of the output, and its row of log2(sum(exp2(logits))); zeros without any key.

    In columns a register holds eight rows, in rows 128 of them: logarithms are for rows.
    """
    total = total.sum(-1, keepdims=True)
    # The unit's own estimate and a step of Newton's are more than bfloat16 can hold.
    estimate = pl.reciprocal(total, approx=dtype == jnp.bfloat16)
    inverse = jnp.where(total == 0, 0, estimate * (2 - total * estimate))
    out = (acc * inverse).astype(dtype)
    columns = jnp.where(iota(top.shape, 1) < LANES // 2, top, total)
    parts = [columns[row : row + LANES].T for row in range(0, top.shape[0], LANES)]
    top_row = jnp.concatenate([part[:1] for part in parts], axis=1)
    total_row = jnp.concatenate([part[LANES // 2 : LANES // 2 + 1] for part in parts], axis=1)
    factor = (static.soft_cap or static.scale) * LOG2_E
    lse = top_row * factor + jnp.log2(jnp.where(total_row == 0, 1, total_row))
    return out, jnp.where(total_row == 0, 0, lse)


def forward(q_BNTH, k_BKTH, v_BKTH, ids_BMT, static: Static):
    """(out_BNTH, lse_BN1T) of rows that are padded to whole blocks."""
    B, N, T, H = q_BNTH.shape
    M, sizes, group = ids_BMT.shape[1], static.forward, N // k_BKTH.shape[1]
    blocks = sizes.span // sizes.queries

    def span(i, s):  # a span after the block's own columns is not fetched
        return jnp.minimum(s, lax.div(i, blocks))

    rows = pl.BlockSpec((None, None, sizes.queries, H), lambda b, n, i, s, _: (b, n, i, 0))
    columns = pl.BlockSpec(
        (None, None, sizes.span, H), lambda b, n, i, s, _: (b, lax.div(n, group), span(i, s), 0)
    )
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes, static=static),
        out_shape=[
            jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, T // sizes.queries, ceil_div(T, sizes.span)),
            in_specs=[
                rows,
                columns,
                columns,
                pl.BlockSpec((None, M, sizes.queries, LANES), lambda b, n, i, s, _: (b, 0, i, 0)),
                pl.BlockSpec((None, 1, sizes.span), lambda b, n, i, s, _: (b, 0, span(i, s))),
            ],
            out_specs=[
                rows,
                pl.BlockSpec((None, None, 1, sizes.queries), lambda b, n, i, s, _: (b, n, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((sizes.queries, LANES), jnp.float32),
                pltpu.VMEM((sizes.queries, LANES), jnp.float32),
                pltpu.VMEM((sizes.queries, H), jnp.float32),
            ],
        ),
        compiler_params=compiler_params(static, sequential=2),
        interpret=static.interpret,
        name="flash_attention_forward",
    )(
        first_passes(ids_BMT, sizes),
        q_BNTH,
        k_BKTH,
        v_BKTH,
        in_sublanes(ids_BMT),
        ids_BMT[:, :1],
    )
