"""The search for settings that fit a slice: mesh, rows of a micro-batch, rematerialisation, and
completions decoded together.

Formulas leave out what cannot fit and put the other candidates in order; the compiler has the last
word: it is asked for one after the other until everything fits.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Literal

import jax
import rich.console

from pgrpo_jax import config, footprint, programs, roofline, sharding, topology
from pgrpo_jax.config import Architecture, Compute, Config

TRIES = 8  # updates that are compiled at most; a large model takes minutes each

REMAT: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of the update, with a formula's word on the seconds of one step of it."""

    settings: Config
    seconds: float

    @property
    def options(self) -> str:
        """As one gives them on the command line."""
        mesh, compute = self.settings.mesh, self.settings.policy.compute
        return (
            f"--mesh.fsdp {mesh.fsdp} --mesh.tensor {mesh.tensor} "
            f"--update.micro-batch-size {self.settings.update.micro_batch_size} "
            f"--policy.compute.remat {compute.remat}"
        )


def search(cfg: Config, name: str, console: rich.console.Console) -> Config | None:
    """The settings with the fastest estimate of those that fit, printed as options; None if none
    of the first TRIES does."""
    misfits: list[Candidate] = []
    ordered = sorted(candidates(cfg, name), key=lambda candidate: candidate.seconds)
    for candidate in ordered:
        if len(misfits) == TRIES:
            break
        if any(_asks_more(candidate, misfit) for misfit in misfits):
            continue
        reports = _reports(candidate.settings, name)
        bad = next((report for report in reports if not report.fits), None)
        if bad is None:
            settings = _more_slots(candidate.settings, name)
            slots = settings.rollout.batch_size
            console.print(f"fits: {candidate.options} --rollout.batch-size {slots}", markup=False)
            return settings
        console.print(f"{bad.name} does not fit: {candidate.options}", markup=False)
        misfits.append(candidate)
    console.print(
        f"nothing fits {name} of {len(ordered)} candidates: take a larger slice, or shorter "
        "completions"
    )
    return None


def _reports(cfg: Config, name: str) -> Iterator[footprint.Report]:
    """Of all programs, the one that needs most first."""
    devices, chip = topology.devices(name), topology.chip(name)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    every = programs.programs(cfg, mesh, chip.hbm_bytes)
    found = sorted(every, key=lambda program: program.name != "update")
    return (footprint.measure(program, chip, len(devices)) for program in found)


def candidates(cfg: Config, name: str) -> Iterator[Candidate]:
    """Every mesh (fsdp, tensor), micro-batch and rematerialisation that may fit."""
    devices, chip = topology.devices(name), topology.chip(name)
    arch, _ = programs.architectures(cfg)
    host = len(devices) // len({device.process_index for device in devices})
    rows = cfg.rollout.prompts_per_step * cfg.rollout.num_generations
    for tensor in _powers(host):
        parts = len(devices) // tensor
        if arch.heads % tensor or arch.mlp % tensor or arch.width % parts:
            continue
        if not _splits(cfg, parts):
            continue
        mesh = config.MeshConfig(data=1, fsdp=parts, tensor=tensor)
        room = chip.hbm_bytes - _kept(cfg, mesh, devices, chip.hbm_bytes)
        for each, remat in itertools.product(_powers(rows // parts), REMAT):
            if rows % (each * parts):
                continue
            compute = dataclasses.replace(cfg.policy.compute, remat=remat)
            settings = dataclasses.replace(
                cfg,
                mesh=mesh,
                policy=dataclasses.replace(cfg.policy, compute=compute),
                update=dataclasses.replace(cfg.update, micro_batch_size=each * parts),
            )
            if _saved(settings, arch) < room:
                yield Candidate(settings, seconds(settings, arch, chip, len(devices)))


def _kept(cfg: Config, mesh: config.MeshConfig, devices: list[jax.Device], hbm_bytes: int) -> int:
    """Bytes of a device that hold parameters and moments during an update."""
    least = dataclasses.replace(cfg.update, micro_batch_size=mesh.fsdp)
    settings = dataclasses.replace(cfg, update=least)
    found = programs.programs(settings, sharding.make_mesh(mesh, devices), hbm_bytes)
    update = next(program for program in found if program.name == "update")
    return sum(update.arguments.values()) + sum(update.resident.values())


def _saved(cfg: Config, arch: Architecture) -> float:
    """Bytes of a device that an update saves for the backward pass, at the least: the input of each
    layer, and without full rematerialisation the results of its projections."""
    compute, tensor = cfg.policy.compute, cfg.mesh.tensor
    width = float(arch.width)
    if compute.remat != "full":
        heads = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
        width += (heads + 2 * arch.mlp) / tensor
    rows = cfg.update.micro_batch_size / cfg.mesh.fsdp
    length = cfg.rollout.prompt_buckets[-1] + cfg.rollout.max_completion_length
    return rows * length * arch.layers * width * (2 if compute.dtype == "bfloat16" else 4)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _splits(cfg: Config, parts: int) -> bool:
    """Whether every number of rows that the settings name is a multiple of `parts`."""
    rows = (
        cfg.rollout.prompts_per_step * cfg.rollout.num_generations,
        cfg.rewards.thinking_batch_size,
        cfg.reward_training.batch_size if cfg.reward_training.steps else 0,
        cfg.sft.batch_size if cfg.sft.steps else 0,
    )
    return all(count % parts == 0 for count in rows)


def seconds(cfg: Config, arch: Architecture, chip: topology.Chip, chips: int) -> float:
    """Of one update, by formula: computation, and what it gathers, reduces and sums meanwhile.

    The parts are added up, not overlapped: so that of two candidates bound by the same resource
    the one comes first that asks less of the others.
    """
    prompt, drawn = cfg.rollout.prompt_buckets[-1], cfg.rollout.max_completion_length
    prompts, each = cfg.rollout.prompts_per_step, cfg.rollout.num_generations
    compute: Compute = cfg.policy.compute
    load = roofline.completions(prompts, each, prompt, drawn)
    work = roofline.training(arch, compute, load)
    steps = load.tokens / (cfg.update.micro_batch_size * (prompt + drawn))
    layers = roofline.layers(arch, 1) / 2  # weights of the layers
    width, split = 2.0 if compute.dtype == "bfloat16" else 4.0, cfg.mesh.tensor
    passes = 3 if compute.remat == "full" else 2
    gathered = steps * (passes + 1) * layers / split * width * (1 - 1 / cfg.mesh.fsdp)
    sums = 2 * passes * arch.layers * load.tokens * arch.width / cfg.mesh.fsdp * width
    summed = 2 * sums * (1 - 1 / split)
    links_s = (gathered + summed) / (2 * chip.link_bytes_per_s)
    return work.executed / (chips * chip.flops_per_s) + links_s


def _asks_more(candidate: Candidate, misfit: Candidate) -> bool:
    """Whether a candidate takes at least the memory of one that did not fit."""
    order = ("full", "dots", "none")
    a, b = candidate.settings, misfit.settings
    return (
        a.mesh == b.mesh
        and a.update.micro_batch_size >= b.update.micro_batch_size
        and order.index(a.policy.compute.remat) >= order.index(b.policy.compute.remat)
    )


def _more_slots(cfg: Config, name: str) -> Config:
    """The most completions decoded together that all find their pages, by doubling."""
    every = cfg.rollout.prompts_per_step * cfg.rollout.num_generations
    best = dataclasses.replace(
        cfg, rollout=dataclasses.replace(cfg.rollout, batch_size=cfg.rollout.batch_size or every)
    )
    while best.rollout.batch_size < every:
        slots = min(2 * best.rollout.batch_size, every)
        more = dataclasses.replace(
            cfg, rollout=dataclasses.replace(cfg.rollout, batch_size=math.ceil(slots))
        )
        devices, chip = topology.devices(name), topology.chip(name)
        mesh = sharding.make_mesh(more.mesh, devices)
        sizes = programs.rollout_sizes(more, *programs.architectures(more), mesh, chip.hbm_bytes)
        found = programs.programs(more, mesh, chip.hbm_bytes)
        rollout = (p for p in found if p.name in ("prefill", "decode"))
        if sizes.own_pages < sizes.slots * sizes.own_table or not all(
            footprint.measure(p, chip, len(devices)).fits for p in rollout
        ):
            break
        best = more
    return best
