"""What XLA leaves on the table where this code has no kernel: norms, angles, log-probabilities.

    python -m benchmarks.xla_ops [--chips v5p v4 v5e]

Needs the `tpu` extra, no TPU. The bytes are those that the TPU compiler counts for the operations
of its compiled program; the least are each input read once and each output written once. Norm and
rotary angles take as long as their bytes; a chunk of log-probabilities takes its matrix product,
and the bytes beyond the least in addition, which is a bound from above: some may hide behind it.

Then the same operations where the compiler has fused them with others: in four layers, forward and
backward. What moves bytes and is neither a matrix product nor a kernel is norms, angles, residuals,
gates and casts: kernels of our own could win no more than all of its time, next to products at the
chip's peak.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import tpu_static
from benchmarks.tpu_static import Case, Chip
from pgrpo_jax import hlo, roofline, sharding, topology
from pgrpo_jax.config import Architecture, Compute, MeshConfig
from pgrpo_jax.models import decoder, layers, logprobs

# Qwen2.5-7B: two rows of 4096 tokens.
B, T, D, N, H, V = 2, 4096, 3584, 28, 128, 152_064
CHUNK = 1024
PEAK_FLOPS_PER_CYCLE = 2 * tpu_static.MATRIX_UNITS * tpu_static.ROWS_MACS


@dataclasses.dataclass(frozen=True)
class Operation:
    """shapes are those of the arguments; flops those of matrix products."""

    name: str
    function: Callable
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    flops: float = 0

    @property
    def least_bytes(self) -> int:
        results = jax.tree.leaves(jax.eval_shape(self.function, *self.shapes))
        return sum(x.size * x.dtype.itemsize for x in (*self.shapes, *results))


def norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
    module = layers.RMSNorm(eps=1e-6, param_dtype="bfloat16")
    out: Any = module.apply({"params": {"scale": scale_D}}, x_BTD)
    return out


def residual_norm(x_BTD: jax.Array, y_BTD: jax.Array, scale_D: jax.Array) -> Any:
    """As between two branches of a decoder: the sum goes on, and its norm into the next branch."""
    total_BTD = x_BTD + y_BTD
    return total_BTD, norm(total_BTD, scale_D)


def norm_gradient(x_BTD: jax.Array, scale_D: jax.Array, dy_BTD: jax.Array) -> Any:
    return jax.vjp(norm, x_BTD, scale_D)[1](dy_BTD)


def rotary(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return layers.rotate(x_BTNH, cos, sin)


def chunk_logprobs(x_BTD: jax.Array, w_DV: jax.Array, ids_BT: jax.Array) -> Any:
    return logprobs.logprobs(x_BTD, w_DV, ids_BT, jnp.ones_like(ids_BT, bool), 1.0, CHUNK)


def chunk_gradient(x_BTD: jax.Array, w_DV: jax.Array, ids_BT: jax.Array) -> Any:
    return jax.grad(lambda x, w: chunk_logprobs(x, w, ids_BT)[0].sum(), (0, 1))(x_BTD, w_DV)


def operations() -> list[Operation]:
    def array(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    x, scale, angles = array(B, T, D), array(D), array(B, T, 1, H // 2, dtype=jnp.float32)
    chunk = array(1, CHUNK, D), array(D, V), array(1, CHUNK, dtype=jnp.int32)
    product = 2 * CHUNK * D * V
    return [
        Operation("RMSNorm", norm, (x, scale)),
        Operation("residual and RMSNorm", residual_norm, (x, x, scale)),
        Operation("RMSNorm, gradient", norm_gradient, (x, scale, x)),
        Operation("rotary angles", rotary, (array(B, T, N, H), angles, angles)),
        Operation(f"log-probabilities of {CHUNK}", chunk_logprobs, chunk, product),
        # The gradient makes the logits again, and two products of their size.
        Operation(f"log-probabilities of {CHUNK}, gradient", chunk_gradient, chunk, 3 * product),
    ]


def build(*, index: int) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    operation = operations()[index]
    return operation.function, list(operation.shapes)


def row(chip: Chip, operation: Operation, xla_bytes: float) -> str:
    product_s = operation.flops / (PEAK_FLOPS_PER_CYCLE * chip.cores * chip.clock_hz)
    least_s = max(product_s, operation.least_bytes / chip.hbm_bytes_per_s)
    beyond_s = (xla_bytes - operation.least_bytes) / chip.hbm_bytes_per_s
    left = max(beyond_s, 0) / (least_s + max(beyond_s, 0))
    return (
        f"| {operation.name} | {operation.least_bytes / 1e6:,.0f} | {xla_bytes / 1e6:,.0f} "
        f"| {product_s * 1e3:.3f} | {least_s * 1e3:.3f} | {left:.0%} |"
    )


LAYERS = 4


def layer_rows(chip: Chip) -> Iterator[str]:
    """For each program of layers a row."""
    arch = Architecture(
        vocab_size=128, width=D, layers=LAYERS, heads=N, kv_heads=4, head_dim=H, mlp=18_944
    )
    compute = Compute(dtype="bfloat16", remat="full", attention="pallas")
    params = jax.eval_shape(lambda key: decoder.init(arch, compute, key), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)

    def forward(params: Any, *rows: jax.Array) -> jax.Array:
        return decoder.forward(params, arch, compute, *rows)

    def gradient(params: Any, dx_BTD: jax.Array, *rows: jax.Array) -> Any:
        return jax.vjp(lambda params: forward(params, *rows), params)[1](dx_BTD)

    products = {
        "forward": roofline.forward(arch, roofline.rows(B, T)).executed,
        "forward and backward": roofline.training(arch, compute, roofline.rows(B, T)).executed,
    }
    programs: dict[str, tuple[Callable, tuple[Any, ...]]] = {
        "forward": (forward, (params, ids, ids, ids)),
        "forward and backward": (gradient, (params, x, ids, ids, ids)),
    }
    devices = topology.devices(chip.slice_name)[:1]
    mesh = sharding.make_mesh(MeshConfig(), devices)
    for name, (function, shapes) in programs.items():
        program = jax.jit(sharding.on(mesh, function), in_shardings=sharding.replicated(mesh))
        text = program.lower(*shapes).compile().as_text()
        assert text is not None, "the TPU compiler gives its programs as text"
        moved = hlo.memory_bytes_by_kind(hlo.parse(text))
        product_s = products[name] / (PEAK_FLOPS_PER_CYCLE * chip.cores * chip.clock_hz)
        other_s = moved["other"] / chip.hbm_bytes_per_s
        left = other_s / (product_s + other_s)
        yield (
            f"| {chip.name}: {LAYERS} layers, {name} | {product_s * 1e3:.2f} "
            f"| {moved['other'] / 1e6:,.0f} | {other_s * 1e3:.2f} | {left:.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=tpu_static.CHIPS, default=[*tpu_static.CHIPS])
    chips = [tpu_static.CHIPS[name] for name in parser.parse_args().chips]
    for chip in chips:
        chosen = operations()
        cases = [
            Case("XLA", operation.name, "benchmarks.xla_ops:build", {"index": i}, len, 0, 0)
            for i, operation in enumerate(chosen)
        ]
        print(f"\n{chip.name}\n\n| | least MB | XLA's MB | product ms | least ms | left, at most |")
        print("|---|---|---|---|---|---|", flush=True)
        for operation, compiled in zip(chosen, tpu_static.compile_cases(chip, cases), strict=True):
            if compiled.error:
                print(f"| {operation.name} | does not compile: {compiled.error} | | | | |")
            else:
                print(row(chip, operation, compiled.hbm_bytes), flush=True)
    print("\n| | product ms | MB of the rest | ms of the rest | left, at most |")
    print("|---|---|---|---|---|", flush=True)
    for chip in chips:
        for line in layer_rows(chip):
            print(line, flush=True)


if __name__ == "__main__":
    main()
