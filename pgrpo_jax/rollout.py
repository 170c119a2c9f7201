"""Sampling of completions by continuous batching: a slot whose completion ends takes the next one.

A prompt is computed once for all of its samples, which share its pages of the key/value cache. The
device draws tokens without the host until `chunk` of them are drawn, or enough slots have become
free to be filled again; then the host hands out what has ended, fills the free slots and computes a
bounded number of prompt tokens, so that a long prompt never keeps the others waiting for long:
more only while many slots would be idle for want of theirs.
What ended is handed out while the device is at work again.

A completion's random numbers are a function of (seed, step, problem, sample, token index) and of
nothing else: it does not depend on its slot, its neighbours, or the number of devices.

`logps` are those of the whole softmax(logits / temperature), from float32 logits, which is what the
trainer recomputes. With top-k or top-p on, tokens come from a narrower distribution than that: such
samples are for evaluation, and `config.Config` refuses to train on them. Greedy samples
(temperature 0) carry the log-probabilities of temperature 1.
"""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pgrpo_jax import decoding, memory, reshard, rng, sampling, scheduler, sharding
from pgrpo_jax.config import Architecture, Compute, RolloutConfig
from pgrpo_jax.data import Prompt
from pgrpo_jax.models import cache as caches
from pgrpo_jax.models import kernel_cache
from pgrpo_jax.types import Completion

LEVELS = 4  # sizes of the pool of own pages, where its pages are all read for every token
MIN_PAGES = 32  # one size is enough for a pool that is no larger
LEAVE = 8  # one part in so many of the slots may be idle while others draw
HALVINGS = 2  # of the slots, as a rollout runs out
MIN_SLOTS = 8  # of a device; each number of slots is a program more to compile


@dataclasses.dataclass
class Statistics:
    """Of one rollout: seconds the host waited for the device and the device for the host, slots
    that were live and slots there were over all steps, prompt tokens computed, preemptions."""

    wait_s: float = 0.0
    host_s: float = 0.0
    live_slots: int = 0
    all_slots: int = 0
    prompt_tokens: int = 0
    visits: int = 0
    preemptions: int = 0

    def metrics(self) -> dict[str, float]:
        """rollout/*: shares of the rollout's time and slots that were idle, and counts."""
        total_s = max(self.wait_s + self.host_s, 1e-9)
        return {
            "rollout/device_idle": self.host_s / total_s,
            "rollout/host_idle": self.wait_s / total_s,
            "rollout/slots_idle": 1 - self.live_slots / max(self.all_slots, 1),
            "rollout/prompt_tokens": float(self.prompt_tokens),
            "rollout/visits": float(self.visits),
            "rollout/preemptions": float(self.preemptions),
        }


class Engine:
    """Samples completions with parameters that lie where training put them. With several processes
    each calls the same methods with the same arguments, and each gets all completions.

    Shapes are few: `cfg.batch_size` slots, a half and a quarter of them as a rollout runs out,
    pieces of prompts of the lengths of `cfg.prompt_buckets`, pools of a few sizes. All programs of
    a bucket are compiled when it is first met with a number of samples; the temperature is data.
    `statistics` are of the newest rollout.
    """

    def __init__(
        self,
        cfg: RolloutConfig,
        arch: Architecture,
        compute: Compute,
        mesh: Mesh,
        stop_ids: Sequence[int],
    ):
        self.settings, self._mesh, self._stop_ids = cfg, mesh, frozenset(stop_ids)
        self._parts = sharding.row_parts(mesh)
        self._plans: dict[tuple[int, int], scheduler.Sizes] = {}
        self._roomy: set[scheduler.Sizes] = set()
        self.warm: set[scheduler.Sizes] = set()
        self.statistics = Statistics()
        cache_dtype = compute.dtype if cfg.cache_dtype == "compute" else cfg.cache_dtype
        self.pages = pages = decoding.layout(arch, compute, cache_dtype)
        everywhere, cache = sharding.replicated(mesh), pages.shardings(arch, cache_dtype, mesh)
        self.prepare = reshard.compile_reshard(arch, compute, mesh)
        prefill = functools.partial(decoding.prefill, arch=arch, compute=compute, pages=pages)
        self.prefill = jax.jit(sharding.on(mesh, prefill), donate_argnums=1, out_shardings=cache)
        chunk = functools.partial(
            decoding.decode,
            arch=arch,
            pages=pages,
            truncate=sampling.truncation(cfg.top_k, cfg.top_p),
            stop_ids=tuple(stop_ids),
        )
        self.decode = jax.jit(
            sharding.on(mesh, chunk),
            donate_argnums=1,
            out_shardings=(cache, everywhere),
        )
        empty = functools.partial(pages.empty, arch, cache_dtype)

        def empty_cache(prompt_pages: int, own_pages: int, page_size: int) -> caches.Cache:
            return caches.Cache(empty(prompt_pages, page_size), empty(own_pages, page_size))

        self._empty = empty_cache
        self.empty = jax.jit(empty_cache, static_argnums=(0, 1, 2), out_shardings=cache)
        grow = functools.partial(caches.grown, parts=self._parts)
        self.grow = jax.jit(grow, static_argnums=1, out_shardings=cache.own)
        self._cache_sharding = cache

    def generate(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        num_samples: int,
        seed: int,
        step: int,
        temperature: float | None = None,
        limits_PG: np.ndarray | None = None,
    ) -> Iterator[Completion]:
        """`num_samples` completions of each prompt, as they finish; `cfg.temperature` by default.

        `limits_PG` are the most tokens of each completion, `cfg.max_completion_length` by default.
        A problem that comes twice gets other samples the second time.

        Raises:
          ValueError: a prompt is longer than the last bucket, or empty, or a limit is too high.
        """
        for prompt in prompts:
            self._check(prompt)
        if not prompts:
            return
        longest = self.settings.max_completion_length
        if limits_PG is None:
            limits_PG = np.full((len(prompts), num_samples), longest)
        if limits_PG.min() < 1 or limits_PG.max() > longest:
            raise ValueError(
                f"limits must be 1 to {longest}, rollout.max_completion_length, got "
                f"{limits_PG.min()} to {limits_PG.max()}"
            )
        samples = _samples(prompts, limits_PG)
        scale = np.float32(self.settings.temperature if temperature is None else temperature)
        weights = self.prepare(params)  # before it is seen how much memory is free
        sizes = self.sizes(max(len(prompt.ids) for prompt in prompts), num_samples)
        run = _Run(
            self, weights, scheduler.Scheduler(sizes, samples), rng.key(seed, "rollout", step)
        )
        self.statistics = run.statistics
        for sample in run.completions(scale):
            ids, logps = np.concatenate(sample.ids), np.concatenate(sample.logps)
            yield Completion(
                problem=prompts[sample.group.index].problem,
                prompt_ids=prompts[sample.group.index].ids,
                ids=ids,
                logps=logps,
                truncated=int(ids[-1]) not in self._stop_ids,
                group=sample.group.index,
                sample=sample.sample,
            )

    def sizes(self, prompt_length: int, num_samples: int) -> scheduler.Sizes:
        """Slots and pages for prompts up to the bucket of `prompt_length`: as `plan` says of the
        memory that was free when the bucket was first met with this number of samples."""
        bucket = next(n for n in self.settings.prompt_buckets if n >= prompt_length)
        if (bucket, num_samples) not in self._plans:  # what is free changes, the shapes must not
            free_bytes = memory.free_bytes(self._mesh)
            plan = self.plan(bucket, num_samples, free_bytes)
            self._plans[bucket, num_samples] = plan
            if 2 * self.cache_bytes(plan) <= free_bytes * self.settings.memory_fraction:
                self._roomy.add(plan)
        return self._plans[bucket, num_samples]

    def plan(self, bucket: int, num_samples: int, free_bytes: int) -> scheduler.Sizes:
        """Slots and pages for prompts of a bucket on devices with so much memory left.

        Pages are as many as the slots can ever use, or as many as fit into `cfg.memory_fraction` of
        what is free. More prompts than twice those that fill the slots are never begun.

        Raises:
          ValueError: not even one completion fits.
        """
        most = self._most(bucket, num_samples)
        shared = dataclasses.replace(most, own_pages=0)
        room = free_bytes * self.settings.memory_fraction - self.cache_bytes(shared)
        of_own = self.cache_bytes(dataclasses.replace(shared, own_pages=self._parts))
        affordable = int(room / (of_own - self.cache_bytes(shared)) * self._parts)
        own_pages, least = min(most.own_pages, affordable), most.own_table * self._parts
        if own_pages < least:
            raise ValueError(
                f"{max(affordable, 0)} pages of {most.page_size} tokens fit into the free memory "
                f"beside {most.prompt_pages} for prompts, and one completion needs {least}: "
                f"{most.own_table} on each of {self._parts} devices of data x fsdp; lower "
                "rollout.batch_size, rollout.prompt_buckets or rollout.max_completion_length"
            )
        return dataclasses.replace(most, own_pages=own_pages // self._parts * self._parts)

    def cache(self, sizes: scheduler.Sizes) -> tuple[caches.Cache, caches.Cache]:
        """The abstract cache, and where it lies."""
        pages = sizes.prompt_pages, sizes.own_pages
        shapes = jax.eval_shape(lambda: self._empty(*pages, sizes.page_size))
        return shapes, self._cache_sharding

    def cache_bytes(self, sizes: scheduler.Sizes) -> int:
        """Of one device."""
        return sharding.device_bytes(*self.cache(sizes))

    def least_bytes(self, bucket: int, num_samples: int) -> int:
        """Memory that has to be free for `plan` to find any."""
        most = self._most(bucket, num_samples)
        least = dataclasses.replace(most, own_pages=most.own_table * self._parts)
        return math.ceil(self.cache_bytes(least) / self.settings.memory_fraction) + 1

    def _most(self, bucket: int, num_samples: int) -> scheduler.Sizes:
        """Slots, and the pages that they can ever use."""
        cfg, page = self.settings, self.settings.page_size
        slots = self._rounded(cfg.batch_size or cfg.prompts_per_step * cfg.num_generations)
        owners = min(num_samples, slots)
        prompt_table = max(math.ceil((bucket - 1) / page), 1)
        own_table = math.ceil(cfg.max_completion_length / page)
        prompts = min(slots, 2 * math.ceil(slots / owners) + 1)
        return scheduler.Sizes(
            slots=slots,
            owners=owners,
            page_size=page,
            prompt_pages=self._rounded(prompts * prompt_table),
            own_pages=slots * own_table,
            prompt_table=prompt_table,
            own_table=own_table,
            parts=self._parts,
        )

    def levels(self, sizes: scheduler.Sizes) -> list[int]:
        """Sizes of the pool of own pages, up to all of them: as many pages for each slot. It grows
        where memory can hold the old and the new pool at once and every page is read, and is there
        as a whole from the start where not."""
        if sizes not in self._roomy or self.pages is kernel_cache:
            return [sizes.own_pages]
        step = max(sizes.slots * math.ceil(sizes.own_table / LEVELS), MIN_PAGES)
        levels = range(step, sizes.own_pages + step, step)
        return [self._rounded(min(level, sizes.own_pages)) for level in levels]

    def widths(self, sizes: scheduler.Sizes) -> list[int]:
        """Numbers of slots that a rollout decodes in: all, and fewer when its last completions fit
        into these, the others having no more to take."""
        halves = [sizes.slots // 2**i for i in range(HALVINGS + 1)]
        least = MIN_SLOTS * self._parts
        return halves[:1] + [n for n in halves[1:] if n >= least and n % self._parts == 0]

    def pieces(self) -> list[int]:
        """Lengths in which prompts are computed, whole pages each: the buckets, and for longer
        prompts than `prefill_tokens` what that holds."""
        page = self.settings.page_size
        longest = max(self.settings.prefill_tokens // page, 1) * page
        buckets = self.settings.prompt_buckets
        return sorted({min(math.ceil(bucket / page) * page, longest) for bucket in buckets})

    def row_counts(self, length: int, slots: int) -> list[int]:
        """Numbers of rows that prompts of a piece's length are computed in: 1, 4, 16 and so on."""
        most = min(self.settings.prefill_tokens // length, slots)
        return [4**i for i in range(16) if 4**i <= max(most, 1)]

    def in_parts(self) -> bool:
        """Whether there are prompts that are computed in several pieces."""
        return max(self.settings.prompt_buckets) - 1 > self.pieces()[-1]

    def place(self, values: Any) -> Any:
        """Host arrays on the mesh, first axes split over data and fsdp where these divide them.

        A single device gets them with the call of its program: to put a dozen small arrays there
        before, while it waits, takes longer.
        """
        if self._mesh.size == 1:
            return values
        return sharding.put(values, self.places(values))

    def places(self, values: Any) -> Any:
        """Where `place` puts (abstract) arrays."""
        rows, everywhere = sharding.batch(self._mesh), sharding.replicated(self._mesh)
        return jax.tree.map(lambda x: everywhere if x.shape[0] % self._parts else rows, values)

    def _rounded(self, count: int) -> int:
        """Slots or pages, at least so many, that divide over the devices."""
        return math.ceil(count / self._parts) * self._parts

    def _check(self, prompt: Prompt) -> None:
        longest = self.settings.prompt_buckets[-1]
        if not 0 < len(prompt.ids) <= longest:
            raise ValueError(
                f"the prompt of problem {prompt.problem.id!r} has {len(prompt.ids)} tokens, wanted "
                f"1 to {longest}, the last of rollout.prompt_buckets; add a longer bucket or drop "
                "the problem"
            )


class _Run:
    """One rollout: weights and cache on the device, slots and pages on the host."""

    def __init__(self, engine: Engine, weights: Any, plan: scheduler.Scheduler, key: jax.Array):
        self._engine, self._plan, self._key = engine, plan, key
        self.statistics = Statistics()
        self._weights = weights
        self._levels, self._pieces = engine.levels(plan.sizes), engine.pieces()
        self._widths = engine.widths(plan.sizes)
        self._cache = self._empty(self._levels[0])
        if plan.sizes not in engine.warm:
            self._compile()
            engine.warm.add(plan.sizes)

    def completions(self, temperature: np.float32) -> Iterator[scheduler.Sample]:
        """Samples in the order in which they end."""
        plan = self._plan
        ended: list[scheduler.Sample] = []
        clock = time.perf_counter()
        while plan.unfinished:
            plan.admit()
            self._fill()
            plan.reserve(decoding.CHUNK)
            self._narrow()
            running, tokens = plan.running, None
            if running:
                tokens = self._decode(temperature, self._leave(len(running)))
            self.statistics.visits += 1
            yield from ended  # the device is at work meanwhile
            begin = time.perf_counter()
            ended = [] if tokens is None else self._collect(running, jax.device_get(tokens))
            self.statistics.host_s += begin - clock
            clock = time.perf_counter()
            self.statistics.wait_s += clock - begin
        self.statistics.preemptions = plan.preemptions
        yield from ended

    def _leave(self, running: int) -> int:
        """Slots that may still be live when the device stops: so many that those which others wait
        for are few, or that the rest fits into fewer slots."""
        if not self._plan.queue:
            return max((n for n in self._widths if n < running), default=0)
        return max(running - max(self._plan.sizes.slots // LEAVE, 1), 0)

    def _narrow(self) -> None:
        """As few slots as do, once none of them is to be taken again."""
        for slots in reversed(self._widths):
            if slots < self._plan.sizes.slots and self._plan.narrow(slots):
                return

    def _decode(self, temperature: np.float32, leave: int) -> decoding.Tokens:
        parts, each = self._plan.sizes.parts, self._plan.highest_own_page()
        pages = next(n for n in self._levels if n >= each * parts)
        self._grow(pages)
        return self._dispatch(self._batch(), temperature, leave)

    def _dispatch(
        self, batch: decoding.Batch, temperature: np.float32, leave: int
    ) -> decoding.Tokens:
        self._cache, tokens = self._engine.decode(
            self._weights, self._cache, batch, self._key, temperature, np.int32(leave)
        )
        return tokens

    def _batch(self) -> decoding.Batch:
        """What the slots do next; idle ones, and those whose prompt is not there yet, nothing."""
        plan = self._plan
        batch = blank_batch(plan.sizes, self._cache.own.pages, plan.slots)
        for s in plan.running:
            batch.ids_B[s.slot], batch.prompt_B[s.slot] = s.last_id, s.group.cached
            batch.own_B[s.slot], batch.limit_B[s.slot] = s.drawn, s.limit
            batch.problem_B[s.slot], batch.sample_B[s.slot] = s.group.name, s.number
            batch.live_B[s.slot] = True
        return self._engine.place(batch)

    def _collect(
        self, running: Sequence[scheduler.Sample], tokens: decoding.Tokens
    ) -> list[scheduler.Sample]:
        """Notes what was drawn; frees the slots of the samples that have ended, and returns these.

        Copies: the rest of a chunk's arrays need not live as long as its completions.
        """
        ended = []
        for sample in running:
            slot = sample.slot
            count = int(tokens.drawn_B[slot])
            ids_T, logp_T = tokens.ids_BT[slot, :count], tokens.logp_BT[slot, :count]
            self._plan.add(sample, ids_T.copy(), logp_T.copy())
            if tokens.done_B[slot]:
                self._plan.finish(sample)
                ended.append(sample)
        self.statistics.live_slots += int(tokens.drawn_B.sum())
        self.statistics.all_slots += int(tokens.steps) * self._plan.sizes.slots
        return ended

    def _fill(self) -> None:
        """Computes prompts until few slots wait for theirs: a step costs as much with them idle."""
        self._prefill()
        while len(self._plan.unready) > self._plan.sizes.slots // LEAVE:
            self._prefill()

    def _prefill(self) -> None:
        """Prompts into the cache, in order, up to `prefill_tokens` tokens of them and one piece."""
        left, chosen = self._engine.settings.prefill_tokens, []
        for group in self._plan.unfilled():
            if left <= 0:
                break
            count = min(group.cached - group.filled, self._pieces[-1])
            length = next(n for n in self._pieces if n >= count)
            chosen.append((length, group.filled > 0, group, count))
            left -= length
        for length, behind in sorted({(length, behind) for length, behind, *_ in chosen}):
            same = [(g, count) for n, b, g, count in chosen if (n, b) == (length, behind)]
            while same:
                counts = self._engine.row_counts(length, self._plan.sizes.slots)
                rows = max(n for n in counts if n <= len(same))
                self._prefill_rows(same[:rows], rows, length, behind)
                same = same[rows:]

    def _prefill_rows(
        self, groups: Sequence[tuple[scheduler.Group, int]], rows: int, length: int, behind: bool
    ) -> None:
        page = self._plan.sizes.page_size
        prompts = blank_prompts(self._plan.sizes, rows, length, behind)
        for row, (group, count) in enumerate(groups):
            first = group.filled // page
            pages = group.pages[first : first + length // page]
            prompts.ids_RT[row, :count] = group.ids[group.filled : group.filled + count]
            prompts.count_R[row], prompts.before_R[row] = count, group.filled
            prompts.page_RM[row, : len(pages)] = pages
            if behind:
                prompts.earlier_RM[row, : len(group.pages)] = group.pages
            group.filled += count
            self.statistics.prompt_tokens += count
        prompts = self._engine.place(prompts)
        self._cache = self._engine.prefill(self._weights, self._cache, prompts)

    def _empty(self, own_pages: int) -> caches.Cache:
        sizes = self._plan.sizes
        return self._engine.empty(sizes.prompt_pages, own_pages, sizes.page_size)

    def _grow(self, own_pages: int) -> None:
        if own_pages > self._cache.own.pages:
            own = self._engine.grow(self._cache.own, own_pages)
            self._cache = caches.Cache(self._cache.prompt, own)

    def _compile(self) -> None:
        """Runs every program of this rollout's shapes on nothing: none is compiled later."""
        for length in self._pieces:
            for rows in self._engine.row_counts(length, self._plan.sizes.slots):
                self._prefill_rows((), rows, length, behind=False)
                if self._engine.in_parts():
                    self._prefill_rows((), rows, length, behind=True)
        for pages in self._levels:
            self._grow(pages)
            for slots in self._widths:
                sizes = dataclasses.replace(self._plan.sizes, slots=slots)
                batch = self._engine.place(blank_batch(sizes, pages))
                self._dispatch(batch, np.float32(1), 0)
        self._cache = self._empty(self._levels[0])


def blank_batch(
    sizes: scheduler.Sizes, own_pages: int, slots: Sequence[scheduler.Sample | None] = ()
) -> decoding.Batch:
    """Slots that do nothing, and the pages of those that hold samples; host arrays."""
    kinds = {"live_B": bool, "problem_B": np.uint32, "sample_B": np.uint32}
    kinds |= dict.fromkeys(("ids_B", "prompt_B", "own_B", "limit_B"), np.int32)
    rows = {name: np.zeros(sizes.slots, kind) for name, kind in kinds.items()}
    return decoding.Batch(**rows, **scheduler.tables(sizes, slots, own_pages))


def blank_prompts(sizes: scheduler.Sizes, rows: int, length: int, behind: bool) -> decoding.Prompts:
    """Rows without a prompt, host arrays; `behind` makes room for the pages of earlier pieces."""
    return decoding.Prompts(
        ids_RT=np.zeros((rows, length), np.int32),
        count_R=np.zeros(rows, np.int32),
        before_R=np.zeros(rows, np.int32),
        page_RM=np.full((rows, length // sizes.page_size), sizes.prompt_pages, np.int32),
        earlier_RM=np.zeros((rows, sizes.prompt_table if behind else 0), np.int32),
    )


def _samples(prompts: Sequence[Prompt], limits_PG: np.ndarray) -> Iterator[scheduler.Sample]:
    """All samples in order. Those of a problem that comes again are numbered on."""
    seen: dict[str, int] = {}
    for index, (prompt, limits_G) in enumerate(zip(prompts, limits_PG.tolist(), strict=True)):
        first = seen.get(prompt.problem.id, 0)
        seen[prompt.problem.id] = first + len(limits_G)
        name = zlib.crc32(prompt.problem.id.encode())
        group = scheduler.Group(prompt.ids, name, index, len(limits_G))
        for sample, limit in enumerate(limits_G):
            yield scheduler.Sample(group, sample, first + sample, limit)
