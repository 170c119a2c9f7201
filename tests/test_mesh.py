"""What is computed does not depend on the mesh: neither on its shape nor on its processes."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pgrpo_jax import config as c
from pgrpo_jax import data, hlo, optimizer, reshard, rewards, rollout, sharding, types, update
from pgrpo_jax.kernels import flash_attention
from pgrpo_jax.models import attention, decode, decoder, reward

ROOT = pathlib.Path(__file__).parent.parent
# 2 key heads and an odd vocabulary: neither divides over 4 devices.
ARCH = c.Architecture(
    vocab_size=33, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=32, qk_norm=True
)
COMPUTE = c.Compute(remat="full", logprob_mb=1)
MODEL = c.ModelConfig(architecture=ARCH, compute=COMPUTE)
CFG = c.Config(
    policy=MODEL,
    reward_model=MODEL,
    data=c.DataConfig(max_prompt_length=4),
    rollout=c.RolloutConfig(
        num_generations=4,
        prompts_per_step=4,
        max_completion_length=8,
        prompt_buckets=(4,),
        page_size=4,
        prefill_tokens=8,
    ),
    # With an epsilon of 1 AdamW's step is a smooth function of the gradient.
    update=c.UpdateConfig(
        steps=3, micro_batch_size=8, optimizer=c.Optimizer(learning_rate=1.0, eps=1.0)
    ),
)
MESHES = {
    1: [(1, 1, 1)],
    2: [(1, 2, 1), (1, 1, 2)],
    4: [(2, 2, 1), (1, 1, 4)],
    8: [(1, 8, 1), (2, 2, 2), (1, 2, 4)],
}


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(c.MeshConfig(data, fsdp, tensor), devices)


def params():
    return decoder.init(ARCH, COMPUTE, jax.random.key(1))


def batch() -> update.UpdateBatch:
    """16 completions of 4 prompts, of several lengths, a row each, in two micro-batches. The first
    three tokens are a segment that the others continue."""
    rng = np.random.default_rng(0)
    B, shape_ART = 16, (2, 8, 12)
    lengths_AR1 = rng.integers(5, 13, (2, 8, 1))
    columns_T = np.arange(12)
    segments_ART = np.where(columns_T < lengths_AR1, 1 + (columns_T >= 3), 0).astype(np.int32)
    return update.UpdateBatch(
        rows=update.Rows(
            ids=rng.integers(0, ARCH.vocab_size, shape_ART, dtype=np.int32),
            positions=np.broadcast_to(columns_T, shape_ART).astype(np.int32),
            segments=segments_ART,
            prefixes=(segments_ART == 2).astype(np.int32),
            completion=(segments_ART > 0) & (columns_T >= 4),
            owner=np.broadcast_to(np.arange(B).reshape(2, 8, 1), shape_ART).astype(np.int32),
            old_logp=rng.normal(-3.5, 0.1, shape_ART).astype(np.float32),
        ),
        micro_batches=np.int32(2),
        r_format_B=rng.integers(0, 2, B).astype(np.float32),
        r_outcome_B=rng.integers(0, 2, B).astype(np.float32),
        r_thinking_B=rng.random(B, np.float32),
        r_extra_B=np.zeros(B, np.float32),
        valid_B=np.arange(B) != 3,
        truncated_B=np.arange(B) == 5,
    )


def one_step(on: jax.sharding.Mesh):
    """State (with it the gradient: mu is a tenth of it), metrics and advantages of one update."""
    tx = optimizer.build(CFG.update.optimizer, CFG.update.steps)
    state = optimizer.init_state(params(), tx, on)
    step = update.compile_update(CFG, ARCH, on)
    return step(state, sharding.put(batch(), update.batch_sharding(on)))


def sampled(on: jax.sharding.Mesh) -> list[tuple[int, int, list[int]]]:
    """Completions of four prompts, with the parameters that the update begins with, three times as
    far from uniform, so that an error shows in the tokens."""
    given = params()
    given["embedding"] = 3 * given["embedding"]
    everywhere = jax.tree.map(lambda _: sharding.replicated(on), given)
    given = sharding.put(jax.device_get(given), everywhere)
    prompts = [
        data.Prompt(
            types.Problem(str(n), "", types.Tests("assert", code=("assert True",))),
            np.arange(n) + 7,
        )
        for n in range(1, 5)
    ]
    engine = rollout.Engine(CFG.rollout, ARCH, COMPUTE, on, stop_ids=(3, 10))
    found = engine.generate(given, prompts, 4, seed=0, step=0)
    return sorted((c.group, c.sample, c.ids.tolist()) for c in found)


@functools.cache
def on_one_device():
    return jax.device_get(one_step(mesh(1, 1, 1)))


@pytest.mark.parametrize("shape", [s for n, shapes in MESHES.items() if n > 1 for s in shapes])
def test_an_update_is_the_same_on_every_mesh(shape):
    state, metrics, advantage_B = jax.device_get(one_step(mesh(*shape)))
    for got, wanted in zip(
        jax.tree.leaves((state, metrics, advantage_B)),
        jax.tree.leaves(on_one_device()),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=2e-5)


def test_the_step_that_is_compared_moves_every_parameter():
    state, metrics, _ = on_one_device()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-6, state.params, params())
    assert all(jax.tree.leaves(moved)) and metrics["grad_norm"] > 0.1


def test_moments_lie_as_their_parameters_do():
    on = mesh(2, 2, 2)
    state = optimizer.init_state(params(), optimizer.build(CFG.update.optimizer, 3), on)
    places = jax.tree.map(lambda x: x.sharding, state.params)
    moments = [
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))
        if isinstance(part, dict)
    ]
    assert len(moments) == 2
    assert all(jax.tree.map(lambda x: x.sharding, moment) == places for moment in moments)


# --- activations and kernels


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        ("BTD", (4, 3, 16), P(("data", "fsdp"), None, None)),
        ("BTNH", (4, 3, 4, 8), P(("data", "fsdp"), None, "tensor", None)),
        ("BTF", (4, 3, 32), P(("data", "fsdp"), None, "tensor")),
        ("BTV", (4, 3, 33), P(("data", "fsdp"), None, None)),  # 33 is odd
        ("BTKH", (3, 3, 2, 8), P(None, None, "tensor", None)),  # 3 rows do not split
    ],
)
def test_activations_are_split_by_the_letters_of_their_names(axes, shape, spec):
    on = mesh(2, 2, 2)
    program = jax.jit(
        sharding.on(on, lambda x: sharding.constrain(x, axes)),
        in_shardings=sharding.replicated(on),
    )
    assert program(jnp.zeros(shape)).sharding.is_equivalent_to(
        jax.sharding.NamedSharding(on, spec), len(shape)
    )


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 1, 4), (1, 2, 4)])
def test_a_kernel_gets_the_rows_and_heads_of_its_device(shape, monkeypatch):
    seen = []

    def kernel(q_BTNH, k_BTKH, v_BTKH, segments_BT):
        seen.append((q_BTNH.shape, k_BTKH.shape))
        return flash_attention.reference(q_BTNH, k_BTKH, v_BTKH, segments_BT)

    monkeypatch.setattr(flash_attention, "flash_attention", kernel)
    rng = np.random.default_rng(0)
    q_BTNH, k_BTKH, v_BTKH, weights = (
        rng.normal(size=(4, 6, heads, 4)).astype(np.float32) for heads in (4, 2, 2, 4)
    )
    rows = (np.broadcast_to(np.arange(6, dtype=np.int32), (4, 6)), np.ones((4, 6), np.int32))

    def loss(compute, q_BTNH, k_BTKH, v_BTKH):
        return jnp.sum(weights * attention.attend(compute, q_BTNH, k_BTKH, v_BTKH, *rows, *rows))

    def values(on, name):
        function = jax.value_and_grad(functools.partial(loss, c.Compute(attention=name)), (0, 1, 2))
        program = jax.jit(sharding.on(on, function), in_shardings=sharding.replicated(on))
        return program(q_BTNH, k_BTKH, v_BTKH)

    wanted = jax.tree.leaves(values(mesh(1, 1, 1), "reference"))
    assert not seen
    got = jax.tree.leaves(values(mesh(*shape), "pallas"))
    parts, tensor = shape[0] * shape[1], shape[2]
    assert seen[0] == ((4 // parts, 6, 4 // tensor, 4), (4 // parts, 6, max(2 // tensor, 1), 4))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "there"), [(12, 3, 12), (24, 6, 12), (8, 4, 4)])
def test_key_heads_are_repeated_until_they_divide(heads, kv_heads, there):
    spread = sharding.on(mesh(1, 1, 4), lambda k: attention.for_tensor_axis(k, heads))
    k_BTKH = jnp.zeros((1, 2, kv_heads, 4))
    assert jax.eval_shape(spread, k_BTKH).shape == (1, 2, there, 4)


def test_query_heads_that_do_not_divide_are_refused_by_name():
    with pytest.raises(
        ValueError, match="attention/out/kernel.*: 4 does not divide over tensor = 8"
    ):
        sharding.shardings(params(), mesh(1, 1, 8))


# --- the way to the rollout, and the reward model


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2), (1, 1, 4)])
def test_the_rollout_gets_the_same_parameters_and_no_fewer_bytes_are_moved_than_told(shape):
    on, compute = mesh(*shape), c.Compute(dtype="bfloat16")
    given = jax.device_put(params(), sharding.shardings(params(), on))
    program = reshard.compile_reshard(ARCH, compute, on)
    got = program(given)
    wanted = sharding.on(on, lambda params: decode.weights(params, ARCH, compute))(params())
    for (path, x), before in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        kept = "norm" in jax.tree_util.keystr(path[-1:])
        assert x.dtype == (jnp.float32 if kept else jnp.bfloat16)
        np.testing.assert_array_equal(x, before)
        assert "fsdp" not in x.sharding.spec
    moved = hlo.collective_bytes(hlo.parse(program.lower(given).compile().as_text()))
    # What must come is told. The CPU's compiler gathers some parameters before it rounds them: that
    # is twice the bytes, and the tied embedding once for each of its two places.
    least = reshard.received_bytes(ARCH, compute, on)
    assert 0 < least <= sum(moved.values()) <= 4 * least


def test_the_reward_model_may_lie_in_the_hosts_memory_between_uses():
    on, scores = mesh(1, 2, 2), []
    for offload in (False, True):
        settings = c.RewardsConfig(thinking_batch_size=4, offload=offload)
        model = reward.init(ARCH, COMPUTE, jax.random.key(0))
        scorer = rewards.ThinkingScorer(model, ARCH, COMPUTE, settings, Words(), on)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(scorer.params)}
        assert kinds == {"pinned_host" if offload else "device"}
        scores.append(scorer([("a", "bc"), ("d", "e")]))
    np.testing.assert_array_equal(*scores)
    assert not np.isnan(scores[0]).any()


class Words:
    """A tokenizer whose ids are bytes."""

    pad_id = 0

    def reward_ids(self, statement: str, reasoning: str) -> list[int]:
        return [ord(letter) % ARCH.vocab_size for letter in statement + reasoning]


# --- processes

WORKER = """
import json, sys
import jax
port, process, out = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
import test_mesh
test_mesh.write_step(out, int(process))
"""


def write_step(out: str, process: int) -> None:
    """One rollout and one update of two processes; what this one sees goes to `out`."""
    on = sharding.make_mesh(c.MeshConfig(fsdp=2, tensor=2))
    assert [d.process_index for d in on.devices.flat] == [0, 0, 1, 1]
    state, metrics, advantage_B = one_step(on)
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(on))(state.params)
    leaves = [np.asarray(x).tolist() for x in jax.tree.leaves((whole, metrics))]
    pathlib.Path(f"{out}/{process}").write_text(
        json.dumps([leaves, advantage_B.tolist(), sampled(on)])
    )


def test_two_processes_sample_and_learn_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(i), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=600)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    state, metrics, advantage_B = on_one_device()
    wanted = jax.tree.leaves((state.params, metrics))
    for process in range(2):
        leaves, all_B, completions = json.loads((tmp_path / str(process)).read_text())
        for got, value in zip(leaves, wanted, strict=True):
            np.testing.assert_allclose(got, value, atol=2e-6, rtol=2e-5)
        np.testing.assert_allclose(all_B, advantage_B, atol=1e-6)
        assert [tuple(c) for c in completions] == sampled(mesh(1, 1, 1))
