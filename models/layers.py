"""The parts of a decoder layer: norm, rotary angles, projections, gated mlp."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pgrpo_jax import sharding
from pgrpo_jax.config import Architecture, Compute


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; float32, because a sum of bfloat16 squares loses."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x_f32 = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(x_f32), -1, keepdims=True)
        scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
        return (x_f32 * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(equation: str, x: jax.Array, kernel: jax.Array, preferred: Any = None) -> jax.Array:
    """jnp.einsum(equation, x, kernel), with a gradient that XLA computes fast on CPU.

    `equation` puts the axes that x and the result share first: "BTD,DNH->BTNH". On CPUs the
    kernel's gradient is then one product of two matrices, that takes either as it lies; of arrays
    with more axes XLA copies the first, transposed, before it multiplies.
    """
    return jnp.einsum(equation, x, kernel, preferred_element_type=preferred)


def _einsum_forward(equation: str, x: jax.Array, kernel: jax.Array, preferred: Any):
    return einsum(equation, x, kernel, preferred), (x, kernel)


def _einsum_backward(equation: str, preferred: Any, saved: tuple[jax.Array, jax.Array], dy: Any):
    (x, kernel), (inputs, y_axes) = saved, equation.split("->")
    x_axes, kernel_axes = inputs.split(",")
    shared = sum(a in y_axes for a in x_axes)

    def as_matrices(x: jax.Array, dy: jax.Array) -> jax.Array:
        rows = math.prod(x.shape[:shared])
        return (x.reshape(rows, -1).T @ dy.reshape(rows, -1)).reshape(kernel.shape)

    def as_they_are(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum(f"{x_axes},{y_axes}->{kernel_axes}", x, dy)

    dy = dy.astype(x.dtype)
    dkernel = jax.lax.platform_dependent(x, dy, cpu=as_matrices, default=as_they_are)
    return jnp.einsum(f"{y_axes},{kernel_axes}->{x_axes}", dy, kernel), dkernel


einsum.defvjp(_einsum_forward, _einsum_backward)


class Projection(nn.Module):
    """einsum(x, kernel), with a bias over the output axes when `bias`.

    `equation` is such as "BTD,DNH->BTNH"; `shape` is the kernel's. Kernels begin with a variance of
    `gain` / (product of the contracted axes).
    """

    equation: str
    shape: tuple[int, ...]
    compute: Compute
    bias: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, outputs = self.equation.split("->")
        axes = inputs.split(",")[1]
        fan_in = math.prod(n for n, a in zip(self.shape, axes, strict=True) if a not in outputs)
        init = nn.initializers.normal((self.gain / fan_in) ** 0.5)
        kernel = self.param("kernel", init, self.shape, self.compute.param_dtype)
        y = einsum(self.equation, x, kernel.astype(x.dtype))
        if not self.bias:
            return y
        shape = tuple(n for n, a in zip(self.shape, axes, strict=True) if a in outputs)
        bias = self.param("bias", nn.initializers.zeros, shape, self.compute.param_dtype)
        return y + jnp.expand_dims(bias.astype(x.dtype), range(y.ndim - bias.ndim))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = self.arch.width, self.arch.mlp
        gate_BTF = Projection("BTD,DF->BTF", (D, F), self.compute, name="gate")(x_BTD)
        up_BTF = Projection("BTD,DF->BTF", (D, F), self.compute, name="up")(x_BTD)
        down = Projection(
            "BTF,FD->BTD", (F, D), self.compute, gain=residual_gain(self.arch), name="down"
        )
        return down(sharding.constrain(nn.silu(gate_BTF) * up_BTF, "BTF"))


def residual_gain(arch: Architecture) -> float:
    """Variance each of the 2L residual branches begins with (GPT-2, section 2.3)."""
    return 1 / (2 * arch.layers)


def rope_frequencies(arch: Architecture) -> jax.Array:
    """Radians a position for each pair of head dimensions, float32 [H / 2].

    With `rope_scaling` the long wavelengths are stretched as in Llama 3.1: by `factor` beyond
    original / low_freq_factor, not at all below original / high_freq_factor, blended between.
    """
    exponents = jnp.arange(0, arch.head_dim, 2, dtype=jnp.float32) / arch.head_dim
    frequencies = arch.rope_theta**-exponents
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope(arch: Architecture, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, 1, H / 2]. float32 because bfloat16 rounds 257 to 256.

    They are written side by side in one array. XLA on CPUs would else compute them anew for each
    head of each layer, as a part of what reads them, and takes a barrier away before it does so.
    """
    frequencies = rope_frequencies(arch)[None, None, None, :]
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    both = jnp.zeros((2, *angles.shape))
    for i, function in enumerate((jnp.cos, jnp.sin)):
        both = jax.lax.dynamic_update_index_in_dim(both, function(angles), i, 0)
    return both[0], both[1]


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (h, h + H / 2) of each head by their angles (as Hugging Face)."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
