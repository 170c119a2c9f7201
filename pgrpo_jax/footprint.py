"""What each program of a configuration takes on a slice, as the compiler and the roofline say."""

import dataclasses
import time
from collections.abc import Iterator

import jax

from pgrpo_jax import config, hlo, programs, roofline, sharding, topology


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one program. Bytes are of one device; those it moves, and seconds,
    are of one execution. `failure` is the compiler's word on a program that it did not compile, and
    then there is nothing but `hbm`.
    """

    name: str
    compile_s: float
    hbm: dict[str, int]
    limit: int
    work: roofline.Work
    executions: int
    collectives: dict[str, float]
    hbm_traffic: float
    estimate: roofline.Estimate | None
    failure: str = ""

    @property
    def total(self) -> int:
        return sum(self.hbm.values())

    @property
    def fits(self) -> bool:
        return not self.failure and self.total <= self.limit

    @property
    def seconds(self) -> float:
        """Of a P-GRPO step."""
        return self.executions * self.estimate.seconds if self.estimate else 0.0


def measure(program: programs.Program, chip: topology.Chip, chips: int) -> Report:
    """Compiles one program."""
    begin, known = time.perf_counter(), dict(program.arguments)
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Report(
            program.name,
            time.perf_counter() - begin,
            known | dict(program.resident),
            chip.hbm_bytes,
            program.work,
            program.executions,
            {},
            0.0,
            None,
            failure=str(error),
        )
    compile_s = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    assert memory is not None, "the TPU compiler tells what memory a program takes"
    hbm = known | {
        "batch": max(memory.argument_size_in_bytes - sum(known.values()), 0),
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    text = compiled.as_text()
    assert text is not None, "the TPU compiler gives its programs as text"
    module = hlo.parse(text)
    collectives = hlo.collective_bytes(module, program.runs)
    traffic = hlo.memory_bytes(module, program.runs)
    return Report(
        program.name,
        compile_s,
        hbm | dict(program.resident),
        chip.hbm_bytes,
        program.work,
        program.executions,
        collectives,
        traffic,
        roofline.estimate(program.work, traffic, sum(collectives.values()), chip, chips),
    )


def reports(cfg: config.Config, name: str) -> Iterator[Report]:
    """A report on each program of a configuration, on a slice."""
    devices, chip = topology.devices(name), topology.chip(name)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    for program in programs.programs(cfg, mesh, chip.hbm_bytes):
        yield measure(program, chip, len(devices))
