"""The kernels beside the best public ones, by the TPU compiler's schedule: no TPU is needed.

    python -m benchmarks.kernels [--chips v5p v4 v5e] [--only forward backward decode]

Needs the `tpu` extra, and tokamax for its rows. Cycles are a static LOWER BOUND: the schedule of
one TensorCore, without waits for copies and without the limit of HBM, whose bytes stand beside it.
Floors are what no schedule can go below: useful matrix work on units that never idle, for decode
the bytes of the cache at the chip's bandwidth.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import kernel_cases_flash as flash
from benchmarks import kernel_cases_paged as paged
from benchmarks import tpu_static
from benchmarks.tpu_static import Case, Chip, Compiled, Kernel
from pgrpo_jax.kernels import paged_kernel

PUBLIC_PART = {"forward": 256, "backward": 512}  # tokamax' best columns of a pass
PUBLIC_BLOCK = 1024
PAGE_SIZES = (128, 16)


def attention_cases(chip: Chip, direction: flash.Direction) -> Iterator[Case]:
    part = PUBLIC_PART[direction]
    public = {"block": PUBLIC_BLOCK, "part": part}
    sizes = flash.own_sizes(chip.name)[direction]
    own = functools.partial(_own_cycles, sizes=sizes)
    kinds: list[tuple[str, str, dict[str, int], Callable]] = [
        ("ours", "build", dataclasses.asdict(sizes) | {"shared": False}, own),
        ("ours, prompts shared", "build", dataclasses.asdict(sizes) | {"shared": True}, own),
        (f"tokamax splash {PUBLIC_BLOCK}/{part}", "build_tokamax", public, _splash_cycles),
    ]
    shape = flash.Shape()
    for name, build, options, cycles in kinds:
        yield Case(
            table=direction,
            name=name,
            build=f"benchmarks.kernel_cases_flash:{build}",
            options={"direction": direction} | options,
            cycles=functools.partial(cycles, direction=direction, cores=chip.cores),
            floor_cycles=shape.floor_cycles(direction, chip.cores),
            hbm_bytes=shape.hbm_bytes(direction),
        )


def _attention_kernel(kernels: list[Kernel]) -> Kernel:
    """The one with the matrix work: a backward pass makes the forward pass's results first."""
    return max(kernels, key=lambda k: k.matrix_cycles(range(len(k.bundles))))


def _own_cycles(
    kernels: list[Kernel], direction: flash.Direction, cores: int, sizes: flash.BlockSizes
) -> float:
    return flash.cycles(_attention_kernel(kernels).main_loop(), direction, cores, sizes)


def _splash_cycles(kernels: list[Kernel], direction: flash.Direction, cores: int) -> float:
    """A splash kernel visits the causal blocks of each head one by one; the others are no steps."""
    kernel, shape = _attention_kernel(kernels), flash.Shape()
    steps = kernel.main_loop()
    own = [len(n.own()) for n in steps.walk() if n is not steps and kernel.matrix_cycles(n.own())]
    step = kernel.step()
    once = kernel.passed(steps, lambda n: n.trips or 1 if n.kind == "loop" else 1) - step
    blocks = shape.T // PUBLIC_BLOCK
    # Masked and unmasked blocks are two regions, of which a step takes one.
    visit = step - sum(own) + max(own)
    return shape.B * shape.N * (blocks * (blocks + 1) // 2 * visit + blocks * once) / cores


def decode_cases(chip: Chip) -> Iterator[Case]:
    for page in PAGE_SIZES:
        own = paged_kernel.BLOCKS.pages(page * paged.KEY_BYTES, paged.LENGTH // page) * page
        whole, head = paged.KEY_BYTES, paged.HEAD_BYTES
        # Name, build, options, keys of a block, bytes of a key, cores at work. The public kernels
        # have their best blocks, and run on one core with all of the bandwidth; the blocks of the
        # last are those of one key head.
        kinds: list[tuple[str, str, dict[str, Any], int, int, int]] = [
            ("ours", "build", {"write": False}, own, whole, chip.cores),
            ("ours, writing the new token", "build", {"write": True}, own, whole, chip.cores),
            ("jax ragged_paged_attention", "build_ragged", {"block": 2048}, 2048, whole, 1),
            ("jax paged_attention", "build_paged", {"block": 1024}, 1024, head, 1),
        ]
        for name, build, options, keys, key_bytes, cores in kinds:
            yield Case(
                table=f"decode, page {page}",
                name=f"{name}, blocks of {keys} keys, cores: {cores}",
                build=f"benchmarks.kernel_cases_paged:{build}",
                options={"page": page} | options,
                cycles=functools.partial(paged.block_cycles, pages=keys // page),
                floor_cycles=keys * key_bytes / chip.core_bytes_per_cycle * cores / chip.cores,
                hbm_bytes=keys * key_bytes * cores,  # all cores at work have a block
            )


HEAD = (
    "| | | static cycles of a core, lower bound | ms | floor, cycles | over the floor | HBM MB "
    "| HBM ms | VMEM MiB |\n|---|---|---|---|---|---|---|---|---|"
)


def row(chip: Chip, case: Case, compiled: Compiled) -> str:
    if compiled.error:
        return f"| {case.table} | {case.name} | does not compile: {compiled.error} | | | | | | |"
    cycles = case.cycles(compiled.kernels)
    vmem_mib = max(kernel.vmem_bytes for kernel in compiled.kernels) / 2**20
    hbm_ms = case.hbm_bytes / chip.hbm_bytes_per_s * 1e3
    return (
        f"| {case.table} | {case.name} | {cycles:,.0f} | {chip.milliseconds(cycles):.4g} "
        f"| {case.floor_cycles:,.0f} | {cycles / case.floor_cycles:.2f} "
        f"| {case.hbm_bytes / 1e6:.4g} | {hbm_ms:.4g} | {vmem_mib:.1f} |"
    )


TABLES: dict[str, Callable[[Chip], Iterator[Case]]] = {
    "forward": functools.partial(attention_cases, direction="forward"),
    "backward": functools.partial(attention_cases, direction="backward"),
    "decode": decode_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=tpu_static.CHIPS, default=[*tpu_static.CHIPS])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[*TABLES])
    arguments = parser.parse_args()
    for name in arguments.chips:
        chip = tpu_static.CHIPS[name]
        cases = [case for table in arguments.only for case in TABLES[table](chip)]
        print(f"\n{name}: {chip.cores} cores, {chip.clock_hz / 1e9:g} GHz\n\n{HEAD}", flush=True)
        for case, compiled in zip(cases, tpu_static.compile_cases(chip, cases), strict=True):
            print(row(chip, case, compiled), flush=True)


if __name__ == "__main__":
    main()
