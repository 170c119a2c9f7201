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

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgrpo_jax.kernels import attention

ROWS = 16  # of a bfloat16 tile in memory, and of what is written back with a new token
UNROLL = 8  # pages whose copies are issued in straight-line code
FLOOR = -1e30  # the score of what is masked; finite, since -inf - -inf is not a number


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


class _Refs(NamedTuple):
    """What the kernel works on: inputs, outputs, scratch. What serves writing may be None."""

    table: Any  # SMEM [B * M]: pages among all layers' pages
    lengths: Any  # SMEM [B]
    q: Any  # HBM [B, K, G, D]: the queries of each key head, padded to G rows
    new: Any  # HBM [B, K, 2H], float32: the new token
    pages: Any  # HBM [L * X, K, S, 2H]; an output too where a token is written
    out: Any  # HBM [B, K, G, D]
    order: Any  # SMEM [B + 1]: the slots of this core
    block: Any  # VMEM [buffers, pages of a block, K, S, 2H]
    q_block: Any  # VMEM [buffers, K, G, D]
    out_block: Any  # VMEM [K, G, D], on its way to HBM
    peak: Any  # VMEM [K * G, 128]: the largest score so far, the same in all lanes
    total: Any  # VMEM [K * G, 128]: the sum of exp2(score - peak), the same in all lanes
    acc: Any  # VMEM [K * G, D]: the sum of exp2(score - peak) v
    arrived: Any  # DMA semaphores [buffers]: a block, and with a slot's first block its q and new
    sent: Any  # DMA semaphores [2]: out_block, tile
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


def _share(r: _Refs, cores: int) -> tuple[jax.Array, jax.Array]:
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


def _pages(r: _Refs, at: _Cursor) -> jax.Array:
    """How many pages a block has."""
    length = r.lengths[r.order[at.place]]
    pages = _div(length + r.page_size - 1, r.page_size)
    return jnp.minimum(pages - at.block * r.block_pages, r.block_pages)


def _entry(r: _Refs, at: _Cursor) -> jax.Array:
    """Where in the table a block's pages begin."""
    slot_pages = r.table.shape[0] // r.lengths.shape[0]
    return r.order[at.place] * slot_pages + at.block * r.block_pages


def _next(r: _Refs, at: _Cursor) -> _Cursor:
    last = (at.block + 1) * r.block_keys >= r.lengths[r.order[at.place]]
    return _Cursor(jnp.where(last, at.place + 1, at.place), jnp.where(last, 0, at.block + 1))


def _of_slot(r: _Refs, at: _Cursor, buffer: jax.Array) -> list[Any]:
    """The copies that come with a slot's first block. They lie where the slot's place says."""
    slot, place = r.order[at.place], _rem(at.place, r.q_block.shape[0])
    copy, arrived = pltpu.make_async_copy, r.arrived.at[buffer]
    copies = [copy(r.q.at[slot], r.q_block.at[place], arrived)]
    if r.new is not None:
        copies.append(copy(r.new.at[slot], r.new_block.at[place], arrived))
    return copies


def _fetch(r: _Refs, at: _Cursor, buffer: jax.Array) -> None:
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


def _wait(r: _Refs, at: _Cursor, buffer: jax.Array) -> None:
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


def _close(r: _Refs, at: _Cursor, buffer: jax.Array, keys: jax.Array) -> None:
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


def _new_token(r: _Refs, at: _Cursor, like: jax.Array) -> jax.Array:
    """The new token in every row of a tile [K, ROWS, 2H]."""
    place = _rem(at.place, r.new_block.shape[0])
    heads = [r.new_block[place, pl.ds(k, 1), :] for k in range(like.shape[0])]
    rows = jnp.stack([jnp.broadcast_to(head, like.shape[1:]) for head in heads])
    return rows.astype(like.dtype)


def _send_tile(r: _Refs, at: _Cursor, tile: jax.Array, page: jax.Array, rows: Any) -> None:
    """Sends the tile of the new token to its page, when the one before has left."""

    @pl.when(at.place > 0)
    def _():
        pltpu.make_async_copy(r.tile, r.tile, r.sent.at[1]).wait()

    r.tile[...] = tile
    home = r.pages.at[r.table[_entry(r, at) + page], :, rows, :]
    pltpu.make_async_copy(r.tile, home, r.sent.at[1]).start()


def _attend(r: _Refs, at: _Cursor, buffer: jax.Array, keys: jax.Array, scale: float) -> None:
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


def _finish(r: _Refs, at: _Cursor) -> None:
    """Sends a slot's output on its way, when the one before has left."""

    @pl.when(at.place > 0)
    def _():
        pltpu.make_async_copy(r.out_block, r.out_block, r.sent.at[0]).wait()

    r.out_block[...] = (r.acc[...] / r.total[:, :1]).reshape(r.out_block.shape).astype(r.out.dtype)
    home = r.out.at[r.order[at.place]]
    pltpu.make_async_copy(r.out_block, home, r.sent.at[0]).start()


def _run(r: _Refs, scale: float, cores: int) -> None:
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
        pltpu.make_async_copy(r.out_block, r.out_block, r.sent.at[0]).wait()
        if r.new is not None:
            pltpu.make_async_copy(r.tile, r.tile, r.sent.at[1]).wait()


def _kernel(table_ref, lengths_ref, q_ref, pages_ref, out_ref, *scratch, scale, cores) -> None:
    refs = _Refs(table_ref, lengths_ref, q_ref, None, pages_ref, out_ref, *scratch)
    _run(refs, scale, cores)


def _kernel_write(
    table_ref, lengths_ref, q_ref, new_ref, _, out_ref, pages_ref, *scratch, scale, cores
) -> None:
    """The pages as an input are not read: they are the output `pages_ref`."""
    refs = _Refs(table_ref, lengths_ref, q_ref, new_ref, pages_ref, out_ref, *scratch)
    _run(refs, scale, cores)


def attend(
    q_BNH: jax.Array,
    pages_LXKSI: jax.Array,
    layer: jax.Array | int,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    *,
    blocks: Blocks = BLOCKS,
    interpret: Any = False,
) -> jax.Array:
    """`reference` as a TPU kernel. `interpret` is that of `pallas_call`.

    Raises:
      ValueError: shapes or dtypes are not those of the layouts above, or H is not a multiple of 64.
    """
    _check(q_BNH, pages_LXKSI, table_BM, lengths_B)
    return _call(q_BNH, None, pages_LXKSI, layer, table_BM, lengths_B, blocks, interpret)[0]


def attend_write(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    pages_LXKSI: jax.Array,
    layer: jax.Array | int,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    *,
    blocks: Blocks = BLOCKS,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference_write` as a TPU kernel; the pages are updated in place if they are donated.

    Raises:
      ValueError: as for `attend`.
    """
    _check(q_BNH, pages_LXKSI, table_BM, lengths_B)
    wanted = q_BNH.shape[0], pages_LXKSI.shape[2], q_BNH.shape[2]
    if k_BKH.shape != wanted or v_BKH.shape != wanted:
        raise ValueError(
            f"attend_write wants a new key and value a slot, both {wanted}, got {k_BKH.shape} and "
            f"{v_BKH.shape}"
        )
    new_BKI = jnp.concatenate((k_BKH, v_BKH), axis=-1).astype(jnp.float32)
    return _call(q_BNH, new_BKI, pages_LXKSI, layer, table_BM, lengths_B, blocks, interpret)


def _check(q_BNH: Any, pages_LXKSI: Any, table_BM: Any, lengths_B: Any) -> None:
    if q_BNH.ndim != 3 or pages_LXKSI.ndim != 5 or table_BM.ndim != 2:
        raise ValueError(
            "paged attention wants q [B, N, H], pages [L, X, K, S, 2H] and a table [B, M], got "
            f"{q_BNH.shape}, {pages_LXKSI.shape} and {table_BM.shape}"
        )
    (B, N, H), (_, _, K, S, width) = q_BNH.shape, pages_LXKSI.shape
    if width != 2 * H or H % 64 or N % K or S % ROWS:
        raise ValueError(
            f"paged attention wants H a multiple of 64, pages of a multiple of {ROWS} positions "
            "with key and value side by side (2H), and query heads N a multiple of key heads K; "
            f"got q [B, N, H] = {q_BNH.shape} and pages [L, X, K, S, 2H] = {pages_LXKSI.shape}"
        )
    if table_BM.shape[0] != B or lengths_B.shape != (B,):
        raise ValueError(
            f"{B} queries want a table [{B}, M] and lengths [{B}], got {table_BM.shape} and "
            f"{lengths_B.shape}"
        )
    dtypes = {q_BNH.dtype, pages_LXKSI.dtype}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        raise ValueError(
            "paged attention wants queries and pages both bfloat16 or both float32, got "
            f"{q_BNH.dtype} and {pages_LXKSI.dtype}"
        )
    if table_BM.dtype != jnp.int32 or lengths_B.dtype != jnp.int32:
        raise ValueError(
            f"table and lengths must be int32, got {table_BM.dtype} and {lengths_B.dtype}"
        )


def _scratch(blocks: Blocks, q_BKGD: jax.Array, pages_XKSI: jax.Array, table_pages: int) -> list:
    """Scratch in the order of `_Refs`: what reading wants, then what writing wants beside it."""
    (B, K, G, D), (_, _, S, width) = q_BKGD.shape, pages_XKSI.shape
    dtype = pages_XKSI.dtype
    block_pages = blocks.pages(K * S * width * dtype.itemsize, table_pages)
    return [
        pltpu.SMEM((B + 1,), jnp.int32),
        pltpu.VMEM((blocks.buffers, block_pages, K, S, width), dtype),
        pltpu.VMEM((blocks.buffers, K, G, D), dtype),
        pltpu.VMEM((K, G, D), dtype),
        pltpu.VMEM((K * G, 128), jnp.float32),
        pltpu.VMEM((K * G, 128), jnp.float32),
        pltpu.VMEM((K * G, D), jnp.float32),
        pltpu.SemaphoreType.DMA((blocks.buffers,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((blocks.buffers, K, width), jnp.float32),
        pltpu.VMEM((K, ROWS, width), dtype),
    ]


def _call(
    q_BNH: jax.Array,
    new_BKI: jax.Array | None,
    pages_LXKSI: jax.Array,
    layer: jax.Array | int,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    blocks: Blocks,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    (B, N, H), (L, X, K, S, width), M = q_BNH.shape, pages_LXKSI.shape, table_BM.shape[1]
    # A key and a value of 64 fill the 128 lanes together: such queries have zeros where the value
    # lies, and their output is the upper half of what p @ [k, v] gives.
    D = H if H % 128 == 0 else width
    group, padded = N // K, (N // K + 7) // 8 * 8
    padding = ((0, 0), (0, 0), (0, padded - group), (0, D - H))
    q_BKGD = jnp.pad(q_BNH.reshape(B, K, group, H), padding)
    # The kernel runs without bounds checks, which would cost more than the copies do: whatever it
    # takes as an index is put in bounds here.
    table = (jnp.clip(table_BM, 0, X - 1) + jnp.clip(layer, 0, L - 1) * X).reshape(B * M)
    lengths_B = jnp.clip(lengths_B, 0, M * S)
    pages_XKSI = pages_LXKSI.reshape(L * X, K, S, width)

    writes = new_BKI is not None
    operands = (q_BKGD, new_BKI, pages_XKSI) if writes else (q_BKGD, pages_XKSI)
    results = (q_BKGD, pages_XKSI) if writes else (q_BKGD,)
    scratch = _scratch(blocks, q_BKGD, pages_XKSI, M)
    out_BKGD, *written = pl.pallas_call(
        functools.partial(
            _kernel_write if writes else _kernel,
            scale=math.log2(math.e) / math.sqrt(H),
            cores=blocks.cores,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(blocks.cores,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(operands),
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(results),
            scratch_shapes=scratch if writes else scratch[:-2],
        ),
        input_output_aliases={4: 1} if writes else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_attend_write" if writes else "paged_attend",
    )(table, lengths_B, *operands)
    out_BNH = out_BKGD[:, :, :group, D - H :].reshape(B, N, H)
    out_BNH = jnp.where((lengths_B > 0)[:, None, None], out_BNH, 0)
    return out_BNH, written[0].reshape(pages_LXKSI.shape) if writes else pages_LXKSI
