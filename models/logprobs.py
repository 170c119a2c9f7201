"""Log-probabilities of given tokens without the [B, T, V] logits.

Logits are made in chunks, and made again in the backward pass.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pgrpo_jax import sharding
from pgrpo_jax.models import layers


def chunk_tokens(megabytes: int, vocab_size: int) -> int:
    """Tokens whose float32 logits take that much: memory does not grow with the vocabulary."""
    return max(megabytes * 2**20 // (4 * vocab_size), 1)


def logprobs(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(x w / temperature) at the targets, and that softmax's entropy, float32 [B, T].

    Logits are float32 and exist for about `chunk` tokens (over all devices) at one time, at least
    one column of the batch. A chunk of which nothing is wanted costs nothing, and is 0. No gradient
    passes through the entropy.
    """
    B, T, _ = x_BTD.shape
    # Chunks are cut along T: B is split over devices, and a scan over a split axis would gather it.
    chunks = min(T, math.ceil(B * T / chunk))
    length = math.ceil(T / chunks)
    # In float32 the gradient of `w` is summed over chunks in float32 too.
    w_DV = w_DV.astype(jnp.float32)

    def of_chunk(x_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = w_DV.astype(x_BTD.dtype)
        logits_BTV = layers.einsum("BTD,DV->BTV", x_BTD, w, preferred=jnp.float32)
        logits_BTV = sharding.constrain(logits_BTV, "BTV")
        return of_logits(logits_BTV / temperature, targets_BT)

    @jax.checkpoint
    def of_wanted(x_BTD: jax.Array, targets_BT: jax.Array, some: jax.Array):
        nothing = jnp.zeros(targets_BT.shape, jnp.float32)
        return lax.cond(some, of_chunk, lambda *_: (nothing, nothing), x_BTD, targets_BT)

    def cut(y_BT: jax.Array) -> jax.Array:
        y_BT = jnp.pad(y_BT, ((0, 0), (0, chunks * length - T), *((0, 0),) * (y_BT.ndim - 2)))
        return y_BT.reshape(B, chunks, length, *y_BT.shape[2:]).swapaxes(0, 1)

    columns = (cut(x_BTD), cut(targets_BT), cut(wanted_BT).any((1, 2)))
    _, outputs = lax.scan(lambda carry, xs: (carry, of_wanted(*xs)), (), columns)
    logp_BT, entropy_BT = (y.swapaxes(0, 1).reshape(B, chunks * length)[:, :T] for y in outputs)
    return logp_BT, entropy_BT


def of_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log softmax at the targets, and the entropy (without gradient), both [B, T]."""
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A comparison, not a gather: its gradient is no scatter, and V may be split over devices.
    chosen_BTV = (
        lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, 2) == targets_BT[..., None]
    )
    logp_BT = jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0), axis=-1) - lse_BT
    fixed_BTV, lse_BT = lax.stop_gradient((logits_BTV, lse_BT))
    entropy_BT = lse_BT - jnp.sum(jnp.exp(fixed_BTV - lse_BT[..., None]) * fixed_BTV, axis=-1)
    return logp_BT, entropy_BT


def token_logprobs(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    ids_BT: jax.Array,
    mask_BT: jax.Array,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """(logp_BT, entropy_BT): of each token given those before it, at the token's own position.

    `mask_BT` keeps the tokens that are wanted, none of them the first of its segment; elsewhere
    both are 0, and no activation, however large, reaches a gradient.
    """
    # Position t is predicted from x at t - 1.
    predicts_BT = jnp.roll(mask_BT, -1, axis=1).at[:, -1].set(False)
    # What is asked for comes to the front of each row, and the chunks behind it are passed over:
    # prompts never meet the vocabulary.
    place_BT, order_BT = _to_the_front(predicts_BT)

    def front(y_BT: jax.Array) -> jax.Array:
        index = order_BT.reshape(*order_BT.shape, *(1,) * (y_BT.ndim - 2))
        return jnp.take_along_axis(y_BT, index, axis=1, mode="promise_in_bounds")

    outputs = logprobs(
        front(jnp.where(predicts_BT[..., None], x_BTD, 0)),
        w_DV,
        front(jnp.roll(ids_BT, -1, axis=1)),
        front(predicts_BT),
        temperature,
        chunk,
    )
    logp_BT, entropy_BT = (
        jnp.where(mask_BT, jnp.roll(jnp.take_along_axis(y, place_BT, axis=1), 1, axis=1), 0)
        for y in outputs
    )
    return logp_BT, entropy_BT


def _to_the_front(chosen_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(place_BT, order_BT): where each entry of a row goes if the chosen ones come first, all in
    their order, and which entry comes to each place. By sums: the TPU compiler is slow with sorts.
    """
    index_BT = lax.broadcasted_iota(jnp.int32, chosen_BT.shape, 1)
    before_BT = jnp.cumsum(chosen_BT, axis=1) - chosen_BT
    total_B1 = chosen_BT.sum(1, keepdims=True)
    place_BT = jnp.where(chosen_BT, before_BT, total_B1 + index_BT - before_BT)

    def inverse(place_T: jax.Array, index_T: jax.Array) -> jax.Array:
        there_T = jnp.zeros_like(index_T).at[place_T]
        return there_T.set(index_T, unique_indices=True, mode="promise_in_bounds")

    return place_BT, jax.vmap(inverse)(place_BT, index_BT)
