"""The reward model: a decoder trunk and a scalar head read at the last real token."""

from typing import Any

import jax
import jax.numpy as jnp

from pgrpo_jax.config import Architecture, Compute
from pgrpo_jax.models import decoder

Params = dict[str, Any]


def init(arch: Architecture, compute: Compute, key: jax.Array) -> Params:
    """Random parameters: {"trunk": a decoder's, "score": {"kernel": [D, 1]}}."""
    key_trunk, key_score = jax.random.split(key)
    trunk = decoder.init(arch, compute, key_trunk)
    return _with_score(trunk, arch.width, key_score)


def from_policy(policy_params: Params, key: jax.Array) -> Params:
    """A reward model whose trunk is a policy (arrays shared) and whose head is random and small."""
    return _with_score(policy_params, policy_params["final_norm"]["scale"].shape[0], key)


def score(
    params: Params,
    arch: Architecture,
    compute: Compute,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """scores_B float32, read at each row's last token with a segment; one segment a row.

    A row without any token scores what its column 0 says: the caller masks it.
    """
    x_BTD = decoder.forward(params["trunk"], arch, compute, ids_BT, positions_BT, segments_BT)
    columns_T = jnp.arange(ids_BT.shape[1])[None]
    last_B = jnp.max(jnp.where(segments_BT > 0, columns_T, 0), axis=1)
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    kernel_D1 = params["score"]["kernel"].astype(jnp.float32)
    return (x_BD.astype(jnp.float32) @ kernel_D1)[:, 0]


def _with_score(trunk: Params, width: int, key: jax.Array) -> Params:
    # The unembedding of an untied policy has no use here: scores are read before it.
    trunk = {name: value for name, value in trunk.items() if name != "unembedding"}
    dtype = trunk["embedding"].dtype
    kernel_D1 = jax.random.normal(key, (width, 1), dtype) * (width + 1) ** -0.5
    return {"trunk": trunk, "score": {"kernel": kernel_D1}}
