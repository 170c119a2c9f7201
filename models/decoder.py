"""The decoder of Qwen2, Qwen2.5, Qwen3 and Llama 3, driven by `config.Architecture`.

Parameters are a plain dict; those of the layers are stacked, L first. Segments say what belongs
together (0 is padding), positions are rotary: left padding, right padding and packed rows are one
thing. A segment may continue another of its row, `prefixes_BT` (0: none): completions share the
prompt that they have in common.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pgrpo_jax import sharding
from pgrpo_jax.config import Architecture, Compute
from pgrpo_jax.models import attention, layers

Params = dict[str, Any]


def init(arch: Architecture, compute: Compute, key: jax.Array) -> Params:
    """Random parameters of `compute.param_dtype`: variance 1 / fan-in, embeddings 1 / D."""
    token_11 = jnp.zeros((1, 1), jnp.int32)
    return _Decoder(arch, compute).init(key, token_11, token_11, token_11)["params"]


def forward(
    params: Params,
    arch: Architecture,
    compute: Compute,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    prefixes_BT: jax.Array | None = None,
) -> jax.Array:
    """x_BTD after the final norm, in `compute.dtype`. Padding is finite but means nothing."""
    variables = {"params": params}
    # Linen types what `apply` returns for any module and any mutable collection.
    rows = (positions_BT, segments_BT, prefixes_BT)
    result: Any = _Decoder(arch, compute).apply(variables, ids_BT, *rows)
    return result


def unembedding(params: Params, arch: Architecture) -> jax.Array:
    """w_DV: x_BTD @ w_DV are the logits."""
    return params["embedding"].T if arch.tied_embeddings else params["unembedding"]


class _Attention(nn.Module):
    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, rows, angles):
        arch = self.arch
        q_BTNH = sharding.constrain(self._heads("query", arch.heads, x_BTD, angles), "BTNH")
        k_BTKH = sharding.constrain(self._heads("key", arch.kv_heads, x_BTD, angles), "BTKH")
        v_BTKH = sharding.constrain(self._project("value", arch.kv_heads)(x_BTD), "BTKH")
        places, segments, prefixes = rows
        both = (places, segments, places, segments)
        out_BTNH = attention.attend(self.compute, q_BTNH, k_BTKH, v_BTKH, *both, prefixes)
        shape = (arch.heads, arch.head_dim, arch.width)
        gain = layers.residual_gain(arch)
        out = layers.Projection("BTNH,NHD->BTD", shape, self.compute, gain=gain, name="out")
        return out(out_BTNH)

    def _project(self, name, heads):
        shape = (self.arch.width, heads, self.arch.head_dim)
        bias = self.arch.qkv_bias
        return layers.Projection("BTD,DNH->BTNH", shape, self.compute, bias=bias, name=name)

    def _heads(self, name, heads, x_BTD, angles):
        y_BTNH = self._project(name, heads)(x_BTD)
        if self.arch.qk_norm:
            norm = layers.RMSNorm(self.arch.norm_eps, self.compute.param_dtype, name=f"{name}_norm")
            y_BTNH = norm(y_BTNH)
        return layers.rotate(y_BTNH, *angles)


class _Layer(nn.Module):
    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, rows, angles):
        eps, dtype = self.arch.norm_eps, self.compute.param_dtype
        attend = _Attention(self.arch, self.compute, name="attention")
        y_BTD = layers.RMSNorm(eps, dtype, name="attention_norm")(x_BTD)
        x_BTD = sharding.constrain(x_BTD + attend(y_BTD, rows, angles), "BTD")
        y_BTD = layers.RMSNorm(eps, dtype, name="mlp_norm")(x_BTD)
        y_BTD = layers.MLP(self.arch, self.compute, name="mlp")(y_BTD)
        return sharding.constrain(x_BTD + y_BTD, "BTD"), None


class _Decoder(nn.Module):
    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, ids_BT, positions_BT, segments_BT, prefixes_BT=None):
        arch, compute = self.arch, self.compute
        init = nn.initializers.normal(arch.width**-0.5)
        shape_VD = (arch.vocab_size, arch.width)
        embedding_VD = self.param("embedding", init, shape_VD, compute.param_dtype)
        if self.is_initializing() and not arch.tied_embeddings:  # a reward trunk goes without
            self.param("unembedding", init, shape_VD[::-1], compute.param_dtype)
        x_BTD = sharding.constrain(embedding_VD[ids_BT].astype(compute.dtype), "BTD")
        scanned = nn.scan(
            _remat(compute),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=arch.layers,
            unroll=compute.scan_unroll,
        )
        x_BTD, _ = scanned(arch, compute, name="layers")(
            x_BTD, (positions_BT, segments_BT, prefixes_BT), layers.rope(arch, positions_BT)
        )
        norm = layers.RMSNorm(arch.norm_eps, compute.param_dtype, name="final_norm")
        return norm(x_BTD)


def _remat(compute: Compute):
    """The layer under the rematerialisation policy `compute.remat`."""
    policies = {
        "none": jax.checkpoint_policies.everything_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    if compute.remat not in policies:
        raise ValueError(f"unknown remat {compute.remat!r}; known: {sorted(policies)}")
    if compute.remat == "none":
        return _Layer
    # Inside a scan nothing can be merged across the barrier that `prevent_cse` would put up.
    return nn.remat(_Layer, policy=policies[compute.remat], prevent_cse=False)
