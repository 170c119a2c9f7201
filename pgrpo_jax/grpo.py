"""The P-GRPO loop: sample, judge, score the reasonings, update (arXiv 2508.05170, section 3.2)."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pgrpo_jax import (
    canaries,
    checkpoint,
    config,
    data,
    evaluate,
    fit,
    hosts,
    interrupt,
    metrics,
    optimizer,
    packing,
    progress,
    reshard,
    rewards,
    rng,
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
        self.cfg, self.words, self.judge, self.scorer = cfg, words, judge, scorer
        self.mesh = mesh
        arch, params = policy
        self.engine = Engine(cfg.rollout, arch, cfg.policy.compute, mesh, words.stop_ids)
        self.reshard_bytes = float(reshard.received_bytes(arch, cfg.policy.compute, mesh))
        self.update = update.compile_update(cfg, arch, mesh)
        tx = optimizer.build(cfg.update.optimizer, cfg.update.steps * cfg.update.num_iterations)
        self.reference = None
        if cfg.update.kl != "none":
            # A copy: the update donates the parameters it is given.
            frozen = jax.tree.map(lambda x: x.copy(), params)
            program = update.compile_reference(cfg, arch, mesh)
            self.reference = lambda batch: program(frozen, batch)
        self.state = optimizer.init_state(params, tx, mesh)
        pool, _ = data.prompts(start.problems(cfg, "train"), words, cfg.data)
        self.held, _ = data.prompts(start.problems(cfg, "evaluation"), words, cfg.data)
        self.batches = data.batches(pool, cfg.rollout.prompts_per_step, cfg.seed)

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
                        values = self._step(log, i)
                        log.metrics(i, values)
                        advance(
                            **{"pass": values["rewards/outcome/mean"], "reward": values["reward"]}
                        )
                        every, last = cfg.evaluation.every_steps, i + 1 == steps
                        if last or (every and (i + 1) % every == 0):
                            self._evaluate(tests, i + 1)
                        saving = (i + 1) % cfg.logging.checkpoint_every_steps == 0
                        if last or saving or stop.requested:
                            checkpoints.save(
                                i + 1, self.state, {"batches": self.batches.get_state()}
                            )
                        if stop.requested and not last:
                            checkpoints.wait()
                            raise fit.Interrupted(STAGE, i + 1, steps)

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
        clock = Clock()
        with clock.phase("evaluate"):
            values, judged = evaluate.evaluate(
                self.cfg, self.engine, self.state.params, self.held, self.words, self.judge
            )
        tokens = float(sum(len(j.completion.ids) for j in judged))
        log.metrics(step, values | clock.metrics() | {"tokens": tokens})

    def _step(self, log: metrics.Log, step: int) -> dict[str, float]:
        """One step; writes its completions and returns its metrics. Each process judges the
        completions of some of the prompts."""
        cfg, clock = self.cfg, Clock()
        prompts, completions = next(self.batches), []
        own = hosts.share(len(prompts))
        session = rewards.Rewards(cfg, self.words, self.judge, self.scorer)
        with clock.phase("rollout"):
            stream = self.engine.generate(
                self.state.params,
                prompts,
                cfg.rollout.num_generations,
                rng.integer(cfg.seed, "rollout"),
                step,
            )
            for completion in stream:
                completions.append(completion)
                if completion.group in own:
                    session.add(completion)
        with clock.phase("judge"):
            session.wait()
        with clock.phase("thinking"):
            scored = session.finish()
        with clock.phase("update"):
            batch = update_batch(cfg, completions, hosts.gather(scored.for_update()))
            batch = sharding.put(batch, update.batch_sharding(self.mesh))
            if self.reference is not None:
                batch = batch.replace(ref_logp_ART=self.reference(batch))
            for iteration in range(cfg.update.num_iterations):
                self.state, values, advantage_B = self.update(self.state, batch)
                if iteration == 0:
                    first = values
            values, advantage_B = jax.device_get((values | _mismatch(first), advantage_B))
        G = cfg.rollout.num_generations
        kept = scored.rows(advantage_B[own.start * G : own.stop * G])
        everyones = hosts.gather([dataclasses.asdict(row) for row in kept])
        log.completions(step, [metrics.CompletionRow(**row) for rows in everyones for row in rows])
        tokens = sum(len(c.ids) for c in completions)
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
            **hosts.mean(scored.values | evaluate.oracle(judged, scored.terms["thinking"])),
            **length_metrics(completions),
            **self.engine.statistics.metrics(),
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


def update_batch(
    cfg: config.Config,
    completions: Sequence[types.Completion],
    terms: Sequence[dict[str, list[float]]],
) -> update.UpdateBatch:
    """A step's completions, packed, with `Scored.for_update` of each process. The shape depends on
    the prompts' bucket, and on which of two lengths of row suits the completions better, alone."""
    completions = sorted(completions, key=lambda c: (c.group, c.sample))
    lengths = [len(c.prompt_ids) + len(c.ids) for c in completions]
    bucket = max(len(c.prompt_ids) for c in completions)
    bucket = next(b for b in cfg.rollout.prompt_buckets if b >= bucket)
    longest, R = bucket + cfg.rollout.max_completion_length, cfg.update.micro_batch_size
    batches, T = packing.pack(lengths, longest, R)
    rows, micro_batches = update.packed(completions, batches, R, T)
    everyones = {name: sum((one[name] for one in terms), []) for name in terms[0]}
    valid_B = np.array(everyones.pop("valid_B"), bool)
    return update.UpdateBatch(
        rows=rows,
        micro_batches=micro_batches,
        **{name: np.array(term_B, np.float32) for name, term_B in everyones.items()},
        valid_B=valid_B,
        truncated_B=np.array([c.truncated for c in completions]),
    )
