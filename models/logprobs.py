"""Log-probabilities of given tokens without the [B, T, V] logits.

Logits are made in chunks, and made again in the backward pass.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pgrpo_jax import sharding


def chunk_tokens(megabytes: int, vocab_size: int) -> int:
    """Tokens whose float32 logits take that much: memory does not grow with the vocabulary."""
    return max(megabytes * 2**20 // (4 * vocab_size), 1)


def logprobs(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """log softmax(x w / temperature) at the targets, and that softmax's entropy, float32 [B, T].

    Logits are float32 and exist for about `chunk` tokens (over all devices) at one time, at least
    one column of the batch. No gradient passes through the entropy.
    """
    B, T, D = x_BTD.shape
    # Chunks are cut along T: B is split over devices, and a scan over a split axis would gather it.
    chunks = min(T, math.ceil(B * T / chunk))
    length = math.ceil(T / chunks)
    # In float32 the gradient of `w` is summed over chunks in float32 too.
    w_DV = w_DV.astype(jnp.float32)

    @jax.checkpoint
    def of_chunk(x_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = w_DV.astype(x_BTD.dtype)
        logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, w, preferred_element_type=jnp.float32)
        logits_BTV = sharding.constrain(logits_BTV, "BTV")
        return of_logits(logits_BTV / temperature, targets_BT)

    if chunks == 1:
        return of_chunk(x_BTD, targets_BT)
    pad = chunks * length - T
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, pad), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, pad)))
    columns = (
        x_BTD.reshape(B, chunks, length, D).swapaxes(0, 1),
        targets_BT.reshape(B, chunks, length).swapaxes(0, 1),
    )
    _, outputs = lax.scan(lambda carry, xs: (carry, of_chunk(*xs)), (), columns)
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
    x_BTD = jnp.where(predicts_BT[..., None], x_BTD, 0)
    outputs = logprobs(x_BTD, w_DV, jnp.roll(ids_BT, -1, axis=1), temperature, chunk)
    logp_BT, entropy_BT = (jnp.where(mask_BT, jnp.roll(y, 1, axis=1), 0) for y in outputs)
    return logp_BT, entropy_BT
