"""How a batch of pairs is cut changes nothing of what the reward model learns from it."""

import jax
import numpy as np
import pytest

from pgrpo_jax import config as c
from pgrpo_jax import data, optimizer, rng, sharding, supervised
from pgrpo_jax.models import reward

ARCH = c.Architecture(
    vocab_size=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=32, qkv_bias=True
)
C, T = 16, 12


def config(micro_batches: int) -> c.Config:
    model = c.ModelConfig(architecture=ARCH)
    training = c.RewardTrainingConfig(steps=10, batch_size=C, micro_batches=micro_batches)
    return c.Config(policy=model, reward_model=model, reward_training=training)


def pairs() -> data.PairBatch:
    random, sides = np.random.default_rng(0), {}
    for side in ("chosen", "rejected"):
        columns_CT = np.broadcast_to(np.arange(T, dtype=np.int32), (C, T))
        real_CT = columns_CT < random.integers(1, T + 1, (C, 1))
        sides[f"{side}_ids_CT"] = random.integers(0, 40, (C, T), dtype=np.int32)
        sides[f"{side}_positions_CT"] = columns_CT
        sides[f"{side}_segments_CT"] = real_CT.astype(np.int32)
    margin_C = random.random(C, np.float32)
    return data.PairBatch(margin_C=margin_C, valid_C=np.arange(C) % 5 != 1, **sides)


def step(micro_batches: int, devices: int = 1):
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:devices])
    cfg = config(micro_batches)
    params = reward.init(ARCH, cfg.reward_model.compute, rng.key(0, "reward"))
    tx = optimizer.build(cfg.reward_training.optimizer, 10)
    state = optimizer.init_state(params, tx, mesh)
    batch = sharding.put_rows(mesh, pairs())
    state, values = supervised.compile_reward_update(cfg, ARCH, mesh)(state, batch)
    return jax.device_get((values, [x for x in jax.tree.leaves(state.opt_state) if x.ndim]))


@pytest.mark.parametrize(("micro_batches", "devices"), [(4, 1), (16, 1), (4, 4)])
def test_pairs_in_micro_batches_teach_what_all_at_once_teach(micro_batches, devices):
    (values, moments), (values_, moments_) = step(1), step(micro_batches, devices)
    assert any(np.abs(x).max() > 1e-4 for x in moments)
    for x, y in zip(moments, moments_, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-7)
    for name, value in values.items():
        np.testing.assert_allclose(value, values_[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="micro_batches=3 must divide .*batch_size=16"):
        config(3)
