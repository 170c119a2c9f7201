"""How completions are packed and split changes nothing of what is learnt from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import config as c
from pgrpo_jax import optimizer, packing, rng, sharding, types, update
from pgrpo_jax.models import decoder, logprobs

ARCH = c.Architecture(
    vocab_size=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=32, qkv_bias=True
)
LONGEST = 24  # prompts of up to 8 tokens, completions of up to 16
P, G = 4, 4


def config(**settings) -> c.Config:
    model = c.ModelConfig(architecture=ARCH)
    settings = {"steps": 10, "micro_batch_size": 4, **settings}
    return c.Config(
        policy=model,
        reward_model=model,
        data=c.DataConfig(max_prompt_length=8),
        rollout=c.RolloutConfig(
            prompts_per_step=P,
            num_generations=G,
            max_completion_length=16,
            temperature=0.9,
            prompt_buckets=(8,),
        ),
        update=c.UpdateConfig(**settings),
    )


def completions(seed: int = 0) -> list[types.Completion]:
    random = np.random.default_rng(seed)
    tests = types.Tests(kind="assert", code=("assert True",))
    prompts = [random.integers(0, 40, random.integers(1, 9), dtype=np.int32) for _ in range(P)]
    found = []
    for i in range(P * G):
        count = int(random.integers(1, 17))
        found.append(
            types.Completion(
                problem=types.Problem(str(i // G), "", tests),
                prompt_ids=prompts[i // G],
                ids=random.integers(0, 40, count, dtype=np.int32),
                logps=random.normal(-3.5, 0.5, count).astype(np.float32),
                truncated=count == 16,
                group=i // G,
                sample=i % G,
            )
        )
    return found


def batch(rows: update.Rows, micro_batches: int, **changes) -> update.UpdateBatch:
    random = np.random.default_rng(1)
    B = P * G
    values = {
        "r_format_B": random.integers(0, 2, B).astype(np.float32),
        "r_outcome_B": random.integers(0, 2, B).astype(np.float32),
        "r_thinking_B": random.random(B, np.float32),
        "r_extra_B": np.zeros(B, np.float32),
        "valid_B": np.arange(B) != 5,
        "truncated_B": np.array([x.truncated for x in completions()]),
    }
    return update.UpdateBatch(rows=rows, micro_batches=np.int32(micro_batches), **values | changes)


def packed(R: int) -> update.UpdateBatch:
    plan = update.plan(config(micro_batch_size=R), mesh(), completions())
    rows = [row for batch in plan.batches for row in batch if row]
    assert len(rows) < P * G  # there is something to pack
    return batch(*update.packed(completions(), plan))


def unpacked() -> update.UpdateBatch:
    alone = packing.Packed([[[i] for i in range(P * G)]], rows=P * G, capacity=LONGEST, limit=1)
    return batch(*update.packed(completions(), alone))


@functools.cache
def mesh(devices: int = 1, **axes) -> jax.sharding.Mesh:
    return sharding.make_mesh(c.MeshConfig(**axes), jax.devices()[:devices])


def step(cfg: c.Config, batch: update.UpdateBatch, mesh: jax.sharding.Mesh):
    """(metrics, gradient by way of plain descent's first moment, log-probabilities by token)."""
    params = decoder.init(ARCH, cfg.policy.compute, rng.key(0, "policy"))
    tx = optimizer.build(cfg.update.optimizer, 10)
    state = optimizer.init_state(params, tx, mesh)
    state, values, advantage_B = update.compile_update(cfg, ARCH, mesh)(state, batch)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    return jax.device_get((values, moments, advantage_B))


def same(one, other) -> None:
    (values, moments, advantage_B), (values_, moments_, advantage_B_) = one, other
    np.testing.assert_array_equal(advantage_B, advantage_B_)
    assert any(np.abs(x).max() > 1e-4 for x in moments)
    for x, y in zip(moments, moments_, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-7)
    for name in values.keys() - {"update/padding"}:
        np.testing.assert_allclose(values[name], values_[name], rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("loss_type", ["token", "sequence", "constant"])
def test_packed_rows_teach_what_unpacked_rows_teach(loss_type):
    settings = {"loss_type": loss_type, "mask_truncated_completions": loss_type == "sequence"}
    whole = step(config(micro_batch_size=P * G, **settings), unpacked(), mesh())
    same(step(config(**settings), packed(4), mesh()), whole)


def test_how_many_rows_are_computed_at_once_changes_nothing():
    one, two = (step(config(micro_batch_size=R), packed(R), mesh()) for R in (1, 8))
    same(one, two)


def test_eight_devices_learn_what_one_learns():
    many = mesh(8, data=2, fsdp=2, tensor=2)
    same(step(config(), packed(8), many), step(config(), packed(8), mesh()))


def test_devices_get_equal_numbers_of_tokens():
    random = np.random.default_rng(0)
    counts = random.integers(8, 129, 1024).tolist()
    many = [
        types.Completion(
            problem=completions()[0].problem,
            prompt_ids=np.full(64, i // 8, np.int32),
            ids=np.zeros(count, np.int32),
            logps=np.zeros(count, np.float32),
            truncated=False,
            group=0,
            sample=0,
        )
        for i, count in enumerate(counts)
    ]
    sequences = packing.Sequences(
        [n + 1 for n in counts], [63] * 1024, [i // 8 for i in range(1024)]
    )
    plan = packing.pack(sequences, 129, 63, 32, parts=8)
    rows, micro_batches = update.packed(many, plan)
    on = mesh(8, data=2, fsdp=4)
    segments_ART = sharding.put(rows.segments, update.batch_sharding(on).rows)
    tokens = [int((part.data > 0).sum()) for part in segments_ART.addressable_shards]
    held = sum(sequences.tokens(row) for batch in plan.batches for row in batch)
    assert len(tokens) == 8 and sum(tokens) == held < sum(counts) + 1024 * 64
    assert max(tokens) < 1.06 * min(tokens)  # a row more of the last micro-batch, perhaps
    # In each full micro-batch, too: devices wait for each other after each.
    for a in range(micro_batches - 1):
        each = [int((part.data[a] > 0).sum()) for part in segments_ART.addressable_shards]
        assert max(each) < 1.03 * min(each)


def test_what_padding_holds_reaches_nothing():
    clean = packed(4)
    blank = clean.rows.segments == 0
    assert blank.any()
    poison = np.where(blank, 39, clean.rows.ids), np.where(blank, 1e30, clean.rows.old_logp)
    rows = clean.rows.replace(ids=poison[0], old_logp=poison[1].astype(np.float32))
    dirty = clean.replace(rows=rows.replace(owner=np.where(blank, 7, rows.owner)))
    one, other = (step(config(), x, mesh()) for x in (clean, dirty))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_completions_that_count_for_nothing_reach_no_gradient():
    nobody = packed(4).replace(valid_B=np.zeros(P * G, bool))
    values, moments, advantage_B = step(config(), nobody, mesh())
    assert not any(np.any(x) for x in (values["loss"], advantage_B, *moments))


@pytest.mark.parametrize("gate", ["posterior", "additive", "process", "outcome"])
def test_the_coefficient_weighs_the_reasoning_and_nothing_else(gate):
    r_f, r_o, r_t = (np.array([x] * P * G, np.float32) for x in (1, 1, 0.5))
    none, ones = np.zeros(P * G, np.float32), np.ones(P * G, bool)

    def total(weight: float) -> float:
        cfg = config(gate=gate, thinking_weight=weight)
        return float(update.fold_rewards(cfg, r_f, r_o, r_t, none, ones).total_PG[0, 0])

    assert total(4.0) - total(1.0) == (0 if gate == "outcome" else 3 * 0.5)


def test_rows_that_devices_cannot_split_are_refused():
    with pytest.raises(ValueError, match="update.micro_batch_size = 3 rows do not split"):
        update.compile_update(config(micro_batch_size=3), ARCH, mesh(2))


def test_a_frozen_policy_speaks_of_every_completions_tokens():
    cfg = config(kl="k3", beta=0.1)
    params = decoder.init(ARCH, cfg.policy.compute, rng.key(0, "policy"))
    both = packed(4), packed(8)
    found = []
    for x in both:
        logp_ART = update.compile_logprobs(cfg, ARCH, mesh())(params, x)
        at = x.rows.completion
        order = np.lexsort((x.rows.positions[at], x.rows.owner[at]))
        assert (np.asarray(logp_ART)[at] < 0).all()
        found.append(np.asarray(logp_ART)[at][order])
    np.testing.assert_allclose(*found, atol=1e-5)


def test_importance_weights_are_1_for_a_sampler_that_is_the_trainer_and_are_capped():
    x = packed(4)
    params = decoder.init(ARCH, c.Compute(), rng.key(0, "policy"))
    logp_ART = np.asarray(update.compile_logprobs(config(), ARCH, mesh())(params, x))
    same_sampler = x.replace(rows=x.rows.replace(old_logp=logp_ART))
    plain = step(config(), same_sampler, mesh())
    weighed = step(config(importance_cap=2.0), same_sampler, mesh())
    np.testing.assert_allclose(weighed[0].pop("importance/mean"), 1, rtol=1e-5)
    assert weighed[0].pop("importance/capped") == 0
    same(plain, weighed)
    # A sampler that gave each token a third of the probability: ratios of 3, all cut to 2.
    third = x.replace(rows=x.rows.replace(old_logp=logp_ART - np.float32(np.log(3))))
    values, moments, _ = step(config(importance_cap=2.0), third, mesh())
    assert values["importance/capped"] == 1 and values["importance/mean"] == 2
    np.testing.assert_allclose(values["loss"], 2 * plain[0]["loss"], rtol=1e-4)


def test_several_iterations_clip_against_the_trainer_before_them():
    x, cfg = packed(4), config(importance_cap=2.0, num_iterations=2)
    with pytest.raises(ValueError, match="needs UpdateBatch.old_logp_ART, got None"):
        step(cfg, x, mesh())
    params = decoder.init(ARCH, c.Compute(), rng.key(0, "policy"))
    logp_ART = update.compile_logprobs(cfg, ARCH, mesh())(params, x)
    once = step(config(importance_cap=2.0), x, mesh())
    same(step(cfg, x.replace(old_logp_ART=logp_ART), mesh()), once)


def test_memory_of_the_loss_does_not_grow_with_the_vocabulary():
    R, T, D = 4, 256, 8
    ids_RT, mask_RT = jnp.zeros((R, T), jnp.int32), jnp.ones((R, T), bool).at[:, 0].set(False)

    def peak(V: int) -> int:
        chunk = logprobs.chunk_tokens(1, V)

        def loss(x_RTD, w_DV):
            return logprobs.token_logprobs(x_RTD, w_DV, ids_RT, mask_RT, 1.0, chunk)[0].sum()

        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((R, T, D), (D, V)))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        weights = 4 * D * V  # the gradient of the unembedding itself, its sum and its term
        return compiled.memory_analysis().temp_size_in_bytes - 3 * weights

    # All logits would be 16 times as many.
    assert peak(32768) < 1.3 * peak(2048)
