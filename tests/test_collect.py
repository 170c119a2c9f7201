"""Which completions a step trains on, and when they are sampled."""

import concurrent.futures
import types as modules

import numpy as np
import pytest

from pgrpo_jax import collect, data, sandbox, tokenizer, types, world
from pgrpo_jax import config as c

WORDS = tokenizer.load("world")
MODEL = c.ModelConfig(
    architecture=c.Architecture(
        vocab_size=WORDS.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16
    )
)
POOL = world.problems("train", 6, seed=0)
SPEC = POOL[0].columns["spec"]
GOOD = world.completion(
    world.reasoning(world.reference_plan(SPEC), SPEC.domain),
    world.program(world.reference_plan(SPEC), SPEC.domain),
)
G = 2


def config(**settings) -> c.Config:
    importance_cap = 2.0 if settings.get("one_step_off") else 0.0
    return c.Config(
        policy=MODEL,
        reward_model=MODEL,
        data=c.DataConfig(max_prompt_length=32),
        rollout=c.RolloutConfig(
            prompts_per_step=2, num_generations=G, prompt_buckets=(32,), **settings
        ),
        update=c.UpdateConfig(steps=1, importance_cap=importance_cap),
    )


class Batches:
    """Prompts 0 and 1, then 2 and 3, then 4 and 5."""

    def __init__(self):
        self.drawn = 0

    def __next__(self) -> list[data.Prompt]:
        self.drawn += 1
        some = POOL[2 * self.drawn - 2 : 2 * self.drawn]
        return [data.Prompt(p, np.arange(3, dtype=np.int32)) for p in some]

    def get_state(self):
        return {"drawn": self.drawn}


class Engine:
    """Gives every sample the good answer and notes for which step it was asked."""

    def __init__(self, events: list[str]):
        self.events, self.seeds = events, []
        self.statistics = modules.SimpleNamespace(metrics=lambda: {"rollout/visits": 1.0})

    def generate(self, params, prompts, count, seed, step):
        self.events.append(f"sample {step}")
        self.seeds.append(seed)
        ids = np.array(WORDS.answer_ids(GOOD), np.int32)
        for group, prompt in enumerate(prompts):
            for sample in range(count):
                logps = np.zeros(len(ids), np.float32)
                yield types.Completion(prompt.problem, prompt.ids, ids, logps, False, group, sample)


class Judge:
    """Passes what its table of verdicts says, a problem's samples in order; a program is judged
    when it is waited for."""

    def __init__(self, events: list[str], verdicts: list[str]):
        self.events, self.verdicts = events, iter(verdicts)
        self.counters = sandbox.Counters()

    def submit(self, program, tests):
        future = concurrent.futures.Future()
        verdict = next(self.verdicts)
        wait = future.result

        def result():
            if not future.done():
                self.events.append("judged")
                future.set_result(types.Result(verdict, int(verdict == "pass"), 1))
            return wait()

        future.result = result
        return future


class Scorer:
    """What `says` makes of a step's number of reasonings."""

    def __init__(self, says):
        self._says = says

    def begin(self):
        return Scores(self._says)


class Scores:
    early = 0

    def __init__(self, says):
        self._says, self._count = says, 0

    def add(self, statement, reasoning):
        self._count += 1

    def finish(self):
        return np.array(self._says(self._count), np.float32)


def collector(cfg, verdicts, scores=lambda count: np.full(count, 0.5)):
    events: list[str] = []
    batches, engine = Batches(), Engine(events)
    judge = Judge(events, [{"p": "pass", "f": "fail"}[v] for v in verdicts])
    return collect.Collector(cfg, engine, WORDS, judge, Scorer(scores), batches), batches, engine


def problems(scored):
    return [POOL.index(x.problem) for x in scored.completions]


def test_groups_whose_outcomes_are_all_alike_are_replaced_by_fresh_prompts():
    # Problem 0 passes whole and 1 in part; 2 fails whole and 3 in part.
    made, batches, engine = collector(config(filter_groups="outcome"), "pppffffp")
    scored, values = made.collect(None, 0, collect.Clock(), ahead=False)
    assert problems(scored) == [1, 1, 3, 3]
    assert scored.r_outcome_B.tolist() == [1, 0, 0, 1]
    assert values["filter/tries"] == 2 and values["filter/signal"] == 0.5
    assert values["filter/filled_up"] == 0 and batches.drawn == 2
    assert len(set(engine.seeds)) == 2  # a problem that is drawn again gets other samples


def test_a_group_that_passes_whole_has_a_signal_in_its_rewards():
    def scores(count):
        return np.linspace(0.1, 0.9, count)

    made, batches, _ = collector(config(filter_groups="reward"), "pppf", scores)
    scored, values = made.collect(None, 0, collect.Clock(), ahead=False)
    assert problems(scored) == [0, 0, 1, 1] and values["filter/tries"] == 1


def test_when_the_tries_are_used_up_groups_without_signal_fill_the_places():
    made, batches, _ = collector(config(filter_groups="outcome", filter_tries=2), "ppffffpf")
    scored, values = made.collect(None, 0, collect.Clock(), ahead=False)
    assert problems(scored) == [0, 0, 3, 3]
    assert values["filter/tries"] == 2 and values["filter/filled_up"] == 1


def test_nothing_is_drawn_again_where_nothing_is_filtered():
    made, batches, _ = collector(config(), "ffff")
    scored, values = made.collect(None, 0, collect.Clock(), ahead=False)
    assert problems(scored) == [0, 0, 1, 1] and batches.drawn == 1
    assert "filter/tries" not in values


def test_the_next_step_is_sampled_before_this_one_is_judged():
    made, batches, engine = collector(config(one_step_off=True), "p" * 12)
    first, _ = made.collect(None, 0, collect.Clock(), ahead=True)
    events = engine.events
    assert events[:3] == ["sample 0", "sample 1", "judged"]
    assert made.position == {"drawn": 1} and batches.drawn == 2  # what a checkpoint goes on from
    second, _ = made.collect(None, 1, collect.Clock(), ahead=False)
    assert problems(first) == [0, 0, 1, 1] and problems(second) == [2, 2, 3, 3]
    assert made.position == {"drawn": 2} and events.count("sample 1") == 1


def test_a_step_ahead_needs_a_correction():
    with pytest.raises(ValueError, match="needs update.importance_cap > 0"):
        c.Config(
            policy=MODEL,
            reward_model=MODEL,
            rollout=c.RolloutConfig(one_step_off=True),
            update=c.UpdateConfig(steps=1),
        )
