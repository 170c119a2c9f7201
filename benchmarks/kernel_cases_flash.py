"""Flash attention for the static measurements: what to compile, and what its schedule adds up to.

Qwen2.5-7B's shapes by default: 28 query heads, 4 key heads of 128, two causal rows of 4096 tokens
in bfloat16, compared segment by segment as packed rows need it. One segment a row is the longest
there is to do, and what the totals stand for: nothing is skipped but what causality skips.
"""

import dataclasses
import importlib
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from pgrpo_jax.kernels import flash_attention, flash_blocks
from pgrpo_jax.kernels.flash_blocks import BlockSizes

Direction = Literal["forward", "backward"]
MATMULS = {"forward": 2, "backward": 5}  # [T, T] by H each
CORE_MACS = 65_536  # multiply-adds a cycle of one TensorCore of v4, v5e and v5p


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int = 2
    T: int = 4096
    N: int = 28
    K: int = 4
    H: int = 128

    def floor_cycles(self, direction: Direction, cores: int) -> float:
        """The matrix work of the causal half alone, on units that are never idle."""
        pairs = self.B * self.N * self.T * self.T / 2
        return MATMULS[direction] * pairs * self.H / CORE_MACS / cores

    def hbm_bytes(self, direction: Direction) -> float:
        """What must move at least: each array once, and keys and values once for their group."""
        queries, keys = (self.B * self.T * n * self.H * 2 for n in (self.N, self.K))
        statistics = self.B * self.T * self.N * 4
        if direction == "forward":  # q, out; k, v
            return 2 * queries + 2 * keys + statistics
        return 3 * queries + 4 * keys + 2 * statistics  # q, dout, dq; k, v, dk, dv


def own_sizes(chip: str) -> dict[Direction, BlockSizes]:
    """What the kernel takes on a chip unless it is told."""
    if chip == "v4":
        return {"forward": flash_blocks.FORWARD_V4, "backward": flash_blocks.BACKWARD_V4}
    return {"forward": flash_blocks.FORWARD, "backward": flash_blocks.BACKWARD}


def build(*, direction: Direction, shared: bool, **sizes: int):
    """(function, abstract arguments) of our kernel with block sizes, those of BlockSizes; `shared`:
    segments may continue others, as the completions of one prompt do."""
    q, k, segments = _arguments(Shape())

    def forward(q, k, v, *segments):
        chosen: dict[str, Any] = {direction: BlockSizes(**sizes)}
        return flash_attention.flash_attention(q, k, v, *segments, **chosen)

    def backward(q, k, v, *segments):
        return jax.vjp(lambda q, k, v: forward(q, k, v, *segments), q, k, v)[1](q)

    arguments = [q, k, k, segments, *[segments] * shared]
    return {"forward": forward, "backward": backward}[direction], arguments


def build_tokamax(*, direction: Direction, block: int, part: int):
    """tokamax' splash attention: blocks of `block` queries and keys, `part` keys at a time."""
    base = "tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_"
    splash, masks = importlib.import_module(base + "kernel"), importlib.import_module(base + "mask")
    shape = Shape()
    config = splash.SplashConfig(
        block_q=block,
        block_kv=block,
        block_kv_compute=part,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=part,
    )
    kernel = splash.make_splash_mha_single_device(
        masks.CausalMask((shape.T, shape.T)), config=config
    )

    def forward(q, k, v, segments):
        def row(q, k, v, ids):
            return kernel(q, k, v, splash.SegmentIds(ids, ids))

        return jax.vmap(row)(q, k, v, segments)

    def backward(q, k, v, segments):
        return jax.vjp(lambda q, k, v: forward(q, k, v, segments), q, k, v)[1](q)

    q, k, segments = _arguments(shape)
    q, k = (
        jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], shape.H), x.dtype) for x in (q, k)
    )
    return {"forward": forward, "backward": backward}[direction], [q, k, k, segments]


# --- from a schedule to a whole call


class Node(Protocol):
    """A region of a kernel's schedule."""

    start: int
    children: list[Any]

    def own(self) -> list[int]: ...


def cycles(steps: Node, direction: Direction, cores: int, sizes: BlockSizes) -> float:
    """Static cycles of one core for a whole call of our kernel; `steps` is its loop over the grid.

    The kernels' regions stand in the order of the code: what only the first block does, the passes,
    the triangle, and what only the last block or a block of padding does.
    """
    shape = Shape()
    sizes = sizes.fitted(shape.T)
    blocks = math.ceil(shape.T / sizes.queries)
    spans = math.ceil(blocks * sizes.queries / sizes.span)
    heads, groups = shape.B * shape.N, shape.B * shape.K
    always, body = len(steps.own()), steps
    while len(body.children) < 4:  # beside the body, what waits for a copy
        *aside, body = sorted(body.children, key=_all)
        always += len(body.own()) + sum(map(_all, aside))
    first, passes, triangle, last = sorted(body.children, key=lambda node: node.start)
    times_once = {"forward": (heads, 0), "backward": (groups * spans, groups * spans)}[direction]
    total = (
        heads * blocks * spans * always
        + heads * math.comb(blocks, 2) * (sizes.queries // sizes.keys) * _all(passes)
        + heads * blocks * _all(triangle)
        + times_once[0] * _all(first)
        + times_once[1] * _all(last)
    )
    return total / cores


def _all(node: Node) -> int:
    return len(node.own()) + sum(map(_all, node.children))


def _arguments(shape: Shape) -> list[jax.ShapeDtypeStruct]:
    def rows(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.B, shape.T, heads, shape.H), jnp.bfloat16)

    ids = jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32)
    return [rows(shape.N), rows(shape.K), ids]
