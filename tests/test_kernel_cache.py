"""The engine that decodes with the TPU's kernel, interpreted, draws what the plain one draws."""

import functools
import re

import jax
import numpy as np
import pytest

from pgrpo_jax import decoding, hlo, memory, programs, rollout, sharding, topology, types
from pgrpo_jax.config import (
    Architecture,
    Compute,
    Config,
    MeshConfig,
    ModelConfig,
    RolloutConfig,
    UpdateConfig,
)
from pgrpo_jax.data import Prompt
from pgrpo_jax.kernels import flash_attention, paged_attention
from pgrpo_jax.models import cache, decoder, kernel_cache

ARCH = Architecture(vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=64, mlp=32)
CFG = RolloutConfig(
    prompts_per_step=4,
    num_generations=3,
    max_completion_length=32,
    temperature=0.8,
    prompt_buckets=(40,),
    page_size=16,
    prefill_tokens=64,
)
STOPS = tuple(range(8))


@pytest.fixture
def interpreted(monkeypatch):
    for module, names in (
        (paged_attention, ("attend", "attend_write")),
        (flash_attention, ("flash_attention",)),
    ):
        for name in names:
            kernel = functools.partial(getattr(module, name), interpret=True)
            monkeypatch.setattr(module, name, kernel)


@functools.cache
def params():
    params = decoder.init(ARCH, Compute(), jax.random.key(1))
    params["embedding"] = 3 * params["embedding"]  # far from uniform, so that errors show in tokens
    return params


def prompt(name: str, length: int) -> Prompt:
    tests = types.Tests(kind="assert", code=("assert True",))
    ids = np.random.default_rng(length).integers(6, ARCH.vocab_size, length, dtype=np.int32)
    return Prompt(types.Problem(name, name, tests), ids)


# A last page partly full, a page full to its end, nothing in the cache, three pages.
LIMITS_PG = np.array([[32, 5, 17], [9, 32, 20], [3, 32, 11], [32, 26, 7]])
PROMPTS = [prompt(name, length) for name, length in (("a", 21), ("b", 17), ("c", 1), ("d", 40))]


def sampled(attention, mesh, **settings):
    """The engine, and its completions by (problem, sample)."""
    cfg = RolloutConfig(**{**vars(CFG), **settings})
    engine = rollout.Engine(cfg, ARCH, Compute(attention=attention), mesh, STOPS)
    placed = jax.device_put(params(), sharding.shardings(params(), mesh))
    completions = engine.generate(placed, PROMPTS, cfg.num_generations, 0, 0, limits_PG=LIMITS_PG)
    return engine, {(c.problem.id, c.sample): c for c in completions}


@functools.cache
def plain():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return sampled("reference", mesh)[1]


def assert_same(got):
    assert got.keys() == plain().keys()
    for name, c in plain().items():
        assert got[name].ids.tolist() == c.ids.tolist()
        np.testing.assert_allclose(got[name].logps, c.logps, atol=1e-5)


def test_slots_that_are_filled_again_and_again_draw_what_plain_attention_draws(interpreted):
    """Samples of a prompt come and go: the first of its slots is not always there."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert_same(sampled("pallas", mesh, batch_size=4)[1])


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 4)])
def test_the_kernel_draws_the_same_on_a_mesh_where_each_device_has_its_slots_pages(
    shape, interpreted
):
    # 12 samples over four parts are three each, and those of a prompt lie on several devices; two
    # key heads over four devices are whole on each.
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    assert_same(sampled("pallas", mesh)[1])


def test_a_completion_that_lost_its_pages_is_written_again_on_a_mesh_too(monkeypatch, interpreted):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    page_bytes = 2 * 2 * 2 * 64 * 16 * 4  # k and v, layers, heads, head dim, tokens, float32
    # Prompts: 9 x 3 pages and one to divide by 4, on every device. Own: 4 a device, where 3 slots
    # could use 2 each.
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: (28 + 4) * page_bytes / 0.8 + 1)
    engine, got = sampled("pallas", mesh)
    assert engine.statistics.preemptions > 0
    assert_same(got)


def test_heads_that_the_kernel_does_not_know_are_attended_in_plain_jnp():
    small = Architecture(vocab_size=32, width=16, layers=1, heads=2, kv_heads=1, head_dim=32, mlp=8)
    assert decoding.layout(small, Compute(attention="pallas"), "bfloat16") is cache
    assert decoding.layout(ARCH, Compute(attention="pallas"), "bfloat16") is kernel_cache
    assert decoding.layout(ARCH, Compute(attention="pallas"), "int8") is cache
    assert decoding.layout(ARCH, Compute(), "float32") is cache  # "auto" on this machine


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("slice_", "samples"), [("v5e:1x1", 32), ("v4:2x2x1", 16), ("v5p:2x2x2", 8)]
)
def test_the_tpu_decodes_with_the_kernel_in_place_and_sends_no_pages_around(slice_, samples):
    pytest.importorskip("libtpu")
    arch = Architecture(
        vocab_size=4096, width=1024, layers=2, heads=28, kv_heads=4, head_dim=128, mlp=4096
    )
    model = ModelConfig(architecture=arch, compute=Compute(dtype="bfloat16", attention="pallas"))
    settings = RolloutConfig(prompt_buckets=(1024,), batch_size=64, num_generations=samples)
    devices = topology.devices(slice_)
    cfg = Config(
        policy=model,
        reward_model=model,
        rollout=settings,
        mesh=MeshConfig(tensor=min(len(devices), 4)),
        update=UpdateConfig(steps=1, micro_batch_size=8),
    )
    mesh = sharding.make_mesh(cfg.mesh, devices)
    found = programs.programs(cfg, mesh, topology.chip(slice_).hbm_bytes)
    decode = next(program for program in found if program.name == "decode")
    compiled = decode.lower().compile()
    text = compiled.as_text()
    for kernel in ("paged_attend", "paged_attend_write"):  # one of each a layer
        calls = re.findall(rf"%{kernel}[.\d]* = .* custom-call\(", text)
        assert len(calls) == arch.layers
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= decode.arguments["cache"]
    assert memory.temp_size_in_bytes < decode.arguments["cache"] / 4
    # Of a token only activations are sent: a few rows of its device's slots.
    sent = sum(hlo.collective_bytes(hlo.parse(text), decode.runs).values()) / decode.runs.trips
    assert sent < decode.arguments["cache"] / 100
