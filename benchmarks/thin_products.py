"""Products of a weight with a few tokens on this CPU: how their factors lie decides their rate.

    python -m benchmarks.thin_products --width 512 --rows 8 32 128 1024

For each matrix of a decoder's layer, GFLOP/s of `x_RD @ w_DE` and of `w_ED @ x_DR`, the way of
`models/decode.py`; a program goes through eight weights one after the other, as layers do. And of
the products of `models/cache.py`, that are batched: four queries a key head with a page of keys.
"Cores" are CPU seconds a second, of what is in the column before.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from benchmarks import machine

LAYERS = 8
KEY_HEADS, QUERIES, HEAD, PAGE = 2, 4, 64, 64

Product = Callable[[jax.Array, jax.Array], jax.Array]


def measured(
    product: Product, operations: int, x: jax.Array, factors: list[jax.Array]
) -> tuple[float, float]:
    """10^9 operations a second of products in order, each of which waits for the one before; and
    the cores that are at work."""

    @jax.jit
    def run(x: jax.Array, factors: list[jax.Array]) -> jax.Array:
        y = product(x, factors[0])
        for factor in factors[1:]:
            y = product(x + 0 * y.reshape(-1)[0], factor)
        return y

    work = functools.partial(run, x, factors)
    rate = len(factors) * operations / machine.fastest(work, times=30) / 1e9
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for _ in range(30):
        work().block_until_ready()
    return rate, (time.process_time() - cpu_begin) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32, 128, 1024])
    arguments = parser.parse_args()
    D, random = arguments.width, np.random.default_rng(0)
    F = D * 11 // 4
    shapes = {"qkv": (D, D * 3 // 2), "out": (D, D), "gate and up": (D, 2 * F), "down": (F, D)}
    table = rich.table.Table(title=f"GFLOP/s in float32; width {D}")
    for column in ("rows", "factor", "x @ w", "w first", "times", "cores"):
        table.add_column(column, justify="right")
    for rows in arguments.rows:
        for name, (D_in, D_out) in shapes.items():
            x_RD = random.standard_normal((rows, D_in)).astype(np.float32)
            many_DE = [random.standard_normal((D_in, D_out)).astype(np.float32)] * LAYERS
            many_ED = [jnp.array(np.ascontiguousarray(w.T)) for w in many_DE]
            operations = 2 * rows * D_in * D_out
            plain, _ = measured(
                jnp.matmul, operations, jnp.array(x_RD), [jnp.array(w) for w in many_DE]
            )
            x_DR = jnp.array(np.ascontiguousarray(x_RD.T))
            first, cores = measured(lambda x, w: w @ x, operations, x_DR, many_ED)
            figures = f"{plain:.0f}", f"{first:.0f}", f"{first / plain:.2f}", f"{cores:.1f}"
            table.add_row(str(rows), name, *figures)
        q_XKGH = jnp.array(random.standard_normal((rows, KEY_HEADS, QUERIES, HEAD)), jnp.float32)
        many_XKHS = [
            jnp.array(random.standard_normal((rows, KEY_HEADS, HEAD, PAGE)), jnp.float32)
            for _ in range(LAYERS)
        ]
        plain, cores = measured(jnp.matmul, 2 * q_XKGH.size * PAGE, q_XKGH, many_XKHS)
        table.add_row(str(rows), "pages of keys", f"{plain:.0f}", "", "", f"{cores:.1f}")
    rich.console.Console(width=80).print(table)
    print(f"a square product of side {machine.SIDE}: {machine.gemm_rate() / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
