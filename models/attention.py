"""Which attention a decoder runs."""

import jax

from pgrpo_jax.config import Compute
from pgrpo_jax.kernels import attention as kernel


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
    """out_BTNH by the implementation `compute.attention` names; masks as in `kernels.attention`."""
    implementations = {"auto": kernel.reference, "reference": kernel.reference}
    if compute.attention not in implementations:
        raise ValueError(
            f"unknown attention {compute.attention!r}; known: {sorted(implementations)}"
        )
    return implementations[compute.attention](
        q_BTNH, k_BSKH, v_BSKH, positions_BT, segments_BT, positions_BS, segments_BS
    )
