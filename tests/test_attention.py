"""Which attention runs where, and that the choice changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import start
from pgrpo_jax.config import Architecture, Compute, Config, ModelConfig, RolloutConfig
from pgrpo_jax.configs import tiny
from pgrpo_jax.kernels import flash_attention
from pgrpo_jax.models import attention, decoder, load

ARCH = Architecture(vocab_size=20, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24)


@pytest.mark.parametrize(
    ("platform", "dtype", "want"),
    [
        ("tpu", "bfloat16", "pallas"),
        ("tpu", "float32", "pallas"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "blocked"),
        ("cpu", "bfloat16", "blocked"),
    ],
)
def test_auto_becomes_the_best_of_the_platform(platform, dtype, want):
    resolved = attention.resolve(Compute(dtype=dtype), platform)
    assert resolved == Compute(dtype=dtype, attention=want)
    assert attention.resolve(resolved, platform) == resolved


@pytest.mark.parametrize(
    ("name", "platform", "sentence"),
    [
        ("pallas", "cpu", "runs on a tpu and this is a cpu"),
        ("cudnn", "tpu", "runs on a gpu and this is a tpu"),
        ("cudnn", "gpu", "computes in bfloat16, got dtype='float32'"),
    ],
)
def test_an_attention_that_is_not_there_is_refused(name, platform, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention.resolve(Compute(attention=name), platform)


def test_the_choice_is_made_once_and_said(capsys):
    chosen = start.resolved(tiny.config())
    assert chosen.policy.compute.attention == chosen.reward_model.compute.attention == "blocked"
    assert capsys.readouterr().err == ("attention  policy blocked, reward model blocked (on cpu)\n")
    assert start.resolved(chosen) == chosen
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "head_dim", "cache_dtype", "said"),
    [
        ("tpu", 128, "compute", "the paged kernel"),
        ("tpu", 32, "compute", "plain attention: the kernel takes heads of a multiple of 64"),
        ("tpu", 128, "int8", "plain attention: the kernel takes heads of a multiple of 64"),
        ("cpu", 128, "compute", "plain attention\n"),
    ],
)
@pytest.mark.parametrize("where", ["settings", "folder"])
def test_what_decodes_is_said_too(
    platform, head_dim, cache_dtype, said, where, capsys, monkeypatch, tmp_path
):
    arch = dataclasses.replace(ARCH, head_dim=head_dim)
    model = ModelConfig(architecture=arch)
    if where == "folder":  # of which the settings say nothing; the warm-up has left it
        params = decoder.init(arch, Compute(), jax.random.key(0))
        load.save_policy(str(tmp_path / start.SFT), arch, params)
        model = ModelConfig(checkpoint="nowhere")
    cfg = Config(
        policy=model,
        reward_model=model,
        rollout=RolloutConfig(cache_dtype=cache_dtype),
        workdir=str(tmp_path),
    )
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    start.resolved_to_decode(cfg)
    first, second = capsys.readouterr().err.splitlines(keepends=True)
    assert first.startswith("attention ") and second.startswith(f"decoding   {said}")


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel on this CPU; gives the numbers of tokens that it was traced with."""
    calls = []
    kernel = flash_attention.flash_attention

    def call(q_BTNH, *arrays):
        calls.append(q_BTNH.shape[1])
        return kernel(q_BTNH, *arrays, interpret=True)

    monkeypatch.setattr(flash_attention, "flash_attention", call)
    return calls


def rows():
    """A row of two segments between padding, and one that is padded on the left."""
    segments_BT = jnp.array([[0, 1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions_BT = jnp.array([[0, 0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]])
    ids_BT = jax.random.randint(jax.random.key(1), segments_BT.shape, 0, ARCH.vocab_size)
    return ids_BT, positions_BT, segments_BT


def test_a_decoder_with_the_kernel_is_the_decoder_with_the_reference(interpreted):
    params = decoder.init(ARCH, Compute(), jax.random.key(0))
    is_token_BT1 = (rows()[2] > 0)[:, :, None]

    def loss(params, compute):
        x_BTD, _ = decoder.forward(params, ARCH, compute, *rows())
        return jnp.where(is_token_BT1, jnp.sin(x_BTD), 0).sum()

    want, got = (
        jax.jit(jax.value_and_grad(functools.partial(loss, compute=Compute(attention=name))))(
            params
        )
        for name in ("reference", "pallas")
    )
    assert set(interpreted) == {10}
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_an_unknown_attention_lists_the_known_ones():
    compute = Compute(attention="reference")
    object.__setattr__(compute, "attention", "fast")
    with pytest.raises(ValueError, match="unknown attention 'fast'; known"):
        decoder.forward(decoder.init(ARCH, Compute(), jax.random.key(0)), ARCH, compute, *rows())
