"""TPU slices that need not be there: their compiler's view of them, and what a chip can do.

The compiler is libtpu, which runs on any x86-64 Linux machine; one process at a time may have it.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

_log = logging.getLogger(__name__)


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
    if name.endswith(":1x1"):  # one chip, as Colab lends it, is not a host of four
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # XLA's own type, with a line of C++ for a message
        raise ValueError(f"the TPU compiler knows no slice {name!r}: {error}") from error
    return list(description.devices)


@contextlib.contextmanager
def compiler() -> Iterator[None]:
    """Has libtpu to itself for the length of the block, and keeps it from asking for a TPU.

    Must be entered before jax first looks for devices. Waits for another process that has it.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # no device could load what it keeps
    path = pathlib.Path(tempfile.gettempdir()) / "pgrpo_jax_libtpu.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("another process compiles for a TPU; waiting for it (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
