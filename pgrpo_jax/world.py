"""The built-in world: small Python problems with reasonings of known quality, for runs without a
network.

A problem names a value x (an integer, a list or a text), one or two constants that have to be
worked out (`k is 7 plus 5 minus 4`), two or three steps of which one may be announced last though
it comes first (`sort it, then drop the first k, but first add m to each`), and perhaps an edge
case. A reasoning works the constants out, settles the edge case and puts the steps in order; the
program then follows it line by line. So the reasoning carries load: a program has no room to work
anything out.

Defects follow the three dimensions of arXiv 2508.05170, section 3.1, and come in kinds that
lengthen, shorten and keep the length, lest a reward model learn to count words:

    accuracy    a worked value is wrong, and used
    rigor       a step or the edge case is missing, or a needless one was added
    coherence   steps stand in another order, or use another constant than was worked out

A composition is a domain and its operations in order of execution. A fifth of the compositions is
held out: no problem of training has one of them, though a reasoning out of order may read like one.
"""

import dataclasses
import random
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from pgrpo_jax import types

Dimension = Literal["accuracy", "rigor", "coherence"]
DIMENSIONS: tuple[Dimension, ...] = ("accuracy", "rigor", "coherence")
NAMES = ("k", "m")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Operation:
    """`phrase` and `code` hold one `{}` if the operation takes a constant."""

    phrase: str
    code: str
    apply: Callable[..., Any]

    @property
    def takes_constant(self) -> bool:
        return "{}" in self.phrase


OPERATIONS: dict[str, dict[str, Operation]] = {
    "an integer": {
        "add": Operation("add {}", "x + {}", lambda x, k: x + k),
        "subtract": Operation("subtract {}", "x - {}", lambda x, k: x - k),
        "times": Operation("multiply by {}", "x * {}", lambda x, k: x * k),
        "remainder": Operation("take the remainder by {}", "x % {}", lambda x, k: x % k),
        "negate": Operation("negate it", "-x", lambda x: -x),
        "square": Operation("square it", "x * x", lambda x: x * x),
    },
    "a list": {
        "sort": Operation("sort it", "sorted(x)", sorted),
        "reverse": Operation("reverse it", "x[::-1]", lambda x: x[::-1]),
        "add_each": Operation(
            "add {} to each", "[v + {} for v in x]", lambda x, k: [v + k for v in x]
        ),
        "above": Operation(
            "keep those above {}", "[v for v in x if v > {}]", lambda x, k: [v for v in x if v > k]
        ),
        "drop": Operation("drop the first {}", "x[{}:]", lambda x, k: x[k:]),
        "take": Operation("keep the first {}", "x[:{}]", lambda x, k: x[:k]),
    },
    "a text": {
        "sort": Operation("sort it", '"".join(sorted(x))', lambda x: "".join(sorted(x))),
        "reverse": Operation("reverse it", "x[::-1]", lambda x: x[::-1]),
        "capitals": Operation("put it in capitals", "x.upper()", str.upper),
        "drop": Operation("drop the first {}", "x[{}:]", lambda x, k: x[k:]),
        "take": Operation("keep the first {}", "x[:{}]", lambda x, k: x[:k]),
        "repeat": Operation("repeat it {} times", "x * {}", lambda x, k: x * k),
    },
}
EDGES = {
    "an integer": ("negative", "x < 0"),
    "a list": ("empty", "not x"),
    "a text": ("empty", "not x"),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """The truth behind one problem. `steps` are (operation, name of its constant or ""), as
    executed."""

    domain: str
    steps: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int, int, int], ...]  # name, a, b, c: the value is a + b - c
    but_first: bool
    edge: int | None

    @property
    def composition(self) -> str:
        return f"{self.domain}: " + " ".join(operation for operation, _ in self.steps)

    def value(self, name: str) -> int | None:
        """What the constant of this name is worth; None for the operation that takes none."""
        return next((a + b - c for n, a, b, c in self.constants if n == name), None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a reasoning says. `worked` is (name, sum, subtrahend, value), sum None where no work is
    shown."""

    worked: tuple[tuple[str, int | None, int | None, int], ...]
    steps: tuple[tuple[str, int | None], ...]
    edge: int | None


@dataclasses.dataclass(frozen=True)
class Grade:
    """The oracle's word on one reasoning; `perfect` also wants every constant worked and nothing
    said twice."""

    accuracy: bool
    rigor: bool
    coherence: bool
    perfect: bool


# --- problems


def held_out(composition: str) -> bool:
    """True for a fifth of the compositions. crc32, because `hash` differs between processes."""
    return zlib.crc32(composition.encode()) % 5 == 0


def _draw_spec(rng: random.Random) -> Spec:
    domain = rng.choice(list(OPERATIONS))
    operations = OPERATIONS[domain]
    while True:
        chosen = rng.sample(list(operations), rng.choice((2, 3)))
        if 1 <= sum(operations[o].takes_constant for o in chosen) <= len(NAMES):
            break
    but_first = rng.random() < 0.5
    told = _as_told(tuple(chosen)) if but_first else tuple(chosen)
    names = dict(zip((o for o in told if operations[o].takes_constant), NAMES, strict=False))
    constants = []
    for name in sorted(names.values()):
        total = rng.randint(3, 9)
        a = rng.randint(1, total - 1)
        constants.append((name, a, total - a, rng.randint(1, total - 2)))
    edge = rng.randint(0, 9) if rng.random() < 0.5 else None
    steps = tuple((o, names.get(o, "")) for o in chosen)
    return Spec(domain, steps, tuple(constants), but_first, edge)


def _as_told(steps: tuple[T, ...]) -> tuple[T, ...]:
    """Steps in the order in which `but first` has them told."""
    return steps[1:] + steps[:1]


def _draw_inputs(domain: str, rng: random.Random) -> list[Any]:
    if domain == "an integer":
        return [-rng.randint(1, 30), 0, *(rng.randint(1, 60) for _ in range(4))]
    if domain == "a list":
        return [[], *([rng.randint(0, 20) for _ in range(rng.randint(4, 12))] for _ in range(5))]
    return ["", *("".join(rng.choices("abcdefgh", k=rng.randint(4, 12))) for _ in range(5))]


def execute(plan: Plan, domain: str, x: Any) -> Any:
    """What the program of `plan` returns for `x`."""
    if plan.edge is not None and (x < 0 if domain == "an integer" else not x):
        return plan.edge
    for name, constant in plan.steps:
        apply = OPERATIONS[domain][name].apply
        x = apply(x) if constant is None else apply(x, constant)
    return x


def statement(spec: Spec) -> str:
    """The problem in English."""
    operations = OPERATIONS[spec.domain]
    phrases = [operations[o].phrase.format(name) for o, name in spec.steps]
    told = "x is " + spec.domain + ".\n"
    told += "".join(f"{n} is {a} plus {b} minus {c}.\n" for n, a, b, c in spec.constants)
    if spec.edge is not None:
        told += f"if x is {EDGES[spec.domain][0]}, return {spec.edge}.\n"
    if spec.but_first:
        return told + ", then ".join(phrases[1:]) + ", but first " + phrases[0] + ".\n"
    return told + ", then ".join(phrases) + ".\n"


def problems(split: Literal["train", "heldout"], count: int, seed: int) -> list[types.Problem]:
    """`count` distinct problems whose compositions belong to `split`. Column `spec` holds the
    truth."""
    rng = random.Random(zlib.crc32(f"{split}/{seed}".encode()))
    found: dict[str, types.Problem] = {}
    while len(found) < count:
        spec = _draw_spec(rng)
        text, plan = statement(spec), reference_plan(spec)
        if held_out(spec.composition) != (split == "heldout") or text in found:
            continue
        inputs = _draw_inputs(spec.domain, rng)
        tests = types.Tests(
            kind="call",
            function="f",
            inputs=tuple((x,) for x in inputs),
            outputs=tuple(execute(plan, spec.domain, x) for x in inputs),
        )
        columns = {"spec": spec, "composition": spec.composition}
        found[text] = types.Problem(f"{split}-{seed}-{len(found)}", text, tests, columns)
    return list(found.values())


# --- reasonings and programs


def reference_plan(spec: Spec) -> Plan:
    """The complete and correct plan."""
    worked = tuple((n, a + b, c, a + b - c) for n, a, b, c in spec.constants)
    steps = tuple((o, spec.value(name)) for o, name in spec.steps)
    return Plan(worked, steps, spec.edge)


def reasoning(plan: Plan, domain: str) -> str:
    """The plan in words, one thought a line."""
    lines = []
    for name, total, subtrahend, value in plan.worked:
        work = "" if total is None else f"{total} - {subtrahend} = "
        lines.append(f"{name} = {work}{value}.")
    if plan.edge is not None:
        lines.append(f"if {EDGES[domain][0]}, return {plan.edge}.")
    lines += [OPERATIONS[domain][o].phrase.format(constant) + "." for o, constant in plan.steps]
    return "\n".join(lines) + "\n"


def program(plan: Plan, domain: str) -> str:
    """The plan in Python."""
    lines = ["def f(x):"]
    if plan.edge is not None:
        lines += [f"    if {EDGES[domain][1]}:", f"        return {plan.edge}"]
    lines += [
        "    x = " + OPERATIONS[domain][o].code.format(constant) for o, constant in plan.steps
    ]
    return "\n".join(lines) + "\n    return x\n"


def completion(reasoning_text: str, program_text: str) -> str:
    """Reasoning and program in the format that the format reward asks for."""
    return f"<think>\n{reasoning_text}</think>\n<answer>\n{program_text}</answer>\n"


def _other(value: int, rng: random.Random, low: int = 1, high: int = 9) -> int:
    return rng.choice([v for v in range(low, high + 1) if v != value])


def _use(plan: Plan, old: int, new: int) -> tuple[tuple[str, int | None], ...]:
    return tuple((o, new if constant == old else constant) for o, constant in plan.steps)


def wrong_value(plan: Plan, spec: Spec, rng: random.Random) -> Plan:
    """Accuracy: one constant comes out wrong, in its sum or its difference, and is used."""
    i = rng.randrange(len(plan.worked))
    name, total, subtrahend, value = plan.worked[i]
    near = [v for v in range(max(1, value - 3), min(9, value + 3) + 1) if v != value]
    new = rng.choice(near)
    if total is not None and rng.random() < 0.5:
        total = total + new - value
    worked = plan.worked[:i] + ((name, total, subtrahend, new),) + plan.worked[i + 1 :]
    uses = {o for o, n in spec.steps if n == name}
    steps = tuple((o, new if o in uses else constant) for o, constant in plan.steps)
    return dataclasses.replace(plan, worked=worked, steps=steps)


def wrong_rigor(plan: Plan, spec: Spec, rng: random.Random) -> Plan:
    """Rigor: a step or the edge case is missing, or a needless one was added; as often longer as
    shorter."""
    at = rng.randrange(len(plan.steps))
    kind = rng.choice(("missing step", "needless step", "edge"))
    if kind == "edge":
        return dataclasses.replace(plan, edge=rng.randint(0, 9) if plan.edge is None else None)
    if kind == "missing step":
        return dataclasses.replace(plan, steps=plan.steps[:at] + plan.steps[at + 1 :])
    used = {o for o, _ in plan.steps}
    needless = rng.choice([o for o in OPERATIONS[spec.domain] if o not in used])
    constant = rng.randint(1, 9) if OPERATIONS[spec.domain][needless].takes_constant else None
    return dataclasses.replace(
        plan, steps=plan.steps[:at] + ((needless, constant),) + plan.steps[at:]
    )


def wrong_order(plan: Plan, spec: Spec, rng: random.Random) -> Plan:
    """Coherence: steps out of order (often the order of the telling), or a constant used that was
    not found."""
    constants = [i for i, (_, constant) in enumerate(plan.steps) if constant is not None]
    if constants and rng.random() < 0.4:
        i = rng.choice(constants)
        operation, constant = plan.steps[i]
        step = (operation, _other(constant or 0, rng))
        return dataclasses.replace(plan, steps=plan.steps[:i] + (step,) + plan.steps[i + 1 :])
    steps = _as_told(plan.steps)
    if not spec.but_first:
        i = rng.randrange(len(plan.steps) - 1)
        steps = plan.steps[:i] + (plan.steps[i + 1], plan.steps[i]) + plan.steps[i + 2 :]
    return dataclasses.replace(plan, steps=steps)


DEFECTS: dict[Dimension, Callable[[Plan, Spec, random.Random], Plan]] = {
    "accuracy": wrong_value,
    "rigor": wrong_rigor,
    "coherence": wrong_order,
}


def _terse(plan: Plan) -> Plan:
    return dataclasses.replace(plan, worked=tuple((n, None, None, v) for n, _, _, v in plan.worked))


def _wordy(plan: Plan, rng: random.Random) -> Plan:
    i = rng.randrange(len(plan.steps))
    return dataclasses.replace(plan, steps=plan.steps[: i + 1] + plan.steps[i:])


def initial_plan(spec: Spec, rng: random.Random) -> Plan:
    """Right in what it says, but with the work not shown, or with a step said twice."""
    plan = reference_plan(spec)
    return _terse(plan) if rng.random() < 0.5 else _wordy(plan, rng)


def degraded_plan(spec: Spec, dimension: Dimension, rng: random.Random) -> Plan:
    """A plan with a defect of `dimension`; some are terse or wordy too."""
    plan = DEFECTS[dimension](reference_plan(spec), spec, rng)
    draw = rng.random()
    if draw < 0.15:
        return _terse(plan)
    return _wordy(plan, rng) if draw < 0.3 and plan.steps else plan


# --- the oracle


_CONSTANT = re.compile(r"(\w) = (?:(\d+) - (\d+) = )?(\d+)\.")
_EDGE = re.compile(r"if (?:empty|negative), return (\d+)\.")


def read_plan(text: str, domain: str) -> Plan | None:
    """The plan that a reasoning's text says, None if a line is none of a plan's, or two say the
    same edge."""
    worked, steps, edges = [], [], []
    for line in text.splitlines():
        if found := _CONSTANT.fullmatch(line):
            name, total, subtrahend, value = found.groups()
            shown = (None, None) if total is None else (int(total), int(subtrahend))
            worked.append((name, *shown, int(value)))
        elif found := _EDGE.fullmatch(line):
            edges.append(int(found[1]))
        elif step := _read_step(line, domain):
            steps.append(step)
        elif line:
            return None
    if len(edges) > 1:
        return None
    return Plan(tuple(worked), tuple(steps), edges[0] if edges else None)


def _read_step(line: str, domain: str) -> tuple[str, int | None] | None:
    for name, operation in OPERATIONS[domain].items():
        pattern = re.escape(operation.phrase + ".").replace(r"\{\}", r"(\d+)")
        if found := re.fullmatch(pattern, line):
            return name, int(found[1]) if operation.takes_constant else None
    return None


def grade(spec: Spec, text: str) -> Grade:
    """What is true of a reasoning: the oracle, a metric of this world and never a reward."""
    plan, truth = read_plan(text, spec.domain), reference_plan(spec)
    if plan is None:
        return Grade(accuracy=False, rigor=False, coherence=False, perfect=False)
    values = {name: value for name, _, _, value in truth.worked}
    accuracy = all(
        values.get(name) == value and (total is None or (name, total, less, value) in truth.worked)
        for name, total, less, value in plan.worked
    )
    said = [o for i, (o, c) in enumerate(plan.steps) if i == 0 or plan.steps[i - 1] != (o, c)]
    wanted = [o for o, _ in truth.steps]
    rigor = (
        sorted(said) == sorted(wanted)
        and plan.edge == truth.edge
        and {n for n, *_ in plan.worked} == set(values)
    )
    found = {name: value for name, _, _, value in plan.worked}
    names = dict(spec.steps)
    uses_what_it_found = all(
        constant is None or constant == found.get(names.get(operation, ""), constant)
        for operation, constant in plan.steps
    )
    in_order = [o for o in said if o in wanted] == [o for o in wanted if o in said]
    return Grade(accuracy, rigor, uses_what_it_found and in_order, plan == truth)


# --- rows to learn from


def _draw_plan(spec: Spec, rng: random.Random) -> tuple[Plan, Plan]:
    """A plan of mixed quality, and the plan that its program follows.

    Most programs follow their reasoning; some slip, and some are right in spite of it. So neither
    of the two rewards can stand for the other. `but first` is overlooked more often than not: then
    the most probable answer is wrong, which no sharpening mends.
    """
    draw = rng.random()
    if draw < 0.65:
        if spec.but_first and rng.random() < 0.55:
            spec = dataclasses.replace(spec, steps=_as_told(spec.steps))
        plan = reference_plan(spec)
        followed = plan if rng.random() < 0.95 else degraded_plan(spec, _dimension(rng), rng)
        return (plan if draw < 0.3 else initial_plan(spec, rng)), followed
    plan = degraded_plan(spec, _dimension(rng), rng)
    return plan, plan if rng.random() < 0.8 else reference_plan(spec)


def _dimension(rng: random.Random) -> Dimension:
    return rng.choice(DIMENSIONS)


def _malform(text: str, rng: random.Random) -> str:
    return text.replace(rng.choice(("<think>\n", "</think>\n", "<answer>\n", "</answer>\n")), "")


def sft_rows(pool: list[types.Problem], count: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows `prompt`, `completion` of mixed quality: 30 % good, 35 % terse or wordy, 35 % degraded;
    10 % malformed. 55 % of the good, terse and wordy overlook a `but first`."""
    rng = random.Random(zlib.crc32(f"sft/{seed}".encode()))
    for _ in range(count):
        problem = rng.choice(pool)
        spec = problem.columns["spec"]
        plan, followed = _draw_plan(spec, rng)
        text = completion(reasoning(plan, spec.domain), program(followed, spec.domain))
        yield {
            "prompt": problem.statement,
            "completion": _malform(text, rng) if rng.random() < 0.1 else text,
        }


def pair_rows(
    pool: list[types.Problem], dimensions: tuple[Dimension, ...], seed: int
) -> Iterator[dict[str, str]]:
    """OD pairs: for each problem and dimension one of each kind, optimised > initial, optimised >
    degraded and initial > degraded."""
    rng = random.Random(zlib.crc32(f"pairs/{seed}".encode()))
    for problem in pool:
        spec = problem.columns["spec"]
        optimised = reasoning(reference_plan(spec), spec.domain)
        sides: list[tuple[str, str, str, str]] = []
        for dimension in dimensions:
            initial = reasoning(initial_plan(spec, rng), spec.domain)
            degraded = reasoning(degraded_plan(spec, dimension, rng), spec.domain)
            sides.append(("optimised>initial", dimension, optimised, initial))
            sides.append(("optimised>degraded", dimension, optimised, degraded))
            sides.append(("initial>degraded", dimension, initial, degraded))
        for kind, found_along, chosen, rejected in sides:
            yield {
                "prompt": problem.statement,
                "chosen": chosen,
                "rejected": rejected,
                "kind": kind,
                "dimension": found_along,
                "generator": "world",
                "problem_id": problem.id,
            }


# --- the vocabulary


def _pieces() -> tuple[str, ...]:
    """Every piece of text that a statement, a reasoning or a program is made of."""
    pieces = ["<think>\n", "</think>\n", "<answer>\n", "</answer>\n", "\n"]
    pieces += ["def f(x):\n", "    return x\n"]
    pieces += [".\n", ", then ", ", but first ", " plus ", " minus ", " - ", " = "]
    pieces += map(str, range(13))
    for name in NAMES:
        pieces += [name, f"{name} is ", f"{name} = "]
    for domain, operations in OPERATIONS.items():
        word, condition = EDGES[domain]
        pieces += [f"x is {domain}.\n", f"if x is {word}, return ", f"if {word}, return "]
        pieces += [f"    if {condition}:\n        return "]
        for operation in operations.values():
            pieces += operation.phrase.split("{}")
            pieces += f"    x = {operation.code}\n".split("{}")
    return tuple(sorted({piece for piece in pieces if piece}))


PIECES = _pieces()
