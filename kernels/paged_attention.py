"""Decode attention over a paged key/value cache: one query token a slot, ragged lengths.

Layouts (X pages of the pool, M pages of a slot, S positions of a page, I = 2H):

    pages_LXKSI   keys and values side by side: pages[l, x, k, s, :H] is a key, [..., H:] its value
    table_BM      int32: token t of slot b lies in page table[b, t // S] at offset t % S
    lengths_B     int32: keys of a slot, its newest token among them
    q_BNH, k_BKH, v_BKH   one token a slot; query head n reads key head n // (N / K)

lse_BN is the log of the sum of exp(score), float32: with it the outputs over several stretches of a
slot's keys are `merged` into one.

A slot of length 0 is idle: its output is zeros, its lse FLOOR, nothing is read and nothing is
written. Table entries behind a slot's last page are never read as data but must name some page:
leave 0 there. Scores and softmax are float32, the output has q's dtype, the scale is 1 / sqrt(H).

What writes a token wants the page that it writes to for that slot alone; full pages may be shared.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgrpo_jax.kernels import attention, paged_kernel
from pgrpo_jax.kernels.paged_kernel import BLOCKS, FLOOR, ROWS, Blocks


def reference(
    q_BNH: jax.Array,
    pages_LXKSI: jax.Array,
    layer: jax.Array,
    table_BM: jax.Array,
    lengths_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k / sqrt(H)) v over the `lengths_B` keys of each slot -> (out_BNH, lse_BN)."""
    B, N, H = q_BNH.shape
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
    q_BKGH = q_BNH.reshape(B, K, N // K, H).astype(jnp.float32)
    scores_BKGT = jnp.einsum("BKGH,BTKH->BKGT", q_BKGH, gathered_BTKI[..., :H]) * H**-0.5
    lse_BKG = jax.nn.logsumexp(scores_BKGT, axis=-1, where=live_BT[:, None, None])
    return out_B1NH[:, 0], jnp.maximum(lse_BKG, FLOOR).reshape(B, N)


def reference_write(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    pages_LXKSI: jax.Array,
    layer: jax.Array,
    table_BM: jax.Array,
    lengths_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes each slot's new token at `lengths_B - 1`, then attends -> (out_BNH, lse_BN, pages)."""
    X, S = pages_LXKSI.shape[1], pages_LXKSI.shape[3]
    at_B = jnp.maximum(lengths_B - 1, 0)
    page_B = jnp.take_along_axis(table_BM, (at_B // S)[:, None], axis=1)[:, 0]
    page_B = jnp.where(lengths_B > 0, page_B, X)  # out of range: dropped
    kv_BKI = jnp.concatenate((k_BKH, v_BKH), axis=-1).astype(pages_LXKSI.dtype)
    pages_LXKSI = pages_LXKSI.at[layer, page_B, :, at_B % S].set(kv_BKI, mode="drop")
    return *reference(q_BNH, pages_LXKSI, layer, table_BM, lengths_B), pages_LXKSI


def merged(parts: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """out_BNH over all keys, from (out_BNH, lse_BN) over some of them each; zeros without any."""
    lse = jnp.stack([lse_BN for _, lse_BN in parts])
    weights = jax.nn.softmax(lse, axis=0)
    out = sum(w[..., None] * out_BNH for w, (out_BNH, _) in zip(weights, parts, strict=True))
    return jnp.asarray(out).astype(parts[0][0].dtype)


def attend(
    q_BNH: jax.Array,
    pages_LXKSI: jax.Array,
    layer: jax.Array | int,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    *,
    blocks: Blocks = BLOCKS,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference` as a TPU kernel. `interpret` is that of `pallas_call`.

    Raises:
      ValueError: shapes or dtypes are not those of the layouts above, or H is not a multiple of 64.
    """
    _check(q_BNH, pages_LXKSI, table_BM, lengths_B)
    return _call(q_BNH, None, pages_LXKSI, layer, table_BM, lengths_B, blocks, interpret)[:2]


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    """In the order of `paged_kernel.Refs`: what reading wants, then what writing wants too."""
    (B, K, G, D), (_, _, S, width) = q_BKGD.shape, pages_XKSI.shape
    dtype = pages_XKSI.dtype
    block_pages = blocks.pages(K * S * width * dtype.itemsize, table_pages)
    return [
        pltpu.SMEM((B + 1,), jnp.int32),
        pltpu.VMEM((blocks.buffers, block_pages, K, S, width), dtype),
        pltpu.VMEM((blocks.buffers, K, G, D), dtype),
        pltpu.VMEM((K, G, D), dtype),
        pltpu.VMEM((K, G, 128), jnp.float32),
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    lse = jax.ShapeDtypeStruct((B, K, padded, 128), jnp.float32)
    results = (q_BKGD, lse, pages_XKSI) if writes else (q_BKGD, lse)
    scratch = _scratch(blocks, q_BKGD, pages_XKSI, M)
    out_BKGD, lse_BKGI, *written = pl.pallas_call(
        functools.partial(
            paged_kernel.read_and_write if writes else paged_kernel.read,
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
        input_output_aliases={4: 2} if writes else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_attend_write" if writes else "paged_attend",
    )(table, lengths_B, *operands)
    out_BNH = out_BKGD[:, :, :group, D - H :].reshape(B, N, H)
    out_BNH = jnp.where((lengths_B > 0)[:, None, None], out_BNH, 0)
    lse_BN = lse_BKGI[:, :, :group, 0].reshape(B, N)
    lse_BN = jnp.where((lengths_B > 0)[:, None], lse_BN, FLOOR)
    return out_BNH, lse_BN, written[0].reshape(pages_LXKSI.shape) if writes else pages_LXKSI
