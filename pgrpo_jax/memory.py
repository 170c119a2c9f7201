"""How much memory a mesh's devices have left."""

import os

import jax

from pgrpo_jax import hosts


def free_bytes(mesh: jax.sharding.Mesh) -> int:
    """Of the fullest device. Devices that keep no account (CPU) share what their host has left."""
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    accounts = [device.memory_stats() for device in devices]
    free = [a["bytes_limit"] - a["bytes_in_use"] for a in accounts if a and "bytes_limit" in a]
    if len(free) == len(devices):
        return min(hosts.gather(min(free)))
    here = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return min(hosts.gather(here))
