"""A step's completions: sampled, judged while others still decode, scored, and perhaps filtered.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach nothing are replaced by
those of fresh prompts. A step always trains on as many groups; when the tries are used up, groups
without signal fill the places, and their advantages are zero.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from pgrpo_jax import config, data, hosts, masked, rewards, rng, sandbox, tokenizer, update
from pgrpo_jax.rollout import Engine


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        """time/<phase>_s and time/step_s."""
        step_s = time.perf_counter() - self._begin
        return {f"time/{name}_s": s for name, s in self.seconds.items()} | {"time/step_s": step_s}


class Collector:
    """Draws prompts from `batches` and makes judged completions of them."""

    def __init__(
        self,
        cfg: config.Config,
        engine: Engine,
        words: tokenizer.Tokenizer,
        judge: sandbox.Judge,
        scorer: rewards.ThinkingScorer,
        batches: data.Batches[list[data.Prompt]],
    ):
        self._cfg, self._engine, self._batches = cfg, engine, batches
        self._words, self._judge, self._scorer = words, judge, scorer
        self._ahead: tuple[rewards.Rewards, dict[str, float]] | None = None
        self._position = batches.get_state()

    @property
    def position(self) -> dict[str, Any]:
        """Where `batches` stands, without the prompts of a rollout that is ahead of its step."""
        return self._batches.get_state() if self._ahead is None else self._position

    def collect(
        self, params: Any, step: int, clock: Clock, *, ahead: bool
    ) -> tuple[rewards.Scored, dict[str, float]]:
        """The step's completions, and the metrics rollout/* and filter/*.

        With `ahead` the next step's completions are sampled, with the same parameters, before this
        step's are waited for: the device decodes while programs are still judged.
        """
        begun, self._ahead = self._ahead, None
        session, values = begun or self._sample(params, step, clock, 0)
        if ahead:
            self._position = self._batches.get_state()
            self._ahead = self._sample(params, step + 1, clock, 0)
        scored = self._score(session, clock)
        if self._cfg.rollout.filter_groups == "none":
            return scored, values
        return self._filtered(scored, values, params, step, clock)

    def _sample(
        self, params: Any, step: int, clock: Clock, attempt: int
    ) -> tuple[rewards.Rewards, dict[str, float]]:
        """One batch of prompts sampled; each program goes to the judge when it is there."""
        prompts = next(self._batches)
        own = hosts.share(len(prompts))  # every process samples all and judges some
        session = rewards.Rewards(self._cfg, self._words, self._judge, self._scorer, own)
        purpose = f"rollout {attempt}" if attempt else "rollout"
        seed = rng.integer(self._cfg.seed, purpose)
        count = self._cfg.rollout.num_generations
        with clock.phase("rollout"):
            for completion in self._engine.generate(params, prompts, count, seed, step):
                session.add(completion)
        return session, self._engine.statistics.metrics()

    def _score(self, session: rewards.Rewards, clock: Clock) -> rewards.Scored:
        with clock.phase("judge"):
            session.wait()
        with clock.phase("thinking"):
            return session.finish()

    def _filtered(
        self,
        scored: rewards.Scored,
        values: dict[str, float],
        params: Any,
        step: int,
        clock: Clock,
    ) -> tuple[rewards.Scored, dict[str, float]]:
        settings, wanted = self._cfg.rollout, self._cfg.rollout.prompts_per_step
        parts, signals = [scored], [signal(self._cfg, scored)]
        while sum(s.sum() for s in signals) < wanted and len(parts) < settings.filter_tries:
            session, values = self._sample(params, step, clock, len(parts))
            parts.append(self._score(session, clock))
            signals.append(signal(self._cfg, parts[-1]))
        found = int(sum(s.sum() for s in signals))
        values = values | {
            "filter/tries": float(len(parts)),
            "filter/signal": found / sum(map(len, signals)),
            "filter/filled_up": float(max(wanted - found, 0)),
        }
        return rewards.joined(parts, places(signals, wanted, settings.num_generations)), values


def signal(cfg: config.Config, scored: rewards.Scored) -> np.ndarray:
    """signal_P (bool): groups whose members differ, in outcome or in reward as configured."""
    terms = (scored.r_format_B, scored.r_outcome_B, scored.r_thinking_B, scored.r_extra_B)
    groups = update.fold_rewards(cfg, *map(jnp.asarray, (*terms, scored.valid_B)))
    by = {"outcome": groups.outcome_PG, "reward": groups.total_PG}[cfg.rollout.filter_groups]
    return np.asarray(masked.std(by, groups.valid_PG, axis=1) > 0)


def places(signals: list[np.ndarray], wanted: int, G: int) -> list[np.ndarray]:
    """Which completions of each try to train on: those of the first `wanted` groups with signal,
    and if there are too few, of the first groups without."""
    with_signal = np.concatenate(signals)
    order = np.argsort(~with_signal, kind="stable")[:wanted]
    chosen = np.zeros(len(with_signal), bool)
    chosen[order] = True
    parts = np.split(chosen, np.cumsum([len(s) for s in signals])[:-1])
    return [np.flatnonzero(part.repeat(G)) for part in parts]
