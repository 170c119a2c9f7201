"""Static cycles of TPU kernels: the TPU compiler's final schedule, read on a machine without a TPU.

libtpu compiles a function for a chip that need not be there and writes down, for every kernel, the
scheduled bundles and which units each of them keeps busy. One bundle before empty ones are folded
together (`packed-bundles-post-ra`) is one cycle as the scheduler counts it. Branches backward are
loops, branches forward skip predicated regions: intervals that nest, hence a tree. A matrix unit
takes one 128-wide row of its left operand a cycle; each TensorCore of v4, v5e and v5p has four.

What this gives is a LOWER BOUND on time: no wait for a copy, no limit of memory bandwidth, no bank
conflict. Whoever quotes it puts the bytes beside it that must move. How often a region runs is for
the caller to say where no constant says it.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pgrpo_jax import sharding, topology
from pgrpo_jax.config import MeshConfig

MATRIX_UNITS = 4  # a TensorCore
DELAY_SLOTS = 4  # bundles after a branch that still run
ROWS_MACS = 128 * 128  # multiply-adds of one row in one matrix unit
FILES = {
    "packed-bundles-post-ra": "bundles",
    "pre-delay_hlo-static-per-bundle-utilization": "usage",
    "post-delay-converter": "allocations",
    "final_bundles": "final",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, as its maker publishes it (cloud.google.com/tpu/docs)."""

    name: str
    slice_name: str  # the smallest slice that the compiler knows
    clock_hz: float
    cores: int
    hbm_bytes_per_s: float

    @property
    def core_bytes_per_cycle(self) -> float:
        """HBM bytes that one core gets in a cycle while all of them read."""
        return self.hbm_bytes_per_s / self.cores / self.clock_hz

    def milliseconds(self, cycles: float) -> float:
        return cycles / self.clock_hz * 1e3


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5p", "v5p:2x2x1", 1.75e9, 2, 2.765e12),
        Chip("v4", "v4:2x2x1", 1.05e9, 2, 1.228e12),
        Chip("v5e", "v5e:2x4", 1.5e9, 1, 0.82e12),
    )
}


# --- what the compiler wrote down


@dataclasses.dataclass
class Node:
    """A stretch of bundles: the whole kernel, a loop, or what a branch may skip."""

    kind: str  # root, loop, if
    start: int
    end: int
    trips: int | None = None  # of a loop, if its bound is a constant
    children: list["Node"] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        yield self
        for child in self.children:
            yield from child.walk()

    def own(self) -> list[int]:
        """The bundles that lie in no child."""
        bundles: list[int] = []
        at = self.start
        for child in sorted(self.children, key=lambda c: c.start):
            bundles += range(at, child.start)
            at = max(at, child.end)
        return bundles + list(range(at, self.end))


@dataclasses.dataclass
class Kernel:
    """One Pallas kernel as scheduled. Cycles are those of one core."""

    name: str
    bundles: list[str]
    units: dict[str, int]  # how many of each there are
    usage: list[dict[str, int]]  # of each bundle
    vmem_bytes: int
    root: Node

    def nodes(self) -> list[Node]:
        return list(self.root.walk())

    def text(self, indices: Iterable[int]) -> str:
        return "\n".join(self.bundles[i] for i in indices)

    def matrix_cycles(self, indices: Iterable[int]) -> float:
        """The least cycles that the matrix units need for what these bundles give them."""
        return sum(self.usage[i]["MXU"] for i in indices) / MATRIX_UNITS

    def unit_floors(self, indices: Sequence[int]) -> dict[str, float]:
        """The least cycles that each unit alone would need."""
        floors = {
            unit: sum(self.usage[i][unit] for i in indices) / count
            for unit, count in self.units.items()
            if ":" not in unit  # FILL and SPILL are parts of VLOAD and VSTORE
        }
        return floors | {"MXU": self.matrix_cycles(indices)}

    def hot(self) -> Node:
        """The node with most matrix work of its own; without any, the longest."""
        return max(self.nodes(), key=lambda n: (self.matrix_cycles(n.own()), len(n.own())))

    def main_loop(self) -> Node:
        """The outermost loop that has most of the matrix work; the root if there is no loop."""
        outermost = [n for n in _outermost(self.root, "loop")]
        work = {id(n): self.matrix_cycles(range(n.start, n.end)) for n in outermost}
        return max(outermost, key=lambda n: (work[id(n)], n.end - n.start), default=self.root)

    def step(self) -> float:
        """Cycles of a pass over the main loop: regions with matrix work taken, others not, loops
        times their trips, or once."""
        return self.passed(self.main_loop(), lambda n: self._usually(n))

    def _usually(self, node: Node) -> float:
        if node.kind == "loop":
            return node.trips or 1
        return float(self.matrix_cycles(range(node.start, node.end)) > 0)

    def passed(self, node: Node, times: Callable[[Node], float]) -> float:
        """Cycles of a pass over `node` if each child runs `times(child)` times in it."""
        inside = sum(times(child) * self.passed(child, times) for child in node.children)
        return len(node.own()) + inside


def _outermost(node: Node, kind: str) -> Iterator[Node]:
    for child in node.children:
        if child.kind == kind:
            yield child
        else:
            yield from _outermost(child, kind)


# --- reading


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{")
_BRANCH = re.compile(r"sbr\.rel(?:\s*\(!?(%\S+?)\))?\s+target bundleno = (\d+)")
_ALLOCATION = re.compile(
    r"#allocation\S* \[shape = '[^']*', space=vmem, size = (0x[0-9a-f]+)"
    r"(?:, offset = (0x[0-9a-f]+|0))?"
)


def read_bundles(text: str) -> list[str]:
    """The text of each bundle; their numbers must be 0, 1, 2 and so on."""
    bundles: list[str] = []
    for line in text.splitlines():
        found = _BUNDLE.match(line)
        if found:
            if int(found[1], 16) != len(bundles):
                raise ValueError(f"bundle {len(bundles)} of a dump calls itself {found[1]}")
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    return bundles


def read_usage(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """How many of each unit there are, and how many each bundle keeps busy."""
    _, names, counts, _, *rows = text.splitlines()
    units = [name.strip() for name in names.split(",")]
    count = dict(zip(units, map(int, counts.split()), strict=True))
    return count, [
        dict(zip(units, map(int, row.split()), strict=True)) for row in rows if row.strip()
    ]


def read_vmem_bytes(text: str) -> int:
    """From the lowest to the highest address of what is allocated in VMEM."""
    placed = [(int(at, 16), int(size, 16)) for size, at in _ALLOCATION.findall(text) if at]
    if not placed:
        return sum(int(size, 16) for size, _ in _ALLOCATION.findall(text))
    return max(at + size for at, size in placed) - min(at for at, _ in placed)


def read_tree(bundles: list[str]) -> Node:
    """Loops and predicated regions, nested."""
    found = []
    for i, text in enumerate(bundles):
        for predicate, target in _BRANCH.findall(text):
            target, after = int(target), i + DELAY_SLOTS + 1
            if target <= i:
                end = min(after, len(bundles))
                found.append(Node("loop", target, end, _trips(bundles, predicate, target, end)))
            elif target > after:
                found.append(Node("if", after, target))
    root = Node("root", 0, len(bundles))
    # Of equal stretches the region is the guard of the loop.
    for node in sorted(found, key=lambda n: (n.start, -n.end, n.kind == "loop")):
        _insert(root, node)
    return root


def _insert(parent: Node, node: Node) -> None:
    for child in parent.children:
        if child.start <= node.start < child.end:
            node.end = min(node.end, child.end)  # two that cross, as an early exit does
            return _insert(child, node)
    parent.children.append(node)


def _trips(bundles: list[str], predicate: str, start: int, end: int) -> int | None:
    """How often a loop runs, if its counter is compared with a constant."""
    if not predicate:
        return None
    compare = re.compile(re.escape(predicate) + r" = scmp\.\w+\.[su]32\S* (%\S+), (\d+)")
    compares = (compare.search(bundles[i]) for i in range(end - 1, start - 1, -1))
    found = next((match for match in compares if match), None)
    if found is None:
        return None
    counter, bound = re.escape(found[1].rstrip(",")), int(found[2])
    add = re.compile(counter + r" = sadd\.s32 (?:(\d+), %\S+|%\S+, (\d+))")
    adds = (add.search(bundles[i]) for i in range(start, end))
    step = next((int(match[1] or match[2]) for match in adds if match), 1)
    return max(1, bound // max(step, 1))


def read(folder: pathlib.Path) -> list[Kernel]:
    """The Pallas kernels of a dump, in the order in which they were compiled."""
    texts: dict[str, dict[str, str]] = {}
    for path in sorted(folder.iterdir()):
        named = re.fullmatch(r"(.*?)-\d\d-(.*)\.txt", path.name)
        if named and named[2] in FILES:
            texts.setdefault(named[1], {})[FILES[named[2]]] = path.read_text(errors="replace")
    kernels = []
    for prefix, files in texts.items():
        if len(files) < len(FILES) or not _is_pallas(files["final"]):
            continue
        bundles, (units, usage) = read_bundles(files["bundles"]), read_usage(files["usage"])
        if len(bundles) != len(usage):
            raise ValueError(
                f"{prefix} has {len(bundles)} bundles and {len(usage)} rows of usage; the compiler "
                "no longer writes what this module reads"
            )
        name = re.sub(r"^\d+-", "", prefix)
        vmem_bytes = read_vmem_bytes(files["allocations"])
        kernels.append(Kernel(name, bundles, units, usage, vmem_bytes, read_tree(bundles)))
    return kernels


def _is_pallas(final: str) -> bool:
    head = next((line for line in final.splitlines() if "entry bundle:" in line), "")
    return re.search(r"entry bundle: %\S+ = .*?\bcustom-call\(", head) is not None


# --- compiling


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to compile, and how to read the time of a call from its schedule.

    build names `module:function`, which is called with `options` (JSON) in a process of its own and
    returns (function, abstract arguments). cycles gets the Pallas kernels of the function and gives
    the static cycles of one core for a call; floor_cycles is what no schedule can go below.
    """

    table: str
    name: str
    build: str
    options: dict[str, Any]
    cycles: Callable[[list[Kernel]], float]
    floor_cycles: float
    hbm_bytes: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of a case: its Pallas kernels, or the compiler's word on why there are none."""

    kernels: list[Kernel]
    hbm_bytes: float  # XLA's count of what its own operations read and write
    error: str = ""


def compile_cases(chip: Chip, cases: Sequence[Case]) -> Iterator[Compiled]:
    """For each case what became of it. One process compiles them all.

    Raises:
      RuntimeError: the process itself fails, for want of libtpu for example.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            f"--xla_jf_dump_llo_pass_label_regex={'|'.join(FILES)}",
        )
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": " ".join((os.environ.get("LIBTPU_INIT_ARGS", ""), *flags)).strip(),
        }
        builds = [[case.build, case.options] for case in cases]
        command = [sys.executable, "-m", "benchmarks.tpu_static", chip.name, json.dumps(builds)]
        run = subprocess.Popen(
            [*command, folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if line.startswith("{"):
                result = json.loads(line)
                kernels = [] if result["error"] else read(pathlib.Path(result["folder"]))
                yield Compiled(kernels, result["hbm_bytes"], result["error"])
        errors = run.stderr.read()
    if run.wait():
        raise RuntimeError(
            f"compiling for {chip.name} ended with {run.returncode}:\n{errors[-2000:]}"
        )


def _compile(chip: Chip, builds: list[tuple[str, dict[str, Any]]], folder: pathlib.Path) -> None:
    """Compiles each; prints a line of JSON for each, with the folder of what was written down."""
    import jax

    mesh = sharding.make_mesh(MeshConfig(), topology.devices(chip.slice_name)[:1])
    place = sharding.replicated(mesh)
    for number, (build, options) in enumerate(builds):
        module, name = build.split(":")
        error, hbm_bytes = "", 0.0
        try:
            function, shapes = getattr(importlib.import_module(module), name)(**options)
            placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
            with jax.set_mesh(mesh):  # public kernels ask which chip they are compiled for
                compiled = jax.jit(function).lower(*placed).compile()
            hbm_bytes = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
        except Exception as cause:  # too much VMEM, say: a row of the table, not its end
            error = f"{type(cause).__name__}: {str(cause)[:200]}".splitlines()[0]
        case = folder / f"case-{number}"
        case.mkdir()
        for path in folder.glob("*.txt"):
            path.rename(case / path.name)
        print(json.dumps({"folder": str(case), "hbm_bytes": hbm_bytes, "error": error}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="compiles cases; called by compile_cases")
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("builds", type=json.loads)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    _compile(CHIPS[arguments.chip], arguments.builds, arguments.folder)


if __name__ == "__main__":
    main()
