"""Which attention a decoder runs, on each device's rows and heads."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pgrpo_jax import sharding
from pgrpo_jax.config import Attention, Compute
from pgrpo_jax.kernels import attention as kernel
from pgrpo_jax.kernels import blocked_attention, flash_attention

PLATFORMS = {"pallas": "tpu", "cudnn": "gpu"}  # the others run everywhere


def resolve(compute: Compute, platform: str) -> Compute:
    """`compute` with a named attention instead of "auto": the best for "tpu", "gpu" or "cpu".

    Raises:
      ValueError: the named one does not run on that platform, or not in that dtype.
    """
    half = compute.dtype == "bfloat16"
    best: dict[str, Attention] = {"tpu": "pallas", "gpu": "cudnn" if half else "blocked"}
    name = compute.attention
    if name == "auto":
        name = best.get(platform, "blocked")
    if PLATFORMS.get(name, platform) != platform:
        raise ValueError(
            f"attention={name!r} runs on a {PLATFORMS[name]} and this is a {platform}; take 'auto' "
            "or 'reference'"
        )
    if name == "cudnn" and not half:
        raise ValueError(
            f"attention='cudnn' computes in bfloat16, got dtype={compute.dtype!r}; take "
            "dtype='bfloat16' or attention='reference'"
        )
    return dataclasses.replace(compute, attention=name)


def attend(
    compute: Compute,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    prefixes_BT: jax.Array | None = None,
) -> jax.Array:
    """out_BTNH by the implementation `compute.attention` names; masks as in `kernels.attention`.

    The kernels are for tokens that attend each other, in the order of their columns: within a
    segment positions rise from left to right, and what it continues lies before it. A query that
    reads a longer cache takes the reference; a cache of as many columns as there are new tokens
    holds nothing else.
    """
    if compute.attention == "auto":
        compute = resolve(compute, jax.default_backend())
    implementations: dict[str, Callable[..., jax.Array]] = {
        "pallas": _pallas,
        "cudnn": _cudnn,
        "blocked": _blocked,
        "reference": kernel.reference,
    }
    if compute.attention not in implementations:
        raise ValueError(
            f"unknown attention {compute.attention!r}; known: {sorted(implementations)}"
        )
    among_themselves = q_BTNH.shape[1] == k_BSKH.shape[1]
    implementation = implementations[compute.attention if among_themselves else "reference"]
    rows = (positions_BT, segments_BT, positions_BS, segments_BS, prefixes_BT)
    return implementation(q_BTNH, k_BSKH, v_BSKH, *rows)


def _blocked(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT, _, __, prefixes_BT):
    rows = (positions_BT, segments_BT, prefixes_BT)
    return blocked_attention.blocked_attention(q_BTNH, k_BTKH, v_BTKH, *rows)


def _pallas(q_BTNH, k_BTKH, v_BTKH, _, segments_BT, __, ___, prefixes_BT):
    k_BTKH, v_BTKH = (for_tensor_axis(x, q_BTNH.shape[2]) for x in (k_BTKH, v_BTKH))
    rows = [x for x in (segments_BT, prefixes_BT) if x is not None]
    arrays = (q_BTNH, k_BTKH, v_BTKH, *rows)
    letters = ("BTNH", "BTKH", "BTKH", *["BT"] * len(rows))
    return sharding.on_devices(flash_attention.flash_attention, arrays, letters, "BTNH")(*arrays)


def for_tensor_axis(k_BTKH: jax.Array, heads: int) -> jax.Array:
    """Key heads for a mesh that has more devices on its tensor axis than there are: each is there
    several times, so that every device has those that its query heads read."""
    K, parts = k_BTKH.shape[2], sharding.axis_size("tensor")
    if K % parts == 0 or heads % parts:  # split as it is, or whole everywhere, as the queries are
        return k_BTKH
    return jnp.repeat(k_BTKH, math.lcm(K, parts) // K, axis=2)


def _cudnn(q_BTNH, k_BTKH, v_BTKH, _, segments_BT, __, ___, prefixes_BT):
    """cuDNN gives a query without any key the mean of all values: here it gets zeros."""
    mask_B1TS = kernel.meets(segments_BT, segments_BT, prefixes_BT)[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TS, is_causal=True, implementation="cudnn"
    )
    return jnp.where((segments_BT > 0)[:, :, None, None], out_BTNH, 0)
