"""Rows are full, equally full, hold everything once, and each prompt once for its completions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrpo_jax import packing


def alone(own) -> packing.Sequences:
    """Sequences that share nothing."""
    return packing.Sequences(own, [0] * len(own), range(len(own)))


def groups(own, shared: int, each: int) -> packing.Sequences:
    """`each` completions of a prompt."""
    return packing.Sequences(own, [shared] * len(own), [i // each for i in range(len(own))])


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), max_size=60),
    st.lists(st.integers(0, 20), min_size=6, max_size=6),
    st.integers(50, 150),
)
def test_every_sequence_is_in_one_row_and_no_row_is_too_full(drawn, prefixes, capacity):
    own, prompts = [n for n, _ in drawn], [prompt for _, prompt in drawn]
    sequences = packing.Sequences(own, [prefixes[p] for p in prompts], prompts)
    rows = packing.best_fit(sequences, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(own)))
    for row in rows:
        together = [list(some) for _, some in itertools.groupby(row, key=lambda i: prompts[i])]
        assert len(together) == len({prompts[i] for i in row})  # side by side
        tokens = sum(prefixes[prompts[some[0]]] + sum(own[i] for i in some) for some in together)
        assert tokens == sequences.tokens(row) <= capacity


def test_the_fullest_row_that_has_room_is_taken():
    # 6 and 5 begin rows of 10; 4 fits both and best the first, 3 the second alone.
    assert packing.best_fit(alone([3, 4, 5, 6]), 10) == [[3, 1], [2, 0]]


def test_a_row_that_holds_the_prompt_is_taken_before_a_fuller_one():
    # Of 12 tokens, 5 and a prompt of 3 leave 4. The 4 of the same prompt fit there.
    own, prompts = [8, 5, 4], ["a", "b", "b"]
    assert packing.best_fit(packing.Sequences(own, [0, 3, 3], prompts), 12) == [[1, 2], [0]]


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit a row of 10"):
        packing.best_fit(groups([8, 2], shared=3, each=2), 10)


def packed(own, rows, shared=63, each=8, longest=129) -> packing.Packed:
    return packing.pack(groups(own, shared, each), longest, shared, rows, parts=1)


@pytest.mark.parametrize(
    ("count", "rows", "each"), [(64, 2, 1), (128, 4, 1), (1024, 8, 1), (128, 4, 8), (1024, 8, 8)]
)
def test_padding_is_under_a_tenth_at_mixed_lengths(count, rows, each):
    for seed in range(5):
        own = np.random.default_rng(seed).integers(9, 130, count).tolist()
        plan = packed(own, rows, each=each)
        room = len(plan.batches) * plan.rows * plan.capacity
        held = sum(groups(own, 63, each).tokens(row) for batch in plan.batches for row in batch)
        assert 1 - held / room < 0.1


def test_completions_of_a_prompt_need_fewer_tokens_together():
    own = np.random.default_rng(0).integers(9, 130, 64).tolist()
    shared, apart = (packed(own, 4, each=each) for each in (8, 1))
    rooms = [len(plan.batches) * plan.rows * plan.capacity for plan in (shared, apart)]
    assert rooms[0] < 0.75 * rooms[1]


def test_longer_rows_are_fewer_at_a_time():
    assert packing.kinds(129, 63, rows_at_once=8, parts=4) == [(579, 4), (288, 8), (192, 8)]
    assert packing.kinds(129, 23, rows_at_once=8, parts=4) == [(410, 4), (228, 8), (152, 8)]
    assert packing.kinds(129, 63, rows_at_once=8, parts=8) == [(288, 8), (192, 8)]
    assert packing.kinds(129, 63, rows_at_once=8, parts=2)[:2] == [(579, 4), (579, 2)]


def test_a_small_batch_does_not_pay_for_rows_that_stay_empty():
    own = np.random.default_rng(0).integers(9, 130, 64).tolist()
    plan = packed(own, 8)
    assert (plan.rows, len(plan.batches)) == (2, 5)  # of four at a time there would be twelve
    assert packed([129] * 64, 8).rows == 4
    # Without shared prompts a micro-batch of so few rows holds fewer than `limit` counts on.
    assert packed([129] * 64, 8, each=1).rows == 8


def test_long_rows_are_whole_tiles():
    kinds = packing.kinds(3073, 1023, rows_at_once=8, parts=4)
    assert kinds == [(10368, 4), (6144, 8), (4096, 8)]


def test_another_kind_of_rows_is_one_more_program_and_has_to_spare_tokens():
    assert packed([129] * 64, 8, each=1).capacity == 192  # three of them leave room in 579
    own = np.random.default_rng(0).integers(9, 130, 128).tolist()
    plans = [packed(own[:count], 8) for count in range(64, 129, 8)]
    assert {plan.capacity for plan in plans} == {579}


def test_sequences_of_one_length_are_not_padded():
    plan = packing.pack(alone([192] * 8), 192, 0, 4, parts=4)
    assert plan == packing.Packed([[[0], [2], [1], [3]], [[4], [6], [5], [7]]], 4, 192, limit=2)


def test_rows_that_are_computed_together_are_equally_full():
    own = np.random.default_rng(0).integers(9, 130, 1024).tolist()
    plan = packed(own, 8)
    tokens = groups(own, 63, 8).tokens
    fills = [[tokens(row) for row in batch] for batch in plan.batches]
    assert max(max(fill) - min(fill) for fill in fills[:-1]) < 0.05 * plan.capacity


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(0, 20))
def test_there_are_never_more_micro_batches_than_the_limit_says(own, shared):
    for rows in (2, 8):
        plan = packed(own, rows, shared, each=4, longest=30)
        assert len(plan.batches) <= plan.limit == math.ceil(len(own) / rows)


def test_half_of_the_devices_do_not_stand_idle_in_the_last_micro_batch():
    # Three rows of four, and room for one of two on each of two devices.
    plan = packing.pack(alone([9, 8, 7]), 9, 0, 4, parts=4)
    assert plan.batches == [[[0], [2], [1], []]]
