"""Where arrays live: the mesh, and one table from parameter names to partitions.

Axes: `data` splits the batch, `fsdp` the batch and the parameters, `tensor` heads and mlp width.
"""

import math
import re
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgrpo_jax.config import MeshConfig

# Every parameter matches exactly one row. A path is a policy's; a reward model's trunk is a policy.
RULES: tuple[tuple[str, P], ...] = (
    (r"embedding", P("tensor", "fsdp")),  # VD
    (r"unembedding", P("fsdp", "tensor")),  # DV
    (r"layers/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),  # LDNH
    (r"layers/attention/(query|key|value)/bias", P(None, "tensor", None)),  # LNH
    (r"layers/attention/(query|key)_norm/scale", P(None, None)),  # LH
    (r"layers/attention/out/kernel", P(None, "tensor", None, "fsdp")),  # LNHD
    (r"layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),  # LDF
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),  # LFD
    (r"layers/(attention|mlp)_norm/scale", P(None, None)),  # LD
    (r"final_norm/scale", P(None)),  # D
    (r"score/kernel", P("fsdp", None)),  # D1
)

# These may be too few to split (2 key heads, 8 devices) or an odd number (a vocabulary): then every
# device of the axis holds all of them, as in Megatron. Anything else must divide.
REPLICABLE = r"(trunk/)?(embedding|unembedding|layers/attention/(key|value)/(kernel|bias))"


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices`, by default all of them; -1 takes what is left.

    Axes are Auto: Explicit ones, jax.make_mesh's default, break Linen's embedding lookup.
    """
    names = ("data", "fsdp", "tensor")
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    asked = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh axes are at least 1, and one of them may be -1; got {asked}")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"a mesh of {asked} does not fit {len(devices)} devices; make the product equal, or "
            "give one axis -1 and make the others divide"
        )
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf (array or ShapeDtypeStruct) of a policy or reward model."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _fit(name, leaf.shape, _rule(name), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def state_shardings(
    optimizer: optax.GradientTransformation, state: Any, parameters: Any, mesh: Mesh
) -> Any:
    """Shardings of an optimizer's (abstract) state: moments as `parameters`, the rest everywhere.

    `parameters` are the shardings of the parameters the state was made for.
    """
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        parameters,
        transform_non_params=lambda _: replicated(mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """All of it on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows (the first axis) split over data and fsdp; `check_rows` says whether they can be."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def micro_batches(mesh: Mesh) -> NamedSharding:
    """Rows behind an axis of micro-batches, which are computed one after the other."""
    return NamedSharding(mesh, P(None, ("data", "fsdp")))


def check_rows(mesh: Mesh, **rows: int) -> None:
    """Refuses a number of rows, named as the setting it comes from, that the mesh cannot split."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, count in rows.items():
        if count % parts:
            raise ValueError(
                f"{name} = {count} rows do not split over data x fsdp = {parts} devices; "
                f"take a multiple of {parts}, or move devices to the tensor axis"
            )


def _rule(name: str) -> P:
    matches = [spec for rule, spec in RULES if re.fullmatch(f"(trunk/)?{rule}", name)]
    if len(matches) != 1:
        raise ValueError(
            f"parameter {name!r} matches {len(matches)} rows of sharding.RULES; it must match one"
        )
    return matches[0]


def _fit(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> P:
    """`spec`, less the axes that a replicable parameter is too small or too odd for."""
    if len(spec) != len(shape):
        raise ValueError(f"parameter {name!r} has shape {shape}, its sharding rule is {spec}")
    fitted = []
    for size, axis in zip(shape, spec, strict=True):
        if axis is None or size % mesh.shape[axis] == 0:
            fitted.append(axis)
        elif axis == "tensor" and re.fullmatch(REPLICABLE, name):
            fitted.append(None)
        else:
            raise ValueError(
                f"parameter {name!r} of shape {shape}: {size} does not divide over "
                f"{axis} = {mesh.shape[axis]} devices; choose a mesh whose {axis} axis divides it"
            )
    return P(*fitted)
