"""Keys and values in pages, and the attention of one new token a slot over them, in plain jnp.
`kernel_cache` is the same for the TPU's kernel.

A slot's keys lie in two kinds of pages: those of its prompt, which all samples of the prompt read
and nobody writes any more, and its own, which hold what it has drawn. Nothing is ever copied: a
sample that begins only names its prompt's pages, and its first own page begins behind the prompt.

Attention goes over the pages, not over the slots: each page is read once, where it lies, for all
the slots that own it, and the slots then gather what their pages say. To gather keys and values by
slot would copy every one of them for every token, and a shared page once for each of its owners.

Axes: X pages of a pool, S tokens of a page, M entries of a slot's table, O owners of a page, and
the G = N / K query heads of a key head.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from pgrpo_jax import sharding
from pgrpo_jax.config import Architecture


class Pool(flax.struct.PyTreeNode):
    """Pages of one kind: keys [X, K, H, S] and values [X, K, S, H] for each layer.

    The layers are arrays of their own, so that a token is written in place and a page is read where
    it lies: a slice of one great array would be copied before it is multiplied. So would keys that
    do not lie as their product wants them, with tokens in the last axis.

    In int8 each key and each value has a scale, float32, that turns its H numbers back into what
    they were to one part in 254 of the largest; there are none in other dtypes.
    """

    k_LXKHS: tuple[jax.Array, ...]
    v_LXKSH: tuple[jax.Array, ...]
    k_scale_LXK1S: tuple[jax.Array, ...] = ()
    v_scale_LXKS1: tuple[jax.Array, ...] = ()

    @property
    def pages(self) -> int:
        """X."""
        return self.v_LXKSH[0].shape[0]

    @property
    def page_size(self) -> int:
        """S."""
        return self.v_LXKSH[0].shape[2]


class Cache(flax.struct.PyTreeNode):
    """The pages of prompts, and the pages of what is drawn: pools of this module or of another
    layout's."""

    prompt: Any
    own: Any


class Places(flax.struct.PyTreeNode):
    """Which slot reads which page of a pool, int32.

    owner_XO: the slots that own a page; a place that nobody holds may name any slot. start_X: the
    page's first token among the tokens that its owners have in this pool. table_BM: the slot's
    pages in order, as x * O + o with owner_XO[x, o] the slot; entries it does not need name any.
    """

    owner_XO: jax.Array
    start_X: jax.Array
    table_BM: jax.Array


class Slots(flax.struct.PyTreeNode):
    """What stays as it is while slots decode: `prompt_B` tokens of each are in its prompt's pages;
    live_B (bool) is False for slots that are idle from the start."""

    prompt: Places
    own: Places
    prompt_B: jax.Array
    live_B: jax.Array


# From (layer, q_BKGH, k_BKH, v_BKH) to out_BKGH.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
# From (cache, own_B, live_B), at one token a slot, to its attention and to the cache behind it.
At = Callable[[Cache, jax.Array, jax.Array], tuple[Attend, Callable[[], Cache]]]


class Partial(flax.struct.PyTreeNode):
    """What a slot's query finds in each of its pages: the largest score, the sum of exp(score -
    largest), float32 [B, M, K, G], and the values weighted by these, [B, M, K, G, H]."""

    top_BMKG: jax.Array
    sum_BMKG: jax.Array
    value_BMKGH: jax.Array


def empty(arch: Architecture, dtype: str, pages: int, page_size: int) -> Pool:
    """A pool in which nothing is written yet."""
    K, H, S = arch.kv_heads, arch.head_dim, page_size

    def layers(*shape: int, dtype: str = dtype) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros((pages, K, *shape), dtype) for _ in range(arch.layers))

    if dtype != "int8":
        return Pool(layers(H, S), layers(S, H))
    scales = layers(1, S, dtype="float32"), layers(S, 1, dtype="float32")
    return Pool(layers(H, S), layers(S, H), *scales)


def grown(pool: Any, pages: int, parts: int) -> Any:
    """The pool with room for `pages` pages; those it holds stay in front in each of its `parts`."""

    def one(x: jax.Array) -> jax.Array:
        each = x.reshape(parts, -1, *x.shape[1:])
        more = pages // parts - each.shape[1]
        return jnp.pad(each, ((0, 0), (0, more), *((0, 0),) * 3)).reshape(pages, *x.shape[1:])

    return jax.tree.map(one, pool)


def shardings(arch: Architecture, dtype: str, mesh: Mesh) -> Cache:
    """Pages over data and fsdp, key heads over tensor where it divides them."""
    place = NamedSharding(mesh, Spec(*sharding.batch(mesh).spec, head_axis(arch, mesh)))
    pool = jax.tree.map(lambda _: place, jax.eval_shape(lambda: empty(arch, dtype, 1, 1)))
    return Cache(pool, pool)


def head_axis(arch: Architecture, mesh: Mesh) -> str | None:
    return "tensor" if arch.kv_heads % mesh.shape["tensor"] == 0 else None


def write_tokens(
    pool: Pool, layer: int, page_B: jax.Array, offset_B: jax.Array, k_BKH: jax.Array, v_BKH
) -> Pool:
    """One token a slot; a page number of X writes nothing."""

    def put_k(x_XKHS: jax.Array, new_BKH: jax.Array) -> jax.Array:
        return x_XKHS.at[page_B, :, :, offset_B].set(new_BKH, mode="drop")

    def put_v(x_XKSH: jax.Array, new_BKH: jax.Array) -> jax.Array:
        return x_XKSH.at[page_B, :, offset_B].set(new_BKH, mode="drop")

    return _written(pool, layer, (k_BKH, v_BKH), (put_k, put_v))


def write_pages(
    pool: Pool, layer: int, page_RM: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array
) -> Pool:
    """R rows of T = M * S tokens, whole pages; a page number of X writes nothing."""

    def put(x: jax.Array, new_RTKH: jax.Array, order: tuple[int, ...]) -> jax.Array:
        R, T, K, H = new_RTKH.shape
        new_RMSKH = new_RTKH.reshape(R, T // pool.page_size, pool.page_size, K, H)
        return x.at[page_RM].set(new_RMSKH.transpose(order), mode="drop")

    def put_k(x_XKHS: jax.Array, new_RTKH: jax.Array) -> jax.Array:
        return put(x_XKHS, new_RTKH, (0, 1, 3, 4, 2))

    def put_v(x_XKSH: jax.Array, new_RTKH: jax.Array) -> jax.Array:
        return put(x_XKSH, new_RTKH, (0, 1, 3, 2, 4))

    return _written(pool, layer, (k_RTKH, v_RTKH), (put_k, put_v))


# From an array of a pool and what is new in it, [..., K, H] or a scale's [..., K, 1].
_Put = Callable[[jax.Array, jax.Array], jax.Array]


def _written(
    pool: Pool, layer: int, new: tuple[jax.Array, jax.Array], put: tuple[_Put, _Put]
) -> Pool:
    """The pool with new keys and values, which `put` puts where they belong."""
    arrays = [pool.k_LXKHS, pool.v_LXKSH, pool.k_scale_LXK1S, pool.v_scale_LXKS1]
    if pool.k_scale_LXK1S:
        (k, k_scale), (v, v_scale) = map(_quantised, new)
        changes = [k, v, k_scale, v_scale]
    else:
        changes = [x.astype(pool.k_LXKHS[layer].dtype) for x in new]
    for i, change in enumerate(changes):
        axes = ("XKHS", "XKSH")[i % 2]
        changed = sharding.constrain(put[i % 2](arrays[i][layer], change), axes)
        arrays[i] = (*arrays[i][:layer], changed, *arrays[i][layer + 1 :])
    return Pool(*arrays)


def _quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [..., H], and the scale [..., 1] to multiply it with."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def read_pages(pool: Pool, layer: int, page_RM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of whole pages side by side, [R, M * S, K, H]."""
    k_RMKHS, v_RMKSH = pool.k_LXKHS[layer][page_RM], pool.v_LXKSH[layer][page_RM]
    if pool.k_scale_LXK1S:
        k_RMKHS = k_RMKHS * pool.k_scale_LXK1S[layer][page_RM]
        v_RMKSH = v_RMKSH * pool.v_scale_LXKS1[layer][page_RM]
    k_RMSKH, v_RMSKH = k_RMKHS.transpose(0, 1, 4, 2, 3), v_RMKSH.transpose(0, 1, 3, 2, 4)
    R, M, S, K, H = k_RMSKH.shape
    return k_RMSKH.reshape(R, M * S, K, H), v_RMSKH.reshape(R, M * S, K, H)


def partial(
    q_BKGH: jax.Array, pool: Pool, layer: int, places: Places, length_B: jax.Array
) -> Partial:
    """What the queries find in one pool, of which slot b has `length_B[b]` tokens."""
    k_XKHS, v_XKSH = pool.k_LXKHS[layer], pool.v_LXKSH[layer]
    S, H, owners = pool.page_size, q_BKGH.shape[3], places.owner_XO.shape[1]
    q_XOKGH = sharding.constrain((q_BKGH * H**-0.5)[places.owner_XO], "XOKGH")
    scores_XKOGS = jnp.einsum(
        "XOKGH,XKHS->XKOGS",
        q_XOKGH,
        k_XKHS.astype(q_XOKGH.dtype),
        preferred_element_type=jnp.float32,
    )
    if pool.k_scale_LXK1S:
        scores_XKOGS = scores_XKOGS * pool.k_scale_LXK1S[layer][:, :, None]
    valid_XO = length_B[places.owner_XO] - places.start_X[:, None]
    mask_XOS = jnp.arange(S)[None, None] < valid_XO[..., None]
    mask_XKOGS = jnp.broadcast_to(mask_XOS[:, None, :, None], scores_XKOGS.shape)
    floor = jnp.finfo(scores_XKOGS.dtype).min
    top_XKOG = jnp.where(mask_XKOGS, scores_XKOGS, floor).max(-1)
    weights_XKOGS = jnp.where(mask_XKOGS, jnp.exp(scores_XKOGS - top_XKOG[..., None]), 0)
    scaled_XKOGS = weights_XKOGS
    if pool.v_scale_LXKS1:
        scaled_XKOGS = scaled_XKOGS * pool.v_scale_LXKS1[layer][:, :, None, None, :, 0]
    value_XKOGH = jnp.einsum(
        "XKOGS,XKSH->XKOGH", scaled_XKOGS.astype(q_XOKGH.dtype), v_XKSH.astype(q_XOKGH.dtype)
    )
    page_BM, owner_BM = places.table_BM // owners, places.table_BM % owners

    def by_slot(y: jax.Array) -> jax.Array:
        return sharding.constrain(y[page_BM, :, owner_BM], "BMKGH"[: y.ndim])

    used_BM = jnp.arange(page_BM.shape[1])[None] * S < length_B[:, None]
    return Partial(
        top_BMKG=jnp.where(used_BM[..., None, None], by_slot(top_XKOG), floor),
        sum_BMKG=by_slot(weights_XKOGS.sum(-1)),
        value_BMKGH=by_slot(value_XKOGH),
    )


def merged(parts: tuple[Partial, ...], dtype: str) -> jax.Array:
    """out_BKGH, the softmax over all keys of a slot; zeros, or finite, where it has none."""
    top_BMKG, sum_BMKG, value_BMKGH = (
        jnp.concatenate(part, axis=1)
        for part in (
            [p.top_BMKG for p in parts],
            [p.sum_BMKG for p in parts],
            [p.value_BMKGH for p in parts],
        )
    )
    weights_BMKG = jnp.exp(top_BMKG - top_BMKG.max(1, keepdims=True))
    total_BKG = (weights_BMKG * sum_BMKG).sum(1)
    out_BKGH = _sum_of_pages(weights_BMKG[..., None] * value_BMKGH)
    return (out_BKGH / jnp.where(total_BKG == 0, 1, total_BKG)[..., None]).astype(dtype)


def _sum_of_pages(x_BMKGH: jax.Array) -> jax.Array:
    """x_BMKGH.sum(1), by halves: XLA on CPUs makes a reduction a part of the product behind it,
    which then takes several times as long."""
    while (pages := x_BMKGH.shape[1]) > 1:
        half = pages // 2
        sums = x_BMKGH[:, :half] + x_BMKGH[:, half : 2 * half]
        x_BMKGH = jnp.concatenate([sums, x_BMKGH[:, 2 * half :]], axis=1)
    return x_BMKGH[:, 0]


def over_pages(batch: Slots) -> At:
    """Attention of one new token a slot, which is written first; and the cache when all are."""
    prompt, own = batch.prompt, batch.own

    def at(cache: Cache, own_B: jax.Array, live_B: jax.Array) -> tuple[Attend, Callable[[], Cache]]:
        size, pool = cache.own.page_size, cache.own
        page_B = jnp.take_along_axis(own.table_BM, own_B[:, None] // size, axis=1)[:, 0]
        page_B = jnp.where(live_B, page_B, pool.pages)
        prompt_B = jnp.where(live_B, batch.prompt_B, 0)
        own_B1 = jnp.where(live_B, own_B + 1, 0)

        def attend(layer, q_BKGH, k_BKH, v_BKH):
            nonlocal pool
            pool = write_tokens(pool, layer, page_B, own_B % size, k_BKH, v_BKH)
            parts = (
                partial(q_BKGH, cache.prompt, layer, prompt, prompt_B),
                partial(q_BKGH, pool, layer, own, own_B1),
            )
            return merged(parts, q_BKGH.dtype)

        return attend, lambda: Cache(cache.prompt, pool)

    return at
