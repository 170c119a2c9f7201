"""Keys and values in the pages of `kernels.paged_attention`, and its kernel over them: what decodes
on a TPU. `cache` is the same in plain jnp, and says what slots, pages and places are.

Under a mesh the kernel sees a device's slots and pages alone. A slot's own pages lie on the devices
that decode it. Those of prompts are on every device of data and fsdp, since a prompt's samples may
be decoded anywhere; each device reads a prompt once for all samples that it has of it: the kernel
takes these for more query heads of one slot.

Axes as in `cache`; I = 2H, and P prompts.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from pgrpo_jax import sharding
from pgrpo_jax.config import Architecture
from pgrpo_jax.kernels import paged_attention
from pgrpo_jax.kernels.paged_kernel import BLOCKS, Blocks
from pgrpo_jax.models import cache
from pgrpo_jax.models.cache import Cache

HEAD_DIM = 64  # the kernel knows multiples of it
SCORE_BYTES = 2**20  # of a block, for all queries of a prompt


class Pool(flax.struct.PyTreeNode):
    """Pages of one kind: keys and values side by side, [X, K, S, 2H] for each layer."""

    kv_LXKSI: tuple[jax.Array, ...]

    @property
    def pages(self) -> int:
        """X."""
        return self.kv_LXKSI[0].shape[0]

    @property
    def page_size(self) -> int:
        """S."""
        return self.kv_LXKSI[0].shape[2]


def empty(arch: Architecture, dtype: str, pages: int, page_size: int) -> Pool:
    """A pool in which nothing is written yet."""
    shape = pages, arch.kv_heads, page_size, 2 * arch.head_dim
    return Pool(tuple(jnp.zeros(shape, dtype) for _ in range(arch.layers)))


def shardings(arch: Architecture, dtype: str, mesh: Mesh) -> Cache:
    """Own pages over data and fsdp, key heads of both kinds over tensor where it divides them."""
    heads = cache.head_axis(arch, mesh)

    def pool(spec: Spec) -> Pool:
        return Pool((NamedSharding(mesh, spec),) * arch.layers)

    return Cache(pool(Spec(None, heads)), pool(Spec(*sharding.batch(mesh).spec, heads)))


def write_pages(
    pool: Pool, layer: int, page_RM: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array
) -> Pool:
    """R rows of T = M * S tokens, whole pages of prompts; a page number of X writes nothing."""
    kv_XKSI = pool.kv_LXKSI[layer]
    kv_RTKI = jnp.concatenate([k_RTKH, v_RTKH], axis=-1)
    R, T, K, width = kv_RTKI.shape
    kv_RMSKI = kv_RTKI.reshape(R, T // pool.page_size, pool.page_size, K, width)
    kv_RMKSI = kv_RMSKI.swapaxes(2, 3).astype(kv_XKSI.dtype)
    return _with_layer(pool, layer, kv_XKSI.at[page_RM].set(kv_RMKSI, mode="drop"))


def read_pages(pool: Pool, layer: int, page_RM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of whole pages side by side, [R, M * S, K, H]."""
    kv_RMSKI = pool.kv_LXKSI[layer][page_RM].swapaxes(2, 3)
    R, M, S, K, width = kv_RMSKI.shape
    k_RTKH, v_RTKH = jnp.split(kv_RMSKI.reshape(R, M * S, K, width), 2, axis=-1)
    return k_RTKH, v_RTKH


def _with_layer(pool: Pool, layer: int, kv_XKSI: jax.Array) -> Pool:
    return Pool((*pool.kv_LXKSI[:layer], kv_XKSI, *pool.kv_LXKSI[layer + 1 :]))


class _Prompts(flax.struct.PyTreeNode):
    """The prompts of a device's slots: their pages and how many tokens these hold, 0 where there is
    no prompt; the slots that read each, any where there are fewer than O; and where each slot's
    queries stand among these, as p * O + o."""

    table_PM: jax.Array
    length_P: jax.Array
    owner_PO: jax.Array
    place_B: jax.Array


def _prompts(
    table_BM: jax.Array, prompt_B: jax.Array, live_B: jax.Array, *, owners: int, prompts: int
) -> _Prompts:
    """From what each slot knows: `table_BM` is that of `cache.Places`."""
    B = len(prompt_B)
    slots_B, page_B, place_B = jnp.arange(B), table_BM[:, 0] // owners, table_BM[:, 0] % owners
    reads_B = live_B & (prompt_B > 0)
    same_BB = (page_B[:, None] == page_B[None]) & reads_B[None]
    first_B = jnp.argmax(same_BB, axis=1)
    leads_B = reads_B & (first_B == slots_B)
    leader_P = jnp.nonzero(leads_B, size=prompts, fill_value=0)[0]
    length_P = jnp.where(jnp.arange(prompts) < leads_B.sum(), prompt_B[leader_P], 0)
    row_B = jnp.where(reads_B, (jnp.cumsum(leads_B) - 1)[first_B], prompts)
    owner_PO = jnp.zeros((prompts, owners), jnp.int32)
    return _Prompts(
        table_PM=table_BM[leader_P] // owners,
        length_P=length_P,
        owner_PO=owner_PO.at[row_B, place_B].set(slots_B, mode="drop"),
        place_B=jnp.where(reads_B, row_B * owners + place_B, 0),
    )


def _attend(
    q_BKGH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    prompt_XKSI: jax.Array,
    own_XKSI: jax.Array,
    table_BM: jax.Array,
    length_B: jax.Array,
    table_PM: jax.Array,
    length_P: jax.Array,
    owner_PO: jax.Array,
    place_B: jax.Array,
    prompt_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(out_BKGH, own_XKSI) of one device; `length_B` counts the new tokens, `table_BM` names pages
    among those of all devices."""
    (B, K, G, H), (P, owners) = q_BKGH.shape, owner_PO.shape
    q_PNH = q_BKGH[owner_PO].swapaxes(1, 2).reshape(P, K * owners * G, H)
    shared = paged_attention.attend(
        q_PNH, prompt_XKSI[None], 0, table_PM, length_P, blocks=_blocks(q_PNH, prompt_XKSI)
    )

    def by_slot(x_PN: jax.Array) -> jax.Array:
        x_PKOG = x_PN.reshape(P, K, owners, G, *x_PN.shape[2:])
        x_BKG = x_PKOG[place_B // owners, :, place_B % owners]
        return x_BKG.reshape(B, K * G, *x_PN.shape[2:])

    out_BNH, lse_BN = map(by_slot, shared)
    lse_BN = jnp.where(prompt_B[:, None] > 0, lse_BN, paged_attention.FLOOR)
    *own, own_1XKSI = paged_attention.attend_write(
        q_BKGH.reshape(B, K * G, H),
        k_BKH,
        v_BKH,
        own_XKSI[None],
        0,
        table_BM % len(own_XKSI),
        length_B,
    )
    out_BNH = paged_attention.merged([(out_BNH, lse_BN), (own[0], own[1])])
    return out_BNH.reshape(q_BKGH.shape), own_1XKSI[0]


def _blocks(q_PNH: jax.Array, kv_XKSI: jax.Array) -> Blocks:
    """The more queries there are, the fewer keys make a block: scores lie in VMEM, in float32."""
    keys = SCORE_BYTES // (4 * q_PNH.shape[1])
    key_bytes = kv_XKSI.shape[1] * kv_XKSI.shape[3] * kv_XKSI.dtype.itemsize
    block_bytes = min(BLOCKS.block_bytes, max(keys, 1) * key_bytes)
    return dataclasses.replace(BLOCKS, block_bytes=block_bytes)


def over_pages(batch: cache.Slots) -> cache.At:
    """As `cache.over_pages`. The slots of a prompt are found once for all tokens."""
    owners = batch.prompt.owner_XO.shape[1]
    parts = math.prod(sharding.axis_size(name) for name in sharding.ROWS)
    table_BM = batch.prompt.table_BM
    # The scheduler begins no more prompts than the pool has room for at their greatest length.
    room = batch.prompt.owner_XO.shape[0] // table_BM.shape[1]
    prompts = min(len(batch.prompt_B) // parts, room)

    def find(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        found = _prompts(*arrays, owners=owners, prompts=prompts)
        return found.table_PM, found.length_P, found.owner_PO, found.place_B

    known = (table_BM, batch.prompt_B, batch.live_B)
    found = sharding.on_devices(find, known, ("BM", "B", "B"), ("RM", "R", "RO", "B"))(*known)

    def at(cache: Cache, own_B: jax.Array, live_B: jax.Array):
        pool = cache.own
        length_B = jnp.where(live_B, own_B + 1, 0)

        def attend(layer, q_BKGH, k_BKH, v_BKH):
            nonlocal pool
            arrays = (q_BKGH, k_BKH, v_BKH, cache.prompt.kv_LXKSI[layer], pool.kv_LXKSI[layer])
            arrays += (batch.own.table_BM, length_B, *found, batch.prompt_B)
            letters = ("BKGH", "BKH", "BKH", "ZKSI", "XKSI", "BM", "B", "RM", "R", "RO", "B", "B")
            on_devices = sharding.on_devices(_attend, arrays, letters, ("BKGH", "XKSI"))
            out_BKGH, own_XKSI = on_devices(*arrays)
            pool = _with_layer(pool, layer, own_XKSI)
            return out_BKGH

        return attend, lambda: Cache(cache.prompt, pool)

    return at
