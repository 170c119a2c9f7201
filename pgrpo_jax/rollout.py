"""Sampling of completions: a prompt is prefilled once, its G samples decode with a key/value cache.

The device decodes a chunk of tokens between two visits of the host and is kept one chunk ahead, so
that finished completions can be judged while the others are still being written.

A row's random numbers are a function of (seed, step, problem, sample, token index) and of nothing
else: a completion does not depend on its batch, its row, or the number of devices.

`logps` are those of the whole softmax(logits / temperature), from float32 logits, which is what the
trainer recomputes. With top-k or top-p on, tokens come from a narrower distribution than that: such
samples are for evaluation, and `config.Config` refuses to train on them. Greedy samples
(temperature 0) carry the log-probabilities of temperature 1.
"""

import collections
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from pgrpo_jax import rng, sampling, sharding
from pgrpo_jax.config import Architecture, Compute, RolloutConfig
from pgrpo_jax.data import Prompt
from pgrpo_jax.models import cache as caches
from pgrpo_jax.models import decoder
from pgrpo_jax.types import Completion

CHUNK = 16  # tokens decoded between two visits of the host


# --- programs


@flax.struct.dataclass
class Slots:
    """B completions in the making. The next token of a row is drawn from `x_BD`."""

    cache: caches.Cache
    x_BD: jax.Array
    key_B: jax.Array
    offset_B: jax.Array  # tokens of the prompt
    length_B: jax.Array  # tokens drawn so far
    done_B: jax.Array  # has its stop token, or is at the length limit, or was never a completion


@flax.struct.dataclass
class Tokens:
    """What a chunk added, and where the rows stand. Columns after a row's end mean nothing."""

    ids_BT: jax.Array
    logp_BT: jax.Array
    length_B: jax.Array
    done_B: jax.Array


def prefill(
    params: Any,
    ids_PT: jax.Array,
    mask_PT: jax.Array,
    key: jax.Array,
    problem_B: jax.Array,
    sample_B: jax.Array,
    *,
    arch: Architecture,
    compute: Compute,
    new_tokens: int,
) -> Slots:
    """Slots of B / P samples a prompt, with room for `new_tokens`.

    Prompts are padded on the left; one without any token stands for no prompt, and its rows are
    done. A row's key is `key` folded with the uint32 `problem_B` and `sample_B`.
    """
    P, T = ids_PT.shape
    G = problem_B.shape[0] // P
    segments_PT = mask_PT.astype(jnp.int32)
    positions_PT = jnp.maximum(jnp.cumsum(segments_PT, axis=1) - 1, 0)
    empty = caches.empty(arch, compute, P, T)
    x_PTD, cache = decoder.forward(params, arch, compute, ids_PT, positions_PT, segments_PT, empty)
    assert cache is not None, "a forward pass that is given a cache returns one"

    def for_samples(y: jax.Array, rows: int) -> jax.Array:
        """Repeats each prompt's entry for its samples and adds columns behind the prompt's."""
        y = jnp.repeat(y, G, axis=rows)
        return jnp.pad(y, [(0, new_tokens if axis == rows + 1 else 0) for axis in range(y.ndim)])

    cache = caches.Cache(
        k_LBSKH=for_samples(cache.k_LBSKH, 1),
        v_LBSKH=for_samples(cache.v_LBSKH, 1),
        positions_BS=for_samples(cache.positions_BS, 0),
        segments_BS=for_samples(cache.segments_BS, 0),
        index=cache.index,
    )
    fold_in = jax.vmap(jax.random.fold_in)
    offset_B = jnp.repeat(segments_PT.sum(1), G)
    return Slots(
        cache=cache,
        x_BD=jnp.repeat(x_PTD[:, -1], G, axis=0),
        key_B=fold_in(jax.vmap(jax.random.fold_in, (None, 0))(key, problem_B), sample_B),
        offset_B=offset_B,
        length_B=jnp.zeros_like(offset_B),
        done_B=offset_B == 0,
    )


def decode(
    params: Any,
    slots: Slots,
    temperature: jax.Array,
    *,
    arch: Architecture,
    compute: Compute,
    truncate: Callable[[jax.Array], jax.Array],
    stop_ids: tuple[int, ...],
    pad_id: int,
    new_tokens: int,
) -> tuple[Slots, Tokens]:
    """Up to CHUNK tokens more in each row that is not done; stops early when all are."""
    w_DV = decoder.unembedding(params, arch)
    stop_1N = jnp.array(stop_ids, jnp.int32)[None]

    def step(carry):
        t, slots, ids_BT, logp_BT = carry
        x_BD, w = slots.x_BD, w_DV.astype(slots.x_BD.dtype)
        logits_BV = jnp.einsum("BD,DV->BV", x_BD, w, preferred_element_type=jnp.float32)
        ids_B, logp_B = sampling.draw(slots.key_B, slots.length_B, logits_BV, temperature, truncate)
        ids_B = jnp.where(slots.done_B, pad_id, ids_B)
        length_B = slots.length_B + ~slots.done_B
        stopped_B = (ids_B[:, None] == stop_1N).any(1)
        done_B = slots.done_B | stopped_B | (length_B == new_tokens)
        positions_B1 = (slots.offset_B + slots.length_B)[:, None]
        live_B1 = (~done_B)[:, None].astype(jnp.int32)
        x_B1D, cache = decoder.forward(
            params, arch, compute, ids_B[:, None], positions_B1, live_B1, slots.cache
        )
        slots = slots.replace(cache=cache, x_BD=x_B1D[:, 0], length_B=length_B, done_B=done_B)
        ids_BT = lax.dynamic_update_slice(ids_BT, ids_B[:, None], (0, t))
        return t + 1, slots, ids_BT, lax.dynamic_update_slice(logp_BT, logp_B[:, None], (0, t))

    def unfinished(carry):
        t, slots, _, _ = carry
        return (t < CHUNK) & ~slots.done_B.all()

    B = slots.done_B.shape[0]
    ids_BT = jnp.full((B, CHUNK), pad_id, jnp.int32)
    start = (jnp.int32(0), slots, ids_BT, jnp.zeros((B, CHUNK), jnp.float32))
    _, slots, ids_BT, logp_BT = lax.while_loop(unfinished, step, start)
    return slots, Tokens(ids_BT, logp_BT, slots.length_B, slots.done_B)


# --- the engine


class Engine:
    """Samples completions with parameters that lie where training put them.

    Shapes are few: there are always as many rows as `cfg.batch_size` says (idle ones fill up), and
    prompts have the lengths of `cfg.prompt_buckets`. When each bucket was met once with each number
    of samples, nothing is compiled any more; the temperature is data.
    """

    def __init__(
        self,
        cfg: RolloutConfig,
        arch: Architecture,
        compute: Compute,
        mesh: Mesh,
        stop_ids: Sequence[int],
        pad_id: int,
    ):
        self._cfg, self._mesh, self._pad_id = cfg, mesh, pad_id
        self._stop_ids = frozenset(stop_ids)
        everywhere, rows = sharding.replicated(mesh), sharding.batch(mesh)
        slots = slots_sharding(arch, mesh)
        shape = {"arch": arch, "compute": compute, "new_tokens": cfg.max_completion_length}
        self.prefill = jax.jit(
            sharding.on(mesh, functools.partial(prefill, **shape)), out_shardings=slots
        )
        chunk = functools.partial(
            decode,
            **shape,
            truncate=sampling.truncation(cfg.top_k, cfg.top_p),
            stop_ids=tuple(stop_ids),
            pad_id=pad_id,
        )
        self.decode = jax.jit(
            sharding.on(mesh, chunk),
            donate_argnums=1,
            in_shardings=(None, slots, everywhere),
            out_shardings=(slots, rows),
        )

    def generate(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        num_samples: int,
        seed: int,
        step: int,
        temperature: float | None = None,
    ) -> Iterator[Completion]:
        """`num_samples` completions of each prompt, as they finish; `cfg.temperature` by default.

        A problem that comes twice gets other samples the second time.

        Raises:
          ValueError: a prompt is longer than the last bucket, or empty.
        """
        for prompt in prompts:
            self._check(prompt)
        key = rng.key(seed, "rollout", step)
        scale = np.float32(self._cfg.temperature if temperature is None else temperature)
        first_samples = _first_samples(prompts, num_samples)
        size = self.prompts_at_once(num_samples)
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            firsts = first_samples[start : start + size]
            slots = self._start(params, some, firsts, size, num_samples, key)
            for row, ids, logps in self._rows(params, slots, scale, len(some) * num_samples):
                group, sample = divmod(row, num_samples)
                yield Completion(
                    problem=some[group].problem,
                    prompt_ids=some[group].ids,
                    ids=ids,
                    logps=logps,
                    truncated=int(ids[-1]) not in self._stop_ids,
                    group=start + group,
                    sample=sample,
                )

    def _check(self, prompt: Prompt) -> None:
        longest = self._cfg.prompt_buckets[-1]
        if not 0 < len(prompt.ids) <= longest:
            raise ValueError(
                f"the prompt of problem {prompt.problem.id!r} has {len(prompt.ids)} tokens, wanted "
                f"1 to {longest}, the last of rollout.prompt_buckets; add a longer bucket or drop "
                "the problem"
            )

    def prompts_at_once(self, num_samples: int) -> int:
        """As many as fill the batch, rounded up to what the mesh can split."""
        rows = self._cfg.batch_size or self._cfg.prompts_per_step * self._cfg.num_generations
        parts = sharding.row_parts(self._mesh)
        multiple = parts // math.gcd(parts, num_samples)
        return math.ceil(max(rows // num_samples, 1) / multiple) * multiple

    def _start(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        first_samples: Sequence[int],
        size: int,
        num_samples: int,
        key: jax.Array,
    ) -> Slots:
        """Prefilled slots, the rows of a prompt side by side; idle ones fill up `size` prompts."""
        longest = max(len(prompt.ids) for prompt in prompts)
        length = next(bucket for bucket in self._cfg.prompt_buckets if bucket >= longest)
        ids_PT = np.full((size, length), self._pad_id, np.int32)
        mask_PT = np.zeros((size, length), bool)
        names_PG = np.zeros((size, num_samples), np.uint32)
        samples_PG = np.zeros((size, num_samples), np.uint32)
        for i, (prompt, first) in enumerate(zip(prompts, first_samples, strict=True)):
            ids_PT[i, length - len(prompt.ids) :] = prompt.ids
            mask_PT[i, length - len(prompt.ids) :] = True
            names_PG[i] = zlib.crc32(prompt.problem.id.encode())
            samples_PG[i] = first + np.arange(num_samples)
        rows = sharding.batch(self._mesh)
        # Too few prompts to split: every device prefills them all.
        splits = size % sharding.row_parts(self._mesh) == 0
        ids, mask = jax.device_put(
            (ids_PT, mask_PT), rows if splits else sharding.replicated(self._mesh)
        )
        names, samples = jax.device_put((names_PG.reshape(-1), samples_PG.reshape(-1)), rows)
        return self.prefill(params, ids, mask, key, names, samples)

    def _rows(
        self, params: Any, slots: Slots, temperature: np.float32, rows: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(row, ids, logps) of the first `rows` rows, each when the chunk is there that ends it."""
        shape_BT = rows, math.ceil(self._cfg.max_completion_length / CHUNK) * CHUNK
        ids_BT, logp_BT = np.zeros(shape_BT, np.int32), np.zeros(shape_BT, np.float32)
        done_B = np.zeros(rows, bool)
        for i, tokens in enumerate(self._chunks(params, slots, temperature)):
            columns = slice(i * CHUNK, (i + 1) * CHUNK)
            ids_BT[:, columns], logp_BT[:, columns] = tokens.ids_BT[:rows], tokens.logp_BT[:rows]
            finished_B = tokens.done_B[:rows] & ~done_B
            done_B |= finished_B
            for row in np.flatnonzero(finished_B):
                length = tokens.length_B[row]
                yield int(row), ids_BT[row, :length].copy(), logp_BT[row, :length].copy()

    def _chunks(self, params: Any, slots: Slots, temperature: np.float32) -> Iterator[Tokens]:
        """Chunks, on the host, until all rows are done; the device works on the next meanwhile."""
        previous = None
        for _ in range(math.ceil(self._cfg.max_completion_length / CHUNK)):
            slots, tokens = self.decode(params, slots, temperature)
            if previous is not None:
                fetched = jax.device_get(previous)
                yield fetched
                if fetched.done_B.all():
                    return  # the chunk that is under way ends at once: it finds no row to write
            previous = tokens
        yield jax.device_get(previous)


def _first_samples(prompts: Sequence[Prompt], num_samples: int) -> list[int]:
    """Where each prompt's sample numbers begin: after those of the same problem before it."""
    seen: collections.Counter[str] = collections.Counter()
    firsts = []
    for prompt in prompts:
        firsts.append(seen[prompt.problem.id] * num_samples)
        seen[prompt.problem.id] += 1
    return firsts


def slots_sharding(arch: Architecture, mesh: Mesh) -> Slots:
    """Rows over data and fsdp, key/value heads over tensor where it divides them."""
    rows, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
    heads = "tensor" if arch.kv_heads % mesh.shape["tensor"] == 0 else None
    kv = NamedSharding(mesh, Spec(None, *rows.spec, None, heads, None))
    cache = caches.Cache(
        k_LBSKH=kv, v_LBSKH=kv, positions_BS=rows, segments_BS=rows, index=everywhere
    )
    return Slots(cache=cache, x_BD=rows, key_B=rows, offset_B=rows, length_B=rows, done_B=rows)
