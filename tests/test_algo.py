"""The mathematics by hand; the arithmetic stands beside each number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import algo, masked

NAN = float("nan")
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def array(*values):
    return jnp.asarray(values, jnp.float32)


def all_valid(x):
    return jnp.ones(x.shape, bool)


# Rows: unformatted and failing, formatted and failing, unformatted and passing, formatted and
# passing.
FORMAT_PG, OUTCOME_PG = array([0, 1, 0, 1]), array([0, 0, 1, 1])
THINKING_PG = array([0.5, 0.9, 0.25, 0.75])


def test_the_posterior_gate_pays_reasoning_only_where_the_program_passes():
    # 0; 1; 1 + 0.25; 1 + 1 + 0.75
    want = array([0, 1, 1.25, 2.75])
    close(algo.posterior_gate(FORMAT_PG, OUTCOME_PG, THINKING_PG), want)
    unscored_PG = array([NAN, NAN, 0.25, 0.75])
    close(algo.posterior_gate(FORMAT_PG, OUTCOME_PG, unscored_PG), want)


def test_the_ungated_rewards_are_plain_sums():
    close(algo.additive_gate(FORMAT_PG, OUTCOME_PG, THINKING_PG), array([0.5, 1.9, 1.25, 2.75]))
    close(algo.outcome_gate(FORMAT_PG, OUTCOME_PG), array([0, 1, 1, 2]))
    close(algo.process_gate(FORMAT_PG, THINKING_PG), array([0.5, 1.9, 0.25, 1.75]))


# Mean 3, deviations -2 -1 0 3, squares 4 + 1 + 0 + 9 = 14, std sqrt(14 / 3).
SPREAD = array([1, 2, 3, 6])


def test_group_advantages_are_deviations_by_the_sample_std():
    advantage_PG = algo.group_advantage(SPREAD, all_valid(SPREAD), std_floor=0.2)
    close(advantage_PG, array([-2, -1, 0, 3]) / (14 / 3) ** 0.5)


def test_a_std_below_the_floor_is_replaced_by_it():
    # An all-passing group: mean 2.52, deviations -0.02 0 0 0.02, std 0.0163 < 0.2.
    rewards_PG = array([2.50, 2.52, 2.52, 2.54])
    advantage_PG = algo.group_advantage(rewards_PG, all_valid(rewards_PG), std_floor=0.2)
    close(advantage_PG, array([-0.1, 0, 0, 0.1]))
    # Without a floor the same noise makes more than unit advantages: 0.02 / 0.0163.
    unfloored_PG = algo.group_advantage(rewards_PG, all_valid(rewards_PG), std_floor=0.0)
    close(unfloored_PG, array([-1.5, 0, 0, 1.5]) ** 1 * (2 / 3) ** 0.5, rtol=1e-3)


@pytest.mark.parametrize("std_floor", [0.0, 0.2])
@pytest.mark.parametrize("reward", [0.0, 0.1, 2.7, 1e4])
def test_a_group_without_variance_has_an_advantage_of_exactly_zero(reward, std_floor):
    # Three times float32's 0.1 over 3 is not 0.1: a mean taken naively leaves 7e-9, over a std of
    # as much.
    rewards_PG = jnp.full((2, 3), reward)
    for advantage in (algo.group_advantage, algo.batch_std_advantage):
        got_PG = advantage(rewards_PG, all_valid(rewards_PG), std_floor=std_floor)
        assert np.array_equal(got_PG, np.zeros((2, 3)))


def test_the_std_keeps_its_digits_far_from_zero():
    # The mean of squares less the squared mean gives 0 or worse here: float32 squares of 1e4 step
    # by 8.
    rewards_PG = 1e4 + SPREAD / 4
    close(masked.std(rewards_PG, all_valid(rewards_PG), axis=1), array((14 / 3) ** 0.5 / 4))


def test_without_std_advantages_are_deviations():
    close(algo.group_no_std_advantage(SPREAD, all_valid(SPREAD)), array([-2, -1, 0, 3]))


def test_batch_advantages_divide_group_deviations_by_the_std_of_all():
    rewards_PG = array([0, 2], [4, 6])
    # Deviations from 1 and 5: -1 1 -1 1. The batch: mean 3, squares 9 + 1 + 1 + 9 = 20, std sqrt(20
    # / 3).
    advantage_PG = algo.batch_std_advantage(rewards_PG, all_valid(rewards_PG), std_floor=0.2)
    close(advantage_PG, array([-1, 1], [-1, 1]) / (20 / 3) ** 0.5)


def test_what_nobody_judged_is_in_no_statistic():
    rewards_PG = array([1, NAN, 2, 3, 6])
    valid_PG = ~jnp.isnan(rewards_PG)
    want_PG = array([-2, 0, -1, 0, 3]) / (14 / 3) ** 0.5
    close(algo.group_advantage(rewards_PG, valid_PG, std_floor=0.2), want_PG)
    close(algo.batch_std_advantage(rewards_PG, valid_PG, std_floor=0.2), want_PG)
    close(algo.group_no_std_advantage(rewards_PG, valid_PG), array([-2, 0, -1, 0, 3]))


@pytest.mark.parametrize("valid", [[True, False, False], [False, False, False]])
def test_fewer_than_two_judged_completions_have_no_advantage(valid):
    rewards_PG, valid_PG = array([5, NAN, NAN]), jnp.asarray([valid])
    got_PG = algo.group_advantage(rewards_PG, valid_PG, std_floor=0.2)
    assert np.array_equal(got_PG, np.zeros((1, 3)))


def test_decoupled_advantages_compare_reasoning_among_the_correct_only():
    rewards_PG = array([1, 2, 2, 1])  # mean 1.5, std sqrt(4 * 0.25 / 3) = 0.577
    thinking_PG = array(
        [0.9, 0.2, 0.8, NAN]
    )  # of the correct: mean 0.5, std sqrt(2 * 0.09) = 0.424
    correct_PG = jnp.asarray([[False, True, True, False]])
    got_PG = algo.decoupled_advantage(
        rewards_PG, thinking_PG, correct_PG, all_valid(rewards_PG), std_floor=0.2
    )
    outcome_PG = array([-0.5, 0.5, 0.5, -0.5]) / (1 / 3) ** 0.5
    process_PG = array([0, -0.3, 0.3, 0]) / 0.18**0.5
    close(got_PG, outcome_PG + process_PG)
    got_PG = algo.decoupled_advantage(
        rewards_PG, thinking_PG, correct_PG, all_valid(rewards_PG), std_floor=0.2, weight=3.0
    )
    close(got_PG, outcome_PG + 3 * process_PG)


def test_a_single_correct_completion_gets_no_process_advantage():
    rewards_PG, thinking_PG = array([1, 2, 1, 1]), array([0.1, 0.9, 0.5, 0.5])
    valid_PG = all_valid(rewards_PG)
    got_PG = algo.decoupled_advantage(
        rewards_PG, thinking_PG, rewards_PG == 2, valid_PG, std_floor=0.2
    )
    close(got_PG, algo.group_advantage(rewards_PG, valid_PG, std_floor=0.2))


# Ratios 0.5, 1.1, 1.5 with A = 1, then the same with A = -2; bounds 0.8 and 1.28.
RATIO_BT = array([0.5, 1.1, 1.5], [0.5, 1.1, 1.5])
ADVANTAGE_BT = array([1, 1, 1], [-2, -2, -2])
clipped_loss = functools.partial(algo.clipped_loss, epsilon=0.2, epsilon_high=0.28)


def test_the_loss_is_the_pessimistic_one_of_ratio_and_clipped_ratio():
    zero_BT = jnp.zeros_like(RATIO_BT)
    loss_BT = clipped_loss(jnp.log(RATIO_BT), zero_BT, ADVANTAGE_BT, all_valid(zero_BT))
    # A = 1: -min(r, clip) = -0.5 -1.1 -1.28; A = -2: 2 max(r, clip) = 1.6 2.2 3
    close(loss_BT, array([-0.5, -1.1, -1.28], [1.6, 2.2, 3.0]))


def test_the_gradient_vanishes_exactly_where_the_clip_fractions_count():
    zero_BT = jnp.zeros_like(RATIO_BT)

    def loss(logp_BT):
        return jnp.sum(clipped_loss(logp_BT, zero_BT, ADVANTAGE_BT, all_valid(zero_BT)))

    grad_BT = jax.grad(loss)(jnp.log(RATIO_BT))
    # d/dlogp of -r A is -r A
    close(grad_BT, array([-0.5, -1.1, 0], [0, 2.2, 3.0]))
    low_BT, high_BT = algo.clipped(
        jnp.log(RATIO_BT), zero_BT, ADVANTAGE_BT, epsilon=0.2, epsilon_high=0.28
    )
    assert np.array_equal(low_BT, [[0, 0, 0], [1, 0, 0]])
    assert np.array_equal(high_BT, [[0, 0, 1], [0, 0, 0]])


def test_k3_is_zero_for_equals_and_by_hand_otherwise():
    logp_BT, other_BT = jnp.log(array([0.5, 0.5, 0.2])), jnp.log(array([0.5, 0.25, 0.4]))
    # r = 1, 0.5, 2: r - 1 - log r = 0, -0.5 + 0.6931, 1 - 0.6931
    close(algo.k3(logp_BT, other_BT, all_valid(logp_BT)), array([0, 0.193147, 0.306853]))


def test_k3_averages_to_the_kl_divergence():
    p_V, q_V = array(0.1, 0.2, 0.3, 0.4), array(0.25, 0.25, 0.25, 0.25)
    k3_V = algo.k3(jnp.log(p_V)[None], jnp.log(q_V)[None], jnp.ones((1, 4), bool))[0]
    close(jnp.sum(p_V * k3_V), jnp.sum(p_V * jnp.log(p_V / q_V)))


MASK_BT = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
LENGTH_B1 = jnp.asarray([[3], [1], [0]])


def test_aggregations_weigh_tokens_by_hand():
    close(algo.token_weights(MASK_BT), MASK_BT / 4)
    # Two rows that count: 1 / (2 * 3) for the tokens of the first, 1 / (2 * 1) for that of the
    # second.
    close(
        algo.sequence_weights(MASK_BT, LENGTH_B1, 2), MASK_BT / jnp.asarray([[6.0], [2.0], [1.0]])
    )
    close(algo.constant_weights(MASK_BT, 2, length=8), MASK_BT / 16)


def test_a_batch_without_tokens_weighs_nothing():
    nothing_BT = jnp.zeros((2, 3), bool)
    for weights_BT in (algo.token_weights(nothing_BT), algo.sequence_weights(nothing_BT, 0, 1)):
        assert np.array_equal(weights_BT, np.zeros((2, 3)))


@pytest.mark.parametrize("poison", [1e30, float("inf"), NAN])
def test_padding_cannot_reach_the_loss_or_its_gradient(poison):
    keys = jax.random.split(jax.random.key(0), 4)
    logp_BT, old_BT, ref_BT, advantage_BT = (jax.random.normal(key, (3, 4)) for key in keys)

    def loss(logp_BT, old_BT, ref_BT, advantage_BT):
        loss_BT = clipped_loss(logp_BT, old_BT, advantage_BT, MASK_BT)
        loss_BT += 0.04 * algo.k3(logp_BT, ref_BT, MASK_BT)
        return jnp.sum(loss_BT * algo.sequence_weights(MASK_BT, LENGTH_B1, 2))

    clean = jax.value_and_grad(loss)(logp_BT, old_BT, ref_BT, advantage_BT)
    dirty = (jnp.where(MASK_BT, x, poison) for x in (logp_BT, old_BT, ref_BT, advantage_BT))
    poisoned = jax.value_and_grad(loss)(*dirty)
    assert all(map(np.array_equal, clean, poisoned))


bradley_terry_loss = functools.partial(algo.bradley_terry_loss, center_coefficient=0.01)


def test_the_bradley_terry_loss_by_hand():
    chosen_C, rejected_C, margin_C = array(1.0, 0.0), array(-1.0, 1.0), array(0.0, 0.5)
    # gaps 2 and -1.5: log(1 + e^-2) = 0.126928, log(1 + e^1.5) = 1.701413; sums 0 and 1: 0.01 * 1
    got = bradley_terry_loss(chosen_C, rejected_C, margin_C, jnp.ones(2, bool))
    close(got, (0.126928 + 1.701413 + 0.01) / 2)


def test_pairs_that_do_not_count_cannot_reach_the_bradley_terry_gradient():
    chosen_C, rejected_C, margin_C = array(1.0, 0.3), array(-1.0, 0.5), array(0.0, 0.0)
    valid_C = jnp.asarray([True, False])
    gradient = jax.value_and_grad(bradley_terry_loss, argnums=(0, 1))
    clean = gradient(chosen_C, rejected_C, margin_C, valid_C)
    dirty = (jnp.where(valid_C, x, jnp.inf) for x in (chosen_C, rejected_C, margin_C))
    poisoned = gradient(*dirty, valid_C)
    assert all(map(np.array_equal, jax.tree.leaves(clean), jax.tree.leaves(poisoned)))
    close(clean[0], 0.126928)


def test_quantiles_and_peaks_are_of_the_kept_entries():
    x_BT, mask_BT = array([5, 1, NAN, 3, 2, 4]), jnp.asarray([[1, 1, 0, 1, 1, 1]], bool)
    close(masked.quantile(x_BT, mask_BT, 0.75), 4.0)
    close(masked.peak(x_BT, mask_BT), 5.0)
    assert masked.quantile(x_BT, ~all_valid(x_BT), 0.75) == 0 == masked.peak(x_BT, ~all_valid(x_BT))
