"""Flash attention for TPUs: causal, grouped queries, packed rows; forward and fused backward.

A query attends a key iff the key lies in the query's own segment (a positive one; 0 is padding) or
in the one that this continues, and the key's column is not after the query's. Within a segment,
tokens must therefore stand in the order of their positions, behind what they continue. A query
without any key gives zeros, and zero gradients. `reference` says the same in plain jnp.

Layouts: q_BTNH, k_BTKH, v_BTKH of one dtype (bfloat16, or float32), segments_BT int32; N is a
multiple of K, query head n reads key head n // (N / K). Any T: rows are padded inside. Scores, sums
and gradients are accumulated in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pgrpo_jax.kernels import attention, flash_backward, flash_forward
from pgrpo_jax.kernels.flash_blocks import (
    BACKWARD,
    BACKWARD_V4,
    FORWARD,
    FORWARD_V4,
    LANES,
    BlockSizes,
    Static,
    round_up,
)


def reference(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    prefixes_BT: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """`attention.reference` with columns for positions."""
    positions_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1])[None], segments_BT.shape)
    rows = (positions_BT, segments_BT)
    return attention.reference(q_BTNH, k_BTKH, v_BTKH, *rows, *rows, prefixes_BT, soft_cap=soft_cap)


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    prefixes_BT: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    forward: BlockSizes | None = None,
    backward: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v -> out_BTNH, of q's dtype.

    `prefixes_BT` names, for each token, the segment that its own continues, 0 for none; without it
    the kernels compare less.

    `soft_cap` turns the logits into cap * tanh(logits / cap) before the mask. The block sizes
    are, unless given, FORWARD and BACKWARD, or those for a v4. `interpret` runs the kernels on any
    platform, slowly.

    Raises:
      ValueError: shapes or dtypes that the kernels cannot do.
    """
    ids = (segments_BT,) if prefixes_BT is None else (segments_BT, prefixes_BT)
    _check(q_BTNH, k_BTKH, v_BTKH, ids, soft_cap)
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    is_float32, is_v4 = q_BTNH.dtype == jnp.float32, _is_v4()
    forward = forward or (FORWARD_V4 if is_v4 else FORWARD)
    backward = backward or (BACKWARD_V4 if is_v4 else BACKWARD)
    static = Static(
        forward=forward.fitted(T),
        backward=backward.fitted(T),
        scale=H**-0.5,
        soft_cap=soft_cap,
        precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
        vmem_bytes=(16 if is_v4 else 32) * 2**20,
        interpret=interpret,
    )
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    ids_BMT = jnp.stack(ids, axis=1).astype(jnp.int32)
    return _flash(q_BNTH, k_BKTH, v_BKTH, ids_BMT, static).swapaxes(1, 2)


def _check(q_BTNH, k_BTKH, v_BTKH, ids, soft_cap) -> None:
    if q_BTNH.ndim != 4 or k_BTKH.ndim != 4:
        raise ValueError(
            f"flash attention wants q_BTNH and k_BTKH, got {q_BTNH.shape} and {k_BTKH.shape}"
        )
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if k_BTKH.shape != v_BTKH.shape or k_BTKH.shape != (B, T, K, H) or N % K:
        raise ValueError(
            f"flash attention wants k and v of one shape [{B}, {T}, K, {H}] with K dividing the "
            f"{N} query heads, got k {k_BTKH.shape} and v {v_BTKH.shape}; queries and keys are the "
            "same tokens, so a cache needs another kernel"
        )
    for name, ids_BT in zip(("segments", "prefixes"), ids, strict=False):
        if ids_BT.shape != (B, T) or not jnp.issubdtype(ids_BT.dtype, jnp.integer):
            raise ValueError(
                f"flash attention wants integer {name} [{B}, {T}], got {ids_BT.dtype} "
                f"{ids_BT.shape}"
            )
    dtypes = {x.dtype for x in (q_BTNH, k_BTKH, v_BTKH)}
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        raise ValueError(
            "flash attention wants q, k and v all bfloat16, or all float32, got "
            f"{q_BTNH.dtype}, {k_BTKH.dtype} and {v_BTKH.dtype}; cast them first"
        )
    if H > LANES or H % 8:
        raise ValueError(
            f"flash attention knows head dimensions up to {LANES} that are multiples of 8, got {H};"
            " use the reference"
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be above 0, or None for no cap, got {soft_cap}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BNTH, k_BKTH, v_BKTH, ids_BMT, static: Static):
    return _flash_forward(q_BNTH, k_BKTH, v_BKTH, ids_BMT, static)[0]


def _flash_forward(q_BNTH, k_BKTH, v_BKTH, ids_BMT, static: Static):
    T = q_BNTH.shape[2]
    tokens = round_up(T, static.forward.queries)
    q, k, v = (_pad(x, tokens, 2) for x in (q_BNTH, k_BKTH, v_BKTH))
    out_BNTH, lse_BN1T = flash_forward.forward(q, k, v, _pad(ids_BMT, tokens, 2), static)
    out_BNTH, lse_BN1T = out_BNTH[:, :, :T], lse_BN1T[:, :, :, :T]
    return out_BNTH, (q_BNTH, k_BKTH, v_BKTH, ids_BMT, out_BNTH, lse_BN1T)


def _flash_backward(static: Static, residuals, dout_BNTH):
    q_BNTH, k_BKTH, v_BKTH, ids_BMT, out_BNTH, lse_BN1T = residuals
    T = q_BNTH.shape[2]
    tokens = round_up(T, static.backward.queries)
    products_BNTH = out_BNTH.astype(jnp.float32) * dout_BNTH.astype(jnp.float32)
    # Padding gave zeros; what comes back for it may be anything, and means nothing.
    delta_BNT = jnp.where(ids_BMT[:, :1] > 0, products_BNTH.sum(-1), 0)
    q, k, v = (_pad(x, tokens, 2) for x in (q_BNTH, k_BKTH, v_BKTH))
    gradients = flash_backward.backward(
        q,
        k,
        v,
        _pad(ids_BMT, tokens, 2),
        _pad(dout_BNTH, tokens, 2),
        _pad(lse_BN1T, tokens, 3),
        _pad(delta_BNT[:, :, None], tokens, 3),
        static,
    )
    return *(x[:, :, :T] for x in gradients), None


_flash.defvjp(_flash_forward, _flash_backward)


def _pad(x: jax.Array, tokens: int, axis: int) -> jax.Array:
    """x with zeros behind it, `tokens` long."""
    widths = [(0, tokens - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths)


def _is_v4() -> bool:
    """Whether this is traced for a v4: the device of the mesh in context, or the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.devices()[0]).device_kind == "TPU v4"
