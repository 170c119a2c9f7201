"""Who decodes in which slot, and which pages of the cache belong to whom. Host side, no device.

A prompt's pages are filled once and are free again when the last of its samples has ended. A sample
takes own pages as it grows. Prompts wait for pages and for slots; a sample that runs is never
refused a page: when none is left, the youngest sample gives up its slot and its pages, goes back to
the head of the queue and is written again later, with the same random numbers.

Slots and own pages lie in equal parts on the devices of a mesh: a slot takes pages of its part.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is fixed for one rollout. Pages hold `page_size` tokens; `owners` is the most samples of
    one prompt; `prompt_pages` and `own_pages` are the pages there are, `table` of one slot; slots
    and own pages divide into `parts`."""

    slots: int
    owners: int
    page_size: int
    prompt_pages: int
    own_pages: int
    prompt_table: int
    own_table: int
    parts: int = 1

    @property
    def prompts(self) -> int:
        """The most prompts that have pages at one time."""
        return self.prompt_pages // self.prompt_table

    def part(self, slot: int) -> int:
        return slot // (self.slots // self.parts)


@dataclasses.dataclass
class Group:
    """One prompt and where its tokens lie; `filled` of them are in the cache. Its last token never
    is: each sample begins by reading it. `places` are taken by its samples that have slots.
    """

    ids: np.ndarray
    name: int
    index: int
    waiting: int
    pages: list[int] = dataclasses.field(default_factory=list)
    places: set[int] = dataclasses.field(default_factory=set)
    filled: int = 0

    @property
    def live(self) -> int:
        """Samples in slots."""
        return len(self.places)

    @property
    def cached(self) -> int:
        """Tokens that the prompt's pages hold when they are filled."""
        return len(self.ids) - 1

    @property
    def ready(self) -> bool:
        return self.filled == self.cached


@dataclasses.dataclass
class Sample:
    """One completion in the making. `number` tells its random numbers from others' of the problem,
    `place` is its place among the owners of its prompt's pages; `pages` count in its slot's part.
    """

    group: Group
    sample: int
    number: int
    limit: int
    place: int = -1
    slot: int = -1
    start: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    logps: list[np.ndarray] = dataclasses.field(default_factory=list)
    drawn: int = 0
    last_id: int = 0


class Scheduler:
    """Slots and pages of one rollout. A visit of the host is: `admit`, `reserve`, and when the
    device has decoded, `add` and `finish`."""

    def __init__(self, sizes: Sizes, samples: Iterable[Sample]):
        self.sizes = sizes
        self.queue = collections.deque(samples)
        self.slots: list[Sample | None] = [None] * sizes.slots
        # The lowest page that is free is taken next, so that few pages stay few in a small pool.
        self._free_prompt = list(range(sizes.prompt_pages))
        self._free_own = [list(range(sizes.own_pages // sizes.parts)) for _ in range(sizes.parts)]
        self.preemptions, self._starts, self._prompts = 0, 0, 0

    @property
    def unfinished(self) -> bool:
        return bool(self.queue) or any(self.slots)

    @property
    def running(self) -> list[Sample]:
        """Samples that can decode: their prompts are in the cache."""
        return [s for s in self.slots if s is not None and s.group.ready]

    @property
    def unready(self) -> list[Sample]:
        """Samples with slots whose prompts are not in the cache yet."""
        return [s for s in self.slots if s is not None and not s.group.ready]

    def admit(self) -> None:
        """Gives free slots to the samples that wait, in order, as far as prompts find pages."""
        for slot in range(self.sizes.slots):
            if self.slots[slot] is not None or not self.queue:
                continue
            if not self._has_room(self.sizes.part(slot)):
                continue
            sample = self.queue[0]
            if not self._has_pages(sample.group):
                return
            self.queue.popleft()
            sample.slot, sample.start = slot, self._starts
            sample.last_id = int(sample.group.ids[-1])
            free = set(range(self.sizes.owners)) - sample.group.places
            sample.place = min(free)
            sample.group.places.add(sample.place)
            sample.group.waiting -= 1
            self.slots[slot] = sample
            self._starts += 1

    def _in_part(self, part: int) -> list[Sample]:
        each = self.sizes.slots // self.sizes.parts
        return [s for s in self.slots[part * each : (part + 1) * each] if s is not None]

    def _has_room(self, part: int) -> bool:
        """Whether one more sample would find an own page, and each that runs its next one: else it
        would only be admitted to be preempted."""
        S, occupied = self.sizes.page_size, self._in_part(part)
        missing = sum(math.ceil(s.limit / S) - len(s.pages) for s in occupied)
        return len(self._free_own[part]) > min(missing, len(occupied))

    def _has_pages(self, group: Group) -> bool:
        need = math.ceil(group.cached / self.sizes.page_size)
        if group.live or group.pages or need == 0:
            return True
        if need > len(self._free_prompt) or self._prompts == self.sizes.prompts:
            return False
        group.pages = self._take(self._free_prompt, need)
        self._prompts += 1
        return True

    def unfilled(self) -> list[Group]:
        """Prompts with a slot that are not wholly in the cache, the first to come first."""
        groups = {s.group.index: s for s in self.unready}
        return [s.group for s in sorted(groups.values(), key=lambda s: s.start)]

    def reserve(self, tokens: int) -> None:
        """Own pages for the next `tokens` tokens of each running sample, the oldest first."""
        for sample in sorted(self.running, key=lambda s: s.start):
            reached = min(sample.drawn + tokens, sample.limit)
            need = math.ceil(reached / self.sizes.page_size) - len(sample.pages)
            part = self.sizes.part(sample.slot)
            while need > len(self._free_own[part]) and sample.slot >= 0:
                self._preempt(part)
            if sample.slot >= 0 and need > 0:
                sample.pages += self._take(self._free_own[part], need)

    def _preempt(self, part: int) -> None:
        youngest = max(self._in_part(part), key=lambda s: s.start)
        self._release(youngest)
        youngest.ids, youngest.logps, youngest.drawn = [], [], 0
        youngest.group.waiting += 1
        self.queue.appendleft(youngest)
        self.preemptions += 1

    def add(self, sample: Sample, ids: np.ndarray, logps: np.ndarray) -> None:
        """Notes what a running sample has drawn."""
        sample.ids.append(ids)
        sample.logps.append(logps)
        sample.drawn += len(ids)
        sample.last_id = int(ids[-1]) if len(ids) else sample.last_id

    def finish(self, sample: Sample) -> None:
        """Frees the slot and the pages of a sample that has ended."""
        self._release(sample)

    def _release(self, sample: Sample) -> None:
        self._give(self._free_own[self.sizes.part(sample.slot)], sample.pages)
        self.slots[sample.slot] = None
        sample.slot = -1
        group = sample.group
        group.places.remove(sample.place)
        if group.live == 0 and (group.waiting == 0 or not group.ready):
            self._prompts -= bool(group.pages)
            self._give(self._free_prompt, group.pages)
            group.filled = 0

    def narrow(self, slots: int) -> bool:
        """Goes on with so many slots, if none waits for one and what decodes fits. Samples stay in
        the parts where their pages are."""
        parts, each = self.sizes.parts, slots // self.sizes.parts
        kept = [self._in_part(part) for part in range(parts)]
        if self.queue or max(map(len, kept)) > each:
            return False
        self.sizes = dataclasses.replace(self.sizes, slots=slots)
        self.slots = [s for part in kept for s in (*part, *[None] * (each - len(part)))]
        for slot, sample in enumerate(self.slots):
            if sample is not None:
                sample.slot = slot
        return True

    def _take(self, free: list[int], count: int) -> list[int]:
        taken, free[:] = free[:count], free[count:]
        return taken

    def _give(self, free: list[int], pages: list[int]) -> None:
        free[:] = sorted(free + pages)
        pages.clear()

    def highest_own_page(self) -> int:
        """Own pages that a part must have for those in use: the highest number, plus 1."""
        return 1 + max((page for s in self.slots if s for page in s.pages), default=0)


def tables(sizes: Sizes, slots: Sequence[Sample | None], own_pages: int) -> dict[str, np.ndarray]:
    """Owners, starts and tables of both pools, as `models.cache.Places` wants them; the pool of own
    pages has `own_pages` of them."""
    decoding = [(b, s) for b, s in enumerate(slots) if s is not None and s.group.ready]
    each = own_pages // sizes.parts
    shared = [(b, s.place, s.group.pages) for b, s in decoding]
    own = [(b, 0, [sizes.part(b) * each + page for page in s.pages]) for b, s in decoding]
    prompt_owner_XO, prompt_start_X, prompt_table_BM = _places(
        shared, (sizes.prompt_pages, sizes.owners), (sizes.slots, sizes.prompt_table)
    )
    own_owner_X1, own_start_X, own_table_BM = _places(
        own, (own_pages, 1), (sizes.slots, sizes.own_table)
    )
    return {
        "prompt_owner_XO": prompt_owner_XO,
        "prompt_start_X": sizes.page_size * prompt_start_X,
        "prompt_table_BM": prompt_table_BM,
        "own_owner_X1": own_owner_X1,
        "own_start_X": sizes.page_size * own_start_X,
        "own_table_BM": own_table_BM,
    }


def _places(
    held: Iterable[tuple[int, int, list[int]]], XO: tuple[int, int], BM: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owners [X, O] of pages, their places [X] among their owners' pages, and slots' tables [B, M],
    of slots that own pages in places. One assignment for all: a visit of the host waits for it."""
    rows = [(b, o, x, m) for b, o, pages in held for m, x in enumerate(pages)]
    b, o, x, m = np.array(rows, np.int32).reshape(-1, 4).T
    owner_XO, place_X, table_BM = (np.zeros(n, np.int32) for n in (XO, XO[0], BM))
    owner_XO[x, o], place_X[x], table_BM[b, m] = b, m, x * XO[1] + o
    return owner_XO, place_X, table_BM
