"""From files to what a step takes: prompts for the rollout, padded rows for the supervised stages.

Order of rows: each epoch is a permutation of its own, a function of the seed and the epoch. The
processes deal the rows of one common stream among themselves, so the batches of a step hold the
same rows together, and a saved position means the same, whatever the number of processes.
"""

import dataclasses
import gzip
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import grain
import jax
import numpy as np
from flax import struct

from pgrpo_jax import problems, rng, types
from pgrpo_jax.config import DataConfig
from pgrpo_jax.tokenizer import Tokenizer

SYSTEM_PROMPT = (
    "You are an expert Python programmer. First think about the problem, then write the program. "
    "Answer in exactly this form:\n"
    "<think>\nyour reasoning\n</think>\n<answer>\nyour Python program\n</answer>"
)

Row = Mapping[str, Any]
T = TypeVar("T")
Batch = TypeVar("Batch", covariant=True)
_log = logging.getLogger(__name__)


class Batches(Protocol[Batch]):
    """An endless iterator whose position is JSON: a part of a checkpoint."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem and the int32 ids that its answers follow, not padded."""

    problem: types.Problem
    ids: np.ndarray


class SFTBatch(struct.PyTreeNode):
    """Rows of tokens. `loss_BT` (bool) keeps what is learnt: the completion and its stop token."""

    ids_BT: jax.Array | np.ndarray
    positions_BT: jax.Array | np.ndarray
    segments_BT: jax.Array | np.ndarray
    loss_BT: jax.Array | np.ndarray


class PairBatch(struct.PyTreeNode):
    """Preference pairs: token rows of both sides, the margin wanted (float32, 0 for none), and
    which pairs are real (bool; all of them, until somebody pads)."""

    chosen_ids_CT: jax.Array | np.ndarray
    chosen_positions_CT: jax.Array | np.ndarray
    chosen_segments_CT: jax.Array | np.ndarray
    rejected_ids_CT: jax.Array | np.ndarray
    rejected_positions_CT: jax.Array | np.ndarray
    rejected_segments_CT: jax.Array | np.ndarray
    margin_C: jax.Array | np.ndarray
    valid_C: jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Examples(Generic[T]):
    """A whole table as one big batch, the rows it was made of, and how many were left out."""

    batch: T
    rows: tuple[Row, ...]
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray | slice) -> T:
        """The batch of some rows."""
        return jax.tree.map(lambda x: x[index], self.batch)


# --- rows and problems


def read_rows(name: str, split: str = "train", limit: int = 0) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .jsonl.gz or .parquet file, or of a `datasets` id or folder.

    `split` is of the latter; its configuration follows a colon (`owner/name:configuration`). A
    `limit` of 0 reads all rows.
    """
    # Imported where they are needed: pandas alone takes seconds, and the built-in world has no use
    # for it.
    if name.endswith((".jsonl", ".jsonl.gz")):
        rows = _read_jsonl(pathlib.Path(name), limit)
    elif name.endswith(".parquet"):
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(name)
        rows = (table.slice(0, limit) if limit else table).to_pylist()
    else:
        import datasets

        path, _, configuration = name.partition(":")
        part = f"{split}[:{limit}]" if limit else split
        rows = list(datasets.load_dataset(path, configuration or None, split=part))
    if not rows:
        raise ValueError(f"{name} has no rows")
    return rows


def _read_jsonl(path: pathlib.Path, limit: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if limit and len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object, got {line[:80]!r}")
            rows.append(row)
    return rows


def load_problems(name: str, split: str, limit: int) -> list[types.Problem]:
    """The problems of `read_rows`, in any of the dialects that `problems` reads."""
    rows = read_rows(name, split, limit)
    return [problems.problem(row, f"{name}, row {i}") for i, row in enumerate(rows)]


def prompts(
    pool: Sequence[types.Problem], tokenizer: Tokenizer, settings: DataConfig
) -> tuple[list[Prompt], int]:
    """Prompts no longer than `max_prompt_length`, and how many were longer and left out.

    Raises:
      ValueError: a prompt is too long and `overlong` is "refuse", or none is left.
    """
    system_prompt = settings.system_prompt or SYSTEM_PROMPT
    kept = []
    for problem in pool:
        ids = tokenizer.prompt_ids(problem.statement, system_prompt, settings.prefill)
        if len(ids) <= settings.max_prompt_length:
            kept.append(Prompt(problem, np.asarray(ids, np.int32)))
        elif settings.overlong == "refuse":
            raise ValueError(
                f"the prompt of problem {problem.id} has {len(ids)} tokens, more than "
                f"max_prompt_length={settings.max_prompt_length}; raise it, or set overlong='drop'"
            )
    _report_dropped(len(pool), len(kept), "prompts", settings.max_prompt_length)
    return kept, len(pool) - len(kept)


def _report_dropped(total: int, kept: int, what: str, limit: int) -> None:
    if kept == 0:
        raise ValueError(f"none of {total} {what} has {limit} tokens or fewer: nothing is left")
    if kept < total:
        _log.warning("left out %d of %d %s: over %d tokens", total - kept, total, what, limit)


# --- rows of the supervised stages


def sft_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, settings: DataConfig, max_length: int
) -> Examples[SFTBatch]:
    """Rows `prompt`, `completion` (text or message lists, TRL's prompt-completion type) as tokens.

    All are padded on the right to `max_length` tokens, or to the longest row if that is 0; longer
    rows are left out. What the prompt already opens is taken off the completion's start.
    """
    opening = tokenizer.opening(settings.prefill)
    system_prompt = settings.system_prompt or SYSTEM_PROMPT
    sides = []
    for i, row in enumerate(rows):
        statement = _text(row, i, "prompt", "user")
        completion = _text(row, i, "completion", "assistant").removeprefix(opening)
        prompt_ids = tokenizer.prompt_ids(statement, system_prompt, settings.prefill)
        sides.append((prompt_ids, tokenizer.answer_ids(completion)))
    limit = max_length or max(len(prompt) + len(answer) for prompt, answer in sides)
    kept = [i for i, (prompt, answer) in enumerate(sides) if len(prompt) + len(answer) <= limit]
    _report_dropped(len(rows), len(kept), "rows", limit)
    ids, positions, segments = _padded([sum(sides[i], []) for i in kept], limit, tokenizer.pad_id)
    prompt_lengths = np.array([len(sides[i][0]) for i in kept], np.int32)
    loss = (segments > 0) & (positions >= prompt_lengths[:, None])
    batch = SFTBatch(ids, positions, segments, loss)
    return Examples(batch, tuple(rows[i] for i in kept), len(rows) - len(kept))


def pair_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length: int
) -> Examples[PairBatch]:
    """Rows `prompt`, `chosen`, `rejected` and perhaps `margin` (text or message lists; without
    `prompt` it is in the messages: TRL's preference type) as tokens that the reward model reads.

    Both sides are padded on the right to `max_length` tokens, or to the longest side if that is 0;
    pairs with a longer side are left out.
    """
    sides = []
    for i, row in enumerate(rows):
        statement = _text(row, i, "prompt" if "prompt" in row else "chosen", "user")
        reasonings = [_text(row, i, side, "assistant") for side in ("chosen", "rejected")]
        sides.append([tokenizer.reward_ids(statement, reasoning) for reasoning in reasonings])
    longest = [max(map(len, pair)) for pair in sides]
    limit = max_length or max(longest)
    kept = [i for i, length in enumerate(longest) if length <= limit]
    _report_dropped(len(rows), len(kept), "pairs", limit)
    chosen = _padded([sides[i][0] for i in kept], limit, tokenizer.pad_id)
    rejected = _padded([sides[i][1] for i in kept], limit, tokenizer.pad_id)
    margin = np.array([rows[i].get("margin") or 0.0 for i in kept], np.float32)
    batch = PairBatch(*chosen, *rejected, margin, np.ones(len(kept), bool))
    return Examples(batch, tuple(rows[i] for i in kept), len(rows) - len(kept))


def _text(row: Row, number: int, column: str, role: Literal["user", "assistant"]) -> str:
    if column not in row:
        raise ValueError(f"row {number} has no column {column!r}; it has {', '.join(row)}")
    try:
        return problems.message_text(row[column], (role,))
    except ValueError as error:
        raise ValueError(f"row {number}, column {column!r}: {error}") from error


def _padded(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions and segments (1; 0 is padding), [rows, length] int32, padded on the right."""
    ids_BT = np.full((len(rows), length), pad_id, np.int32)
    segments_BT = np.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = row
        segments_BT[i, : len(row)] = 1
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BT.shape)
    return ids_BT, positions_BT, segments_BT


# --- batches


def batches(items: Sequence[T], batch_size: int, seed: int) -> Batches[list[T]]:
    """Shuffled batches without end, the same in every process."""
    return _stream(len(items), batch_size, seed, lambda index: [items[i] for i in index], 0, 1)


def example_batches(examples: Examples[T], batch_size: int, seed: int) -> Batches[T]:
    """This process's share of such batches for a supervised stage; `batch_size` counts the rows of
    all processes."""
    process, processes = jax.process_index(), jax.process_count()
    return _stream(len(examples), batch_size, seed, examples.take, process, processes)


def _stream(
    length: int,
    batch_size: int,
    seed: int,
    take: Callable[[np.ndarray], Any],
    process: int,
    processes: int,
) -> Batches[Any]:
    if batch_size % processes:
        raise ValueError(f"batch size {batch_size} must be a multiple of {processes} processes")
    # grain's epoch e is shuffled by seed + e: seeds must be far apart, or runs share epochs.
    rows = grain.MapDataset.range(length).shuffle(seed=rng.integer(seed, "rows")).repeat()
    share = rows[process::processes].batch(batch_size // processes, drop_remainder=True).map(take)
    return iter(share.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
