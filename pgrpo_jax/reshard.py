"""From where training keeps the policy to where the rollout wants it, on the device."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from pgrpo_jax import config, sharding
from pgrpo_jax.models import decoder


def compile_reshard(
    cfg: config.Config, arch: config.Architecture, mesh: Mesh
) -> Callable[[Any], Any]:
    """The jitted (params) -> params for `rollout.Engine`: in `compute.dtype`, split over `tensor`
    alone. The scales of norms stay as they are, since the norms are computed in float32: the
    rollout's policy is the trainer's to the last bit.
    """
    return jax.jit(
        lambda params: jax.tree_util.tree_map_with_path(_cast(cfg.policy.compute), params),
        in_shardings=(sharding.shardings(_shapes(cfg, arch), mesh),),
        out_shardings=sharding.rollout_shardings(_shapes(cfg, arch), mesh),
    )


def abstract(cfg: config.Config, arch: config.Architecture, mesh: Mesh) -> Any:
    """What the program returns."""
    shapes = jax.eval_shape(
        lambda params: jax.tree_util.tree_map_with_path(_cast(cfg.policy.compute), params),
        _shapes(cfg, arch),
    )
    places = sharding.rollout_shardings(shapes, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def received_bytes(cfg: config.Config, arch: config.Architecture, mesh: Mesh) -> int:
    """Bytes that each device receives in one reshard."""
    target = abstract(cfg, arch, mesh)
    return sharding.received_bytes(
        target,
        sharding.shardings(target, mesh),
        jax.tree.map(lambda x: x.sharding, target),
    )


def _shapes(cfg: config.Config, arch: config.Architecture) -> Any:
    return jax.eval_shape(
        lambda key: decoder.init(arch, cfg.policy.compute, key), jax.random.key(0)
    )


def _cast(compute: config.Compute) -> Callable[[Any, jax.Array], jax.Array]:
    def one(path: Any, x: jax.Array) -> jax.Array:
        kept = jax.tree_util.keystr(path[-1:], simple=True) == "scale"
        return x if kept else x.astype(compute.dtype)

    return one
