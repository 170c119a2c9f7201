"""Flash attention for TPUs: causal, grouped queries, packed rows; forward and fused backward.

A query attends a key iff both lie in the same segment (a positive one; 0 is padding) and the key's
column is not after the query's. Within a segment, tokens must therefore stand in the order of their
positions. A query without any key gives zeros, and zero gradients. `reference` says the same in
plain jnp.

Layouts: q_BTNH, k_BTKH, v_BTKH of one dtype (bfloat16, or float32), segments_BT int32; N is a
multiple of K, query head n reads key head n // (N / K). Any T: rows are padded inside. Scores, sums
and gradients are accumulated in float32.

A grid step holds a block of `queries` rows of one head, and `span` columns of its keys. It loops
over the passes of `keys` columns before the block's own columns, from the first that shares a
segment with the block (a prefetched table), and then does the triangle on the diagonal, of which
the tiles above the diagonal are left out. Each of the two is one long piece of straight-line code,
long because its beginning and its end (scores, maximum, exponentials, values, one waiting for the
other) leave the matrix units idle.

The backward pass is one kernel. Its scores are transposed, keys in sublanes: then the statistics of
the queries lie along lanes as rows, and only dq needs a transposed operand. dk and dv of a span
stay in VMEM in float32 over all query blocks and all heads of the group; dq of a block is summed
over the passes of a step, and outside over spans, if there is more than one.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgrpo_jax.kernels import attention

LANES = 128
LOG2_E = math.log2(math.e)
LOWEST = -1e30  # where the running maximum begins: finite, so that exp2(-inf - LOWEST) is 0
PRODUCT = (((1,), (0,)), ((), ()))  # a b
ROWS = (((1,), (1,)), ((), ()))  # a b^T
SUMS = (((0,), (0,)), ((), ()))  # a^T b


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows and columns of the pieces, each a multiple of the one below it."""

    span: int = 4096  # columns whose keys and values lie in VMEM together
    queries: int = 1024  # rows of a grid step
    keys: int = 1024  # columns of one pass of its loop
    part: int = 512  # rows and columns of a piece of a pass, whose scores exist at one time
    tile: int = 256  # rows and columns of the steps of the triangle

    def __post_init__(self):
        chain = (self.span, self.queries, self.keys, self.part, self.tile, LANES)
        if any(small < 1 or large % small for large, small in zip(chain, chain[1:], strict=False)):
            raise ValueError(
                "block sizes must each be a multiple of the next, "
                f"span, queries, keys, part, tile and {LANES}; got {self}"
            )

    def fitted(self, length: int) -> "BlockSizes":
        """Sizes for rows of `length` tokens, which leave little padding."""
        tile = min(self.tile, _up(length, LANES))
        blocks = _parts(length, self.queries)
        queries = _up(_parts(length, blocks), tile)
        part = _divisor(queries, tile, self.part)
        keys = _divisor(queries, part, self.keys)
        spans = _parts(blocks * queries, self.span)
        return BlockSizes(_parts(blocks, spans) * queries, queries, keys, part, tile)


FORWARD = BlockSizes()
BACKWARD = BlockSizes()
# A v4 has 16 MiB of VMEM, where a v5p has 64, and is the better for wider pieces and finer steps.
FORWARD_V4 = BlockSizes(part=1024, tile=128)
BACKWARD_V4 = BlockSizes(span=2048, part=256, tile=128)


def reference(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """`attention.reference` with columns for positions."""
    positions_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1])[None], segments_BT.shape)
    rows = (positions_BT, segments_BT)
    return attention.reference(q_BTNH, k_BTKH, v_BTKH, *rows, *rows, soft_cap=soft_cap)


class _Static(NamedTuple):
    """What the kernels know when they are traced."""

    forward: BlockSizes
    backward: BlockSizes
    scale: float
    soft_cap: float | None
    precision: lax.Precision
    vmem_bytes: int  # what a kernel may use
    interpret: bool


# --- both directions


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _up(n: int, multiple: int) -> int:
    return _parts(n, multiple) * multiple


def _divisor(n: int, multiple: int, limit: int) -> int:
    """The largest divisor of n up to `limit` that is a multiple of `multiple`, or `multiple`."""
    return max(
        d for d in range(multiple, n + 1, multiple) if n % d == 0 and d <= max(limit, multiple)
    )


def _repeat(x: jax.Array, columns: int) -> jax.Array:
    """[rows, columns] of x [rows, LANES], whose lanes are all the same."""
    if columns <= LANES:
        return x[:, :columns]
    return jnp.concatenate([x] * (columns // LANES), axis=1)


def _capped(scores: jax.Array, static: _Static) -> tuple[jax.Array, float]:
    """(x, factor): the logits in base 2 are x * factor. The factor comes after the maximum."""
    if static.soft_cap is None:
        return scores, static.scale * LOG2_E
    return jnp.tanh(scores * (static.scale / static.soft_cap)), static.soft_cap * LOG2_E


def _first_passes(segments_BT: jax.Array, sizes: BlockSizes) -> jax.Array:
    """first_X, X = B * blocks of queries: the first pass that a block has to look at.

    Passes before the block's own columns are meant; where none has a segment in common with it, the
    entry is their number. A block of nothing but padding has one more than that: it does not even
    look at its own columns.
    """

    def extremes(width):
        cut = segments_BT.reshape(segments_BT.shape[0], -1, width)
        return jnp.where(cut > 0, cut, jnp.iinfo(jnp.int32).max).min(-1), cut.max(-1)

    low_BQ, top_BQ = extremes(sizes.queries)
    low_BP, top_BP = extremes(sizes.keys)
    meet_BQP = (low_BQ[:, :, None] <= top_BP[:, None]) & (low_BP[:, None] <= top_BQ[:, :, None])
    passes_11P = jnp.arange(low_BP.shape[1])[None, None]
    before_1Q = jnp.arange(low_BQ.shape[1])[None] * (sizes.queries // sizes.keys)
    first_BQP = jnp.where(meet_BQP, passes_11P, before_1Q[:, :, None])
    first_BQ = jnp.minimum(first_BQP.min(-1), before_1Q)
    return jnp.where(top_BQ > 0, first_BQ, before_1Q + 1).astype(jnp.int32).reshape(-1)


class _Step(NamedTuple):
    """Which columns a grid step looks at: block i of queries, span s of keys.

    Passes `begin` to `end` of the span; then, if `is_last`, the block's own columns, which start at
    `own`, unless the whole block `is_padding`. Columns count from the start of the span.
    """

    begin: jax.Array
    end: jax.Array
    own: jax.Array
    is_last: jax.Array
    is_padding: jax.Array


def _step(first: jax.Array, i: jax.Array, s: jax.Array, sizes: BlockSizes) -> _Step:
    before = i * (sizes.queries // sizes.keys)
    here, passes = s * (sizes.span // sizes.keys), sizes.span // sizes.keys
    blocks = sizes.span // sizes.queries
    return _Step(
        begin=jnp.maximum(first - here, 0),
        end=jnp.minimum(before - here, passes),
        own=pl.multiple_of(lax.rem(i, blocks) * sizes.queries, sizes.queries),
        is_last=s == lax.div(i, blocks),
        is_padding=first > before,
    )


# --- forward


def _forward_kernel(
    first_ref,
    q_ref,
    k_ref,
    v_ref,
    q_segments_ref,  # [queries, LANES]
    k_segments_ref,  # [1, span]
    out_ref,
    lse_ref,  # [1, queries], in base 2
    top_ref,  # [queries, LANES], each lane the maximum
    total_ref,  # [queries, LANES], whose lanes are still to be summed
    acc_ref,
    *,
    sizes: BlockSizes,
    static: _Static,
):
    i, s = pl.program_id(2), pl.program_id(3)
    step = _step(first_ref[pl.program_id(0) * pl.num_programs(2) + i], i, s, sizes)
    inputs = (q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref)
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


def _softmax(inputs, state, rows, pieces, static: _Static):
    """The new (top, total, acc) of `rows` after neighbouring `pieces`: (column, width, causal)."""
    q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref = inputs
    top, total, acc = (ref[rows, :] for ref in state)
    parts = []
    for column, width, is_causal in pieces:
        columns = pl.ds(column, width)
        part = _dot(q_ref[rows, :], k_ref[columns, :], ROWS, static)
        mask = _repeat(q_segments_ref[rows, :], width) == k_segments_ref[:, columns]
        if is_causal:
            mask &= _iota(part.shape, 0) >= _iota(part.shape, 1)
        x, factor = _capped(part, static)
        parts.append(jnp.where(mask, x, -jnp.inf))
    x = jnp.concatenate(parts, axis=1)
    width = x.shape[1]
    new_top = jnp.maximum(top, x.max(-1, keepdims=True))
    p = jnp.exp2((x - _repeat(new_top, width)) * factor)
    kept = jnp.exp2((top - new_top) * factor)
    total = kept * total + sum(p[:, lane : lane + LANES] for lane in range(0, width, LANES))
    columns = pl.ds(pieces[0][0], width)
    values = _dot(p.astype(v_ref.dtype), v_ref[columns, :], PRODUCT, static)
    return new_top, total, _repeat(kept, acc.shape[1]) * acc + values


def _finished(top, total, acc, dtype, static: _Static) -> tuple[jax.Array, jax.Array]:
    """The block of the output, and its row of log2(sum(exp2(logits))); zeros without any key.

    In columns a register holds eight rows, in rows 128 of them: logarithms are for rows.
    """
    total = total.sum(-1, keepdims=True)
    # The unit's own estimate and a step of Newton's are more than bfloat16 can hold.
    estimate = pl.reciprocal(total, approx=dtype == jnp.bfloat16)
    inverse = jnp.where(total == 0, 0, estimate * (2 - total * estimate))
    out = (acc * inverse).astype(dtype)
    columns = jnp.where(_iota(top.shape, 1) < LANES // 2, top, total)
    parts = [columns[row : row + LANES].T for row in range(0, top.shape[0], LANES)]
    top_row = jnp.concatenate([part[:1] for part in parts], axis=1)
    total_row = jnp.concatenate([part[LANES // 2 : LANES // 2 + 1] for part in parts], axis=1)
    factor = (static.soft_cap or static.scale) * LOG2_E
    lse = top_row * factor + jnp.log2(jnp.where(total_row == 0, 1, total_row))
    return out, jnp.where(total_row == 0, 0, lse)


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(a, b, contracted, static: _Static) -> jax.Array:
    return lax.dot_general(
        a, b, contracted, precision=static.precision, preferred_element_type=jnp.float32
    )


def _forward(q_BNTH, k_BKTH, v_BKTH, segments_BT, static: _Static):
    """(out_BNTH, lse_BN1T) of rows that are padded to whole blocks."""
    B, N, T, H = q_BNTH.shape
    sizes, group = static.forward, N // k_BKTH.shape[1]
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
            grid=(B, N, T // sizes.queries, _parts(T, sizes.span)),
            in_specs=[
                rows,
                columns,
                columns,
                pl.BlockSpec((None, sizes.queries, LANES), lambda b, n, i, s, _: (b, i, 0)),
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
        compiler_params=_compiler_params(static, sequential=2),
        interpret=static.interpret,
        name="flash_attention_forward",
    )(
        _first_passes(segments_BT, sizes),
        q_BNTH,
        k_BKTH,
        v_BKTH,
        _in_sublanes(segments_BT),
        segments_BT[:, None],
    )


# --- backward


def _backward_kernel(
    first_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,  # [1, queries]
    delta_ref,  # [1, queries]
    q_segments_ref,  # [1, queries]
    k_segments_ref,  # [span, LANES]
    dq_ref,
    dk_ref,
    dv_ref,
    dq_acc_ref,
    dk_acc_ref,
    dv_acc_ref,
    *,
    sizes: BlockSizes,
    static: _Static,
):
    s, g, i = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    groups, blocks = pl.num_programs(3), pl.num_programs(4)
    step = _step(first_ref[pl.program_id(0) * blocks + i], i, s, sizes)
    inputs = (q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_segments_ref, k_segments_ref)
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


def _gradients(inputs, sums, columns, rows, is_causal: bool, static: _Static) -> None:
    """Adds what `columns` of keys and `rows` of queries give to dq, dk (both unscaled) and dv.

    If `is_causal`, the first column and the first row are one token.
    """
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, q_segments_ref, k_segments_ref = inputs
    dq_ref, dk_ref, dv_ref = sums
    q, dout, k, v = q_ref[rows, :], dout_ref[rows, :], k_ref[columns, :], v_ref[columns, :]
    scores = _dot(k, q, ROWS, static)
    mask = _repeat(k_segments_ref[columns, :], scores.shape[1]) == q_segments_ref[:, rows]
    if is_causal:
        mask &= _iota(scores.shape, 0) <= _iota(scores.shape, 1)
    x, factor = _capped(scores, static)
    p = jnp.where(mask, jnp.exp2(x * factor - lse_ref[:, rows]), 0)
    dv_ref[columns, :] += _dot(p.astype(dout.dtype), dout, PRODUCT, static)
    dp = _dot(v, dout, ROWS, static)
    ds = p * (dp - delta_ref[:, rows])
    if static.soft_cap is not None:
        ds *= 1 - x * x
    # p is 0 where the mask is, but padding may hold what is infinite after a product.
    ds = jnp.where(mask, ds, 0).astype(q.dtype)
    dk_ref[columns, :] += _dot(ds, q, PRODUCT, static)
    dq_ref[rows, :] += _dot(ds, k, SUMS, static)


def _backward(q_BNTH, k_BKTH, v_BKTH, segments_BT, dout_BNTH, lse_BN1T, delta_BN1T, static):
    """(dq_BNTH, dk_BKTH, dv_BKTH) of rows that are padded to whole blocks."""
    B, N, T, H = q_BNTH.shape
    K, sizes = k_BKTH.shape[1], static.backward
    G, spans, blocks = N // K, _parts(T, sizes.span), sizes.span // sizes.queries

    def block(s, i):  # a block before the span is not fetched
        return jnp.maximum(i, s * blocks)

    rows = pl.BlockSpec(
        (None, None, sizes.queries, H), lambda b, k, s, g, i, _: (b, k * G + g, block(s, i), 0)
    )
    statistics = pl.BlockSpec(
        (None, None, 1, sizes.queries), lambda b, k, s, g, i, _: (b, k * G + g, 0, block(s, i))
    )
    columns = pl.BlockSpec((None, None, sizes.span, H), lambda b, k, s, g, i, _: (b, k, s, 0))
    partial_dtype = q_BNTH.dtype if spans == 1 else jnp.float32
    dq_SBNTH, dk_BKTH, dv_BKTH = pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, static=static),
        out_shape=[
            jax.ShapeDtypeStruct((spans, *q_BNTH.shape), partial_dtype),
            jax.ShapeDtypeStruct(k_BKTH.shape, k_BKTH.dtype),
            jax.ShapeDtypeStruct(v_BKTH.shape, v_BKTH.dtype),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, spans, G, T // sizes.queries),
            in_specs=[
                rows,
                columns,
                columns,
                rows,
                statistics,
                statistics,
                pl.BlockSpec(
                    (None, 1, sizes.queries), lambda b, k, s, g, i, _: (b, 0, block(s, i))
                ),
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
        ),
        compiler_params=_compiler_params(static, sequential=3),
        interpret=static.interpret,
        name="flash_attention_backward",
    )(
        _first_passes(segments_BT, sizes),
        q_BNTH,
        k_BKTH,
        v_BKTH,
        dout_BNTH,
        lse_BN1T,
        delta_BN1T,
        segments_BT[:, None],
        _in_sublanes(segments_BT),
    )
    dq_BNTH = dq_SBNTH[0] if spans == 1 else dq_SBNTH.sum(0).astype(q_BNTH.dtype)
    return dq_BNTH, dk_BKTH, dv_BKTH


# --- the public function


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    soft_cap: float | None = None,
    forward: BlockSizes | None = None,
    backward: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v -> out_BTNH, of q's dtype.

    `soft_cap` turns the logits into cap * tanh(logits / cap) before the mask. The block sizes
    are, unless given, FORWARD and BACKWARD, or those for a v4. `interpret` runs the kernels on any
    platform, slowly.

    Raises:
      ValueError: shapes or dtypes that the kernels cannot do.
    """
    _check(q_BTNH, k_BTKH, v_BTKH, segments_BT, soft_cap)
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    is_float32, is_v4 = q_BTNH.dtype == jnp.float32, _is_v4()
    forward = forward or (FORWARD_V4 if is_v4 else FORWARD)
    backward = backward or (BACKWARD_V4 if is_v4 else BACKWARD)
    static = _Static(
        forward=forward.fitted(T),
        backward=backward.fitted(T),
        scale=H**-0.5,
        soft_cap=soft_cap,
        precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
        vmem_bytes=(16 if is_v4 else 32) * 2**20,
        interpret=interpret,
    )
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return _flash(q_BNTH, k_BKTH, v_BKTH, segments_BT.astype(jnp.int32), static).swapaxes(1, 2)


def _check(q_BTNH, k_BTKH, v_BTKH, segments_BT, soft_cap) -> None:
    if q_BTNH.ndim != 4 or k_BTKH.ndim != 4:
        raise ValueError(
            f"flash attention wants q_BTNH and k_BTKH, got {q_BTNH.shape} and {k_BTKH.shape}"
        )
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if k_BTKH.shape != v_BTKH.shape or k_BTKH.shape != (B, T, K, H) or N % K:
        raise ValueError(
            f"flash attention wants k and v of one shape [{B}, {T}, K, {H}] with K dividing the "
            f"{N} query heads, got k {k_BTKH.shape} and v {v_BTKH.shape}; queries and keys are the "
            "same tokens, so a cache needs another kernel"
        )
    if segments_BT.shape != (B, T) or not jnp.issubdtype(segments_BT.dtype, jnp.integer):
        raise ValueError(
            f"flash attention wants integer segments [{B}, {T}], got {segments_BT.dtype} "
            f"{segments_BT.shape}"
        )
    dtypes = {x.dtype for x in (q_BTNH, k_BTKH, v_BTKH)}
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        raise ValueError(
            "flash attention wants q, k and v all bfloat16, or all float32, got "
            f"{q_BTNH.dtype}, {k_BTKH.dtype} and {v_BTKH.dtype}; cast them first"
        )
    if H > LANES or H % 8:
        raise ValueError(
            f"flash attention knows head dimensions up to {LANES} that are multiples of 8, got {H};"
            " use the reference"
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be above 0, or None for no cap, got {soft_cap}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BNTH, k_BKTH, v_BKTH, segments_BT, static: _Static):
    return _flash_forward(q_BNTH, k_BKTH, v_BKTH, segments_BT, static)[0]


def _flash_forward(q_BNTH, k_BKTH, v_BKTH, segments_BT, static: _Static):
    T = q_BNTH.shape[2]
    tokens = _up(T, static.forward.queries)
    q, k, v = (_pad(x, tokens, 2) for x in (q_BNTH, k_BKTH, v_BKTH))
    out_BNTH, lse_BN1T = _forward(q, k, v, _pad(segments_BT, tokens, 1), static)
    out_BNTH, lse_BN1T = out_BNTH[:, :, :T], lse_BN1T[:, :, :, :T]
    return out_BNTH, (q_BNTH, k_BKTH, v_BKTH, segments_BT, out_BNTH, lse_BN1T)


def _flash_backward(static: _Static, residuals, dout_BNTH):
    q_BNTH, k_BKTH, v_BKTH, segments_BT, out_BNTH, lse_BN1T = residuals
    T = q_BNTH.shape[2]
    tokens = _up(T, static.backward.queries)
    products_BNTH = out_BNTH.astype(jnp.float32) * dout_BNTH.astype(jnp.float32)
    # Padding gave zeros; what comes back for it may be anything, and means nothing.
    delta_BNT = jnp.where(segments_BT[:, None] > 0, products_BNTH.sum(-1), 0)
    q, k, v = (_pad(x, tokens, 2) for x in (q_BNTH, k_BKTH, v_BKTH))
    gradients = _backward(
        q,
        k,
        v,
        _pad(segments_BT, tokens, 1),
        _pad(dout_BNTH, tokens, 2),
        _pad(lse_BN1T, tokens, 3),
        _pad(delta_BNT[:, :, None], tokens, 3),
        static,
    )
    return *(x[:, :, :T] for x in gradients), None


_flash.defvjp(_flash_forward, _flash_backward)


def _pad(x: jax.Array, tokens: int, axis: int) -> jax.Array:
    """x with zeros behind it, `tokens` long."""
    widths = [(0, tokens - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths)


def _in_sublanes(segments_BT: jax.Array) -> jax.Array:
    """[B, T, LANES]: each token's segment in all lanes of a row; padding has one of its own, -1."""
    ids_BT1 = jnp.where(segments_BT > 0, segments_BT, -1)[:, :, None]
    return jnp.broadcast_to(ids_BT1, (*segments_BT.shape, LANES))


def _compiler_params(static: _Static, sequential: int) -> pltpu.CompilerParams:
    """Of a grid whose first two axes, rows and heads, are free; the others have an order."""
    free, ordered = pltpu.PARALLEL, pltpu.ARBITRARY
    return pltpu.CompilerParams(
        dimension_semantics=(free, free, *[ordered] * sequential),
        vmem_limit_bytes=static.vmem_bytes,
    )


def _is_v4() -> bool:
    """Whether this is traced for a v4: the device of the mesh in context, or the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.devices()[0]).device_kind == "TPU v4"
