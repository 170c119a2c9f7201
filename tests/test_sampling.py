"""From logits to tokens: who is drawn, how often, and with which log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pgrpo_jax import hlo, sampling, sharding
from pgrpo_jax.config import MeshConfig


def keys(count: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count))


def shares(count: int, place: int = 0) -> jax.Array:
    return sampling.shares(keys(count), jnp.full(count, place))


def kept(logits_BV) -> list[list[int]]:
    return [list(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits_BV)]


def test_a_share_picks_the_token_whose_part_of_the_total_it_falls_in():
    # Of a total of 4, token 0 has [0, 1), token 1 nothing, token 2 [1, 3), token 3 [3, 4).
    u_B = jnp.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999])
    weights_VB = jnp.tile(jnp.array([[1.0], [0.0], [2.0], [1.0]]), (1, 6))
    assert sampling.pick(u_B, weights_VB).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 255, 256, 257])
def test_even_shares_pick_each_token_as_often_as_its_weight_says(vocabulary):
    weights_V = np.random.default_rng(vocabulary).exponential(size=vocabulary).astype(np.float32)
    shares = 4096
    u_B = (jnp.arange(shares) + 0.5) / shares
    ids_B = sampling.pick(u_B, jnp.tile(jnp.array(weights_V)[:, None], (1, shares)))
    counts = np.bincount(ids_B, minlength=vocabulary)
    # An interval of length w holds w * shares of evenly spaced points, give or take one.
    assert np.abs(counts - shares * weights_V / weights_V.sum()).max() < 1.1


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_devices_that_split_the_vocabulary_pick_the_same_and_do_not_send_it_around(tensor):
    on = sharding.make_mesh(MeshConfig(tensor=tensor))
    # Sums of whole numbers are exact in any order. 5000 / 8 tokens are no whole number of blocks.
    weights_VB = np.random.default_rng(0).integers(0, 4, (5000, 32)).astype(np.float32)
    u_B = (np.arange(32, dtype=np.float32) + 0.5) / 32
    split = NamedSharding(on, PartitionSpec("tensor", sharding.ROWS))
    places = (sharding.batch(on), split)
    program = jax.jit(sharding.on(on, sampling.pick), in_shardings=places)
    assert program(u_B, weights_VB).tolist() == sampling.pick(u_B, weights_VB).tolist()
    moved = hlo.collective_bytes(hlo.parse(program.lower(u_B, weights_VB).compile().as_text()))
    rows_bytes = weights_VB.nbytes / sharding.row_parts(on)
    assert 0 < sum(moved.values()) < rows_bytes / 10


def test_a_token_without_weight_is_never_picked():
    rng = np.random.default_rng(0)
    weights_VB = (rng.random((300, 2000)) * (rng.random((300, 2000)) < 0.02)).astype(np.float32)
    weights_VB[150] = 1e-6
    edges = [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))]
    for u in edges:
        ids_B = sampling.pick(jnp.full(2000, u, jnp.float32), jnp.array(weights_VB))
        assert (weights_VB[ids_B, np.arange(2000)] > 0).all()


def test_top_k_keeps_the_largest_and_what_ties_with_the_last_of_them():
    logits_BV = jnp.array([[1.0, 3.0, 2.0, 0.0], [1.0, 2.0, 2.0, 2.0]])
    assert kept(sampling.keep_top_k(logits_BV, 2)) == [[1, 2], [1, 2, 3]]
    assert kept(sampling.keep_top_k(logits_BV, 9)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("p", "tokens"),
    [(1e-6, [2]), (0.45, [2]), (0.55, [1, 2]), (0.79, [1, 2]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_tokens_whose_mass_reaches_p(p, tokens):
    # In order the masses are 0.5, 0.3, 0.15, 0.05 and the running sums 0.5, 0.8, 0.95, 1.
    logits_BV = jnp.log(jnp.array([[0.15, 0.3, 0.5, 0.05]]))
    assert kept(sampling.keep_top_p(logits_BV, p)) == [tokens]


def test_truncation_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as oracle

    logits_BV = 3 * np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32)
    wanted = oracle.TopKLogitsWarper(20)(None, torch.tensor(logits_BV))
    wanted = oracle.TopPLogitsWarper(0.8)(None, wanted)
    got = sampling.truncation(20, 0.8)(jnp.array(logits_BV))
    np.testing.assert_array_equal(got, wanted)


def test_draws_are_as_frequent_as_the_tempered_softmax_says():
    # Temperature 0.5 squares: 4/8, 2/8, 2/8 become 16, 4, 4 of 24.
    rows = 6000
    logits_VB = jnp.tile(jnp.log(jnp.array([[0.5], [0.25], [0.25]])), (1, rows))
    ids_B, logp_B = sampling.draw(shares(rows), logits_VB, jnp.float32(0.5), None)
    p = np.array([16, 4, 4]) / 24
    frequency = np.bincount(ids_B, minlength=3) / rows
    assert (np.abs(frequency - p) < 4 * np.sqrt(p * (1 - p) / rows)).all()
    np.testing.assert_allclose(logp_B, np.log(p)[np.asarray(ids_B)], rtol=1e-6)


def test_each_place_in_a_row_has_a_draw_of_its_own():
    rows = 2000
    logits_VB = jnp.zeros((2, rows))
    first, second = (
        np.asarray(sampling.draw(shares(rows, i), logits_VB, jnp.float32(1), None)[0])
        for i in (0, 1)
    )
    # Two fair coins agree half of the time: 1000 of 2000, standard deviation 22.
    assert abs((first == second).sum() - 1000) < 90


def test_truncation_narrows_the_draw_and_leaves_the_log_probability():
    logits_VB = jnp.tile(jnp.log(jnp.array([[0.5], [0.25], [0.25]])), (1, 50))
    ids_B, logp_B = sampling.draw(
        shares(50), logits_VB, jnp.float32(1), sampling.truncation(1, 1.0)
    )
    assert set(ids_B.tolist()) == {0}
    np.testing.assert_allclose(logp_B, np.log(0.5), rtol=1e-6)


def test_temperature_0_takes_the_first_of_the_likeliest_with_the_log_probability_of_temperature_1():
    logits_VB = jnp.log(jnp.array([[0.2, 0.4, 0.4], [0.5, 0.25, 0.25]])).T
    ids_B, logp_B = sampling.draw(shares(2), logits_VB, jnp.float32(0), None)
    assert ids_B.tolist() == [1, 0]
    np.testing.assert_allclose(logp_B, np.log([0.4, 0.5]), rtol=1e-6)
