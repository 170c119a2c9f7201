"""Completion text to reasoning, program and format."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax import parse

SNIPPETS = st.sampled_from(
    [
        *parse.TAGS,
        "```",
        "```python",
        "```\n",
        "\n",
        " ",
        "x = 1",
        "SECRET",
        "  y = 2",
        "\r",
        "\u2028",
    ]
)
TEXTS = st.lists(SNIPPETS | st.text(max_size=4), max_size=24).map("".join)


@pytest.mark.parametrize(
    "text",
    [
        "<think>add</think><answer>print(1)</answer>",
        "\n<think>\nadd\n</think>\n\n<answer>\nprint(1)\n</answer>\n",
        "<think>add</think><answer>\n```python\nprint(1)\n```\n</answer>",
        "<think>add</think><answer>\n```\nprint(1)\n```</answer>",
        "<think>add</think><answer>    print(1)  </answer>",
    ],
)
def test_the_format_is_recognised_with_the_code_fenced_or_not(text):
    assert parse.parse(text) == parse.Parsed("add", "print(1)", True)


@pytest.mark.parametrize(
    "text",
    [
        "<think></think><answer>print(1)</answer>",
        "<think>add</think><answer> </answer>",
        "<think>add</think><answer>\n```python\n```\n</answer>",
        "<think>add</think> so <answer>print(1)</answer>",
        "Sure! <think>add</think><answer>print(1)</answer>",
        "<think>add</think><answer>print(1)</answer> done",
        "<think>add</think><answer>print(1)",
        "<think>add<answer>print(1)</answer>",
        "add</think><answer>print(1)</answer>",
        "<answer>print(1)</answer><think>add</think>",
        "<think>a</think><think>b</think><answer>print(1)</answer>",
        "<think>a</think><answer>1</answer><answer>2</answer>",
        "<think>a</think>\n```python\nprint(1)\n```",
        "print(1)",
        "",
    ],
)
def test_whatever_departs_from_the_format_is_not_well_formed(text):
    assert not parse.parse(text).well_formed


def test_a_think_opened_by_the_prompt_counts_as_written():
    text = "add</think><answer>print(1)</answer>"
    assert parse.parse(text, "<think>\n") == parse.Parsed("add", "print(1)", True)
    assert parse.parse("<think>" + text, "<think>\n").well_formed is False  # opened twice


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("<think>```python\ndraft\n```</think>\n```python\na\n```\nor\n```py\nb\n```\n", "b"),
        ("<think>r</think>\n```python\nfence\n```\n<answer>answer</answer>", "answer"),
        ("<think>r</think><answer>a</answer><answer>b</answer>", "b"),
        ("<think>r</think><answer>use this:\n```\na\n```\n</answer>", "a"),
        ("no reasoning\n```python\na\n```", "a"),
        ("<answer>a</answer>", "a"),
        ("r</think><answer>a</answer>", "a"),
        ("<think>r</think>\n```python\na = '''\n   \n'''\n```", "a = '''\n   \n'''"),
        ("<think>r</think>\n````\na = '```'\n```\nb\n````", "a = '```'\n```\nb"),
        ('<think>r</think><answer>print("</answer>")</answer>', 'print("</answer>")'),
        ("<think>r</think><answer>\n    if x:\n        y\n    z\n</answer>", "if x:\n    y\nz"),
    ],
)
def test_the_program_is_the_answer_or_the_last_fenced_block_after_the_reasoning(text, program):
    assert parse.parse(text).program == program


@pytest.mark.parametrize(
    "text",
    [
        "<think>\n```python\ndraft\n```\n",
        "<think><answer>draft</answer>",
        "<think><answer>draft</answer></think>",
        "<think>\n```python\ndraft\n```\n</think> I am done.",
        "<think>r</think> wait <think>\n```python\ndraft\n```\n",
        "<think>a</think>\n```python\ndraft\n```\n<think>b</think>",
        "<think>r</think>\n```python\ncut off",
        "<think>r</think><answer>cut off",
        "only words",
    ],
)
def test_a_draft_or_a_cut_off_program_is_no_program(text):
    assert parse.parse(text).program == ""


def test_an_open_reasoning_is_kept_as_reasoning():
    assert parse.parse("<think>cut o").reasoning == "cut o"


def test_the_reasoning_loses_line_ends_around_it_and_nothing_else():
    assert parse.parse("<think>\n\n  a \n b \n</think>").reasoning == "  a \n b "


def test_many_open_fences_take_linear_time():
    parse.parse("</think>" + "```a\n" * 200_000)  # quadratic: an hour


@settings(deadline=None)
@given(TEXTS, st.sampled_from(["", "<think>", "<think>\n"]))
def test_parsing_never_raises_and_well_formed_means_both_parts(text, prefill):
    parsed = parse.parse(text, prefill)
    if parsed.well_formed:
        assert parsed.reasoning and parsed.program
        assert all((prefill + text).count(tag) == 1 for tag in parse.TAGS)


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_text_inside_the_reasoning_never_reaches_the_program(before, inside, after):
    after = after.replace("SECRET", "")
    text = f"{before}<think>{inside}SECRET</think>{after}"
    assert "SECRET" not in parse.parse(text).program
    assert "SECRET" not in parse.parse(f"{before}<think>{inside}SECRET").program.replace(before, "")


@settings(deadline=None)
@given(st.text(alphabet="abc =()\n1", min_size=1).filter(lambda code: code.strip()))
def test_a_clean_program_comes_back_unchanged_however_it_is_wrapped(code):
    code = code.strip()
    for answer in (code, f"\n{code}\n", f"\n```python\n{code}\n```\n"):
        parsed = parse.parse(f"<think>r</think>\n<answer>{answer}</answer>")
        assert parsed.program == code and parsed.well_formed
