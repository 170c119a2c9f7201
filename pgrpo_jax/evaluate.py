"""pass@1 of a policy on held-out problems, sampled and greedy.

    python -m pgrpo_jax.evaluate --config tiny

Evaluates the newest policy of the run's folder (`policy/`, else `sft/`, else where the run starts)
and prints what it finds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from pgrpo_jax import (
    cli,
    config,
    data,
    metrics,
    parse,
    rng,
    sandbox,
    sharding,
    start,
    tokenizer,
    types,
    world,
)
from pgrpo_jax.rollout import Engine


@dataclasses.dataclass(frozen=True)
class Judged:
    """One completion, what it says, and what the judge says of it."""

    completion: types.Completion
    text: str
    parsed: parse.Parsed
    result: types.Result

    @property
    def passed(self) -> bool:
        return self.result.verdict == "pass"


def evaluate(
    cfg: config.Config,
    engine: Engine,
    params: Any,
    prompts: Sequence[data.Prompt],
    words: tokenizer.Tokenizer,
    judge: sandbox.Judge,
) -> tuple[dict[str, float], list[Judged]]:
    """Metrics eval/*, and the sampled completions. Samples depend on the seed alone, so that
    policies are compared on the same random numbers.
    """
    seed, settings = rng.integer(cfg.seed, "evaluation"), cfg.evaluation
    sampled = sample(
        cfg, engine, params, prompts, words, judge, settings.samples, seed, settings.temperature
    )
    greedy = sample(cfg, engine, params, prompts, words, judge, 1, seed, 0.0)
    values = {
        "eval/pass@1": pass_at_1(sampled),
        "eval/pass@1_greedy": pass_at_1(greedy),
        "eval/format": float(np.mean([j.parsed.well_formed for j in sampled])),
        "eval/mean_length": float(np.mean([len(j.completion.ids) for j in sampled])),
        "eval/n": float(len(prompts)),
    }
    values |= {f"eval/{name}": value for name, value in oracle(sampled).items()}
    return values, sampled


def sample(
    cfg: config.Config,
    engine: Engine,
    params: Any,
    prompts: Sequence[data.Prompt],
    words: tokenizer.Tokenizer,
    judge: sandbox.Judge,
    count: int,
    seed: int,
    temperature: float,
) -> list[Judged]:
    """`count` judged completions a prompt; programs are judged while other completions decode."""
    waiting = []
    for completion in engine.generate(params, prompts, count, seed, 0, temperature):
        text = words.decode(completion.ids)
        parsed = parse.parse(text, words.opening(cfg.data.prefill))
        future = judge.submit(parsed.program, completion.problem.tests)
        waiting.append((completion, text, parsed, future))
    return [Judged(c, text, parsed, future.result()) for c, text, parsed, future in waiting]


def pass_at_1(judged: Sequence[Judged]) -> float:
    """The share of completions that pass, of those that could be judged."""
    verdicts = [j.passed for j in judged if j.result.verdict != "infra"]
    if not verdicts:
        raise RuntimeError(
            f"none of {len(judged)} programs could be judged; see the judge's messages"
        )
    return float(np.mean(verdicts))


def oracle(judged: Sequence[Judged], thinking_B: np.ndarray | None = None) -> dict[str, float]:
    """What the built-in world's oracle says of the reasonings; nothing for other problems.

    With R_t of each (NaN where there is none) also `oracle/thinking_auc`: how often the reward
    model puts a sound reasoning, one without a defect in any dimension, above one that is not.
    """
    graded = [
        (j.passed, world.grade(j.completion.problem.columns["spec"], j.parsed.reasoning))
        for j in judged
        if "spec" in j.completion.problem.columns
    ]
    if not graded:
        return {}
    values = {
        f"oracle/{name}": float(np.mean([getattr(grade, name) for _, grade in graded]))
        for name in ("perfect", *world.DIMENSIONS)
    }
    passing = [grade.perfect for passed, grade in graded if passed]
    if passing:
        values["oracle/perfect_of_passing"] = float(np.mean(passing))
    if thinking_B is not None:
        sound_B = np.array([all(getattr(g, name) for name in world.DIMENSIONS) for _, g in graded])
        scored_B = ~np.isnan(thinking_B)
        sound, flawed = thinking_B[scored_B & sound_B], thinking_B[scored_B & ~sound_B]
        if sound.size and flawed.size:
            values["oracle/thinking_auc"] = area_under_curve(sound, flawed)
    return values


def area_under_curve(above: np.ndarray, below: np.ndarray) -> float:
    """The share of pairs in which the first is the greater, ties a half (Mann-Whitney U / nm)."""
    gaps = above[:, None] - below[None, :]
    return float(np.mean((gaps > 0) + 0.5 * (gaps == 0)))


@start.stage
def run(cfg: config.Config) -> None:
    """Evaluates the run's newest policy and prints a table."""
    cfg = start.resolved_to_decode(cfg)
    mesh, words = sharding.make_mesh(cfg.mesh), tokenizer.load(cfg.data.tokenizer)
    arch, params = start.newest_policy(cfg, mesh)
    engine = Engine(cfg.rollout, arch, cfg.policy.compute, mesh, words.stop_ids)
    prompts, _ = data.prompts(start.problems(cfg, "evaluation"), words, cfg.data)
    with sandbox.Judge(cfg.judge) as judge:
        values, _ = evaluate(cfg, engine, params, prompts, words, judge)
    if jax.process_index():
        return
    table = rich.table.Table(title=f"{len(prompts)} held-out problems")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.3f}")
    low, high = metrics.wilson_interval(values["eval/pass@1"] * len(prompts), len(prompts))
    table.add_row("pass@1, 95 % interval", f"{low:.3f} to {high:.3f}")
    rich.console.Console().print(table)


if __name__ == "__main__":
    cli.run(run, __doc__)
