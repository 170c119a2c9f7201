"""Sequences of many lengths into few rows of one length, and rows into micro-batches."""

import bisect
import math
from collections.abc import Sequence

# A row of the longest sequence holds pairs only of a long and a short one; half as much again
# leaves under 10 % of padding at mixed lengths. Longer rows cost more attention, for nothing.
ROWS = (1.0, 1.5)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices, the sum of each row's lengths at most `capacity`.

    Best fit decreasing: the longest sequence first, into the fullest row that has room. Needs at
    most 11/9 of the fewest rows, and one more (D. S. Johnson, 1973).

    Raises:
      ValueError: a sequence is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[i], 0))
        if at == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return rows


def pack(
    lengths: Sequence[int], longest: int, rows_at_once: int
) -> tuple[list[list[list[int]]], int]:
    """(micro-batches of at most `rows_at_once` rows of indices, the length of a row).

    Rows hold `longest` tokens or half as much again, whichever computes fewer tokens. Rows are
    dealt out by their fill, fullest first, so that those of one micro-batch are equally full: they
    lie on different devices, which wait for each other. Of the last, some may be empty.
    """

    def computed(capacity: int, rows: Sequence[Sequence[int]]) -> int:
        return math.ceil(len(rows) / rows_at_once) * rows_at_once * capacity

    plans = [(int(longest * share), best_fit(lengths, int(longest * share))) for share in ROWS]
    capacity, rows = min(plans, key=lambda plan: computed(*plan))
    rows = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
    batches = [rows[i : i + rows_at_once] for i in range(0, len(rows), rows_at_once)]
    return [_spread(batch, rows_at_once) for batch in batches], capacity


def _spread(rows: list[list[int]], count: int) -> list[list[int]]:
    """The rows, with empty ones up to `count`, in an order of which devices get equal parts.

    Devices take neighbouring rows, a power of two of them as a rule. In the order of their numbers'
    reversed bits, each of such parts has rows of every fill.
    """
    rows = rows + [[] for _ in range(count - len(rows))]
    bits = (count - 1).bit_length()
    return [rows[i] for i in sorted(range(count), key=lambda i: f"{i:0{bits}b}"[::-1])]
