"""What this machine can do: the rates that every figure is a share of."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

SIDE = 2048  # of the square matrices, float32
COPIED = 2**28  # bytes


def fastest(run: Callable[[], jax.Array], times: int = 5) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    run().block_until_ready()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def gemm_rate() -> float:
    """Float32 operations a second of a product of two square matrices."""
    x = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.matmul)
    return 2 * SIDE**3 / fastest(lambda: product(x, x))


def bandwidth() -> float:
    """Bytes a second, read and written, of adding 1 in place to an array that no cache holds."""
    x = jnp.ones(COPIED // 4)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * COPIED / fastest(run)
