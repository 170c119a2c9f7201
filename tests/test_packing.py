"""Rows are full, equally full, and hold everything once."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrpo_jax import packing


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 150))
def test_every_sequence_is_in_one_row_and_no_row_is_too_full(lengths, capacity):
    rows = packing.best_fit(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


def test_the_fullest_row_that_has_room_is_taken():
    # 6 and 5 begin rows of 10; 4 fits both and best the first, 3 the second alone.
    assert packing.best_fit([3, 4, 5, 6], 10) == [[3, 1], [2, 0]]


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit a row of 10"):
        packing.best_fit([11], 10)


@pytest.mark.parametrize(("count", "rows"), [(64, 2), (128, 4), (1024, 8)])
def test_padding_is_under_a_tenth_at_mixed_lengths(count, rows):
    for seed in range(5):
        lengths = 64 + np.random.default_rng(seed).integers(8, 129, count)
        batches, capacity = packing.pack(lengths.tolist(), 192, rows)
        assert 1 - lengths.sum() / (len(batches) * rows * capacity) < 0.1


def test_sequences_of_one_length_are_not_padded():
    assert packing.pack([192] * 8, 192, 4) == ([[[0], [2], [1], [3]], [[4], [6], [5], [7]]], 192)


def test_rows_that_are_computed_together_are_equally_full():
    lengths = 64 + np.random.default_rng(0).integers(8, 129, 1024)
    batches, capacity = packing.pack(lengths.tolist(), 192, 8)
    fills = [[sum(lengths[i] for i in row) for row in batch] for batch in batches]
    assert max(max(fill) - min(fill) for fill in fills[:-1]) < 0.05 * capacity


def test_half_of_the_devices_do_not_stand_idle_in_the_last_micro_batch():
    # Three rows of four, and room for one of two on each of two devices.
    assert packing.pack([9, 8, 7], 9, 4)[0] == [[[0], [2], [1], []]]
