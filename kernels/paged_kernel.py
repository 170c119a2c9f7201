"""The kernel of decode attention over pages: how the slots are shared out over cores, how their
blocks of keys stream through VMEM, and the running softmax. `paged_attention` says what for."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 16  # of a bfloat16 tile in memory, and of what is written back with a new token
UNROLL = 8  # pages whose copies are issued in straight-line code
LN_2 = math.log(2)  # scores are in powers of two
FLOOR = -1e30  # the score of what is masked; finite, since -inf - -inf is not a number


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the cache streams through the chip.

    A block is what one step of the loop computes: whole pages of one slot, up to `block_bytes` of
    keys and values. `buffers` of them lie in VMEM, one computed and the others on their way. The
    slots are shared out over `cores`: v4 and v5p have two; v5e has one, which does both shares in
    turn if told two.
    """

    block_bytes: int = 2 * 2**20
    buffers: int = 3
    cores: int = 2

    def __post_init__(self):
        if self.block_bytes < 1 or self.buffers < 2 or self.cores < 1:
            raise ValueError(
                "Blocks wants block_bytes of at least 1, two buffers or more (one is computed "
                f"while another arrives) and a core or more, got {self}"
            )

    def pages(self, page_bytes: int, table_pages: int) -> int:
        """Pages of one slot in a block: at least one, at most those of a slot."""
        return max(1, min(self.block_bytes // page_bytes, table_pages))


BLOCKS = Blocks()


class Refs(NamedTuple):
    """What the kernel works on: inputs, outputs, scratch. What serves writing may be None."""

    table: Any  # SMEM [B * M]: pages among all layers' pages
    lengths: Any  # SMEM [B]
    q: Any  # HBM [B, K, G, D]: the queries of each key head, padded to G rows
    new: Any  # HBM [B, K, 2H], float32: the new token
    pages: Any  # HBM [L * X, K, S, 2H]; an output too where a token is written
    out: Any  # HBM [B, K, G, D]
    lse: Any  # HBM [B, K, G, 128], float32: log sum exp of the scores, the same in all lanes
    order: Any  # SMEM [B + 1]: the slots of this core
    block: Any  # VMEM [buffers, pages of a block, K, S, 2H]
    q_block: Any  # VMEM [buffers, K, G, D]
    out_block: Any  # VMEM [K, G, D], on its way to HBM
    lse_block: Any  # VMEM [K, G, 128], the same
    peak: Any  # VMEM [K * G, 128]: the largest score so far, the same in all lanes
    total: Any  # VMEM [K * G, 128]: the sum of exp2(score - peak), the same in all lanes
    acc: Any  # VMEM [K * G, D]: the sum of exp2(score - peak) v
    arrived: Any  # DMA semaphores [buffers]: a block, and with a slot's first block its q and new
    sent: Any  # DMA semaphores [2]: out_block and lse_block, tile
    new_block: Any = None  # VMEM [buffers, K, 2H]
    tile: Any = None  # VMEM [K, ROWS, 2H]: the rows around the new token, on their way to HBM

    @property
    def page_size(self) -> int:
        return self.block.shape[3]

    @property
    def block_pages(self) -> int:
        return self.block.shape[1]

    @property
    def block_keys(self) -> int:
        return self.block_pages * self.page_size


class _Cursor(NamedTuple):
    """A block of work: the `block`th of the slot at `place` in this core's order."""

    place: jax.Array
    block: jax.Array


def _div(a: jax.Array, b: int) -> jax.Array:
    """a // b, and below a % b, of what is not negative: Python's operators look at signs."""
    return lax.div(a, jnp.int32(b))


def _rem(a: jax.Array, b: int) -> jax.Array:
    return lax.rem(a, jnp.int32(b))


def _share(r: Refs, cores: int) -> tuple[jax.Array, jax.Array]:
    """Notes this core's slots in `r.order`; returns how many they are, and their blocks.

    Slots stay in order, idle ones are left out. A slot belongs to the core in whose equal share of
    all keys its middle lies.
    """
    core, slots = pl.program_id(0), r.lengths.shape[0]
    total = lax.fori_loop(0, slots, lambda b, sum_: sum_ + r.lengths[b], jnp.int32(0))

    def note(b, carry):
        place, blocks, start = carry
        length = r.lengths[b]
        middle = (2 * start + length) * cores
        mine = (length > 0) & (2 * total * core <= middle) & (middle < 2 * total * (core + 1))

        @pl.when(mine)
        def _():
            r.order[place] = b

        new_blocks = _div(length + r.block_keys - 1, r.block_keys)
        return place + mine.astype(jnp.int32), blocks + mine * new_blocks, start + length

    places, blocks, _ = lax.fori_loop(0, slots, note, (jnp.int32(0),) * 3)
    r.order[places] = 0  # read, not used, by a cursor that is at its end
    return places, blocks


def _pages(r: Refs, at: _Cursor) -> jax.Array:
    """How many pages a block has."""
    length = r.lengths[r.order[at.place]]
    pages = _div(length + r.page_size - 1, r.page_size)
    return jnp.minimum(pages - at.block * r.block_pages, r.block_pages)


def _entry(r: Refs, at: _Cursor) -> jax.Array:
    """Where in the table a block's pages begin."""
    slot_pages = r.table.shape[0] // r.lengths.shape[0]
    return r.order[at.place] * slot_pages + at.block * r.block_pages


def _next(r: Refs, at: _Cursor) -> _Cursor:
    last = (at.block + 1) * r.block_keys >= r.lengths[r.order[at.place]]
    return _Cursor(jnp.where(last, at.place + 1, at.place), jnp.where(last, 0, at.block + 1))


def _of_slot(r: Refs, at: _Cursor, buffer: jax.Array) -> list[Any]:
    """The copies that come with a slot's first block. They lie where the slot's place says."""
    slot, place = r.order[at.place], _rem(at.place, r.q_block.shape[0])
    copy, arrived = pltpu.make_async_copy, r.arrived.at[buffer]
    copies = [copy(r.q.at[slot], r.q_block.at[place], arrived)]
    if r.new is not None:
        copies.append(copy(r.new.at[slot], r.new_block.at[place], arrived))
    return copies


def _fetch(r: Refs, at: _Cursor, buffer: jax.Array) -> None:
    """Starts the copies of a block: one a page."""
    pages, entry = _pages(r, at), _entry(r, at)
    chunks = _div(pages, UNROLL)

    def fetch_page(i):
        page = r.pages.at[r.table[entry + i]]
        pltpu.make_async_copy(page, r.block.at[buffer, i], r.arrived.at[buffer]).start()

    @pl.when(at.block == 0)
    def _():
        for copy in _of_slot(r, at, buffer):
            copy.start()

    # In straight-line code a page costs half of what it does in a loop of its own.
    @pl.loop(0, chunks)
    def _(chunk):
        for i in range(UNROLL):
            fetch_page(chunk * UNROLL + i)

    @pl.loop(chunks * UNROLL, pages)
    def _(i):
        fetch_page(i)


def _wait(r: Refs, at: _Cursor, buffer: jax.Array) -> None:
    """Waits for what `_fetch` started. A semaphore counts bytes, so pages are waited for in powers
    of two, whichever come first."""

    @pl.when(at.block == 0)
    def _():
        for copy in _of_slot(r, at, buffer):
            copy.wait()

    pages = _pages(r, at)
    for bit in range(r.block_pages.bit_length()):

        @pl.when((pages >> bit) & 1 == 1)
        def _(bit=bit):
            some = r.block.at[buffer, pl.ds(0, 1 << bit)]
            pltpu.make_async_copy(some, some, r.arrived.at[buffer]).wait()


def _close(r: Refs, at: _Cursor, buffer: jax.Array, keys: jax.Array) -> None:
    """In a slot's last block, of `keys` keys: takes in the new token and clears what lies behind.

    Whatever lies there, infinite or not a number, would reach the output as 0 * v.
    """
    S, width = r.block.shape[3:]
    values = pl.ds(width - r.acc.shape[1], r.acc.shape[1])
    row = _div(_rem(keys - 1, S), ROWS) * ROWS  # of the tile that has the last key
    page, rows = _div(keys - 1, S), pl.ds(pl.multiple_of(row, ROWS), ROWS)
    tile = r.block[buffer, page, :, rows, :]
    index = page * S + row + lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    if r.new is not None:
        tile = jnp.where(index == keys - 1, _new_token(r, at, tile), tile)
        _send_tile(r, at, tile, page, rows)
    r.block[buffer, page, :, rows, :] = jnp.where(index < keys, tile, jnp.zeros_like(tile))

    @pl.loop(_div(keys + ROWS - 1, ROWS), r.block_keys // ROWS)
    def _(i):
        rows = pl.ds(pl.multiple_of(_rem(i * ROWS, S), ROWS), ROWS)
        behind = r.block.at[buffer, _div(i * ROWS, S), :, rows, values]
        behind[...] = jnp.zeros(behind.shape, behind.dtype)


def _new_token(r: Refs, at: _Cursor, like: jax.Array) -> jax.Array:
    """The new token in every row of a tile [K, ROWS, 2H]."""
    place = _rem(at.place, r.new_block.shape[0])
    heads = [r.new_block[place, pl.ds(k, 1), :] for k in range(like.shape[0])]
    rows = jnp.stack([jnp.broadcast_to(head, like.shape[1:]) for head in heads])
    return rows.astype(like.dtype)


def _send_tile(r: Refs, at: _Cursor, tile: jax.Array, page: jax.Array, rows: Any) -> None:
    """Sends the tile of the new token to its page, when the one before has left."""

    @pl.when(at.place > 0)
    def _():
        pltpu.make_async_copy(r.tile, r.tile, r.sent.at[1]).wait()

    r.tile[...] = tile
    home = r.pages.at[r.table[_entry(r, at) + page], :, rows, :]
    pltpu.make_async_copy(r.tile, home, r.sent.at[1]).start()


def _attend(r: Refs, at: _Cursor, buffer: jax.Array, keys: jax.Array, scale: float) -> None:
    """Adds a block to the running softmax.

    Each stage is done for all heads before the next begins, so that their chains of matmul,
    maximum, exponential and matmul hide each other's latency.
    """
    K, G, D = r.q_block.shape[1:]
    S, width = r.block.shape[3:]
    # The MXU rounds float32 operands to bfloat16 unless it is told not to.
    exact = lax.Precision.HIGHEST if r.block.dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
    kv = [r.block[buffer, :, k].reshape(r.block_keys, width) for k in range(K)]
    q = r.q_block.at[_rem(at.place, r.q_block.shape[0])]
    scores = [dot(q[k], kv[k][:, :D], (((1,), (1,)), ((), ()))) for k in range(K)]
    index = lax.broadcasted_iota(jnp.int32, (1, r.block_keys), 1)
    s = jnp.where(index < keys, jnp.concatenate(scores) * scale, FLOOR)
    peak = jnp.maximum(r.peak[:, :1], s.max(1, keepdims=True))
    p, decay = jnp.exp2(s - peak), jnp.exp2(r.peak[:, :1] - peak)
    heads = [p[k * G : (k + 1) * G].astype(r.block.dtype) for k in range(K)]
    values = [dot(heads[k], kv[k][:, width - D :], (((1,), (0,)), ((), ()))) for k in range(K)]
    total = decay * r.total[:, :1] + p.sum(1, keepdims=True)
    r.peak[...] = jnp.broadcast_to(peak, r.peak.shape)
    r.total[...] = jnp.broadcast_to(total, r.total.shape)
    r.acc[...] = decay * r.acc[...] + jnp.concatenate(values)


def _finish(r: Refs, at: _Cursor) -> None:
    """Sends a slot's results on their way, when those before have left."""

    @pl.when(at.place > 0)
    def _():
        _wait_sent(r)

    total, slot = r.total[...], r.order[at.place]
    r.out_block[...] = (r.acc[...] / total[:, :1]).reshape(r.out_block.shape).astype(r.out.dtype)
    r.lse_block[...] = (r.peak[...] * LN_2 + jnp.log(total)).reshape(r.lse_block.shape)
    pltpu.make_async_copy(r.out_block, r.out.at[slot], r.sent.at[0]).start()
    pltpu.make_async_copy(r.lse_block, r.lse.at[slot], r.sent.at[0]).start()


def _wait_sent(r: Refs) -> None:
    for block in (r.out_block, r.lse_block):
        pltpu.make_async_copy(block, block, r.sent.at[0]).wait()


def _run(r: Refs, scale: float, cores: int) -> None:
    places, blocks = _share(r, cores)
    buffers = r.block.shape[0]

    def prefetch(i: jax.Array, at: _Cursor) -> _Cursor:
        @pl.when(i < blocks)
        def _():
            _fetch(r, at, _rem(i, buffers))

        return jax.tree.map(functools.partial(jnp.where, i < blocks), _next(r, at), at)

    def block(i: jax.Array, carry: tuple[_Cursor, _Cursor]) -> tuple[_Cursor, _Cursor]:
        at, ahead = carry
        ahead = prefetch(i + buffers - 1, ahead)
        buffer = _rem(i, buffers)
        keys = r.lengths[r.order[at.place]] - at.block * r.block_keys

        @pl.when(at.block == 0)
        def _():
            r.peak[...] = jnp.full(r.peak.shape, FLOOR, jnp.float32)
            r.total[...] = jnp.zeros(r.total.shape, jnp.float32)
            r.acc[...] = jnp.zeros(r.acc.shape, jnp.float32)

        _wait(r, at, buffer)

        @pl.when(keys <= r.block_keys)
        def _():
            _close(r, at, buffer, keys)

        _attend(r, at, buffer, keys, scale)

        @pl.when(keys <= r.block_keys)
        def _():
            _finish(r, at)

        return _next(r, at), ahead

    start = ahead = _Cursor(jnp.int32(0), jnp.int32(0))
    for i in range(buffers - 1):
        ahead = prefetch(jnp.int32(i), ahead)
    lax.fori_loop(0, blocks, block, (start, ahead))

    @pl.when(places > 0)
    def _():
        _wait_sent(r)
        if r.new is not None:
            pltpu.make_async_copy(r.tile, r.tile, r.sent.at[1]).wait()


def read(
    table_ref, lengths_ref, q_ref, pages_ref, out_ref, lse_ref, *scratch, scale, cores
) -> None:
    refs = Refs(table_ref, lengths_ref, q_ref, None, pages_ref, out_ref, lse_ref, *scratch)
    _run(refs, scale, cores)


def read_and_write(
    table_ref, lengths_ref, q_ref, new_ref, _, out_ref, lse_ref, pages_ref, *scratch, scale, cores
) -> None:
    """The pages as an input are not read: they are the output `pages_ref`."""
    refs = Refs(table_ref, lengths_ref, q_ref, new_ref, pages_ref, out_ref, lse_ref, *scratch)
    _run(refs, scale, cores)
