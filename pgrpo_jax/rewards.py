"""The three rewards of a completion: format, outcome, and thinking (arXiv 2508.05170, section 3.2).

Programs are judged while other completions still decode. The reward model then reads (problem,
reasoning) of the passing completions, never the program; the jitted update folds the terms into the
gated reward.
"""

import dataclasses
import importlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, cast

import jax
import numpy as np

from pgrpo_jax import config, metrics, parse, sandbox, sharding, tokenizer, types
from pgrpo_jax.models import reward

READS_ALL = ("additive", "process")  # gates that want R_t of failing completions too

RewardFunction = Callable[..., Sequence[float | None]]


def user_functions(names: Sequence[str]) -> list[RewardFunction]:
    """The functions named as "module:function", with TRL's signature f(prompts, completions,
    **columns).

    Raises:
      ValueError: a name is not of that form, or there is no such module or function.
    """
    found: list[RewardFunction] = []
    for name in names:
        module, colon, function = name.partition(":")
        config.require(bool(colon), f"rewards.functions wants 'module:function', got {name!r}")
        try:
            value = getattr(importlib.import_module(module), function, None)
        except ImportError as error:
            raise ValueError(f"rewards.functions names {name!r}: {error}") from error
        config.require(
            callable(value),
            f"rewards.functions names {name!r}: {module} has no function {function!r}",
        )
        found.append(cast(RewardFunction, value))
    return found


class ThinkingScorer:
    """R_t = sigmoid(s(problem, reasoning)), in batches of few shapes."""

    def __init__(
        self,
        params: Any,
        arch: config.Architecture,
        compute: config.Compute,
        settings: config.RewardsConfig,
        words: tokenizer.Tokenizer,
        mesh: jax.sharding.Mesh,
    ):
        self._params, self._settings, self._words = params, settings, words
        sharding.check_rows(mesh, **{"rewards.thinking_batch_size": settings.thinking_batch_size})
        rows = sharding.batch(mesh)
        self._score = jax.jit(
            lambda params, *rows_BT: jax.nn.sigmoid(reward.score(params, arch, compute, *rows_BT)),
            in_shardings=(None, rows, rows, rows),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """R_t of (statement, reasoning) pairs, float32; 0 for a reasoning over the length limit.

        A batch is as long as its longest row asks for: an eighth, a quarter, a half or all of
        `thinking_max_length`.
        """
        limit, size = self._settings.thinking_max_length, self._settings.thinking_batch_size
        ids = [self._words.reward_ids(*pair) for pair in pairs]
        scores = np.zeros(len(ids), np.float32)
        order = sorted(
            (i for i in range(len(ids)) if len(ids[i]) <= limit), key=lambda i: len(ids[i])
        )
        for begin in range(0, len(order), size):
            some = order[begin : begin + size]
            longest = len(ids[some[-1]])
            length = next(
                n for n in (-(-limit // 8), -(-limit // 4), -(-limit // 2), limit) if n >= longest
            )
            ids_BT = np.full((size, length), self._words.pad_id, np.int32)
            segments_BT = np.zeros_like(ids_BT)
            for row, i in enumerate(some):
                ids_BT[row, : len(ids[i])] = ids[i]
                segments_BT[row, : len(ids[i])] = 1
            positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BT.shape)
            found_B = self._score(self._params, ids_BT, positions_BT, segments_BT)
            scores[some] = np.asarray(found_B)[: len(some)]
        return scores


@dataclasses.dataclass(frozen=True)
class Scored:
    """A step's completions, by group and sample, with all that was found out about them.

    `r_thinking_B` is 0 where the gate does not read it and NaN nowhere; `scored_B` says where the
    reward model was asked, shadow scores included. `valid_B` is False where the judge failed.
    """

    completions: tuple[types.Completion, ...]
    texts: tuple[str, ...]
    parsed: tuple[parse.Parsed, ...]
    results: tuple[types.Result, ...]
    r_format_B: np.ndarray
    r_outcome_B: np.ndarray
    r_thinking_B: np.ndarray
    r_extra_B: np.ndarray
    valid_B: np.ndarray
    scored_B: np.ndarray
    thinking_B: np.ndarray  # what the reward model said, shadow scores included
    values: dict[str, float]

    def rows(self, advantage_B: np.ndarray) -> list[metrics.CompletionRow]:
        """What completions.jsonl keeps."""
        return [
            metrics.CompletionRow(
                problem_id=c.problem.id,
                prompt=c.problem.statement,
                completion=self.texts[i],
                reasoning=self.parsed[i].reasoning,
                code=self.parsed[i].program,
                verdict=self.results[i].verdict,
                verdicts=self.results[i].verdicts,
                rewards={
                    "format": float(self.r_format_B[i]),
                    "outcome": float(self.r_outcome_B[i]),
                    "thinking": float(self.thinking_B[i]) if self.scored_B[i] else None,
                    "extra": float(self.r_extra_B[i]) if np.isfinite(self.r_extra_B[i]) else None,
                },
                advantage=float(advantage_B[i]),
                length=len(c.ids),
                truncated=c.truncated,
            )
            for i, c in enumerate(self.completions)
        ]


class Rewards:
    """Gathers one step's completions: `add` each as it streams in, `wait` for the judge,
    `finish`."""

    def __init__(
        self,
        cfg: config.Config,
        words: tokenizer.Tokenizer,
        judge: sandbox.Judge,
        scorer: ThinkingScorer,
    ):
        self._cfg, self._words, self._judge, self._scorer = cfg, words, judge, scorer
        self._functions = user_functions(cfg.rewards.functions)
        self._opening = words.opening(cfg.data.prefill)
        self._rows: list[tuple[types.Completion, str, parse.Parsed, Future[types.Result]]] = []

    def add(self, completion: types.Completion) -> None:
        """Parses one completion and hands its program to the judge."""
        text = self._words.decode(completion.ids)
        parsed = parse.parse(text, self._opening)
        verdict = self._judge.submit(parsed.program, completion.problem.tests)
        self._rows.append((completion, text, parsed, verdict))

    def wait(self) -> None:
        """Returns when every program is judged."""
        for *_, verdict in self._rows:
            verdict.result()

    def finish(self) -> Scored:
        """The rewards, rows ordered by group and sample.

        Raises:
          ValueError: a user's function returned another number of rewards than completions.
        """
        rows = sorted(self._rows, key=lambda row: (row[0].group, row[0].sample))
        completions = [completion for completion, *_ in rows]
        texts, parsed = [text for _, text, *_ in rows], [parsed for _, _, parsed, _ in rows]
        results = [verdict.result() for *_, verdict in rows]
        valid_B = np.array([result.verdict != "infra" for result in results])
        passed_B = np.array([result.verdict == "pass" for result in results])
        format_B = np.array([p.well_formed for p in parsed])
        asked_B = self._asked(completions, parsed, passed_B)
        thinking_B = np.zeros(len(rows), np.float32)
        where = np.flatnonzero(asked_B)
        pairs = [(completions[i].problem.statement, parsed[i].reasoning) for i in where]
        thinking_B[where] = self._scorer(pairs)
        read_B = np.ones_like(passed_B) if self._cfg.update.gate in READS_ALL else passed_B
        return Scored(
            completions=tuple(completions),
            texts=tuple(texts),
            parsed=tuple(parsed),
            results=tuple(results),
            r_format_B=format_B.astype(np.float32),
            r_outcome_B=passed_B.astype(np.float32),
            r_thinking_B=np.where(read_B, thinking_B, 0).astype(np.float32),
            r_extra_B=self._extra(completions, texts),
            valid_B=valid_B,
            scored_B=asked_B,
            thinking_B=thinking_B,
            values=reward_metrics(results, parsed, format_B, passed_B, asked_B, thinking_B),
        )

    def _asked(self, completions, parsed, passed_B: np.ndarray) -> np.ndarray:
        """Which completions the reward model reads: what the gate wants, and a share of the
        rest."""
        some_B = np.array([bool(p.reasoning.strip()) for p in parsed])
        if self._cfg.update.gate in READS_ALL:
            return some_B
        threshold = self._cfg.rewards.shadow_fraction * 2**32
        names = (f"{c.problem.id}/{c.sample}" for c in completions)
        shadow_B = np.array([zlib.crc32(name.encode()) < threshold for name in names])
        return some_B & (passed_B | shadow_B)

    def _extra(self, completions: Sequence[types.Completion], texts: Sequence[str]) -> np.ndarray:
        """The sum of the user's rewards; NaN where every function said None."""
        if not self._functions:
            return np.zeros(len(completions), np.float32)
        names = {name for c in completions for name in c.problem.columns}
        columns = {name: [c.problem.columns.get(name) for c in completions] for name in names}
        prompts = [c.problem.statement for c in completions]
        terms = []
        for name, function in zip(self._cfg.rewards.functions, self._functions, strict=True):
            values = function(prompts=prompts, completions=list(texts), **columns)
            config.require(
                len(values) == len(completions),
                f"{name} returned {len(values)} rewards for {len(completions)} completions; "
                "it must return one number or None for each",
            )
            terms.append([np.nan if value is None else float(value) for value in values])
        terms_FB = np.array(terms)
        nobody_B = np.isnan(terms_FB).all(axis=0)
        return np.where(nobody_B, np.nan, np.nansum(terms_FB, axis=0)).astype(np.float32)


def reward_metrics(
    results: Sequence[types.Result],
    parsed: Sequence[parse.Parsed],
    format_B: np.ndarray,
    passed_B: np.ndarray,
    asked_B: np.ndarray,
    thinking_B: np.ndarray,
) -> dict[str, float]:
    """Shares of verdicts, and the terms on passing and failing completions; no entry for an empty
    set."""
    verdicts = Counter(result.verdict for result in results)
    values = {f"judge/{name}": count / len(results) for name, count in sorted(verdicts.items())}
    values["judge/cpu_s"] = float(sum(result.cpu_s for result in results))
    values["completions/no_program"] = float(np.mean([not p.program for p in parsed]))
    for name, chosen_B in (("passing", passed_B), ("failing", ~passed_B)):
        if chosen_B.any():
            values[f"rewards/format/{name}"] = float(format_B[chosen_B].mean())
        if (chosen_B & asked_B).any():
            values[f"rewards/thinking/{name}"] = float(thinking_B[chosen_B & asked_B].mean())
    lengths_B = np.array([len(p.reasoning) for p in parsed], float)
    both = thinking_B[asked_B], lengths_B[asked_B]
    if asked_B.sum() > 2 and all(np.std(x) > 0 for x in both):
        values["rewards/thinking/length_correlation"] = float(np.corrcoef(*both)[0, 1])
    return values
