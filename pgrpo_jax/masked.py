"""Statistics over the entries a mask keeps: what it drops, NaN included, reaches nothing.

Masks are boolean and of the same shape as the values. The statistic of no entry at all is 0.
"""

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def total(x: jax.Array, mask: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """The sum of the kept entries."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis, keepdims=keepdims)


def count(mask: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """The number of kept entries, float32 and at least 1, to be divided by."""
    return jnp.maximum(jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32), 1)


def mean(x: jax.Array, mask: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """The mean of the kept entries."""
    return total(x, mask, axis, keepdims) / count(mask, axis, keepdims)


def peak(x: jax.Array, mask: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """The largest kept entry."""
    largest = jnp.max(jnp.where(mask, x, -jnp.inf), axis=axis, keepdims=keepdims)
    return jnp.where(jnp.any(mask, axis=axis, keepdims=keepdims), largest, 0)


def centred(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Kept entries less their mean, 0 where the mask drops.

    The peak is taken off first: equal entries then give exact zeros, and large ones keep digits.
    """
    shifted = jnp.where(mask, x, 0) - peak(x, mask, axis, keepdims=True)
    return jnp.where(mask, shifted - mean(shifted, mask, axis, keepdims=True), 0)


def std(x: jax.Array, mask: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """The two-pass sample standard deviation (ddof = 1); 0 for fewer than two entries."""
    squares = jnp.sum(centred(x, mask, axis) ** 2, axis=axis, keepdims=keepdims)
    freedom = jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32) - 1
    return jnp.sqrt(squares / jnp.maximum(freedom, 1))


def quantile(x: jax.Array, mask: jax.Array, q: float) -> jax.Array:
    """The q-quantile of the kept entries, linear between neighbours."""
    return jnp.where(jnp.any(mask), jnp.nanquantile(jnp.where(mask, x, jnp.nan), q), 0)
