"""What each completion earns, who is asked for it, and what is never shown to whom."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import sys
import types as modules

import jax
import numpy as np
import pytest

from pgrpo_jax import config as c
from pgrpo_jax import rewards, sandbox, sharding, tokenizer, types, world
from pgrpo_jax.models import reward

WORDS = tokenizer.load("world")
ARCH = c.Architecture(
    vocab_size=WORDS.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16
)
MODEL = c.ModelConfig(architecture=ARCH)
POOL = world.problems("train", 3, seed=0)
SPEC = POOL[0].columns["spec"]
TRUTH = world.reference_plan(SPEC)
REASONING = world.reasoning(TRUTH, SPEC.domain)
PROGRAM = world.program(TRUTH, SPEC.domain)
GOOD = world.completion(REASONING, PROGRAM)


def config(gate="posterior", **settings) -> c.Config:
    return c.Config(
        policy=MODEL,
        reward_model=MODEL,
        rewards=c.RewardsConfig(thinking_max_length=64, thinking_batch_size=8, **settings),
        update=c.UpdateConfig(gate=gate),
    )


def completion(text: str, group=0, sample=0, columns=None) -> types.Completion:
    problem = POOL[group]
    if columns is not None:
        problem = dataclasses.replace(problem, columns=columns)
    ids = np.array(WORDS.answer_ids(text))
    return types.Completion(
        problem=problem,
        prompt_ids=np.array(WORDS.prompt_ids(problem.statement, "", "")),
        ids=ids,
        logps=np.zeros(len(ids), np.float32),
        truncated=False,
        group=group,
        sample=sample,
    )


class Judge:
    """Says of the i-th program what the i-th verdict is; a second passes with each. The second
    program tries to open a socket, and the third is tested in its own interpreter."""

    def __init__(self, *verdicts: types.Verdict):
        self._verdicts, self.programs = list(verdicts), []

    @property
    def counters(self):
        number = len(self.programs)
        return sandbox.Counters(runs=number, slot_rebuilds=number // 4)

    def submit(self, program, tests):
        self.programs.append(program)
        number = len(self.programs)
        verdict = self._verdicts[number - 1]
        future = concurrent.futures.Future()
        denied = ("socket",) if number == 2 else ()
        future.set_result(
            types.Result(
                verdict, int(verdict == "pass"), 1, cpu_s=0.5, denied=denied, weak=number == 3
            )
        )
        return future


class Scorer:
    """Keeps what it was shown; says 0.9 of a first reasoning, 0.8 of a second, and so on, or what
    `says` makes of (number, reasoning)."""

    early = 0

    def __init__(self, says=lambda number, _: 0.9 - 0.1 * number):
        self.pairs, self._says = [], says

    def begin(self):
        return self

    def add(self, *pair):
        self.pairs.append(pair)

    def finish(self):
        said = [self._says(i, reasoning) for i, (_, reasoning) in enumerate(self.pairs)]
        return np.array(said, np.float32)


def score(completions, verdicts, cfg=None, scorer=None) -> rewards.Scored:
    session = rewards.Rewards(cfg or config(), WORDS, Judge(*verdicts), scorer or Scorer())
    for one in completions:
        session.add(one)
    return session.finish()


def samples(*texts: str) -> list[types.Completion]:
    return [completion(text, sample=i) for i, text in enumerate(texts)]


# --- the three terms


def test_each_term_of_each_kind_of_completion():
    unformatted = GOOD.replace("</answer>\n", "")
    scored = score(samples(GOOD, GOOD, unformatted, GOOD), ["pass", "fail", "error", "infra"])
    np.testing.assert_array_equal(scored.r_format_B, [1, 1, 0, 1])
    np.testing.assert_array_equal(scored.r_outcome_B, [1, 0, 0, 0])
    np.testing.assert_allclose(scored.r_thinking_B, [0.9, 0, 0, 0])
    np.testing.assert_array_equal(scored.r_extra_B, [0, 0, 0, 0])
    np.testing.assert_array_equal(scored.valid_B, [True, True, True, False])


@pytest.mark.parametrize("verdict", ["fail", "timeout", "memory", "error"])
def test_only_a_pass_is_an_outcome(verdict):
    scored = score(samples(GOOD), [verdict])
    assert scored.r_outcome_B == 0 and scored.valid_B


def test_the_judge_is_given_the_program_when_the_completion_comes():
    judge = Judge("pass")
    session = rewards.Rewards(config(), WORDS, judge, Scorer())
    session.add(completion(GOOD))
    assert judge.programs == [PROGRAM.strip()]


def test_rows_stand_by_group_and_sample_in_whatever_order_completions_finish():
    places = [(1, 1), (0, 1), (1, 0), (0, 0)]
    texts = [GOOD, GOOD.replace("<think>\n", ""), GOOD, GOOD]
    mixed = [completion(text, *place) for text, place in zip(texts, places, strict=True)]
    scored = score(mixed, ["pass", "fail", "error", "timeout"])
    assert [(x.group, x.sample) for x in scored.completions] == sorted(places)
    assert [r.verdict for r in scored.results] == ["timeout", "fail", "error", "pass"]
    np.testing.assert_array_equal(scored.r_format_B, [1, 0, 1, 1])
    np.testing.assert_array_equal(scored.r_outcome_B, [0, 0, 0, 1])


def test_a_completion_of_any_tokens_scores_zero_and_stops_nothing():
    rng = np.random.default_rng(0)
    texts = [WORDS.decode(rng.integers(2, WORDS.vocab_size, 20)) for _ in range(200)]
    texts += ["<think>\n" + text + "</think>\n" for text in texts]
    scorer = rewards.ThinkingScorer(params(), ARCH, c.Compute(), config().rewards, WORDS, mesh(1))
    scored = score(samples(*texts), ["error"] * 400, config("additive"), scorer)
    assert scored.r_format_B.sum() == scored.r_outcome_B.sum() == 0
    assert scored.values["completions/no_program"] > 0.5
    assert np.isfinite(scored.r_thinking_B).all()


# --- who is asked for the thinking reward


@pytest.mark.parametrize(
    ("gate", "asked", "thinking"),
    [
        ("posterior", 1, [0, 0.9]),
        ("outcome", 1, [0, 0.9]),
        ("additive", 2, [0.9, 0.8]),
        ("process", 2, [0.9, 0.8]),
    ],
)
def test_failing_completions_are_scored_for_the_gates_that_read_them(gate, asked, thinking):
    scorer = Scorer()
    scored = score(samples(GOOD, GOOD), ["fail", "pass"], config(gate), scorer)
    assert len(scorer.pairs) == asked
    np.testing.assert_allclose(scored.r_thinking_B, thinking)


def test_shadow_scores_reach_the_metrics_and_the_file_but_not_the_reward():
    scored = score(samples(GOOD, GOOD), ["fail", "pass"], config(shadow_fraction=1.0))
    np.testing.assert_allclose(scored.r_thinking_B, [0, 0.8])
    assert scored.values["rewards/thinking/failing"] == pytest.approx(0.9)
    assert [row.rewards["thinking"] for row in scored.rows(np.zeros(2))] == [
        pytest.approx(0.9),
        pytest.approx(0.8),
    ]


def test_the_shadow_is_about_its_share_and_the_same_each_time():
    cfg, completions = config(shadow_fraction=0.25), samples(*[GOOD] * 400)
    first, again = (
        ~np.isnan(score(completions, ["fail"] * 400, cfg).terms["thinking"]) for _ in range(2)
    )
    # 100 of 400 with a standard deviation of 8.7.
    assert 65 < first.sum() < 135
    np.testing.assert_array_equal(first, again)


def test_the_reward_model_is_shown_the_problem_and_the_reasoning_and_no_program():
    scorer = Scorer()
    score(samples(GOOD), ["pass"], scorer=scorer)
    assert scorer.pairs == [(POOL[0].statement, REASONING.strip("\n"))]


def test_a_passing_completion_without_reasoning_earns_no_thinking_reward():
    scorer = Scorer()
    bare = f"<think>\n\n</think>\n<answer>\n{PROGRAM}</answer>\n"
    scored = score(samples(bare), ["pass"], scorer=scorer)
    assert scorer.pairs == [] and scored.r_thinking_B == 0 and scored.r_outcome_B == 1
    assert scored.values["completions/no_reasoning"] == 1


# --- the reward model's batches


@functools.cache
def params():
    return reward.init(ARCH, c.Compute(), jax.random.key(0))


@functools.cache
def mesh(devices: int):
    return sharding.make_mesh(c.MeshConfig(), jax.devices()[:devices])


def thinking_scorer(devices=1, **settings) -> rewards.ThinkingScorer:
    settings = {"thinking_max_length": 64, "thinking_batch_size": 8, **settings}
    cfg = c.RewardsConfig(**settings)
    return rewards.ThinkingScorer(params(), ARCH, c.Compute(), cfg, WORDS, mesh(devices))


def pair(problem: types.Problem) -> tuple[str, str]:
    spec = problem.columns["spec"]
    return problem.statement, world.reasoning(world.reference_plan(spec), spec.domain)


PAIRS = [pair(problem) for problem in world.problems("train", 20, seed=1)]


def test_a_thinking_reward_is_the_sigmoid_of_the_models_score_of_its_row_alone():
    scores = thinking_scorer()(PAIRS)
    for read, got in zip(PAIRS[:2], scores[:2], strict=True):
        ids_1T = np.array(WORDS.reward_ids(*read))[None]
        positions_1T = np.arange(ids_1T.shape[1])[None]
        rows = ids_1T, positions_1T, np.ones_like(ids_1T)
        wanted = float(reward.score(params(), ARCH, c.Compute(), *rows)[0])
        assert got == pytest.approx(1 / (1 + math.exp(-wanted)), abs=1e-6)
    assert len(set(scores.round(6))) > 10  # scores that differ, each at its own place


def test_a_thinking_reward_does_not_depend_on_its_batch_or_the_devices():
    wanted = thinking_scorer()(PAIRS)
    for scorer in (thinking_scorer(thinking_batch_size=1), thinking_scorer(devices=8)):
        np.testing.assert_allclose(scorer(PAIRS), wanted, atol=1e-6)
    np.testing.assert_allclose(thinking_scorer()(PAIRS[::-1]), wanted[::-1], atol=1e-6)


def test_full_batches_are_begun_while_pairs_still_come_and_change_no_score():
    wanted = thinking_scorer()(PAIRS)
    for order in (range(len(PAIRS)), range(len(PAIRS) - 1, -1, -1)):
        scores = thinking_scorer(thinking_batch_size=4).begin()
        early = []
        for i in order:
            scores.add(*PAIRS[i])
            early.append(scores.early)
        assert early[0] == 0 and early[-1] >= len(PAIRS) - 4 * 3
        np.testing.assert_array_equal(early, [n - n % 4 for n in early])
        np.testing.assert_allclose(scores.finish(), wanted[list(order)], atol=1e-6)


def test_a_model_in_the_hosts_memory_waits_for_the_last_pair():
    scorer = thinking_scorer(thinking_batch_size=1, offload=True)
    scores, moves, on_device = scorer.begin(), [], scorer.on_device
    scorer.on_device = lambda: moves.append("in") or on_device()
    for read in PAIRS:
        scores.add(*read)
    assert scores.early == 0 and not moves
    np.testing.assert_allclose(scores.finish(), thinking_scorer()(PAIRS), atol=1e-6)
    assert moves == ["in"]  # once for all batches


def test_what_is_judged_late_is_scored_too():
    judge = Judge("pass", "pass", "fail")
    late, submit = [], judge.submit

    def submit_late(program, tests):
        late.append((concurrent.futures.Future(), submit(program, tests).result()))
        return late[-1][0]

    judge.submit = submit_late
    session = rewards.Rewards(config(), WORDS, judge, Scorer(lambda number, _: number))
    for one in samples(GOOD, GOOD, GOOD):
        session.add(one)
    for future, result in reversed(late):  # the second is judged, and asked about, before the first
        future.set_result(result)
    np.testing.assert_array_equal(session.finish().r_thinking_B, [1, 0, 0])


def test_a_reasoning_over_the_length_limit_is_not_cut_but_left_without_a_score():
    lengths = np.array([len(WORDS.reward_ids(*read)) for read in PAIRS])
    limit = int(np.median(lengths))
    scores = thinking_scorer(thinking_max_length=limit)(PAIRS)
    np.testing.assert_array_equal(np.isnan(scores), lengths > limit)
    assert 0 < (lengths > limit).sum() < len(PAIRS)


def test_a_reasoning_without_a_score_earns_0_and_stands_as_none():
    scored = score(samples(GOOD), ["pass"], scorer=Scorer(lambda *_: np.nan))
    assert scored.r_thinking_B == 0
    assert scored.rows(np.zeros(1))[0].rewards["thinking"] is None
    assert "rewards/thinking/passing" not in scored.values


# --- functions of the user


@pytest.fixture
def own(monkeypatch):
    """A module of the user's, whose functions a test sets."""
    module = modules.ModuleType("own_rewards")
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    return module


def test_user_functions_have_the_signature_of_trl_and_are_summed(own):
    seen = {}

    def brevity(prompts, completions, level, **columns):
        seen.update(columns, prompts=prompts, completions=completions, level=level)
        return [1.5, None, None]

    own.brevity, own.style = brevity, lambda completions, **_: [0.25, -1, float("nan")]
    cfg = config(functions=("own_rewards:brevity", "own_rewards:style"))
    rows = [completion(GOOD, i, 0, columns={"level": i, "prompts": "no"}) for i in range(3)]
    scored = score(rows, ["fail"] * 3, cfg)
    # 1.5 + 0.25; nothing and -1; nothing at all.
    np.testing.assert_array_equal(scored.r_extra_B, [1.75, -1, np.nan])
    assert seen == {
        "prompts": [p.statement for p in POOL],
        "completions": [GOOD] * 3,
        "level": [0, 1, 2],
    }
    assert scored.values["rewards/brevity/mean"] == 1.5
    assert scored.values["rewards/style/mean"] == -0.375
    assert scored.rows(np.zeros(3))[1].rewards == {
        "format": 1.0,
        "outcome": 0.0,
        "thinking": None,
        "brevity": None,
        "style": -1.0,
    }


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_rewards", "names 'own_rewards'; wanted 'module:function'"),
        (":brevity", "names ':brevity'; wanted 'module:function'"),
        ("nowhere_at_all:f", "names 'nowhere_at_all:f': No module named 'nowhere_at_all'"),
        ("own_rewards:style", "own_rewards has no function 'style'"),
        ("own_rewards:number", "own_rewards has no function 'number'"),
        ("own_rewards:thinking", "there is a term 'thinking' already"),
    ],
)
def test_a_name_that_means_no_function_is_refused(own, name, sentence):
    own.number, own.thinking = 3, len
    with pytest.raises(ValueError, match=sentence):
        rewards.user_functions([name])


def test_a_function_that_forgets_completions_is_refused(own):
    own.short = lambda **_: [1.0]
    cfg = config(functions=("own_rewards:short",))
    with pytest.raises(ValueError, match="'short' returned 1 rewards for 2 completions"):
        score(samples(GOOD, GOOD), ["fail", "fail"], cfg)


# --- what is written down


def test_metrics_of_a_batch_by_hand(monkeypatch):
    monkeypatch.setattr(rewards.time, "monotonic", itertools.count(10.0, 2.0).__next__)
    bare = GOOD.replace("<answer>\n", "")  # no answer: no program, and no format
    texts = [GOOD, GOOD, bare, GOOD, GOOD]
    verdicts = ["pass", "pass", "error", "fail", "infra"]
    values = score(samples(*texts), verdicts, config("additive")).values
    assert values == {
        "judge/pass": 2 / 5,
        "judge/fail": 1 / 5,
        "judge/timeout": 0,
        "judge/memory": 0,
        "judge/error": 1 / 5,
        "judge/infra": 1 / 5,
        "judge/cpu_s": 2.5,
        "judge/weak": 1 / 5,
        "judge/passing_with_denied_calls": 1 / 2,
        "judge/runs_per_s": 5 / 2,
        "judge/slot_rebuilds": 1,
        "completions/no_program": 1 / 5,
        "completions/no_reasoning": 0,
        "completions/reasoning_characters": len(REASONING.strip("\n")),
        "rewards/format/passing": 1,
        "rewards/format/failing": 1 / 2,
        "rewards/thinking/passing": pytest.approx((0.9 + 0.8) / 2),
        "rewards/thinking/failing": pytest.approx((0.7 + 0.6) / 2),
        "rewards/thinking/early": 0,
    }


def test_a_reward_model_that_likes_length_is_seen_in_the_correlation():
    likes_length = Scorer(lambda _, reasoning: 0.1 + 0.001 * len(reasoning))
    texts = [world.completion(REASONING * n, PROGRAM) for n in (1, 2, 4)]
    values = score(samples(*texts), ["pass"] * 3, scorer=likes_length).values
    assert values["rewards/thinking/length_correlation"] == pytest.approx(1, abs=1e-5)


def test_the_file_keeps_what_was_said_judged_and_earned():
    row = score(samples(GOOD), ["pass"]).rows(np.array([0.5]))[0]
    assert (row.prompt, row.completion) == (POOL[0].statement, GOOD)
    assert (row.reasoning, row.code) == (REASONING.strip("\n"), PROGRAM.strip())
    assert (row.verdict, row.advantage, row.truncated) == ("pass", 0.5, False)
    assert row.length == len(WORDS.encode(GOOD)) + 1
    assert row.rewards == {"format": 1.0, "outcome": 1.0, "thinking": pytest.approx(0.9)}
