"""Decode attention over pages, for the static measurements: ours, and the public ones of jax.

64 slots of 4096 tokens, 28 query heads, 4 key heads of 128, bfloat16: Qwen2.5-7B's. What is
compared is a block of keys in the middle of a slot, that is the loop which computes it and starts
the copies of a later one, over the cycles that a core needs to get the block's bytes from HBM.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from benchmarks.tpu_static import Kernel, Node
from pgrpo_jax.kernels import paged_attention, paged_kernel

SLOTS, LENGTH, QUERY_HEADS, KEY_HEADS, HEAD_DIM = 64, 4096, 28, 4, 128
KEY_BYTES = 2 * KEY_HEADS * HEAD_DIM * 2  # key and value of a token, bfloat16
HEAD_BYTES = KEY_BYTES // KEY_HEADS  # those of one key head
PAGE_COPY = "dma.hbm_to_vmem"


def build(*, page: int, write: bool) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """(function, abstract arguments) of our kernels, on one layer of two."""
    pages = LENGTH // page
    q, new = _bfloat16(SLOTS, QUERY_HEADS, HEAD_DIM), _bfloat16(SLOTS, KEY_HEADS, HEAD_DIM)
    cache = _bfloat16(2, SLOTS * pages, KEY_HEADS, page, 2 * HEAD_DIM)
    rest = [cache, _int32(), _int32(SLOTS, pages), _int32(SLOTS)]
    if write:
        return paged_attention.attend_write, [q, new, new, *rest]
    return paged_attention.attend, [q, *rest]


def build_paged(*, page: int, block: int) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """jax's paged_attention, with blocks of `block` keys."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as public

    pages = LENGTH // page
    cache = _bfloat16(KEY_HEADS, SLOTS * pages, page, HEAD_DIM)
    q = _bfloat16(SLOTS, QUERY_HEADS, HEAD_DIM)
    function = functools.partial(public, pages_per_compute_block=block // page)
    return function, [q, cache, cache, _int32(SLOTS), _int32(SLOTS, pages)]


def build_ragged(*, page: int, block: int) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """jax's ragged_paged_attention, with one query token a slot."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages = LENGTH // page
    function = functools.partial(
        ragged_paged_attention,
        sm_scale=HEAD_DIM**-0.5,
        num_kv_pages_per_block=block // page,
        num_queries_per_block=8,
    )
    q = _bfloat16(SLOTS, QUERY_HEADS, HEAD_DIM)
    cache = _bfloat16(SLOTS * pages, page, 2 * KEY_HEADS, HEAD_DIM)
    rest = [_int32(SLOTS), _int32(SLOTS, pages), _int32(SLOTS + 1), _int32(1)]
    return function, [q, cache, *rest]


def _bfloat16(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


def _int32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


# --- from a schedule to a block of keys


def block_cycles(kernels: Sequence[Kernel], pages: int) -> float:
    """Static cycles of a block of `pages` pages in the middle of a slot.

    The hot node is the loop over blocks. Of what it may skip, a pass takes what has matrix work and
    what starts copies from HBM; what begins and ends a slot is left out.
    """
    (kernel,) = kernels
    loop = _loop_of(kernel, kernel.hot())
    # Of two alike that only start copies, the first is for the very first block of a call.
    fetches = [(n, _copies(kernel, n)) for n in loop.walk() if n.kind == "if"]
    skipped = [
        first
        for first, copies in fetches
        for second, others in fetches
        if copies == others > 0 and first.end <= second.start
    ]
    return kernel.passed(
        loop, lambda n: 0.0 if any(n is s for s in skipped) else _times(kernel, pages, n)
    )


def _copies(kernel: Kernel, node: Node) -> int:
    """The copies from HBM that a node starts, if it does nothing else."""
    inside = range(node.start, node.end)
    return 0 if kernel.matrix_cycles(inside) else kernel.text(inside).count(PAGE_COPY)


def _loop_of(kernel: Kernel, node: Node) -> Node:
    """The innermost loop that a node lies in, or is."""
    around = [n for n in kernel.nodes() if n.start <= node.start and node.end <= n.end]
    return min(
        (n for n in around if n.kind == "loop"), key=lambda n: n.end - n.start, default=kernel.root
    )


def _times(kernel: Kernel, pages: int, node: Node) -> float:
    """How often a pass over the loop runs a node in it."""
    inside = range(node.start, node.end)
    copies = kernel.text(inside).count(PAGE_COPY)
    if node.kind == "loop" and copies:
        # One loop copies several pages at a time; another, of single pages, copies what remains.
        return pages // copies if copies > 1 else pages % paged_kernel.UNROLL
    if node.kind == "loop":
        return node.trips or 1
    return float(copies > 0 or kernel.matrix_cycles(inside) > 0)
