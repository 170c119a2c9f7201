"""An answer is the wanted one exactly when a careful human says so."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrpo_jax import compare

INTEGERS = st.integers(-(10**30), 10**30)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.text())
def test_every_text_equals_itself_with_other_line_ends_and_trailing_blanks(text):
    text = text.replace("\r", "")
    got = text.replace("\n", "  \r\n") + "\n\n  \n"
    assert compare.lines(text, got.encode("utf-8", "surrogatepass")) == ""


@given(INTEGERS, INTEGERS)
def test_printed_integers_are_compared_exactly_at_any_size(want, got):
    assert (compare.lines(str(want), str(got).encode()) == "") == (want == got)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_lines_agree_only_if_all_of_them_do(want, got):
    text = ["\n".join(map(str, numbers)) for numbers in (want, got)]
    assert (compare.lines(text[0], text[1].encode()) == "") == (want == got)


@given(
    st.lists(st.floats(-1e12, 1e12), min_size=1),
    st.floats(-3, 3).filter(lambda off: not 0.999 < abs(off) < 1.001),
    st.data(),
)
def test_floats_agree_exactly_if_each_is_within_the_tolerance(wanted, off, data):
    i = data.draw(st.integers(0, len(wanted) - 1))
    got = list(wanted)
    got[i] += off * compare.TOLERANCE * max(1.0, abs(wanted[i]))
    agree = compare.floats(
        " ".join(map(repr, wanted)), "\n".join(f"{x:.17g}" for x in got).encode()
    )
    assert (agree == "") == (abs(off) < 1)


@given(st.lists(st.integers(-(10**9), 10**9), min_size=1))
def test_floats_takes_decimals_where_integers_are_wanted_and_nothing_that_is_no_number(wanted):
    text = " ".join(map(str, wanted))
    assert compare.floats(text, " ".join(f"{x}.0000001" for x in wanted).encode()) == ""
    assert compare.floats(text, text.encode() + b" 1") != ""
    for word in (b"nan", b"inf", b"x", b"1_0"):
        assert compare.floats(text, b" ".join([word] * len(wanted))) != ""


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ("0.5", "0.5000001"),
        ("3", "3.0"),
        ("1000000.0", "1000000.9"),  # 0.9 <= 1e-6 * 1e6
        ("2.0", "2"),
        (".5", "0.50"),
        ("a  b", "a b"),
        ("nan", "nan"),
    ],
)
def test_equal_texts(want, got):
    assert compare.lines(want, got.encode()) == ""


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ("YES", "NO"),
        ("YES", "yes"),
        ("100000000000000001", "1e17"),
        ("100000000000000001", "100000000000000000"),
        ("5", "5.0000001"),  # an integer is met exactly
        ("7", "007"),  # zeros in front are digits of a text
        ("1000", "1_000"),
        ("7", "\uff17"),  # a full-width digit is text
        ("0.5", "nan"),
        ("1e400", "inf"),
        ("0.5", "inf"),
        ("1\n2", "1"),  # a right prefix
        ("1", "1\n2"),
        ("1 2", "1\n2"),
        ("1\n\n2", "1\n2"),
        ("", "0"),
        ("0.5", "0.50001"),
    ],
)
def test_different_texts(want, got):
    assert compare.lines(want, got.encode()) != ""


def test_the_first_difference_is_told():
    assert compare.lines("1\n2\n3", b"1\n5\n3") == "line 2: wanted b'2', got b'5'"
    assert compare.values([1, 2], [1, 3]) == "wanted [1, 2], got [1, 3]"


def test_other_comparers_forgive_what_they_say():
    assert compare.tokens("1 2\n3", b"1\n2 3") == ""
    assert compare.tokens("1 2", b"2 1") != ""
    assert compare.unordered_lines("a\nb\nb", b"b\na\nb\n") == ""
    assert compare.unordered_lines("a\nb\nb", b"b\na\na\n") != ""
    assert compare.exact("a\n", b"a\n") == ""
    assert compare.exact("a\n", b"a") != ""


def test_a_huge_number_costs_no_time():
    """Its value would take minutes to compute: texts of digits are compared as texts."""
    digits = "9" * 1_000_000
    assert compare.lines(digits, digits.encode()) == ""
    assert compare.lines(digits, b"1" * 1_000_000) != ""
    assert compare.lines("1", b"1e9999") != ""


@given(PLAIN)
def test_every_value_equals_itself_under_both_rules(value):
    assert compare.values(value, value) == ""
    assert compare.same_values(value, value) == ""


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ((1, 2), [1, 2]),
        (2, 2.0),
        ([0.3], [0.1 + 0.2]),
        ({"a": [1.0]}, {"a": (1,)}),
        (math.nan, math.nan),
        ({1, 2}, {2, 1}),
        (True, 1),
    ],
)
def test_equal_values(want, got):
    assert compare.values(want, got) == ""


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ([1, 2], {1, 2}),
        ({1: 2}, [1]),
        (1, "1"),
        (10**17 + 1, 1e17),
        (5, 5.0000001),
        (0.5, math.inf),
        (math.inf, 1e308),
        (0.5, 10**400),
        ([], None),
        (0.0, ""),
        ([1, 2], [1]),
        ({"a": 1}, {"a": 1, "b": 2}),
    ],
)
def test_different_values(want, got):
    assert compare.values(want, got) != ""


def test_python_equality_keeps_tuples_and_lists_apart():
    assert compare.same_values((1, 2), [1, 2]) != ""
    assert compare.same_values(0.3, 0.1 + 0.2) != ""
    assert compare.same_values(1, True) == ""


def test_a_failure_is_told_even_if_the_value_cannot_be_printed():
    assert "very long number" in compare.values(0, 10**10_000)
