"""What both passes of flash attention are cut into, and what they share in their kernels.

A grid step holds a block of `queries` rows of one head, and `span` columns of its keys. It loops
over the passes of `keys` columns before the block's own columns, from the first that shares a
segment with the block (a prefetched table), and then does the triangle on the diagonal, of which
the tiles above the diagonal are left out. Each of the two is one long piece of straight-line code,
long because its beginning and its end (scores, maximum, exponentials, values, one waiting for the
other) leave the matrix units idle.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = math.log2(math.e)
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
        tile = min(self.tile, round_up(length, LANES))
        blocks = ceil_div(length, self.queries)
        queries = round_up(ceil_div(length, blocks), tile)
        part = _divisor(queries, tile, self.part)
        keys = _divisor(queries, part, self.keys)
        spans = ceil_div(blocks * queries, self.span)
        return BlockSizes(ceil_div(blocks, spans) * queries, queries, keys, part, tile)


FORWARD = BlockSizes()
BACKWARD = BlockSizes()
# A v4 has 16 MiB of VMEM, where a v5p has 64, and is the better for wider pieces and finer steps.
FORWARD_V4 = BlockSizes(part=1024, tile=128)
BACKWARD_V4 = BlockSizes(span=2048, part=256, tile=128)


class Static(NamedTuple):
    """What the kernels know when they are traced."""

    forward: BlockSizes
    backward: BlockSizes
    scale: float
    soft_cap: float | None
    precision: lax.Precision
    vmem_bytes: int  # what a kernel may use
    interpret: bool


def ceil_div(n: int, size: int) -> int:
    return -(-n // size)


def round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


def _divisor(n: int, multiple: int, limit: int) -> int:
    """The largest divisor of n up to `limit` that is a multiple of `multiple`, or `multiple`."""
    return max(
        d for d in range(multiple, n + 1, multiple) if n % d == 0 and d <= max(limit, multiple)
    )


def repeat_lanes(x: jax.Array, columns: int) -> jax.Array:
    """[rows, columns] of x [rows, LANES], whose lanes are all the same."""
    if columns <= LANES:
        return x[:, :columns]
    return jnp.concatenate([x] * (columns // LANES), axis=1)


def capped(scores: jax.Array, static: Static) -> tuple[jax.Array, float]:
    """(x, factor): the logits in base 2 are x * factor. The factor comes after the maximum."""
    if static.soft_cap is None:
        return scores, static.scale * LOG2_E
    return jnp.tanh(scores * (static.scale / static.soft_cap)), static.soft_cap * LOG2_E


def first_passes(ids_BMT: jax.Array, sizes: BlockSizes) -> jax.Array:
    """first_X, X = B * blocks of queries: the first pass that a block has to look at.

    `ids_BMT` are the segments that a token attends: its own, and perhaps the one it continues.

    Passes before the block's own columns are meant; where none has a segment in common with it, the
    entry is their number. A block of nothing but padding has one more than that: it does not even
    look at its own columns.
    """

    def extremes(ids_BMT, width):
        cut = ids_BMT.reshape(*ids_BMT.shape[:2], -1, width)
        low = jnp.where(cut > 0, cut, jnp.iinfo(jnp.int32).max)
        return low.min((1, 3)), cut.max((1, 3))

    low_BQ, top_BQ = extremes(ids_BMT, sizes.queries)
    low_BP, top_BP = extremes(ids_BMT[:, :1], sizes.keys)
    meet_BQP = (low_BQ[:, :, None] <= top_BP[:, None]) & (low_BP[:, None] <= top_BQ[:, :, None])
    passes_11P = jnp.arange(low_BP.shape[1])[None, None]
    before_1Q = jnp.arange(low_BQ.shape[1])[None] * (sizes.queries // sizes.keys)
    first_BQP = jnp.where(meet_BQP, passes_11P, before_1Q[:, :, None])
    first_BQ = jnp.minimum(first_BQP.min(-1), before_1Q)
    return jnp.where(top_BQ > 0, first_BQ, before_1Q + 1).astype(jnp.int32).reshape(-1)


class Step(NamedTuple):
    """Which columns a grid step looks at: block i of queries, span s of keys.

    Passes `begin` to `end` of the span; then, if `is_last`, the block's own columns, which start at
    `own`, unless the whole block `is_padding`. Columns count from the start of the span.
    """

    begin: jax.Array
    end: jax.Array
    own: jax.Array
    is_last: jax.Array
    is_padding: jax.Array


def step_of(first: jax.Array, i: jax.Array, s: jax.Array, sizes: BlockSizes) -> Step:
    before = i * (sizes.queries // sizes.keys)
    here, passes = s * (sizes.span // sizes.keys), sizes.span // sizes.keys
    blocks = sizes.span // sizes.queries
    return Step(
        begin=jnp.maximum(first - here, 0),
        end=jnp.minimum(before - here, passes),
        own=pl.multiple_of(lax.rem(i, blocks) * sizes.queries, sizes.queries),
        is_last=s == lax.div(i, blocks),
        is_padding=first > before,
    )


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a, b, contracted, static: Static) -> jax.Array:
    return lax.dot_general(
        a, b, contracted, precision=static.precision, preferred_element_type=jnp.float32
    )


def in_sublanes(ids_BMT: jax.Array) -> jax.Array:
    """[B, M, T, LANES]: each token's segments in all lanes of a row; -1, as no key has, for 0."""
    ids_BMT1 = jnp.where(ids_BMT > 0, ids_BMT, -1)[..., None]
    return jnp.broadcast_to(ids_BMT1, (*ids_BMT.shape, LANES))


def meet(queries: list[jax.Array], keys: jax.Array) -> jax.Array:
    """Where the keys' segment is one of those that the queries attend."""
    found = queries[0] == keys
    for ids in queries[1:]:
        found |= ids == keys
    return found


def compiler_params(static: Static, sequential: int) -> pltpu.CompilerParams:
    """Of a grid whose first two axes, rows and heads, are free; the others have an order."""
    free, ordered = pltpu.PARALLEL, pltpu.ARBITRARY
    return pltpu.CompilerParams(
        dimension_semantics=(free, free, *[ordered] * sequential),
        vmem_limit_bytes=static.vmem_bytes,
    )
