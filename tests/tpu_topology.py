"""The TPU compiler for tests: one test at a time has it, over all processes."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1"}
# Without megacore each v4 chip would be two devices of one core.
OPTIONS = {"v4": {"chip_config_name": "megacore"}}


@contextlib.contextmanager
def one_device(chip: str) -> Iterator[NamedSharding]:
    """A sharding on one device of a slice that is not there; skips without libtpu."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the `tpu` extra")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    path = pathlib.Path(tempfile.gettempdir()) / "pgrpo_jax_libtpu.lock"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        slice_ = topologies.get_topology_desc(
            platform="tpu", topology_name=SLICES[chip], **OPTIONS.get(chip, {})
        )
        types = (AxisType.Auto,)
        mesh = Mesh(np.array(slice_.devices[:1]), ("one",), axis_types=types)
        yield NamedSharding(mesh, PartitionSpec())


def lower(function, *shapes: jax.ShapeDtypeStruct):
    """Mosaic's lowering for TPUs, which needs no TPU compiler and refuses illegal blocks."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))


def compile_on(place: NamedSharding, function, *shapes: jax.ShapeDtypeStruct):
    """The whole way, for the device of `place`, which kernels see when they are traced."""
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
        return jax.jit(function).lower(*placed).compile()
