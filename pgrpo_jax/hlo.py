"""What a compiled program moves: bytes between devices, and in and out of memory.

Read from the text of a compiled module (`compiled.as_text()`). The compiler's own count takes a
loop's body once; here a body counts as often as it runs. Tiles that are padded count unpadded.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They hand on what is there, or run what is counted by itself.
FREE = (
    *("parameter", "constant", "iota", "partition-id", "replica-id", "after-all", "opt-barrier"),
    *("tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    "async-start",
)
ENDS = ("-done", "-update")  # of what was counted at its start
CUTS = ("dynamic-slice", "slice", "gather")  # they read of their first operand what they return
PATCHES = {
    "dynamic-update-slice": 1,
    "scatter": 2,
}  # in place: where the operand stands that is new
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of others the number in the name tells


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array of a result. Buffers in other memories than `hbm` are the chip's own."""

    bytes: float
    hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is all that follows the operands."""

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(buffer.bytes for buffer in self.buffers)

    @property
    def hbm_bytes(self) -> float:
        return sum(buffer.bytes for buffer in self.buffers if buffer.hbm)

    def called(self, attribute: str) -> str:
        """The computation that an attribute names, "" if there is none."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a module by name."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The module whose text this is. Raises ValueError if it has no entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head.group(2)
            computations[name] = {}
            entry = name if head.group(1) else entry
        elif name and " = " in line:
            instruction = _instruction(line)
            computations[name][instruction.name] = instruction
    if not entry:
        raise ValueError(f"this is no compiled module, it has no ENTRY: {text[:80]!r}")
    return Module(computations, entry)


@dataclasses.dataclass(frozen=True)
class Runs:
    """What does not stand in the module: how often a loop runs whose end is found on the device,
    and the share of its executions in which a conditional takes the branch that moves the most;
    in the others it takes the one that moves the least."""

    trips: int = 1
    taken: float = 1.0


def collective_bytes(module: Module, runs: Runs = Runs()) -> dict[str, float]:
    """Bytes that each device receives in one execution, by kind of collective, rings assumed."""

    def received(name: str, _: bool) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for instruction in module.computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                kind, size = _received(instruction, kind, name)
                total[kind] += size
        return total

    return _total(module, module.entry, received, runs)


def memory_bytes(module: Module, runs: Runs = Runs()) -> float:
    """Bytes that one execution reads from and writes to a device's main memory."""
    return sum(memory_bytes_by_kind(module, runs).values())


def memory_bytes_by_kind(module: Module, runs: Runs = Runs()) -> dict[str, float]:
    """The same by what moves them: "product" for instructions with a matrix product, "kernel",
    "collective", and "other": element by element, sums, copies."""

    def moved(name: str, fused: bool) -> dict[str, float]:
        computation, total = module.computations[name], dict.fromkeys(_KINDS, 0.0)
        for step in () if fused else computation.values():
            if step.opcode not in FREE and not step.opcode.endswith(ENDS):
                total[_kind(module, step)] += _traffic(module, computation, step)
        return total

    return _total(module, module.entry, moved, runs)


_KINDS = ("product", "kernel", "collective", "other")


def _kind(module: Module, instruction: Instruction) -> str:
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return "collective"
    if instruction.opcode == "custom-call":
        return "kernel"
    if instruction.opcode in ("dot", "convolution"):
        return "product"
    inner = module.computations.get(instruction.called("calls"), {}).values()
    kinds = {_kind(module, i) for i in inner} - {"other"}
    return next((kind for kind in _KINDS if kind in kinds), "other")


# --- how often


# Bytes by kind that a computation moves by itself, given its name and whether it runs inside of one
# instruction.
Own = Callable[[str, bool], Mapping[str, float]]


def _total(
    module: Module, name: str, own: Own, runs: Runs, fused: bool = False
) -> dict[str, float]:
    """What a computation moves by itself and by all that it runs."""
    total = defaultdict(float, own(name, fused))

    def add(moved: Mapping[str, float], times: float) -> None:
        for kind, size in moved.items():
            total[kind] += times * size

    def of(callee: str, inside: bool = fused) -> dict[str, float]:
        return _total(module, callee, own, runs, inside)

    for instruction in module.computations[name].values():
        if instruction.opcode == "while":
            add(of(instruction.called("body")), _trips(module, instruction, runs.trips))
        elif instruction.opcode == "conditional":
            branches = sorted(
                (of(branch) for branch in _branches(instruction)), key=lambda x: sum(x.values())
            )
            add(branches[-1], runs.taken)
            add(branches[0], 1 - runs.taken)
        elif instruction.opcode == "call":
            add(of(instruction.called("to_apply")), 1)
        elif not instruction.opcode.endswith(ENDS) and (callee := instruction.called("calls")):
            add(of(callee, True), 1)
    return dict(total)


def _branches(instruction: Instruction) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if several:
        return [name.strip(" %") for name in several.group(1).split(",")]
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def _trips(module: Module, loop: Instruction, unknown: int) -> int:
    """From what the compiler notes, or from a condition `index < constant`."""
    noted = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted.group(1))
    condition = module.computations[loop.called("condition")]
    root = next(i for i in condition.values() if i.root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return unknown
    bound = condition[root.operands[1]]
    return int(bound.arguments) if bound.opcode == "constant" else unknown


# --- between devices


def _received(instruction: Instruction, kind: str, computation: str) -> tuple[str, float]:
    size, n = instruction.bytes, _group(instruction.attributes)
    if instruction.opcode == "all-gather-start":  # (what is sent, what is gathered)
        size = max(buffer.bytes for buffer in instruction.buffers)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter", size * (n - 1) / n  # the TPU compiler's way to write it
    share = {
        "all-gather": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1.0,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1.0,
    }[kind]
    return kind, size * share


def _group(attributes: str) -> int:
    """Devices that take part in one collective, from the three ways to write them."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match.group(1))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return match.group(1).count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match.group(2)))
    return 1


# --- in and out of memory


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode in CUTS:
        return 2 * instruction.hbm_bytes
    if instruction.opcode in PATCHES:
        return 2 * operands[PATCHES[instruction.opcode]].hbm_bytes
    if instruction.opcode == "slice-start":  # ((what is cut), the slice, a semaphore)
        _, cut, *_ = instruction.buffers
        return cut.bytes + (cut.bytes if cut.hbm else 0.0)
    if instruction.opcode == "copy-start":  # (the copy, what is copied, a semaphore)
        copy = instruction.buffers[0]
        return operands[0].hbm_bytes + (copy.bytes if copy.hbm else 0.0)
    if instruction.opcode.endswith("-start"):  # (what is sent, what comes)
        written = max((buffer.bytes for buffer in instruction.buffers if buffer.hbm), default=0.0)
        return written + sum(operand.hbm_bytes for operand in operands)
    fused = module.computations.get(instruction.called("calls"))
    if instruction.opcode != "fusion" or fused is None:
        written = instruction.hbm_bytes - _updated_in_place(instruction)
        return written + sum(operand.hbm_bytes for operand in operands)
    read = sum(
        min(operand.hbm_bytes, _read(module, fused, number))
        for number, operand in enumerate(operands)
    )
    return read + min(instruction.hbm_bytes, _written(fused))


def _updated_in_place(instruction: Instruction) -> float:
    """Bytes of results that are operands of a kernel: nobody knows how much of them it writes."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    if not found:
        return 0.0
    aliased = re.findall(r"\{(\d*)\}: \(", found.group(1))  # {} where there is one result
    buffers = (instruction.buffers[int(number or 0)] for number in aliased)
    return sum(buffer.bytes for buffer in buffers if buffer.hbm)


def _read(module: Module, fused: Computation, number: int) -> float:
    """Bytes that a fusion reads of its operand `number`: of slices, only those."""
    parameter = next(
        i for i in fused.values() if i.opcode == "parameter" and i.arguments == str(number)
    )
    return _read_of(module, fused, parameter.name)


def _read_of(module: Module, fused: Computation, name: str) -> float:
    if fused[name].root:
        return math.inf  # all of it
    total = 0.0
    for user in fused.values():
        if name not in user.operands:
            continue
        inner = module.computations.get(user.called("calls"))
        if user.opcode in CUTS and user.operands[0] == name:
            total += user.bytes
        elif user.opcode == "bitcast":
            total += _read_of(module, fused, user.name)
        elif user.opcode == "fusion" and inner is not None:
            number = str(user.operands.index(name))
            if _returned(inner).arguments == number and _returned(inner).opcode == "parameter":
                total += _read_of(module, fused, user.name)
            else:
                total += _read(module, inner, int(number))
        elif user.opcode not in PATCHES or user.operands[0] != name:
            return math.inf
    return total


def _written(fused: Computation) -> float:
    """Bytes that a fusion writes: of what it updates in place, only what is new."""
    root = _returned(fused)
    if root.opcode not in PATCHES:
        return math.inf
    return fused[root.operands[PATCHES[root.opcode]]].bytes


def _returned(fused: Computation) -> Instruction:
    """What a fusion returns, maybe in another shape."""
    root = next(i for i in fused.values() if i.root)
    while root.opcode == "bitcast" and root.operands[0] in fused:
        root = fused[root.operands[0]]
    return root


# --- lines


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    end = _closed(right) if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = len(opcode) + _closed(rest[len(opcode) :])
    arguments = rest[len(opcode) + 1 : close - 1]
    return Instruction(
        name=left.replace("ROOT", "").strip(" %"),
        opcode=opcode,
        buffers=_buffers(shape),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[close:],
        root="ROOT" in left,
    )


def _closed(text: str) -> int:
    """Where the parenthesis that `text` begins with ends."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"a parenthesis that does not close: {text[:80]!r}")


@functools.cache
def _buffers(shape: str) -> tuple[Buffer, ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape)
    return tuple(
        Buffer(_bits(kind) * _elements(dims) / 8, "S(" not in at) for kind, dims, at in found
    )


def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.findall(r"\d+", kind)[0])


def _elements(dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(","))))
