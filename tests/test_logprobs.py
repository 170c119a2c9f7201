"""Chunked log-probabilities equal the plain ones, and never hold all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pgrpo_jax.models import logprobs

B, T, D, V = 8, 10, 6, 50
CHUNKS = [1, B, 3 * B, 5 * B, B * T, 10 * B * T]
# Chunks sum in another order; with logits of standard deviation 5 float32 rounds entropies at 1e-5.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=5e-5)


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD, w_DV = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    return x_BTD, w_DV, targets_BT, jax.random.normal(keys[3], (B, T))


ALL_BT = jnp.ones((B, T), bool)


def plain(x_BTD, w_DV, targets_BT, temperature):
    logp_BTV = jax.nn.log_softmax(x_BTD @ w_DV / temperature)
    logp_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return logp_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


def gradient(function, cotangent_BT):
    """The gradient of a weighted sum of the log-probabilities with respect to x and w."""
    return jax.jit(jax.grad(lambda x, w: jnp.sum(function(x, w)[0] * cotangent_BT), argnums=(0, 1)))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_change_neither_values_nor_gradients(chunk):
    x_BTD, w_DV, targets_BT, cotangent_BT = inputs()

    def chunked(x_BTD, w_DV):
        return logprobs.logprobs(x_BTD, w_DV, targets_BT, ALL_BT, 0.7, chunk)

    def whole(x_BTD, w_DV):
        return plain(x_BTD, w_DV, targets_BT, 0.7)

    for got, want in zip(chunked(x_BTD, w_DV), whole(x_BTD, w_DV), strict=True):
        assert got.dtype == jnp.float32
        close(got, want)
    sides = (gradient(f, cotangent_BT)(x_BTD, w_DV) for f in (chunked, whole))
    for got, want in zip(*sides, strict=True):
        close(got, want)


def test_no_gradient_passes_through_the_entropy():
    x_BTD, w_DV, targets_BT, _ = inputs()

    def entropy(x_BTD, w_DV):
        return jnp.sum(logprobs.logprobs(x_BTD, w_DV, targets_BT, ALL_BT, 1.0, B)[1])

    for grad in jax.grad(entropy, argnums=(0, 1))(x_BTD, w_DV):
        assert not np.any(grad)


def test_the_logits_of_all_tokens_never_exist_forward_or_backward():
    chunk, wide = 2 * B, 4096  # a vocabulary that dwarfs everything else
    x_BTD, _, targets_BT, cotangent_BT = inputs()
    w_DV = jax.random.normal(jax.random.key(1), (D, wide))

    def chunked(x_BTD, w_DV):
        return logprobs.logprobs(x_BTD, w_DV, targets_BT, ALL_BT, 1.0, chunk)

    for program in (jax.jit(chunked), gradient(chunked, cotangent_BT)):
        compiled = program.lower(x_BTD, w_DV).compile()
        # A few arrays of [chunk, V] at one time; all logits would be B T / chunk = 5 of them each.
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * T * wide
        assert f"f32[{B},{T},{wide}]" not in compiled.as_text()
        assert f"f32[{B},{chunk // B},{wide}]" in compiled.as_text()


def test_chunks_of_a_split_batch_are_not_gathered():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x_BTD, w_DV, targets_BT, cotangent_BT = inputs()

    def value(x_BTD, w_DV):
        logp_BT, _ = logprobs.logprobs(x_BTD, w_DV, targets_BT, ALL_BT, 1.0, 2 * B)
        return jnp.sum(logp_BT * cotangent_BT)

    step = jax.jit(jax.grad(value), in_shardings=(rows, everywhere), out_shardings=rows)
    text = step.lower(x_BTD, w_DV).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    close(step(x_BTD, w_DV), jax.grad(value)(x_BTD, w_DV))


def test_the_gradient_of_bfloat16_activations_is_summed_in_float32():
    # Each token adds 1/256 of its gradient's size; in bfloat16 the sum over 4096 would stop at 256
    # of them.
    n = 4096
    x_BTD, w_DV = jnp.ones((1, n, 1), jnp.bfloat16), jnp.zeros((1, 2))
    targets_BT, all_BT = jnp.zeros((1, n), jnp.int32), jnp.ones((1, n), bool)

    def value(w_DV):
        return jnp.sum(logprobs.logprobs(x_BTD, w_DV, targets_BT, all_BT, 1.0, 1)[0])

    # d logp / d w = [1 - 1/2, -1/2] per token
    close(jax.grad(value)(w_DV), jnp.asarray([[n / 2, -n / 2]]))


MASK_BT = jnp.broadcast_to((jnp.arange(T) >= 3) & (jnp.arange(T) < 8), (B, T))


def test_each_token_is_judged_from_the_position_before_it():
    x_BTD, w_DV, ids_BT, _ = inputs()
    logp_BT, entropy_BT = logprobs.token_logprobs(x_BTD, w_DV, ids_BT, MASK_BT, 0.7, B)
    want_BT, want_entropy_BT = plain(x_BTD[:, :-1], w_DV, ids_BT[:, 1:], 0.7)
    close(logp_BT[:, 3:8], want_BT[:, 2:7])
    close(entropy_BT[:, 3:8], want_entropy_BT[:, 2:7])
    assert not np.any(logp_BT[:, :3]) and not np.any(logp_BT[:, 8:])


@pytest.mark.parametrize("poison", [1e30, float("nan")])
def test_activations_outside_the_mask_reach_no_gradient(poison):
    x_BTD, w_DV, ids_BT, _ = inputs()

    def value(x_BTD, w_DV):
        logp_BT, entropy_BT = logprobs.token_logprobs(x_BTD, w_DV, ids_BT, MASK_BT, 1.0, 2 * B)
        return jnp.sum(logp_BT) + jnp.sum(entropy_BT)

    both = jax.value_and_grad(value, argnums=(0, 1))
    predicts_T = (jnp.arange(T) >= 2) & (jnp.arange(T) < 7)
    dirty_BTD = jnp.where(predicts_T[None, :, None], x_BTD, poison)
    clean, poisoned = both(x_BTD, w_DV), both(dirty_BTD, w_DV)
    assert all(map(np.array_equal, jax.tree.leaves(clean), jax.tree.leaves(poisoned)))


def test_what_is_not_asked_for_never_meets_the_vocabulary():
    x_BTD, w_DV, ids_BT, _ = inputs()
    scattered_BT = jax.random.bernoulli(jax.random.key(5), 0.4, (B, T)).at[:, 0].set(False)
    logp_BT, _ = logprobs.token_logprobs(x_BTD, w_DV, ids_BT, scattered_BT, 0.7, B)
    want_BT, _ = plain(x_BTD[:, :-1], w_DV, ids_BT[:, 1:], 0.7)
    close(logp_BT[:, 1:], jnp.where(scattered_BT[:, 1:], want_BT, 0))
    # A vocabulary of NaN shows which chunks were computed: as many as the fullest row asks for.
    chunks = logprobs.logprobs(x_BTD, w_DV * jnp.nan, ids_BT, ALL_BT.at[:, 4:].set(False), 1.0, B)
    assert np.isnan(chunks[0]).sum() == B * 4 and not np.any(chunks[0][:, 4:])
