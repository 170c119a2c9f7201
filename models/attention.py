"""Which attention a decoder runs, on each device's rows and heads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pgrpo_jax import sharding
from pgrpo_jax.config import Compute
from pgrpo_jax.kernels import attention as plain
from pgrpo_jax.kernels import flash_attention


def attend(
    compute: Compute,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
) -> jax.Array:
    """out_BTNH by the implementation `compute.attention` names; masks as in `kernels.attention`.

    The kernel is for tokens that attend each other. One that attends to what a longer cache holds
    takes the reference.
    """
    implementations = {"auto": _reference, "reference": _reference, "pallas": _pallas}
    if compute.attention not in implementations:
        raise ValueError(
            f"unknown attention {compute.attention!r}; known: {sorted(implementations)}"
        )
    same = q_BTNH.shape[1] == k_BSKH.shape[1]
    return (implementations[compute.attention] if same else _reference)(
        q_BTNH, k_BSKH, v_BSKH, positions_BT, segments_BT, positions_BS, segments_BS
    )


_reference = plain.reference


def _pallas(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT, *_):
    """The kernel sees columns, whose order is that of the positions within a segment."""
    k_BTKH, v_BTKH = (for_tensor_axis(x, q_BTNH.shape[2]) for x in (k_BTKH, v_BTKH))
    arrays = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    kernel = functools.partial(flash_attention.flash_attention, **_blocks())
    letters = ("BTNH", "BTKH", "BTKH", "BT")
    return sharding.on_devices(kernel, arrays, letters, "BTNH")(*arrays)


def _blocks() -> dict[str, flash_attention.BlockSizes]:
    """Sizes other than the kernel's own: a core of v4 has 16 MiB of VMEM, later ones a multiple."""
    if sharding.device_kind() != "TPU v4":
        return {}
    sizes = {"forward": flash_attention.FORWARD, "backward": flash_attention.BACKWARD}
    return {way: dataclasses.replace(size, span=2048) for way, size in sizes.items()}


def for_tensor_axis(k_BTKH: jax.Array, heads: int) -> jax.Array:
    """Key heads for a mesh that has more devices on its tensor axis than there are: each is there
    several times, so that every device has those that its query heads read."""
    K, parts = k_BTKH.shape[2], sharding.axis_size("tensor")
    if K % parts == 0 or heads % parts:  # split as it is, or whole everywhere, as the queries are
        return k_BTKH
    return jnp.repeat(k_BTKH, math.lcm(K, parts) // K, axis=2)
