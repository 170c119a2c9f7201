"""The two device programs of a rollout: prompts into the cache, and tokens out of it."""

import types
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pgrpo_jax import sampling
from pgrpo_jax.config import Architecture, Compute
from pgrpo_jax.models import attention, kernel_cache
from pgrpo_jax.models import cache as caches
from pgrpo_jax.models import decode as model

CHUNK = 32  # tokens drawn between two visits of the host, at most


class Batch(flax.struct.PyTreeNode):
    """What the slots are about to do, made by the host for each visit.

    ids_B is the token to be read, at position_B; own_B tokens of the slot are in its own pages,
    which is also the number it has drawn, up to limit_B. live_B (bool) is False for idle slots.
    problem_B and sample_B (uint32) make the key of its random numbers.
    """

    ids_B: jax.Array
    prompt_B: jax.Array
    own_B: jax.Array
    limit_B: jax.Array
    live_B: jax.Array
    problem_B: jax.Array
    sample_B: jax.Array
    prompt_owner_XO: jax.Array
    prompt_start_X: jax.Array
    prompt_table_BM: jax.Array
    own_owner_X1: jax.Array
    own_start_X: jax.Array
    own_table_BM: jax.Array


class Tokens(flax.struct.PyTreeNode):
    """What a visit's decoding drew: drawn_B tokens of each row of ids_BT and logp_BT, in `steps`
    steps. done_B says which slots have come to their end."""

    ids_BT: jax.Array
    logp_BT: jax.Array
    drawn_B: jax.Array
    done_B: jax.Array
    steps: jax.Array


def decode(
    weights: model.Weights,
    cache: caches.Cache,
    batch: Batch,
    key: jax.Array,
    temperature: jax.Array,
    leave: jax.Array,
    *,
    arch: Architecture,
    pages: types.ModuleType,
    truncate: Callable[[jax.Array], jax.Array] | None,
    stop_ids: tuple[int, ...],
) -> tuple[caches.Cache, Tokens]:
    """Up to CHUNK tokens more in each live slot; stops when only `leave` slots are live."""
    B = batch.ids_B.shape[0]
    prompt = caches.Places(batch.prompt_owner_XO, batch.prompt_start_X, batch.prompt_table_BM)
    own = caches.Places(batch.own_owner_X1, batch.own_start_X, batch.own_table_BM)
    slots = caches.Slots(prompt, own, batch.prompt_B, batch.live_B)
    over_pages = pages.over_pages(slots)
    stop_1N = jnp.array(stop_ids, jnp.int32)[None]
    fold_in = jax.vmap(jax.random.fold_in)
    key_B = fold_in(jax.vmap(jax.random.fold_in, (None, 0))(key, batch.problem_B), batch.sample_B)
    # All at once: one small program for each token would cost more than its product with a weight.
    u_TB = jax.vmap(lambda t: sampling.shares(key_B, batch.own_B + t))(jnp.arange(CHUNK))

    def rope(own_B):
        return model.rope(arch, batch.prompt_B + own_B)

    def step(carry):
        t, cache, ids_B, own_B, angles, live_B, ids_BT, logp_BT = carry
        attend, written = over_pages(cache, own_B, live_B)
        x_DB = model.forward(weights, arch, ids_B, angles, attend)
        drawn_B, logp_B = sampling.draw(u_TB[t], model.logits(weights, x_DB), temperature, truncate)
        ids_BT = lax.dynamic_update_slice(ids_BT, drawn_B[:, None], (0, t))
        logp_BT = lax.dynamic_update_slice(logp_BT, logp_B[:, None], (0, t))
        own_B = own_B + live_B
        stopped_B = (drawn_B[:, None] == stop_1N).any(1)
        live_B = live_B & ~stopped_B & (own_B < batch.limit_B)
        # Angles for the next step: XLA on CPUs would work them out anew for each head of each layer
        # if they were of this one.
        return t + 1, written(), drawn_B, own_B, rope(own_B), live_B, ids_BT, logp_BT

    def go_on(carry):
        t, _, _, _, _, live_B, _, _ = carry
        return (t < CHUNK) & (live_B.sum() > leave)

    blank_BT = jnp.zeros((B, CHUNK), jnp.int32), jnp.zeros((B, CHUNK), jnp.float32)
    slots_B = batch.ids_B, batch.own_B, rope(batch.own_B), batch.live_B
    start = (jnp.int32(0), cache, *slots_B, *blank_BT)
    t, cache, _, own_B, _, live_B, ids_BT, logp_BT = lax.while_loop(go_on, step, start)
    return cache, Tokens(
        ids_BT=ids_BT,
        logp_BT=logp_BT,
        drawn_B=own_B - batch.own_B,
        done_B=batch.live_B & ~live_B,
        steps=t,
    )


class Prompts(flax.struct.PyTreeNode):
    """R pieces of prompts, T tokens each: `count_R` are real and stand behind `before_R` that are
    in the cache already. page_RM are the pages they go to (X: nowhere), earlier_RM those before."""

    ids_RT: jax.Array
    count_R: jax.Array
    before_R: jax.Array
    page_RM: jax.Array
    earlier_RM: jax.Array


def prefill(
    weights: model.Weights,
    cache: caches.Cache,
    prompts: Prompts,
    *,
    arch: Architecture,
    compute: Compute,
    pages: types.ModuleType,
) -> caches.Cache:
    """The cache with the keys and values of a piece of each prompt."""
    R, T = prompts.ids_RT.shape
    pool = cache.prompt
    columns_1T = jnp.arange(T)[None]
    segments_RT = (columns_1T < prompts.count_R[:, None]).astype(jnp.int32)
    positions_RT = columns_1T + prompts.before_R[:, None]
    earlier_1S = jnp.arange(prompts.earlier_RM.shape[1] * pool.page_size)[None]
    earlier_RS = (earlier_1S < prompts.before_R[:, None]).astype(jnp.int32)
    positions_RS = jnp.concatenate([earlier_1S.repeat(R, 0), positions_RT], axis=1)
    segments_RS = jnp.concatenate([earlier_RS, segments_RT], axis=1)

    def attend(layer, q_EKGH, k_EKH, v_EKH):
        nonlocal pool
        K, G, H = q_EKGH.shape[1:]
        k_RTKH, v_RTKH = k_EKH.reshape(R, T, K, H), v_EKH.reshape(R, T, K, H)
        before = pages.read_pages(pool, layer, prompts.earlier_RM)
        pool = pages.write_pages(pool, layer, prompts.page_RM, k_RTKH, v_RTKH)
        k_RSKH, v_RSKH = (
            jnp.concatenate([old.astype(new.dtype), new], axis=1)
            for old, new in zip(before, (k_RTKH, v_RTKH), strict=True)
        )
        out_RTNH = attention.attend(
            compute,
            q_EKGH.reshape(R, T, K * G, H),
            k_RSKH,
            v_RSKH,
            positions_RT,
            segments_RT,
            positions_RS,
            segments_RS,
        )
        return out_RTNH.reshape(R * T, K, G, H)

    ids_E, positions_E = prompts.ids_RT.reshape(-1), positions_RT.reshape(-1)
    model.keys_and_values(weights, arch, ids_E, positions_E, attend)
    return caches.Cache(pool, cache.own)


def layout(arch: Architecture, compute: Compute, cache_dtype: str) -> types.ModuleType:
    """Whose pages the cache has: those of the kernel where `compute.attention` is "pallas", but for
    heads and a dtype that the kernel does not know."""
    if compute.attention == "auto":
        compute = attention.resolve(compute, jax.default_backend())
    known = arch.head_dim % kernel_cache.HEAD_DIM == 0 and cache_dtype != "int8"
    return kernel_cache if known and compute.attention == "pallas" else caches
