"""The built-in world: its splits, its defects, its oracle and its vocabulary."""

import dataclasses
import random
import re
import statistics

import pytest

from pgrpo_jax import world

SPEC = world.Spec(
    domain="a list",
    steps=(("sort", ""), ("drop", "k"), ("add_each", "m")),
    constants=(("k", 7, 5, 9), ("m", 3, 6, 2)),
    but_first=True,
    edge=4,
)


@pytest.fixture(scope="module")
def pool():
    return world.problems("train", 300, seed=0)


def run_program(source: str, x):
    namespace: dict = {}
    exec(source, namespace)
    return namespace["f"](x)


def test_statement_reasoning_and_program_of_a_known_problem():
    plan = world.reference_plan(SPEC)
    assert world.statement(SPEC) == (
        "x is a list.\nk is 7 plus 5 minus 9.\nm is 3 plus 6 minus 2.\nif x is empty, return 4.\n"
        "drop the first k, then add m to each, but first sort it.\n"
    )
    assert world.reasoning(plan, "a list") == (
        "k = 12 - 9 = 3.\nm = 9 - 2 = 7.\nif empty, return 4.\n"
        "sort it.\ndrop the first 3.\nadd 7 to each.\n"
    )
    assert run_program(world.program(plan, "a list"), [5, 1, 4, 2, 3]) == [11, 12]
    assert run_program(world.program(plan, "a list"), []) == 4


def test_reference_programs_pass_their_tests_when_really_run(pool):
    for problem in pool:
        spec = problem.columns["spec"]
        source = world.program(world.reference_plan(spec), spec.domain)
        for (x,), wanted in zip(problem.tests.inputs, problem.tests.outputs, strict=True):
            assert run_program(source, x) == wanted, (problem.statement, source)


def test_no_composition_is_both_trained_on_and_held_out(pool):
    held = {p.columns["composition"] for p in world.problems("heldout", 300, seed=0)}
    trained = {p.columns["composition"] for p in pool}
    assert not held & trained
    assert len(held) > 40 and len(trained) > 150


def test_problems_are_distinct_and_depend_on_the_seed_alone(pool):
    assert len({p.statement for p in pool}) == len({p.id for p in pool}) == 300
    assert [p.statement for p in world.problems("train", 300, seed=0)] == [
        p.statement for p in pool
    ]
    assert world.problems("train", 5, seed=1)[0].statement != pool[0].statement


@pytest.mark.parametrize("dimension", world.DIMENSIONS)
def test_the_oracle_finds_the_planted_defect_and_no_other(pool, dimension):
    rng = random.Random(0)
    for problem in pool:
        spec = problem.columns["spec"]
        text = world.reasoning(world.degraded_plan(spec, dimension, rng), spec.domain)
        grade = world.grade(spec, text)
        flaws = {d for d in world.DIMENSIONS if not getattr(grade, d)}
        assert flaws == {dimension} and not grade.perfect, (problem.statement, text)


def test_only_the_complete_reasoning_is_perfect(pool):
    rng = random.Random(0)
    for problem in pool:
        spec = problem.columns["spec"]
        best = world.grade(spec, world.reasoning(world.reference_plan(spec), spec.domain))
        initial = world.grade(spec, world.reasoning(world.initial_plan(spec, rng), spec.domain))
        assert best == world.Grade(True, True, True, True)
        assert initial == world.Grade(True, True, True, False)


def test_a_reasoning_with_a_foreign_line_is_graded_as_nothing():
    text = world.reasoning(world.reference_plan(SPEC), "a list") + "trust me.\n"
    assert world.grade(SPEC, text) == world.Grade(False, False, False, False)


def test_a_defect_followed_by_the_program_usually_fails_the_tests(pool):
    """The reasoning carries load: a program that follows a flawed one fails four times out of five
    or more."""
    rng = random.Random(0)
    for dimension in world.DIMENSIONS:
        lucky = 0
        for problem in pool:
            spec = problem.columns["spec"]
            plan = world.degraded_plan(spec, dimension, rng)
            lucky += all(
                world.execute(plan, spec.domain, x) == wanted
                for (x,), wanted in zip(problem.tests.inputs, problem.tests.outputs, strict=True)
            )
        assert lucky / len(pool) < 0.25, dimension


def test_length_does_not_give_a_degraded_reasoning_away(pool):
    """Initial against degraded: about as often longer as shorter, in every dimension."""
    for dimension in world.DIMENSIONS:
        rows = [
            r for r in world.pair_rows(pool, (dimension,), 0) if r["kind"] == "initial>degraded"
        ]
        lines = [
            len(re.split(r"[ \n]", r["chosen"])) - len(re.split(r"[ \n]", r["rejected"]))
            for r in rows
        ]
        longer, shorter = (
            statistics.mean(d > 0 for d in lines),
            statistics.mean(d < 0 for d in lines),
        )
        assert abs(longer - shorter) < 0.15, (dimension, longer, shorter)


def test_pairs_come_in_three_kinds_with_the_columns_that_trl_reads(pool):
    rows = list(world.pair_rows(pool[:50], world.DIMENSIONS, 0))
    assert {r["kind"] for r in rows} == {
        "optimised>degraded",
        "optimised>initial",
        "initial>degraded",
    }
    assert all(r["chosen"] != r["rejected"] for r in rows)
    assert set(rows[0]) >= {
        "prompt",
        "chosen",
        "rejected",
        "kind",
        "dimension",
        "generator",
        "problem_id",
    }


def test_warm_up_overlooks_but_first_more_often_than_not(pool):
    specs = {p.statement: p.columns["spec"] for p in pool}
    right = overlooked = 0
    for row in world.sft_rows(pool, 4000, seed=0):
        spec = specs[row["prompt"]]
        if spec.but_first:
            as_told = dataclasses.replace(spec, steps=spec.steps[1:] + spec.steps[:1])
            texts = [
                world.reasoning(world.reference_plan(s), s.domain) + "</think>"
                for s in (spec, as_told)
            ]
            right += texts[0] in row["completion"]
            overlooked += texts[1] in row["completion"]
    assert right > 200 and 1.3 < overlooked / right < 2


def test_every_text_of_the_world_is_made_of_its_pieces(pool):
    longest_first = sorted(world.PIECES, key=len, reverse=True)
    pattern = re.compile("(?:" + "|".join(map(re.escape, longest_first)) + ")*")
    for row in world.sft_rows(pool, 500, seed=0):
        for text in row.values():
            assert pattern.fullmatch(text), text
