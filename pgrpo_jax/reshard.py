"""From where training keeps the policy to where the rollout wants it, on the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from pgrpo_jax import sharding
from pgrpo_jax.config import Architecture, Compute
from pgrpo_jax.models import decode, decoder


def compile_reshard(
    arch: Architecture, compute: Compute, mesh: Mesh
) -> Callable[[Any], decode.Weights]:
    """The jitted (params) -> weights for the rollout: in `compute.dtype`, split over `tensor`
    alone. The scales of norms stay as they are, since the norms are computed in float32: the
    rollout's policy is the trainer's to the last bit.
    """
    layout = functools.partial(decode.weights, arch=arch, compute=compute)
    return jax.jit(sharding.on(mesh, layout), out_shardings=decode.shardings(arch, mesh))


def abstract(arch: Architecture, compute: Compute, mesh: Mesh) -> decode.Weights:
    """What the program returns."""
    shapes = jax.eval_shape(
        lambda params: decode.weights(params, arch, compute), _params(arch, compute)
    )
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        decode.shardings(arch, mesh),
    )


def received_bytes(arch: Architecture, compute: Compute, mesh: Mesh) -> int:
    """Bytes that each device receives in one reshard: what it holds after it, less what of that it
    held before."""
    weights = abstract(arch, compute, mesh)
    if arch.tied_embeddings:  # the second copy of the embedding is made on the spot
        weights = weights.replace(unembedding_VD=None)
    params = jax.eval_shape(lambda params: decode.rounded(params, compute), _params(arch, compute))
    places = jax.tree.map(lambda x: x.sharding, weights)
    held = sharding.device_bytes(params, sharding.shardings(params, mesh))
    return sharding.device_bytes(weights, places) - held


def _params(arch: Architecture, compute: Compute) -> Any:
    return jax.eval_shape(lambda key: decoder.init(arch, compute, key), jax.random.key(0))
