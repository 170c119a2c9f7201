"""Products of a weight with a few tokens on this CPU: how their factors lie decides their rate.

    python -m benchmarks.thin_products --width 512 --rows 8 32 128 1024

For each matrix of a decoder's layer, GFLOP/s of `x_RD @ w_DE` and of `w_ED @ x_DR`, the way of
`models/decode.py`; a program goes through eight weights one after the other, as layers do.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from benchmarks import machine

LAYERS = 8

Product = Callable[[jax.Array, jax.Array], jax.Array]


def gflops(product: Product, rows: int, x: jax.Array, weights: list[jax.Array]) -> float:
    """10^9 operations a second of products in order: each waits for the one before."""

    @jax.jit
    def run(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        y = product(x, weights[0])
        for w in weights[1:]:
            y = product(x + 0 * y[:1, :1], w)
        return y

    operations = 2 * LAYERS * weights[0].size * rows
    return operations / machine.fastest(functools.partial(run, x, weights), times=30) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32, 128, 1024])
    arguments = parser.parse_args()
    D, random = arguments.width, np.random.default_rng(0)
    F = D * 11 // 4
    shapes = {"qkv": (D, D * 3 // 2), "out": (D, D), "gate and up": (D, 2 * F), "down": (F, D)}
    table = rich.table.Table(title=f"GFLOP/s in float32; width {D}")
    for column in ("rows", "weight", "x @ w", "w first", "times"):
        table.add_column(column, justify="right")
    for rows in arguments.rows:
        for name, (D_in, D_out) in shapes.items():
            x_RD = random.standard_normal((rows, D_in)).astype(np.float32)
            many_DE = [random.standard_normal((D_in, D_out)).astype(np.float32)] * LAYERS
            many_ED = [np.ascontiguousarray(w.T) for w in many_DE]
            plain = gflops(jnp.matmul, rows, jnp.array(x_RD), [jnp.array(w) for w in many_DE])
            first = gflops(
                lambda x_DR, w_ED: w_ED @ x_DR,
                rows,
                jnp.array(np.ascontiguousarray(x_RD.T)),
                [jnp.array(w) for w in many_ED],
            )
            figures = f"{plain:.0f}", f"{first:.0f}", f"{first / plain:.2f}"
            table.add_row(str(rows), name, *figures)
    rich.console.Console(width=80).print(table)
    print(f"a square product of side {machine.SIDE}: {machine.gemm_rate() / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
