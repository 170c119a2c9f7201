"""Where arrays live: the mesh, one table from parameter names to partitions, and one from the axes
of activations.

Axes of the mesh: `data` splits the batch, `fsdp` the batch and the parameters, `tensor` heads, mlp
width and vocabulary. Optimizer moments lie as their parameters do. The rollout has a layout of its
own: weights in `models.decode.shardings`, pages of the cache in `models.cache.shardings`.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgrpo_jax.config import MeshConfig

NAMES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

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

# What splits each axis of an activation, by its letter in the legend; an axis without a row is
# whole on every device.
ACTIVATIONS: dict[str, str | tuple[str, ...]] = {
    "B": ROWS,
    "R": ROWS,
    "X": ROWS,
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices`, by default all of them; -1 takes what is left.

    Devices of one process stand side by side, the tensor axis innermost: a tensor axis no longer
    than a host has devices stays within the host, and each process holds rows of its own.
    Axes are Auto: Explicit ones, jax.make_mesh's default, break Linen's embedding lookup.

    Raises:
      ValueError: the axes do not fit the devices, or two processes would hold the same rows.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    asked = ", ".join(f"{name}={size}" for name, size in zip(NAMES, sizes, strict=True))
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
    local = len(devices) // len({device.process_index for device in devices})
    if local % sizes[-1]:
        raise ValueError(
            f"a mesh of {asked} lets two hosts of {local} devices share rows, and each host judges "
            f"its own; take a tensor axis that divides {local}"
        )
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(sizes), NAMES, axis_types=(AxisType.Auto,) * len(NAMES))


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


def on_host(places: Any) -> Any:
    """The same shardings in the memory of the devices' hosts."""
    return jax.tree.map(lambda place: place.with_memory_kind("pinned_host"), places)


def device_bytes(tree: Any, places: Any) -> int:
    """Bytes that each device holds of (abstract) arrays that lie so."""
    sizes = jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, tree, places
    )
    return sum(jax.tree.leaves(sizes))


def on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for jit, traced where `constrain` finds `mesh`."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """`x`, split as ACTIVATIONS says for `axes`, the letters of its name; outside of `on`, `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, axes))


def axis_size(name: str) -> int:
    """Devices on an axis of the mesh of `on`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[name]


def on_devices(
    function: Callable[..., Any],
    arrays: Sequence[jax.Array],
    axes: Sequence[str],
    out: str | tuple[str, ...],
) -> Callable[..., Any]:
    """`function` for a kernel: called on each device with its part of `arrays`, whose axes have
    these letters. It needs no other part. `out` are the letters of its result, or of each of its
    results; one that is in none of `arrays` is split as ACTIVATIONS says."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    specs = [activation_spec(x.shape, letters) for x, letters in zip(arrays, axes, strict=True)]
    split = ACTIVATIONS | {
        a: s
        for spec, letters in zip(specs, axes, strict=True)
        for a, s in zip(letters, spec, strict=True)
    }
    places = jax.tree.map(lambda letters: P(*(split.get(a) for a in letters)), out)
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=places, check_vma=False)


def activation_spec(shape: tuple[int, ...], axes: str) -> P:
    """The partition of an activation on the mesh of `on`.

    An axis that does not divide (4 key heads over 8 devices, one prompt over 4) is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def one(size: int, letter: str) -> str | tuple[str, ...] | None:
        names = ACTIVATIONS.get(letter)
        if names is None:
            return None
        parts = math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names))
        return names if size % parts == 0 else None

    return P(*(one(size, letter) for size, letter in zip(shape, axes, strict=True)))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of it on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows (the first axis) split over data and fsdp; `check_rows` says whether they can be."""
    return NamedSharding(mesh, P(ROWS))


def row_parts(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[name] for name in ROWS)


def put(tree: Any, places: Any) -> Any:
    """Host arrays, of which every process has the same, on the devices; `places` may be a prefix of
    the tree."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    # device_put would first send them all around, to compare them.
    def one(x: np.ndarray, place: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(np.shape(x), place, np.asarray(x).__getitem__)

    def part(place: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda x: one(x, place), part)

    return jax.tree.map(part, places, tree)


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """The batch whose rows are those that each process holds, process after process."""
    place = batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), tree)


def local_rows(tree: Any) -> Any:
    """This process's rows of a batch, on the host: what `put_rows` was given."""

    def one(x: jax.Array) -> np.ndarray:
        shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(one, tree)


def micro_batches(mesh: Mesh) -> NamedSharding:
    """Rows behind an axis of micro-batches, which are computed one after the other."""
    return NamedSharding(mesh, P(None, ROWS))


def check_rows(mesh: Mesh, **rows: int) -> None:
    """Refuses a number of rows, named as the setting it comes from, that the mesh cannot split."""
    parts = row_parts(mesh)
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
