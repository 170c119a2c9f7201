"""TPU slices that need not be there: their compiler's view of them, and what a chip can do.

The compiler is libtpu, which runs on any x86-64 Linux machine.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as its maker publishes it (cloud.google.com/tpu/docs), but for `hbm_bytes`: what
    the compiler says a program may use, which is less than is built in."""

    flops_per_s: float  # bfloat16
    hbm_bytes: int
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # of one link to a neighbour, in one direction
    options: tuple[tuple[str, Any], ...] = ()  # of the topology


GIB = 2**30
CHIPS = {
    # Without megacore each v4 chip would be two devices of one core.
    "v4": Chip(275e12, int(30.75 * GIB), 1.228e12, 50e9, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, int(15.75 * GIB), 0.819e12, 50e9),
    "v5p": Chip(459e12, int(95.74 * GIB), 2.765e12, 100e9),
    "v6e": Chip(918e12, int(31.25 * GIB), 1.640e12, 112e9),
}


ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def chip(name: str) -> Chip:
    """The chip of a slice such as "v5p:4x4x4". Raises ValueError for another form or chip."""
    if not re.fullmatch(r"v\w+:\d+x\d+(x\d+)?", name) or name.split(":")[0] not in CHIPS:
        raise ValueError(
            f"topology must be a chip and its slice, such as v5p:4x4x4 or v5e:2x4, got {name!r}; "
            f"known chips are {', '.join(CHIPS)}"
        )
    return CHIPS[name.split(":")[0]]


def devices(name: str) -> list[jax.Device]:
    """The devices of a slice, to compile for and not to run on.

    From then on this process runs on its CPU and keeps no compiled programs on disk: no device
    could load them. Several processes may compile at one time.

    Raises:
      ValueError: the name has another form, or the compiler knows no such slice.
      ImportError: there is no libtpu.
    """
    options = dict(chip(name).options)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for TPUs needs libtpu, the TPU compiler, which is not installed: "
            "`pip install -e '.[tpu]'` (it needs no TPU)"
        )
    # libtpu would look for a TPU in this machine, and refuse a second process that loads it.
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if name.endswith(":1x1"):  # one chip, as Colab lends it, is not a host of four
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # XLA's own type, with a line of C++ for a message
        raise ValueError(f"the TPU compiler knows no slice {name!r}: {error}") from error
    return list(description.devices)
