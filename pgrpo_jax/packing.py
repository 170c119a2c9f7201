"""Completions of many lengths into few rows of one length, and rows into micro-batches.

Completions of one prompt that lie in a row share what the prompt holds before its last token: the
row holds that once, and each of them attends it (arXiv 2506.05433).
"""

import bisect
import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence

# A row of the longest sequence holds pairs only of a long and a short one; half as much again
# leaves under 10 % of padding at mixed lengths.
LONGER = 1.5
SPARED = 0.05  # of the tokens, or rows of another kind are not worth their compilation
TILE = 128  # tokens side by side in a TPU's registers


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Completions with their prompts, as numbers of tokens.

    Of sequence i, `own[i]` are its alone, and `shared[i]` those that a row holds once for all
    sequences of the same `prompts[i]`.
    """

    own: Sequence[int]
    shared: Sequence[int]
    prompts: Sequence[Hashable]

    def tokens(self, row: Sequence[int]) -> int:
        """Those of a row of sequences."""
        shared = {self.prompts[i]: self.shared[i] for i in row}
        return sum(self.own[i] for i in row) + sum(shared.values())


@dataclasses.dataclass(frozen=True)
class Packed:
    """Micro-batches of `rows` rows of indices, some of them empty. A row has room for `capacity`
    tokens; as many sequences of any length need at most `limit` micro-batches."""

    batches: list[list[list[int]]]
    rows: int
    capacity: int
    limit: int


def best_fit(sequences: Sequences, capacity: int) -> list[list[int]]:
    """Rows of indices, each row's tokens at most `capacity`, those of one prompt side by side.

    Best fit decreasing (D. S. Johnson, 1973), prompt by prompt: the longest sequence first, into
    the fullest row with room that holds its prompt, or else into the fullest that has room for
    both.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    own, shared, prompts = sequences.own, sequences.shared, sequences.prompts
    longest = max((a + b for a, b in zip(own, shared, strict=True)), default=0)
    if longest > capacity:
        raise ValueError(f"a sequence of {longest} tokens does not fit a row of {capacity}")
    groups = collections.defaultdict(list)
    for i in sorted(range(len(own)), key=lambda i: -own[i]):
        groups[prompts[i]].append(i)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for group in sorted(groups.values(), key=lambda group: -sequences.tokens(group)):
        holding: list[tuple[int, int]] = []  # the rows that hold this prompt, as in `room`
        for i in group:
            before = shared[i]
            at = bisect.bisect_left(holding, (own[i], 0))
            if at < len(holding):
                left, row = holding.pop(at)
                before = 0
            elif (at := bisect.bisect_left(room, (own[i] + before, 0))) < len(room):
                left, row = room.pop(at)
            else:
                left, row = capacity, len(rows)
                rows.append([])
            rows[row].append(i)
            bisect.insort(holding, (left - before - own[i], row))
        for place in holding:
            bisect.insort(room, place)
    return rows


def pack(sequences: Sequences, own: int, shared: int, rows_at_once: int, parts: int) -> Packed:
    """The plan of the first of `kinds`, or one that computes fewer tokens by SPARED or more: each
    kind is one more program to compile.

    Rows are dealt out by their fill, fullest first, so that those of one micro-batch are equally
    full: they lie on different devices, which wait for each other.
    """

    # A row is begun when the others lack room for a sequence of any length: such rows are full.
    limit = math.ceil(len(sequences.own) / rows_at_once)

    def plan(capacity: int, count: int) -> Packed:
        rows = sorted(best_fit(sequences, capacity), key=lambda row: -sequences.tokens(row))
        batches = [rows[i : i + count] for i in range(0, len(rows), count)]
        return Packed([_spread(batch, count) for batch in batches], count, capacity, limit)

    def computed(plan: Packed) -> int:
        return len(plan.batches) * plan.rows * plan.capacity

    first, *others = (plan(*kind) for kind in kinds(own, shared, rows_at_once, parts))
    best = min((plan for plan in others if len(plan.batches) <= limit), key=computed)
    return best if computed(best) <= (1 - SPARED) * computed(first) else first


def kinds(own: int, shared: int, rows_at_once: int, parts: int) -> list[tuple[int, int]]:
    """(capacity, rows of a micro-batch) of rows for sequences of up to so many tokens.

    Half of `rows_at_once` rows that begin with a prompt and have room for three of its longest
    completions, or for four, if those need no more than a fiftieth more tokens than rows of LONGER;
    a quarter of the same rows, of which the last micro-batch leaves fewer empty;
    `rows_at_once` rows of LONGER; and as many of the longest sequence. Always a multiple of
    `parts`. Rows of more than eight tiles are rounded up to whole ones: a TPU's compiler takes half
    as long again where it has to pad them itself.
    """
    longer = int(LONGER * (own + shared))
    found = [(longer, rows_at_once), (own + shared, rows_at_once)]
    if rows_at_once % (2 * parts) == 0:
        count = 4 if shared + 4 * own <= 1.02 * 2 * longer else 3
        rows = [rows_at_once // n for n in (2, 4) if rows_at_once % (n * parts) == 0]
        found = [(shared + count * own, n) for n in rows] + found
    return [(t if t <= 8 * TILE else math.ceil(t / TILE) * TILE, rows) for t, rows in found]


def _spread(rows: list[list[int]], count: int) -> list[list[int]]:
    """The rows, with empty ones up to `count`, in an order of which devices get equal parts.

    Devices take neighbouring rows, a power of two of them as a rule. In the order of their numbers'
    reversed bits, each of such parts has rows of every fill.
    """
    rows = rows + [[] for _ in range(count - len(rows))]
    bits = (count - 1).bit_length()
    return [rows[i] for i in sorted(range(count), key=lambda i: f"{i:0{bits}b}"[::-1])]
