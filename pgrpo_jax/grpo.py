"""The P-GRPO loop: sample, judge, score the reasonings, update (arXiv 2508.05170, section 3.2)."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pgrpo_jax import (
    canaries,
    checkpoint,
    collect,
    compilation,
    config,
    data,
    evaluate,
    fit,
    interrupt,
    metrics,
    optimizer,
    packing,
    progress,
    reshard,
    rewards,
    sandbox,
    sharding,
    start,
    tokenizer,
    types,
    update,
)
from pgrpo_jax.config import Architecture
from pgrpo_jax.rollout import Engine

STAGE, EVALUATE = "grpo", "evaluate"


class Loop:
    """One run's policy, on its way. Programs are compiled once, when they are first met."""

    def __init__(
        self,
        cfg: config.Config,
        mesh: jax.sharding.Mesh,
        words: tokenizer.Tokenizer,
        policy: tuple[Architecture, Any],
        scorer: rewards.ThinkingScorer,
        judge: sandbox.Judge,
    ):
        self.cfg, self.mesh, self.words, self.judge = cfg, mesh, words, judge
        self.compiled = compilation.Count()
        arch, params = policy
        self.arch = arch
        self.engine = Engine(cfg.rollout, arch, cfg.policy.compute, mesh, words.stop_ids)
        self.reshard_bytes = float(reshard.received_bytes(arch, cfg.policy.compute, mesh))
        self.update = update.compile_update(cfg, arch, mesh)
        tx = optimizer.build(cfg.update.optimizer, cfg.update.steps * cfg.update.num_iterations)
        self.logprobs = update.compile_logprobs(cfg, arch, mesh)
        self.reference = None
        if cfg.update.kl != "none":
            # A copy: the update donates the parameters it is given.
            frozen = jax.tree.map(lambda x: x.copy(), params)
            self.reference = lambda batch: self.logprobs(frozen, batch)
        self.state = optimizer.init_state(params, tx, mesh)
        pool, _ = data.prompts(start.problems(cfg, "train"), words, cfg.data)
        self.held, _ = data.prompts(start.problems(cfg, "evaluation"), words, cfg.data)
        self.batches = data.batches(pool, cfg.rollout.prompts_per_step, cfg.seed)
        self.collector = collect.Collector(cfg, self.engine, words, judge, scorer, self.batches)

    def run(self) -> None:
        """Steps from the newest checkpoint to the last step.

        Raises:
          fit.Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
          canaries.FooledError: a known-bad program passed.
        """
        cfg, steps = self.cfg, self.cfg.update.steps
        with (
            checkpoint.Checkpoints(cfg.workdir, cfg.logging.checkpoints_kept) as checkpoints,
            interrupt.delayed() as stop,
        ):
            done = self._restore(checkpoints)
            with (
                self._log(STAGE, done) as log,
                self._log(EVALUATE, done + 1 if done else 0) as tests,
            ):
                if done == 0:
                    self._evaluate(tests, 0)
                with progress.bar(STAGE, steps, done) as advance:
                    for i in range(done, steps):
                        if cfg.judge.canary_every_steps and i % cfg.judge.canary_every_steps == 0:
                            canaries.stop_if_fooled(self.judge, i)
                        every, last = cfg.evaluation.every_steps, i + 1 == steps
                        saving = (i + 1) % cfg.logging.checkpoint_every_steps == 0
                        # A checkpoint holds no completions: none are sampled ahead of one.
                        ahead = cfg.rollout.one_step_off and not (last or saving)
                        with self._timeline(i):
                            values = self._step(log, i, ahead)
                        log.metrics(i, values)
                        advance(
                            **{"pass": values["rewards/outcome/mean"], "reward": values["reward"]}
                        )
                        if last or (every and (i + 1) % every == 0):
                            self._evaluate(tests, i + 1)
                        if last or saving or stop.requested:
                            checkpoints.save(
                                i + 1, self.state, {"batches": self.collector.position}
                            )
                        if stop.requested and not last:
                            checkpoints.wait()
                            raise fit.Interrupted(STAGE, i + 1, steps)

    def _timeline(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Writes timeline/ into the run's folder, for Perfetto and XProf, in the step asked for."""
        if step + 1 != self.cfg.logging.timeline_step:
            return contextlib.nullcontext()
        folder = pathlib.Path(self.cfg.workdir) / "timeline"
        return jax.profiler.trace(str(folder), create_perfetto_trace=True)

    def _restore(self, checkpoints: checkpoint.Checkpoints) -> int:
        restored = checkpoints.restore(fit.abstract(self.state))
        if restored is None:
            return 0
        done, self.state, extra = restored
        self.batches.set_state(extra["batches"])
        return done

    def _log(self, stage: str, first_step: int) -> metrics.Log:
        return metrics.Log(
            self.cfg.workdir,
            stage,
            first_step=first_step,
            primary=jax.process_index() == 0,
            wandb_project=self.cfg.logging.wandb_project,
        )

    def _evaluate(self, log: metrics.Log, step: int) -> None:
        clock = collect.Clock()
        with clock.phase("evaluate"):
            values, judged = evaluate.evaluate(
                self.cfg, self.engine, self.state.params, self.held, self.words, self.judge
            )
        tokens = float(sum(len(j.completion.ids) for j in judged))
        log.metrics(step, values | clock.metrics() | {"tokens": tokens})

    def _step(self, log: metrics.Log, step: int, ahead: bool) -> dict[str, float]:
        """One step; writes its completions and returns its metrics. With `ahead` it samples those
        of the next step before its own update."""
        cfg, clock = self.cfg, collect.Clock()
        scored, rollout = self.collector.collect(self.state.params, step, clock, ahead=ahead)
        with clock.phase("update"):
            plan = update.plan(cfg, self.mesh, scored.completions)
            batch = sharding.put(update_batch(scored, plan), update.batch_sharding(self.mesh))
            if self.reference is not None:
                batch = batch.replace(ref_logp_ART=self.reference(batch))
            if cfg.update.importance_cap and cfg.update.num_iterations > 1:
                batch = batch.replace(old_logp_ART=self.logprobs(self.state.params, batch))
            for iteration in range(cfg.update.num_iterations):
                self.state, values, advantage_B = self.update(self.state, batch)
                if iteration == 0:
                    first = values
            values, advantage_B = jax.device_get((values | _mismatch(first), advantage_B))
        log.completions(step, scored.rows(advantage_B))
        tokens = sum(len(c.ids) for c in scored.completions)
        seconds = clock.metrics()
        speed = {"tokens": float(tokens), "tokens_per_s": tokens / seconds["time/step_s"]}
        judged = [
            evaluate.Judged(*parts)
            for parts in zip(
                scored.completions, scored.texts, scored.parsed, scored.results, strict=True
            )
        ]
        return {
            **{name: float(value) for name, value in values.items()},
            **scored.values,
            **evaluate.oracle(judged, scored.terms["thinking"]),
            **length_metrics(scored.completions),
            **rollout,
            "compilations": float(self.compiled.value),
            **seconds,
            **speed,
            "reshard/received_bytes": self.reshard_bytes,
        }


def _mismatch(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What compares sampler and trainer is true of the first iteration only."""
    return {name: value for name, value in values.items() if name.startswith("mismatch_")}


def length_metrics(completions: Sequence[types.Completion]) -> dict[str, float]:
    """Lengths in tokens, and the share that the limit cut."""
    lengths = [len(c.ids) for c in completions]
    return {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/max_length": float(np.max(lengths)),
        "completions/clipped_ratio": float(np.mean([c.truncated for c in completions])),
    }


def update_batch(scored: rewards.Scored, plan: packing.Packed) -> update.UpdateBatch:
    """A step's completions, packed."""
    completions = scored.completions
    rows, micro_batches = update.packed(completions, plan)
    return update.UpdateBatch(
        rows=rows,
        micro_batches=micro_batches,
        r_format_B=scored.r_format_B,
        r_outcome_B=scored.r_outcome_B,
        r_thinking_B=scored.r_thinking_B,
        r_extra_B=scored.r_extra_B,
        valid_B=scored.valid_B,
        truncated_B=np.array([c.truncated for c in completions]),
    )
