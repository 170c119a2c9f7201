"""The three rewards of a completion: format, outcome, and thinking (arXiv 2508.05170, section 3.2).

While other completions still decode, programs are judged, and the reward model reads (problem,
reasoning) of those that have passed, never the program. The jitted update folds the terms into the
gated reward.
"""

import dataclasses
import importlib
import math
import queue
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, get_args

import jax
import numpy as np

from pgrpo_jax import config, hosts, metrics, parse, sandbox, sharding, tokenizer, types
from pgrpo_jax.models import reward

TERMS = ("format", "outcome", "thinking")
READS_ALL = ("additive", "process")  # gates that want R_t of failing completions too

RewardFunction = Callable[..., Sequence[float | None]]


def user_functions(names: Sequence[str]) -> dict[str, RewardFunction]:
    """The functions named as "module:function", with TRL's signature f(prompts, completions,
    **columns), by the name of the function, which names its term in the metrics.

    Raises:
      ValueError: a name is not of that form, there is no such function, or a term is named twice.
    """
    found: dict[str, RewardFunction] = {}
    for name in names:
        module, _, function = name.partition(":")
        complaint = f"rewards.functions names {name!r}"
        config.require(bool(module and function), f"{complaint}; wanted 'module:function'")
        try:
            members = vars(importlib.import_module(module))
        except ImportError as error:
            raise ValueError(f"{complaint}: {error}; is its folder on PYTHONPATH?") from error
        config.require(
            callable(members.get(function)), f"{complaint}: {module} has no function {function!r}"
        )
        config.require(
            function not in found and function not in TERMS,
            f"{complaint}, but there is a term {function!r} already; rename the function",
        )
        found[function] = members[function]
    return found


def compile_score(
    arch: config.Architecture, compute: config.Compute, mesh: jax.sharding.Mesh
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
    """The jitted (params, ids_BT, positions_BT, segments_BT) -> R_t of each row, float32."""

    def score(params: Any, *rows_BT: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(reward.score(params, arch, compute, *rows_BT))

    shapes = jax.eval_shape(lambda key: reward.init(arch, compute, key), jax.random.key(0))
    rows = sharding.batch(mesh)
    return jax.jit(
        sharding.on(mesh, score),
        in_shardings=(sharding.shardings(shapes, mesh), rows, rows, rows),
        out_shardings=rows,
    )


class ThinkingScorer:
    """R_t = sigmoid(s(problem, reasoning)), in batches of few shapes.

    With `settings.offload` the parameters lie in the host's memory and are on the device for the
    length of a call of `Scores.finish`: drop your own reference to `params`.
    """

    def __init__(
        self,
        params: Any,
        arch: config.Architecture,
        compute: config.Compute,
        settings: config.RewardsConfig,
        words: tokenizer.Tokenizer,
        mesh: jax.sharding.Mesh,
    ):
        sharding.check_rows(mesh, **{"rewards.thinking_batch_size": settings.thinking_batch_size})
        self._settings, self._words, self._mesh = settings, words, mesh
        self._places = sharding.shardings(params, mesh)
        self._score = compile_score(arch, compute, mesh)
        home = sharding.on_host(self._places) if settings.offload else self._places
        self.params = jax.device_put(params, home)

    @property
    def eager(self) -> bool:
        """Whether scores may be computed before all pairs are known. Several processes must start
        the same programs in the same order, and do not see the same pairs first; and what lies in
        the host's memory is fetched once, not for each batch."""
        return jax.process_count() == 1 and not self._settings.offload

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of rows: an eighth, a quarter, a half and all of `thinking_max_length`."""
        limit = self._settings.thinking_max_length
        return -(-limit // 8), -(-limit // 4), -(-limit // 2), limit

    @property
    def size(self) -> int:
        """Rows that a process puts into a batch."""
        return self._settings.thinking_batch_size // jax.process_count()

    def begin(self) -> "Scores":
        """For the pairs of one step."""
        return Scores(self)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """R_t of (statement, reasoning) pairs, float32; NaN for a row over the length limit."""
        scores = self.begin()
        for pair in pairs:
            scores.add(*pair)
        return scores.finish()

    def ids(self, statement: str, reasoning: str) -> Sequence[int]:
        """What the model reads."""
        return self._words.reward_ids(statement, reasoning)

    def on_device(self) -> Any:
        """The parameters where they are computed with; moves nothing unless they are away."""
        return jax.device_put(self.params, self._places)

    def start(self, params: Any, ids: Sequence[Sequence[int]], length: int) -> jax.Array:
        """Scores of a batch's rows by `on_device` parameters, without waiting for them."""
        ids_BT = np.full((self.size, length), self._words.pad_id, np.int32)
        segments_BT = np.zeros_like(ids_BT)
        for row, some in enumerate(ids):
            ids_BT[row, : len(some)] = some
            segments_BT[row, : len(some)] = 1
        positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BT.shape)
        rows = sharding.put_rows(self._mesh, (ids_BT, positions_BT, segments_BT))
        return self._score(params, *rows)


class Scores:
    """R_t of pairs that come one by one, in batches of few shapes.

    A full batch is begun at once: the device works it off between two visits of the rollout. A row
    is computed at the length that it needs itself, so that its score hangs neither on the others
    nor on when it came.
    """

    def __init__(self, scorer: ThinkingScorer):
        self._scorer, self._count, self.early = scorer, 0, 0
        self._waiting: dict[int, list[tuple[int, Sequence[int]]]] = {n: [] for n in scorer.lengths}
        self._begun: list[tuple[list[int], jax.Array]] = []

    def add(self, statement: str, reasoning: str) -> None:
        """One more pair."""
        ids, number = self._scorer.ids(statement, reasoning), self._count
        self._count += 1
        length = next((n for n in self._waiting if n >= len(ids)), None)
        if length is None:
            return
        self._waiting[length].append((number, ids))
        if self._scorer.eager and len(self._waiting[length]) == self._scorer.size:
            self.early += self._scorer.size
            self._begin(length, self._scorer.on_device())

    def finish(self) -> np.ndarray:
        """R_t in the order of `add`, float32; NaN for a row over the length limit."""
        params = self._scorer.on_device()
        missing = [math.ceil(len(rows) / self._scorer.size) for rows in self._waiting.values()]
        every = zip(*hosts.gather(missing), strict=True)  # another process may have more
        for length, counts in zip(self._waiting, every, strict=True):
            for _ in range(max(counts)):
                self._begin(length, params)
        scores = np.full(self._count, np.nan, np.float32)
        for numbers, batch in self._begun:
            scores[numbers] = sharding.local_rows(batch)[: len(numbers)]
        return scores

    def _begin(self, length: int, params: Any) -> None:
        rows, size = self._waiting[length], self._scorer.size
        batch, self._waiting[length] = rows[:size], rows[size:]
        scores = self._scorer.start(params, [ids for _, ids in batch], length)
        self._begun.append(([number for number, _ in batch], scores))


@dataclasses.dataclass(frozen=True)
class Scored:
    """A step's completions, by group and sample, with all that was found out about them.

    `r_*_B` (float32) are for the update: `r_thinking_B` is 0 where the gate does not read it, and
    for a missing reasoning or one over the length limit; `r_extra_B` is the sum of the user's
    terms, NaN where all of them are. `valid_B` is False where the judge failed. `terms` holds all
    that was said, by name, NaN where nothing was: here `thinking` has the shadow scores too.
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
    terms: dict[str, np.ndarray]
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
                tier=self.results[i].tier,
                rewards={
                    name: None if np.isnan(term_B[i]) else float(term_B[i])
                    for name, term_B in self.terms.items()
                },
                advantage=float(advantage_B[i]),
                length=len(c.ids),
                truncated=c.truncated,
            )
            for i, c in enumerate(self.completions)
        ]


def joined(parts: Sequence[Scored], places: Sequence[np.ndarray]) -> Scored:
    """The completions of each part that `places` names, one after the other."""

    def entries(name: str) -> tuple[Any, ...]:
        return tuple(
            getattr(part, name)[i] for part, index in zip(parts, places, strict=True) for i in index
        )

    def array(name: str) -> np.ndarray:
        return np.concatenate(
            [getattr(part, name)[index] for part, index in zip(parts, places, strict=True)]
        )

    terms = {
        name: np.concatenate(
            [part.terms[name][index] for part, index in zip(parts, places, strict=True)]
        )
        for name in parts[0].terms
    }
    parsed, results = entries("parsed"), entries("results")
    return Scored(
        completions=entries("completions"),
        texts=entries("texts"),
        parsed=parsed,
        results=results,
        r_format_B=array("r_format_B"),
        r_outcome_B=array("r_outcome_B"),
        r_thinking_B=array("r_thinking_B"),
        r_extra_B=array("r_extra_B"),
        valid_B=array("valid_B"),
        terms=terms,
        values=reward_metrics(results, parsed, terms),
    )


_Row = tuple[types.Completion, str, parse.Parsed, Future[types.Result] | None]


class Rewards:
    """Gathers one step's completions: `add` each as it streams in, `wait` for the judge,
    `finish`.

    With several processes each adds all of them, judges and scores those of its `own` groups (by
    default of all), and is told of the others' in `finish`.
    """

    def __init__(
        self,
        cfg: config.Config,
        words: tokenizer.Tokenizer,
        judge: sandbox.Judge,
        scorer: ThinkingScorer,
        own: range | None = None,
    ):
        self._cfg, self._words, self._judge = cfg, words, judge
        self._own = own
        self._functions = user_functions(cfg.rewards.functions)
        self._opening = words.opening(cfg.data.prefill)
        self._rows: list[_Row] = []
        self._judged: queue.SimpleQueue[_Row] = queue.SimpleQueue()
        self._unread, self._asked = 0, list[tuple[int, int]]()
        self._thinking = scorer.begin()
        self._counters, self._begin = judge.counters, time.monotonic()
        self._judged_at: float | None = None

    def add(self, completion: types.Completion) -> None:
        """Parses one completion and hands its program to the judge, if this process does."""
        text = self._words.decode(completion.ids)
        parsed = parse.parse(text, self._opening)
        verdict = None
        if self._own is None or completion.group in self._own:
            verdict = self._judge.submit(parsed.program, completion.problem.tests)
        row = completion, text, parsed, verdict
        self._rows.append(row)
        if verdict is not None:
            self._unread += 1
            verdict.add_done_callback(lambda _: self._judged.put(row))
        while not self._judged.empty():
            self._ask()

    def wait(self) -> None:
        """Returns when every program that is judged here is."""
        for *_, verdict in self._rows:
            if verdict is not None:
                verdict.result()
        self._judged_at = self._judged_at or time.monotonic()

    def finish(self) -> Scored:
        """The rewards, rows ordered by group and sample.

        Raises:
          ValueError: a user's function returned another number of rewards than completions.
        """
        self.wait()
        while self._unread:
            self._ask()
        rows = sorted(self._rows, key=lambda row: (row[0].group, row[0].sample))
        results, terms = self._everyones([row for row in rows if row[3] is not None])
        completions = [completion for completion, *_ in rows]
        texts, parsed = [text for _, text, *_ in rows], [parsed for _, _, parsed, _ in rows]
        valid_B = np.array([result.verdict != "infra" for result in results])
        passed_B = np.array([result.verdict == "pass" for result in results])
        thinking_B = terms.pop("thinking")
        said = {
            "format": np.array([p.well_formed for p in parsed], np.float32),
            "outcome": np.where(valid_B, passed_B, np.nan).astype(np.float32),
            "thinking": thinking_B,
            **terms,
        }
        read_B = passed_B | (self._cfg.update.gate in READS_ALL)
        return Scored(
            completions=tuple(completions),
            texts=tuple(texts),
            parsed=tuple(parsed),
            results=tuple(results),
            r_format_B=said["format"],
            r_outcome_B=passed_B.astype(np.float32),
            r_thinking_B=np.where(read_B & ~np.isnan(thinking_B), thinking_B, np.float32(0)),
            r_extra_B=total(list(terms.values()), len(rows)),
            valid_B=valid_B,
            terms=said,
            values=reward_metrics(results, parsed, said) | hosts.mean(self._pace()),
        )

    def _everyones(self, own: Sequence[_Row]) -> tuple[list[types.Result], dict[str, np.ndarray]]:
        """The judge's results and the terms that are not read off the text, of all processes in
        their order."""
        completions, texts = [row[0] for row in own], [row[1] for row in own]
        results = [verdict.result() for *_, verdict in own if verdict is not None]
        scores = dict(zip(self._asked, self._thinking.finish().tolist(), strict=True))
        thinking_B = np.array([scores.get((c.group, c.sample), np.nan) for c in completions])
        terms = {"thinking": thinking_B, **self._user_terms(completions, texts)}
        told = hosts.gather(
            {
                "results": [dataclasses.asdict(result) for result in results],
                "terms": {name: term_B.tolist() for name, term_B in terms.items()},
            }
        )
        return [_result(fields) for part in told for fields in part["results"]], {
            name: np.concatenate([np.array(part["terms"][name], np.float32) for part in told])
            for name in terms
        }

    def _pace(self) -> dict[str, float]:
        """What the judge did while completions were decoded and after it, and the share of
        reasonings that were scored meanwhile."""
        before, after = self._counters, self._judge.counters
        seconds = (self._judged_at or time.monotonic()) - self._begin
        return {
            "judge/runs_per_s": (after.runs - before.runs) / seconds,
            "judge/slot_rebuilds": float(after.slot_rebuilds - before.slot_rebuilds),
            "rewards/thinking/early": self._thinking.early / max(len(self._asked), 1),
        }

    def _ask(self) -> None:
        """Shows the reward model the reasoning of the next completion that has been judged, if the
        gate reads it, and a share of the others that hangs on the problem and the sample number
        alone."""
        completion, _, parsed, verdict = self._judged.get()
        self._unread -= 1
        assert verdict is not None, "only what is judged comes here"
        name = f"{completion.problem.id}/{completion.sample}"
        shadow = zlib.crc32(name.encode()) < self._cfg.rewards.shadow_fraction * 2**32
        read = verdict.result().verdict == "pass" or self._cfg.update.gate in READS_ALL
        if parsed.reasoning.strip() and (read or shadow):
            self._thinking.add(completion.problem.statement, parsed.reasoning)
            self._asked.append((completion.group, completion.sample))

    def _user_terms(
        self, completions: Sequence[types.Completion], texts: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """What the user's functions say, NaN for None."""
        problems = [c.problem for c in completions]
        names = {name for p in problems for name in p.columns} - {"prompts", "completions"}
        columns = {name: [p.columns.get(name) for p in problems] for name in sorted(names)}
        prompts = [p.statement for p in problems]
        terms = {}
        for name, function in self._functions.items():
            values = function(prompts=prompts, completions=list(texts), **columns)
            config.require(
                len(values) == len(completions),
                f"the reward function {name!r} returned {len(values)} rewards for "
                f"{len(completions)} completions; it must return one number or None for each",
            )
            terms[name] = np.array([np.nan if v is None else v for v in values], np.float32)
        return terms


def _result(fields: dict[str, Any]) -> types.Result:
    """From the fields as they come out of JSON."""
    tuples = {name: tuple(fields[name]) for name in ("verdicts", "denied")}
    return types.Result(**fields | tuples)


def total(terms: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The sum, as in TRL, of the user's terms that are not NaN; NaN where all of them are."""
    if not terms:
        return np.zeros(count, np.float32)
    terms_FB = np.stack(terms)
    return np.where(np.isnan(terms_FB).all(0), np.float32(np.nan), np.nansum(terms_FB, axis=0))


def reward_metrics(
    results: Sequence[types.Result],
    parsed: Sequence[parse.Parsed],
    terms: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Shares of verdicts, and means of terms; no entry where there is nothing to take a mean of.

    Completions that nobody could judge are neither passing nor failing.
    """
    verdicts = Counter(result.verdict for result in results)
    values = {f"judge/{name}": verdicts[name] / len(results) for name in get_args(types.Verdict)}
    values["judge/cpu_s"] = sum(result.cpu_s for result in results)
    values["judge/weak"] = sum(result.weak for result in results) / len(results)
    passing = [result for result in results if result.verdict == "pass"]
    if passing:  # what passes has no reason to try what is forbidden
        values["judge/passing_with_denied_calls"] = sum(bool(r.denied) for r in passing) / len(
            passing
        )
    values["completions/no_program"] = float(np.mean([not p.program for p in parsed]))
    values["completions/no_reasoning"] = float(np.mean([not p.reasoning.strip() for p in parsed]))
    for name, wanted in (("passing", 1), ("failing", 0)):
        chosen_B = terms["outcome"] == wanted
        for term in ("format", "thinking"):
            _put_mean(values, f"rewards/{term}/{name}", terms[term][chosen_B])
    for name in terms.keys() - set(TERMS):
        _put_mean(values, f"rewards/{name}/mean", terms[name])
    scored_B = ~np.isnan(terms["thinking"])
    lengths_B = np.array([len(p.reasoning) for p in parsed], float)
    values["completions/reasoning_characters"] = float(lengths_B.mean())
    both = terms["thinking"][scored_B], lengths_B[scored_B]
    if scored_B.sum() > 2 and all(np.std(x) > 0 for x in both):
        values["rewards/thinking/length_correlation"] = float(np.corrcoef(*both)[0, 1])
    return values


def _put_mean(values: dict[str, float], name: str, term_B: np.ndarray) -> None:
    """Notes the mean of what is not NaN, if there is any."""
    said = term_B[~np.isnan(term_B)]
    if said.size:
        values[name] = float(said.mean())
