"""Decoding with the paged kernel beside decoding with plain attention, by the TPU compiler.

    python -m benchmarks.decode_attention [--slices v5e:1x1]

Needs the `tpu` extra and no TPU. Compiles the decode program of the Qwen2.5-Coder configurations
both ways. Bytes are of one device and one token of each slot; milliseconds are the lower bound of
`pgrpo_jax.roofline`, which lets the kernel read every page there is, as plain attention does: in
fact it reads those in use.
"""

import argparse
import dataclasses
from collections.abc import Iterator

from pgrpo_jax import cli, config, footprint, programs, sharding, topology
from pgrpo_jax.topology import GIB

CASES = (("qwen2_5_coder_7b", "v5p:2x2x2"), ("qwen2_5_coder_0_5b", "v5e:1x1"))
ATTENTION: tuple[config.Attention, ...] = ("pallas", "blocked")


def decode(cfg: config.Config, slice_: str) -> tuple[footprint.Report, int]:
    """What the compiler says of the decode program, and the tokens of a slot in one execution."""
    devices, chip = topology.devices(slice_), topology.chip(slice_)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    found = programs.programs(cfg, mesh, chip.hbm_bytes)
    program = next(program for program in found if program.name == "decode")
    return footprint.measure(program, chip, len(devices)), program.runs.trips


def rows(name: str, slice_: str) -> Iterator[str]:
    for attention in ATTENTION:
        cfg = cli.load(name)
        compute = dataclasses.replace(cfg.policy.compute, attention=attention)
        policy = dataclasses.replace(cfg.policy, compute=compute)
        report, tokens = decode(dataclasses.replace(cfg, policy=policy), slice_)
        yield f"| `{name}` | {slice_} | {attention} | {_cells(report, tokens)} |"


def _cells(report: footprint.Report, tokens: int) -> str:
    if report.estimate is None:
        return "does not fit | | |"
    return " | ".join(
        (
            f"{report.hbm_traffic / tokens / 1e9:.2f}",
            f"{sum(report.collectives.values()) / tokens / 1e6:,.0f}",
            f"{report.hbm['temporaries'] / GIB:.2f}",
            f"{report.estimate.seconds / tokens * 1e3:.2f}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", nargs="+", choices=[slice_ for _, slice_ in CASES])
    chosen = parser.parse_args().slices
    print("| configuration | slice | attention | HBM GB | links MB | temporaries GiB | ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, slice_ in CASES:
        if not chosen or slice_ in chosen:
            for row in rows(name, slice_):
                print(row, flush=True)


if __name__ == "__main__":
    main()
