"""Rows of every dialect of tests to problems."""

import base64
import gzip
import json
import pathlib
import pickle
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax import problems, types

DATA = pathlib.Path(__file__).parent / "data/problems"
SHARED = pathlib.Path(__file__).parents[2] / "shared/data"
CALL = types.Tests("call", ((1, [2]), (3, [4])), (5, [6, 7]), function="f")
STDIN = types.Tests("stdin", ("1\n2\n", "3\n"), ("3\n", "3\n"))


def rows(file: pathlib.Path) -> list[dict]:
    text = file.read_bytes()
    text = gzip.decompress(text) if file.suffix == ".gz" else text
    return [json.loads(line) for line in text.splitlines()]


def read(row: dict) -> types.Problem:
    return problems.problem(row, "t.jsonl, row 7")


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


CALL_ROWS = [
    {"input": "1\n[2]", "output": "5", "testtype": "functional"},
    {"input": "3\n[4]", "output": "[6, 7]", "testtype": "functional"},
]
STDIN_ROWS = [{"input": "1\n2\n", "output": "3\n"}, {"input": "3\n", "output": "3\n"}]
PRIME_CALL = [
    {"type": "function_call", "fn_name": "f", "input": [1, [2]], "output": 5},
    {"type": "function_call", "fn_name": "f", "input": [3, [4]], "output": [6, 7]},
]
PRIME_STDIN = [{**row, "type": "stdin_stdout", "fn_name": None} for row in STDIN_ROWS]
CALL_LISTS = {"inputs": [[1, [2]], [3, [4]]], "outputs": [5, [6, 7]]}
STDIN_LISTS = {"inputs": ["1\n2\n", "3\n"], "outputs": ["3\n", "3\n"]}
LINES = {"inputs": [["1", "2", ""], "3\n"], "outputs": [["3\n"], "3\n"]}
BLANK = {"inputs": ["", ""], "outputs": [None, None]}
CODE = ["assert f(1)", "f(2)"]
ASSERT = types.Tests("assert", code=tuple(CODE))
DIALECTS = {
    "taco call": ({**CALL_LISTS, "fn_name": "f"}, CALL),
    "taco stdin": (STDIN_LISTS, STDIN),
    "apps lists of lines": (LINES, STDIN),
    "assert_case": ({**BLANK, "assert_case": CODE}, ASSERT),
    "assert_case alone": ({"assert_case": CODE}, ASSERT),
    "primeintellect call": ({"language": "python", "test_cases": PRIME_CALL}, CALL),
    "primeintellect stdin": ({"language": "python", "test_cases": PRIME_STDIN}, STDIN),
    "livecodebench call": ([{**r, "metadata": {"func_name": "f"}} for r in CALL_ROWS], CALL),
    "its metadata as text": ([{**r, "metadata": '{"func_name": "f"}'} for r in CALL_ROWS], CALL),
    "livecodebench stdin": ([{**r, "testtype": "stdin"} for r in STDIN_ROWS], STDIN),
    "code contests": ({"input": STDIN_LISTS["inputs"], "output": STDIN_LISTS["outputs"]}, STDIN),
    "a list of asserts": (CODE, ASSERT),
    "own call": ({"kind": "call", **CALL_LISTS, "function": "f"}, CALL),
    "own stdin": ({"kind": "stdin", **STDIN_LISTS}, STDIN),
    "own assert": ({"kind": "assert", "code": CODE}, ASSERT),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize(
    "wrap", [lambda spec: spec, json.dumps, repr], ids=["object", "json", "repr"]
)
@pytest.mark.parametrize("column", ["tests", "input_output", "verification_info", "reward_model"])
def test_every_dialect_reads_the_same_from_every_column_and_packing(name, wrap, column):
    spec, wanted = DIALECTS[name]
    value = {"ground_truth": wrap(spec)} if column == "reward_model" else wrap(spec)
    problem = read({"id": 3, "prompt": "Add.", column: value, "difficulty": "easy"})
    assert problem == types.Problem("3", "Add.", wanted, {"id": 3, "difficulty": "easy"})


@pytest.mark.parametrize(
    ("outputs", "wrapped"),
    [
        ([[3], [[4]]], True),  # every output may be wrapped
        ([[3], [4, 5]], False),  # a list of two cannot be a wrapper, so none is
        ([3, [4]], False),
    ],
)
def test_outputs_in_lists_of_one_may_be_wrapped_only_where_all_are(outputs, wrapped):
    tests = read(
        {"prompt": "p", "tests": {"inputs": [[1], [2]], "outputs": outputs, "fn_name": "f"}}
    ).tests
    assert (tests.outputs, tests.wrapped) == (tuple(outputs), wrapped)


GOOD = {"inputs": ["1"], "outputs": ["1"]}
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"
TEST_CASE = "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        pass\n"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"tests": "assert f(1) == 2"}, types.Tests("assert", code=("assert f(1) == 2",))),
        (
            {"tests": "import math\nx = [1]\nassert f(x)\nassert f(2)"},
            types.Tests(
                "assert", code=("assert f(x)", "assert f(2)"), setup="import math\nx = [1]"
            ),
        ),
        (
            {"tests": "x = f(1)\nassert x\nx = f(2)\nassert x"},  # an order of its own is kept
            types.Tests("assert", code=("x = f(1)\nassert x\nx = f(2)\nassert x",)),
        ),
        ({"tests": CHECK + "check(f)"}, types.Tests("assert", code=(CHECK + "check(f)",))),
        (
            {"tests": CHECK, "entry_point": "f"},
            types.Tests("assert", code=("check(f)",), setup=CHECK),
        ),
        (
            {"tests": {"test": CHECK, "entry_point": "f"}},
            types.Tests("assert", code=("check(f)",), setup=CHECK),
        ),
        ({"tests": TEST_CASE}, types.Tests("unittest", code=(TEST_CASE,))),
        ({"tests": [TEST_CASE], "kind": "unittest"}, types.Tests("unittest", code=(TEST_CASE,))),
        (
            {"tests": json.dumps(json.dumps(["assert f()"]))},
            types.Tests("assert", code=("assert f()",)),
        ),
        (
            {"tests": {"inputs": [[1]], "outputs": [2], "function": "f"}, "kind": "call"},
            types.Tests("call", ((1,),), (2,), function="f"),
        ),
        (
            {"tests": {"code": ["assert f()"], "setup": "import os"}, "kind": "assert"},
            types.Tests("assert", code=("assert f()",), setup="import os"),
        ),
        ({"tests": {"input": "1", "output": "2"}}, types.Tests("stdin", ("1",), ("2",))),
    ],
)
def test_the_tests_beside_a_program_may_be_a_row_a_literal_or_source(row, wanted):
    assert problems.tests(row, "line 1") == wanted


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"tests": CHECK}, "assert nothing; .* needs `entry_point`"),
        ({"tests": ["def test():\n    assert f()"]}, "assert nothing"),
        ({"tests": "if __name__ == '__main__':\n    assert f()"}, "assert nothing"),
        ({"tests": ["assert f("]}, "no Python: '\\(' was never closed"),
        ({"tests": GOOD, "kind": "call"}, "'kind' is 'call', and its tests are of kind 'stdin'"),
        ({"tests": {**GOOD, "kind": "stdin", "compare": "odd"}}, "one of lines, tokens, floats"),
        ({"tests": {**GOOD, "kind": "stdin", "checker": "os:system"}}, "the source of a program"),
        ({"tests": ""}, "wanted JSON or a Python literal, got ''"),
        ({"tests": None}, "no known dialect of tests, got None"),
    ],
)
def test_tests_that_would_pass_anything_are_refused(row, sentence):
    with pytest.raises(ValueError, match=f"line 1.*{sentence}"):
        problems.tests(row, "line 1")


def test_livecodebench_joins_public_and_packed_private_tests():
    public = json.dumps(CALL_ROWS[:1])
    row = {
        "question_id": "2727",
        "question_content": "Add.",
        "starter_code": "class Solution:\n    def f(self, a: int, b: List[int]) -> int:\n        ",
        "public_test_cases": public,
        "private_test_cases": packed(json.dumps(CALL_ROWS[1:])),
        "metadata": '{"func_name": "f"}',
    }
    problem = read(row)
    assert problem.tests == CALL and problem.id == "2727"
    assert problem.statement == (
        "Add.\n\nUse this starter code:\n```python\n"
        "class Solution:\n    def f(self, a: int, b: List[int]) -> int:\n```"
    )
    assert set(problem.columns) == {"question_id", "starter_code", "metadata"}


def test_packed_tests_cannot_run_code():
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    row = {"question": "p", "public_test_cases": "[]", "private_test_cases": packed(Evil())}
    with pytest.raises(ValueError, match=r"row 7, column 'private_test_cases'.*builtins.print"):
        read(row)


def test_verl_rows_show_the_users_message_and_name_themselves_by_index():
    row = {
        "data_source": "taco",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Add."}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(DIALECTS["taco stdin"][0])},
        "extra_info": {"index": 5, "split": "train"},
    }
    columns = {"data_source": "taco", "extra_info": row["extra_info"]}
    assert read(row) == types.Problem("taco/5", "Add.", STDIN, columns)


def test_a_raw_statement_says_how_the_program_is_run():
    stdin, call = DIALECTS["taco stdin"][0], DIALECTS["taco call"][0]
    assert read({"question": "Add.", "input_output": stdin}).statement == (
        "Add.\n\nRead the input from stdin and write the answer to stdout."
    )
    assert read({"question": "Add.", "input_output": call}).statement == (
        "Add.\n\nWrite a function `f`."
    )


def test_mbpp_shows_its_tests_and_runs_its_setup():
    read_rows = [read(row) for row in rows(DATA / "mbpp.jsonl")]
    assert read_rows[0].statement == (
        "Write a python function to remove first and last occurrence of a given character from "
        "the string.\nYour code should pass these tests:\n\n"
        'assert remove_Occ("hello","l") == "heo"\n'
        'assert remove_Occ("abcda","a") == "bcd"\n'
        'assert remove_Occ("PHP","P") == "H"'
    )
    assert {len(problem.tests) for problem in read_rows} == {3}
    (tree,) = (problem for problem in read_rows if problem.id == "367")
    assert tree.tests.setup.startswith("root = Node(1)")


def test_sanitised_mbpp_keeps_its_imports():
    row = {"prompt": "Add.", "test_imports": ["import math"], "test_list": ["assert f(1)"]}
    problem = read(row)
    assert problem.tests == types.Tests("assert", code=("assert f(1)",), setup="import math")
    assert problem.statement.endswith("these tests:\n\nassert f(1)")


def test_the_programs_that_come_with_the_rows_pass_the_tests_that_are_read():
    """HumanEval's check and MBPP's asserts, run in this process: these programs are known."""
    for file, program in (
        ("humaneval.jsonl", lambda row: row["prompt"] + row["canonical_solution"]),
        ("mbpp.jsonl", lambda row: row["code"]),
    ):
        for row in rows(DATA / file):
            tests, scope = read(row).tests, {}
            if "Node" in tests.setup and "class Node" not in program(row):
                continue
            for code in (program(row), tests.setup, *tests.code):
                exec(code, scope)
            with pytest.raises((AssertionError, TypeError)):
                exec(tests.code[0], scope | {"check": None})
                raise AssertionError  # an MBPP assert stands on its own


def test_humaneval_asks_for_the_whole_function():
    problem = read(rows(DATA / "humaneval.jsonl")[0])
    assert problem.id == "HumanEval/23" and problem.tests.code == ("check(strlen)",)
    assert problem.statement.startswith("Write a self-contained Python program")
    assert "def strlen(string: str) -> int:" in problem.statement


def test_bigcodebench_livecodebench_and_code_contests_rows_read():
    (bigcode,) = map(read, rows(DATA / "bigcodebench.jsonl"))
    assert bigcode.tests.kind == "unittest" and "class TestCases" in bigcode.tests.code[0]
    assert bigcode.statement.startswith("Run files from list of files")
    (live,) = map(read, rows(DATA / "livecodebench.jsonl"))
    assert live.tests.function == "countSeniors" and live.tests.outputs[:2] == (2, 0)
    (contest,) = map(read, rows(DATA / "code_contests.jsonl"))
    assert contest.tests.kind == "stdin" and len(contest.tests) > 5


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"tests": GOOD}, ": no column with the statement"),
        ({"prompt": "p", "code": "x"}, ": no column with tests"),
        ({"prompt": " ", "tests": GOOD}, ", column 'prompt': the statement is empty"),
        ({"prompt": 5, "tests": GOOD}, "column 'prompt': wanted text or a list of messages, got 5"),
        ({"prompt": "p", "tests": "{"}, "column 'tests': wanted JSON or a Python literal, got '{'"),
        ({"prompt": "p", "tests": 5}, "column 'tests': no known dialect of tests, got 5"),
        ({"prompt": "p", "tests": {"a": 1}}, "column 'tests': wanted an object with 'input'"),
        ({"prompt": "p", "tests": {"inputs": ["1"]}}, "wanted an object with 'outputs'"),
        ({"prompt": "p", "tests": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"prompt": "p", "tests": {"inputs": [], "outputs": []}}, "no tests of kind 'stdin'"),
        ({"prompt": "p", "tests": {**GOOD, "fn_name": 3}}, "'fn_name' must be text, got 3"),
        ({"prompt": "p", "tests": {"inputs": [{}], "outputs": ["1"]}}, "object with 'stdin'"),
        ({"prompt": "p", "tests": {"inputs": [None], "outputs": ["1"]}}, "stdin must be text"),
        ({"prompt": "p", "tests": {"inputs": ["a b"], "outputs": [1], "fn_name": "f"}}, "'a b'"),
        ({"prompt": "p", "tests": {"inputs": [3], "outputs": [1], "fn_name": "f"}}, "arguments"),
        ({"prompt": "p", "tests": {"language": "cpp", "test_cases": []}}, "language 'cpp'"),
        ({"prompt": "p", "tests": [{"input": "1", "output": "1", "type": "odd"}]}, "got 'odd'"),
        ({"prompt": "p", "tests": [{"input": "1", "output": "1", "type": "functional"}]}, "names"),
        ({"prompt": "p", "tests": {"kind": "call", "inputs": [[1]], "outputs": [1]}}, "`function`"),
        ({"prompt": "p", "tests": {"kind": "stdin", "input": ["1"]}}, "unknown keys .'input'."),
        ({"prompt": "p", "tests": {"kind": "odd"}}, "stdin, call, assert or unittest, got 'odd'"),
        ({"prompt": "p", "test": "x = 1", "entry_point": "f"}, "assert nothing"),
        ({"prompt": "p", "reward_model": {"style": "rule"}}, "object with 'ground_truth'"),
        ({"prompt": "p", "tests": "A" * 64}, "packed tests .* do not unpack"),
    ],
)
def test_a_malformed_row_is_refused_with_its_row_and_column(row, sentence):
    with pytest.raises(ValueError, match=f"t.jsonl, row 7.*{sentence}"):
        read(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("f"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "outputs", "fn_name", "assert_case", "kind", "input", "output"]
            )
            | st.sampled_from(
                ["test_cases", "language", "testtype", "metadata", "role", "content"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
COLUMNS = st.sampled_from(["prompt", "question", "tests", "test_list", "test", "starter_code"])
COLUMNS |= st.sampled_from(["reward_model", "public_tests", "private_tests", "fn_name", "metadata"])
COLUMNS |= st.sampled_from(["entry_point", "test_imports", "test_setup_code", "extra_info", "id"])


@settings(deadline=None)
@given(st.dictionaries(COLUMNS, JSON, max_size=6), JSON)
def test_any_row_becomes_a_problem_or_a_value_error(row, tests):
    for one in (row, {"prompt": "p", "tests": tests, **row}):
        try:
            assert len(read(one).tests) > 0
        except ValueError as error:
            assert "t.jsonl, row 7" in str(error)


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("mbpp/mbpp.jsonl", {"assert": 974}),
        ("mbpp/mbpp_sanitized_codet.jsonl", {"assert": 427}),
        ("humaneval/HumanEval.jsonl.gz", {"assert": 164}),
        ("code_contests_sample/code_contests_20.jsonl.gz", {"stdin": 20}),
        ("code_contests_sample/lcb_v1_3.jsonl", {"stdin": 2, "call": 1}),
        ("lcb_derived/lcb_problems_merged.jsonl.gz", {"stdin": 610, "call": 444}),
        ("bigcodebench_hard/bigcodebench_hard.json.gz", {"unittest": 148}),
    ],
)
def test_whole_public_data_sets_read(file, kinds):
    if not (SHARED / file).is_file():
        pytest.skip(f"no file {SHARED / file}")
    found = rows(SHARED / file)
    if "bigcodebench" in file:
        found = list(found[0].values())
    found = [row for row in found if row.get("question_id") != "abc350_c"]  # has no tests
    counts: dict[str, int] = {}
    for row in found:
        kind = read(row).tests.kind
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == kinds
