"""A decoder's layers for the rollout: the same sums as `decoder`, over weights laid out for it.

While a rollout lasts the parameters do not change. They are cast once to the dtype of the sums, the
three projections of a key head and its queries are joined into one matrix, and so are gate and up:
a token then costs four products a layer, and in bfloat16 half of the bytes. The joined axis is the
key heads', so that the tensor axis of a mesh splits it as it splits the parameters. No other axis
splits them: a step of decoding does little work on each weight, and to gather them for every token
would take many times as long.

Weights come first in products, their contracted axis last, and tokens (R) are the last axis of what
goes through the layers and of the logits: on CPUs that is quicker than `x_RD @ w_DE` for a few
dozen tokens (`benchmarks/thin_products.py`).

Layers are a Python loop: a loop on the device would copy each layer's pages in and out.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from pgrpo_jax import sharding
from pgrpo_jax.config import Architecture, Compute
from pgrpo_jax.models import layers


class Layer(flax.struct.PyTreeNode):
    """One layer's weights. Matrices are flat (E): a product over two axes of a weight would copy it
    for every token. qkv_ED is [K, J, H, D] with J = G + 2, the queries of a key head, its key and
    its value; out_DE is [D, N, H], gate_up_ED [A, 2, F / A, D] for the A devices of a tensor axis.
    """

    attention_norm_D: jax.Array
    mlp_norm_D: jax.Array
    qkv_ED: jax.Array
    qkv_bias_KJH: jax.Array | None
    query_norm_H: jax.Array | None
    key_norm_H: jax.Array | None
    out_DE: jax.Array
    gate_up_ED: jax.Array
    down_DF: jax.Array


class Weights(flax.struct.PyTreeNode):
    """A decoder's; norms float32, the rest in `compute.dtype`."""

    embedding_VD: jax.Array
    layers: tuple[Layer, ...]
    final_norm_D: jax.Array
    unembedding_VD: jax.Array


# From (layer, q_RKGH, k_RKH, v_RKH) to out_RKGH; it keeps keys and values as it likes.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
Angles = tuple[jax.Array, jax.Array]  # see `rope`


def weights(params: dict[str, Any], arch: Architecture, compute: Compute) -> Weights:
    """The parameters of `decoder`, laid out for the rollout."""
    L = arch.layers
    # First: half of the bytes then go from device to device.
    params = rounded(params, compute)
    unembedding_VD = params["embedding"] if arch.tied_embeddings else params["unembedding"].T
    stacked = params["layers"]
    attention, mlp = stacked["attention"], stacked["mlp"]
    qkv_LDKJH = _by_key_head(attention, "kernel", 2, arch.kv_heads)
    qkv_LED = qkv_LDKJH.reshape(L, arch.width, -1).mT
    gate_up_LED = _side_by_side(mlp["gate"]["kernel"], mlp["up"]["kernel"])
    bias_LKJH = _by_key_head(attention, "bias", 1, arch.kv_heads) if arch.qkv_bias else None

    def layer(i: int) -> Layer:
        return Layer(
            attention_norm_D=stacked["attention_norm"]["scale"][i],
            mlp_norm_D=stacked["mlp_norm"]["scale"][i],
            qkv_ED=qkv_LED[i],
            qkv_bias_KJH=None if bias_LKJH is None else bias_LKJH[i],
            query_norm_H=attention["query_norm"]["scale"][i] if arch.qk_norm else None,
            key_norm_H=attention["key_norm"]["scale"][i] if arch.qk_norm else None,
            out_DE=attention["out"]["kernel"][i].reshape(-1, arch.width).T,
            gate_up_ED=gate_up_LED[i],
            down_DF=mlp["down"]["kernel"][i].T,
        )

    return Weights(
        embedding_VD=params["embedding"],
        layers=tuple(layer(i) for i in range(L)),
        final_norm_D=params["final_norm"]["scale"],
        unembedding_VD=unembedding_VD,
    )


def shardings(arch: Architecture, mesh: Mesh) -> Weights:
    """Where they lie: split over tensor, where heads, mlp width and vocabulary can be."""
    parts = mesh.shape["tensor"]
    heads, words = (n % parts == 0 for n in (arch.kv_heads, arch.vocab_size))

    def place(axis: int, splits: bool = True) -> NamedSharding:
        return NamedSharding(mesh, Spec(*(None,) * axis, "tensor") if splits else Spec())

    everywhere = place(0, False)
    layer = Layer(
        attention_norm_D=everywhere,
        mlp_norm_D=everywhere,
        qkv_ED=place(0, heads),
        qkv_bias_KJH=place(0, heads) if arch.qkv_bias else None,
        query_norm_H=everywhere if arch.qk_norm else None,
        key_norm_H=everywhere if arch.qk_norm else None,
        out_DE=place(1, heads),
        gate_up_ED=place(0),
        down_DF=place(1),
    )
    return Weights(
        embedding_VD=place(0, words),
        layers=(layer,) * arch.layers,
        final_norm_D=everywhere,
        unembedding_VD=place(0, words),
    )


def rounded(params: dict[str, Any], compute: Compute) -> dict[str, Any]:
    """The parameters in the dtype of the sums; but norms are computed in float32, and stay."""

    def one(path: Any, x: jax.Array) -> jax.Array:
        kept = jax.tree_util.keystr(path[-1:], simple=True) == "scale"
        return x if kept else x.astype(compute.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def _side_by_side(gate_LDF: jax.Array, up_LDF: jax.Array) -> jax.Array:
    """One matrix [L, 2F, D], in which each device of a tensor axis has its part of both."""
    L, D, F = gate_LDF.shape
    shape = L, D, sharding.axis_size("tensor"), 1, -1
    both = jnp.concatenate([gate_LDF.reshape(shape), up_LDF.reshape(shape)], 3)
    return both.reshape(L, D, 2 * F).mT


def _by_key_head(attention: Any, part: str, axis: int, kv_heads: int) -> jax.Array:
    """Queries, keys and values, `part` of each, as J entries a key head behind `axis`."""
    sides = [attention[name][part] for name in ("query", "key", "value")]
    shapes = [(*x.shape[:axis], kv_heads, -1, *x.shape[axis + 1 :]) for x in sides]
    split = [x.reshape(shape) for x, shape in zip(sides, shapes, strict=True)]
    return jnp.concatenate(split, axis=axis + 1)


def rope(arch: Architecture, positions_R: jax.Array) -> Angles:
    """Cosines and sines [R, 1, 1, H / 2] of the rotary angles at positions."""
    cos_R11H, sin_R11H = layers.rope(arch, positions_R[:, None])
    return cos_R11H, sin_R11H


def forward(
    w: Weights, arch: Architecture, ids_R: jax.Array, angles: Angles, attend: Attend
) -> jax.Array:
    """x_DR after the final norm, of R tokens that see others through `attend` only; `angles` are
    `rope` of their positions."""
    x_DR = sharding.constrain(w.embedding_VD[ids_R].T, "DR")
    for i, layer in enumerate(w.layers):
        x_DR = sharding.constrain(x_DR + _attention(layer, arch, i, x_DR, angles, attend), "DR")
        x_DR = sharding.constrain(x_DR + _mlp(layer, arch, x_DR), "DR")
    return _norm(x_DR, w.final_norm_D, arch, axis=0)


def keys_and_values(
    w: Weights, arch: Architecture, ids_R: jax.Array, positions_R: jax.Array, attend: Attend
) -> None:
    """Shows `attend` the keys and values of all layers and computes nothing that they do not need:
    after the last layer's there is nothing left to know of a prompt."""
    x_DR = sharding.constrain(w.embedding_VD[ids_R].T, "DR")
    angles = rope(arch, positions_R)
    for i, layer in enumerate(w.layers):
        update_DR = _attention(layer, arch, i, x_DR, angles, attend)
        if i + 1 < len(w.layers):
            x_DR = sharding.constrain(x_DR + update_DR, "DR")
            x_DR = sharding.constrain(x_DR + _mlp(layer, arch, x_DR), "DR")


def logits(w: Weights, x_DR: jax.Array) -> jax.Array:
    """logits_VR, float32."""
    logits_VR = jnp.matmul(w.unembedding_VD, x_DR, preferred_element_type=jnp.float32)
    return sharding.constrain(logits_VR, "VR")


def _attention(layer: Layer, arch: Architecture, i: int, x_DR, angles, attend: Attend) -> jax.Array:
    y_DR = _norm(x_DR, layer.attention_norm_D, arch, axis=0)
    qkv_KJHR = (layer.qkv_ED @ y_DR).reshape(arch.kv_heads, -1, arch.head_dim, y_DR.shape[1])
    qkv_RKJH = qkv_KJHR.transpose(3, 0, 1, 2)
    if layer.qkv_bias_KJH is not None:
        qkv_RKJH = qkv_RKJH + layer.qkv_bias_KJH[None]
    qkv_RKJH = sharding.constrain(qkv_RKJH, "RKJH")
    q_RKGH, k_RK1H, v_RKH = qkv_RKJH[:, :, :-2], qkv_RKJH[:, :, -2:-1], qkv_RKJH[:, :, -1]
    if layer.query_norm_H is not None:
        q_RKGH = _norm(q_RKGH, layer.query_norm_H, arch, axis=-1)
        k_RK1H = _norm(k_RK1H, layer.key_norm_H, arch, axis=-1)
    q_RKGH, k_RK1H = layers.rotate(q_RKGH, *angles), layers.rotate(k_RK1H, *angles)
    out_RKGH = attend(i, q_RKGH, k_RK1H[:, :, 0], v_RKH)
    return jnp.einsum("DE,RE->DR", layer.out_DE, out_RKGH.reshape(len(out_RKGH), -1))


def _mlp(layer: Layer, arch: Architecture, x_DR: jax.Array) -> jax.Array:
    y_DR = _norm(x_DR, layer.mlp_norm_D, arch, axis=0)
    R, parts = y_DR.shape[1], sharding.axis_size("tensor")  # as `_side_by_side` has put them
    both = (layer.gate_up_ED @ y_DR).reshape(parts, 2, -1, R)
    hidden_FR = (nn.silu(both[:, 0]) * both[:, 1]).reshape(-1, R)
    return layer.down_DF @ sharding.constrain(hidden_FR, "FR")


def _norm(x: jax.Array, scale: Any, arch: Architecture, axis: int) -> jax.Array:
    """As `layers.RMSNorm`, over an axis."""
    x_f32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x_f32), axis, keepdims=True)
    others = [i for i in range(x.ndim) if i != axis % x.ndim]
    scale = jnp.expand_dims(scale.astype(jnp.float32), others)
    return (x_f32 * jax.lax.rsqrt(mean + arch.norm_eps) * scale).astype(x.dtype)
