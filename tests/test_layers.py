"""The parts of a layer: their gradients, and what XLA makes of them on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.config import Architecture, Compute
from pgrpo_jax.models import decoder, layers

ARCH = Architecture(vocab_size=20, width=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=24)
TOKENS_BT = jnp.ones((2, 12), jnp.int32)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def loss(params):
    compute = Compute(attention="blocked", scan_unroll=ARCH.layers)
    positions_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
    return decoder.forward(params, ARCH, compute, TOKENS_BT, positions_BT, TOKENS_BT).sum()


@pytest.mark.parametrize(
    ("equation", "x", "kernel"),
    [
        ("BTD,DF->BTF", (2, 5, 6), (6, 7)),
        ("BTD,DNH->BTNH", (2, 5, 6), (6, 3, 4)),
        ("BTNH,NHD->BTD", (2, 5, 3, 4), (3, 4, 6)),
    ],
)
def test_a_products_gradients_are_those_that_jax_derives(equation, x, kernel):
    keys = jax.random.split(jax.random.key(0), 2)
    arguments = jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)

    def gradients(product):
        return jax.grad(lambda *a: jnp.sin(product(equation, *a)).sum(), argnums=(0, 1))(*arguments)

    for ours, derived in zip(gradients(layers.einsum), gradients(jnp.einsum), strict=True):
        np.testing.assert_allclose(ours, derived, rtol=1e-5, atol=1e-5)


def test_rotary_angles_are_computed_once_for_all_heads_and_layers():
    params = decoder.init(ARCH, Compute(), jax.random.key(0))
    program = compiled(jax.grad(loss), params)
    assert len(re.findall(r" cosine\(", program)) == 1


def test_the_gradient_of_a_kernel_takes_its_factors_as_they_lie():
    x_BTD, kernel_DF = jnp.ones((4, 64, 128)), jnp.ones((128, 256))

    def gradient(product):
        def loss(w, x):
            return jnp.sin(product("BTD,DF->BTF", x, w)).sum()

        return compiled(jax.grad(loss), kernel_DF, x_BTD)

    assert " transpose(" not in gradient(layers.einsum)
    assert " transpose(" in gradient(jnp.einsum)
