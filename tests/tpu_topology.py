"""The TPU compiler for tests of single kernels."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pgrpo_jax import topology

SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1"}


def one_device(chip: str) -> NamedSharding:
    """A sharding on one device of a slice that is not there; skips without libtpu."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the `tpu` extra")
    devices = topology.devices(SLICES[chip])
    mesh = Mesh(np.array(devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def lower(function, *shapes: jax.ShapeDtypeStruct):
    """Mosaic's lowering for TPUs, which needs no TPU compiler and refuses illegal blocks."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))


def compile_on(place: NamedSharding, function, *shapes: jax.ShapeDtypeStruct):
    """The whole way, for the device of `place`, which kernels see when they are traced."""
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        return jax.jit(function).lower(*placed).compile()
