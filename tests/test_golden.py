"""Agreement with TRL 1.16 on fixed inputs; `data/golden/README.md` says how they were made."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import algo, masked

FOLDER = pathlib.Path(__file__).parent / "data" / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())
LOSS, ADVANTAGE = np.load(FOLDER / "trl_loss.npz"), np.load(FOLDER / "trl_adv.npz")
EPS = 1e-4  # TRL divides by std + EPS


def weights(case, mask_BT, rows):
    """TRL's loss types as our aggregations; `rows` are those of one of its micro-batches."""
    B = len(mask_BT)
    length = case["max_completion_length"]
    if case["loss_type"] == "bnpo":  # a mean over the micro-batch, the mean of which is taken
        return algo.token_weights(mask_BT[rows]) / case["grad_accum"]
    return {
        "dapo": lambda: algo.token_weights(mask_BT),
        "grpo": lambda: algo.sequence_weights(mask_BT, masked.count(mask_BT, 1, True), B),
        "dr_grpo": lambda: algo.constant_weights(mask_BT, B, length=length),
    }[case["loss_type"]]()[rows]


@pytest.mark.parametrize("case", INDEX["loss"], ids=lambda case: case["name"])
def test_loss_and_gradient_are_trls(case):
    assert case["importance_sampling_level"] == "token" and case["delta"] is None and case["old"]
    assert not case["use_bias_correction_kl"]
    rows = slice(*(case["rows"] or (0, INDEX["G"] * 3)))
    mask_BT = jnp.asarray(LOSS[f"in/{case['mask']}"], bool)
    weights_BT = weights(case, mask_BT, rows)
    advantage = LOSS[f"in/{case['adv']}"]
    advantage_BT = jnp.broadcast_to(advantage.reshape(len(mask_BT), -1), mask_BT.shape)[rows]
    old_BT, ref_BT, mask_BT = LOSS["in/old"][rows], LOSS["in/ref"][rows], mask_BT[rows]

    def loss(logp_BT):
        loss_BT = algo.clipped_loss(
            logp_BT,
            old_BT,
            advantage_BT,
            mask_BT,
            epsilon=case["epsilon_low"],
            epsilon_high=case["epsilon_high"],
        )
        loss_BT += case["beta"] * algo.k3(logp_BT, ref_BT, mask_BT)
        return jnp.sum(loss_BT * weights_BT)

    value, grad_BT = jax.value_and_grad(loss)(jnp.asarray(LOSS["in/logps"][rows]))
    np.testing.assert_allclose(value, LOSS[f"{case['name']}/loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(grad_BT, LOSS[f"{case['name']}/grad_logps"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", INDEX["adv"], ids=lambda case: case["name"])
def test_advantages_are_trls_but_for_the_floor(case):
    rewards_BF, weights_F = (ADVANTAGE[f"{case['name']}/{name}"] for name in ("rewards", "weights"))
    rewards_PG = np.nansum(rewards_BF * weights_F, axis=1).reshape(-1, case["G"])
    valid_PG = ~np.isnan(rewards_BF).all(axis=1).reshape(-1, case["G"])
    rewards_PG, valid_PG = jnp.asarray(rewards_PG), jnp.asarray(valid_PG)
    axis = {"group": 1, "batch": None, "none": None}[case["scale_rewards"]]
    std = masked.std(rewards_PG, valid_PG, axis, keepdims=True)
    to_trl = jnp.maximum(std, EPS) / (std + EPS)  # our floor for TRL's summand
    advantage_PG = {
        "group": lambda: algo.group_advantage(rewards_PG, valid_PG, std_floor=EPS) * to_trl,
        "batch": lambda: algo.batch_std_advantage(rewards_PG, valid_PG, std_floor=EPS) * to_trl,
        "none": lambda: algo.group_no_std_advantage(rewards_PG, valid_PG),
    }[case["scale_rewards"]]()
    want_PG = ADVANTAGE[f"{case['name']}/adv"].reshape(-1, case["G"])
    np.testing.assert_allclose(advantage_PG, want_PG, rtol=1e-4, atol=1e-6)


def test_the_golden_cases_have_not_become_fewer():
    # 4 loss types x 2 upper bounds x 3 masks, and for each type advantages by token and 2
    # micro-batches
    assert len(INDEX["loss"]) == 4 * 2 * 3 + 4 * 2
    assert len(INDEX["adv"]) == 13
    assert {case["loss_type"] for case in INDEX["loss"]} == {"grpo", "bnpo", "dapo", "dr_grpo"}
    assert {case["scale_rewards"] for case in INDEX["adv"]} == {"group", "batch", "none"}
