"""Rows of public code datasets to problems: every way in use of writing tests down.

| dialect | where it comes from |
|---|---|
| `{"inputs", "outputs", "fn_name"}` | APPS (arXiv 2105.09938), TACO (2312.14852) |
| the same with `assert_case` | verl's sandbox reward |
| `{"language", "test_cases": [{"type", "input", "output", "fn_name"}]}` | PrimeIntellect |
| `[{"input", "output", "testtype", "metadata"}]`, also compressed | LiveCodeBench (2403.07974) |
| `{"input": [...], "output": [...]}` | CodeContests (2203.07814) |
| `prompt`, `test` with `check(candidate)`, `entry_point` | HumanEval (2107.03374) |
| `text`, `test_list`, `test_setup_code` | MBPP (2108.07732) |
| `instruct_prompt`, `test` with `unittest.TestCase` | BigCodeBench (2406.15877) |
| `prompt`, `reward_model.ground_truth` holding one of the above | verl |
| `{"kind", "inputs", "outputs", "code", "function", "setup", ...}` | `types.Tests`, our own |
| source of asserts, of `check(candidate)`, of `unittest.TestCase` | `tests` of `pgrpo_jax.judge` |

Any of them may be JSON (or a Python literal) in a string.
"""

import ast
import base64
import contextlib
import dataclasses
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pgrpo_jax import types

# What the policy is shown of a row, best first. To the raw ones is added what a program has to be.
COMPLETE_COLUMNS = ("statement", "prompt", "instruct_prompt", "content")
RAW_COLUMNS = ("question_content", "question", "problem", "description", "text")
STATEMENT_COLUMNS = COMPLETE_COLUMNS + RAW_COLUMNS
TEST_COLUMNS = (
    ("tests",),
    ("input_output",),
    ("verification_info",),
    ("test_list",),
    ("public_test_cases", "private_test_cases"),
    ("public_tests", "private_tests", "generated_tests"),
    ("test",),
    ("reward_model",),
)
ID_COLUMNS = ("id", "task_id", "question_id", "problem_id")
STDIN_TYPES = ("stdin", "stdin_stdout")
CALL_TYPES = ("functional", "function_call")

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{32,}=*\s*")
_DEF = re.compile(r"^\s*def\s+(\w+)", re.MULTILINE)


def problem(row: Mapping[str, Any], where: str) -> types.Problem:
    """The problem in a row of any dialect above.

    A malformed row is a ValueError that names `where` (say "train.jsonl, row 7") and the column.
    """
    text_column = _first(row, STATEMENT_COLUMNS, where, "the statement")
    test_columns = _test_columns(row, where)
    tests = _tests_of(row, test_columns, where)
    with _located(where, text_column):
        statement = _statement(row, text_column, tests)
    used = {text_column, *test_columns}
    columns = {name: value for name, value in row.items() if name not in used}
    return types.Problem(_id(row, where), statement, tests, columns)


def tests(row: Mapping[str, Any], where: str) -> types.Tests:
    """The tests of a row with a program: those in its column `tests`, of its `kind` if it has one.

    A malformed row is a ValueError that names `where`.
    """
    found = _tests_of(row, ("tests",), where)
    if (kind := row.get("kind")) not in (None, found.kind):
        raise ValueError(f"{where}: 'kind' is {kind!r}, and its tests are of kind {found.kind!r}")
    return found


def message_text(value: Any, roles: tuple[str, ...] = ("user",)) -> str:
    """The text of a string, or of the messages of `roles` in a chat's message list."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise ValueError(f"wanted text or a list of messages, got {_brief(value)}")
    said = [m.get("content") for m in value if m.get("role") in roles]
    if not said or not all(isinstance(text, str) for text in said):
        raise ValueError(f"wanted messages of {' or '.join(roles)} with text, got {_brief(value)}")
    return "\n\n".join(said)


def _test_columns(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    for group in TEST_COLUMNS:
        present = tuple(name for name in group if row.get(name))
        if present:
            return present
    known = ", ".join(name for group in TEST_COLUMNS for name in group)
    raise ValueError(f"{where}: no column with tests; wanted one of {known}, got {', '.join(row)}")


def _tests_of(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> types.Tests:
    cases = []
    for column in columns:
        with _located(where, column):
            value = row[column]
            if column == "reward_model":
                value = _field(_decoded(value), "ground_truth")
            while isinstance(value, str) and not _is_code(value):
                value = _decoded(value)
            if _is_code(value):
                return _from_code(value, row)
            if isinstance(value, Mapping) and column == "tests":
                inner = next((g for g in TEST_COLUMNS if any(map(value.get, g))), ())
                if inner:
                    return _tests_of({**row, **value}, tuple(filter(value.get, inner)), where)
                value = _with_kind(value, row)
            if isinstance(value, Mapping) and "kind" in value:
                return _own(value)
            asserts = value.get("assert_case") if isinstance(value, Mapping) else value
            if isinstance(asserts, list) and asserts and _all_text(asserts):
                return _from_statements(asserts, row)
            cases += _cases(value, _function(row))
    with _located(where, columns[0]):
        return _from_cases(cases)


def _setup(row: Mapping[str, Any]) -> str:
    """MBPP's set-up, and the imports of its sanitised rows."""
    imports = row.get("test_imports") or []
    if not isinstance(imports, list) or not _all_text(imports):
        raise ValueError(f"column 'test_imports' must be a list of lines, got {_brief(imports)}")
    return "\n".join([*imports, _text(row, "test_setup_code")]).strip()


def _with_kind(value: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`types.Tests` whose kind stands beside them."""
    own = any(key in value for key in ("code", "function", "compare", "checker"))
    return {"kind": row["kind"], **value} if own and row.get("kind") else value


def _own(value: Mapping[str, Any]) -> types.Tests:
    known = {field.name for field in dataclasses.fields(types.Tests)}
    if unknown := set(value) - known:
        raise ValueError(f"unknown keys {sorted(unknown)}; known are {sorted(known)}")
    if value["kind"] not in get_args(types.TestKind):
        raise ValueError(f"kind must be stdin, call, assert or unittest, got {value['kind']!r}")
    checker = _text(value, "checker")
    if checker and "\n" not in checker:  # never "module:function", which would be trusted
        raise ValueError(f"a checker in data must be the source of a program, got {checker!r}")
    lists: dict[str, Any] = {key: value.get(key) or [] for key in ("inputs", "outputs", "code")}
    if isinstance(lists["code"], str):
        lists["code"] = [lists["code"]]
    for key, items in lists.items():
        if not isinstance(items, list | tuple):
            raise ValueError(f"{key!r} must be a list, got {_brief(items)}")
    if value["kind"] == "call":
        lists["inputs"] = [_arguments(item) for item in lists["inputs"]]
    elif not all(map(_all_text, lists.values())):
        raise ValueError(f"tests of kind {value['kind']!r} must be strings")
    if value["kind"] == "assert":
        _require_assertions(lists["code"], _text(value, "setup"))
    return types.Tests(
        value["kind"],
        inputs=tuple(lists["inputs"]),
        outputs=tuple(lists["outputs"]),
        code=tuple(lists["code"]),
        function=_text(value, "function"),
        setup=_text(value, "setup"),
        compare=_text(value, "compare") or "lines",  # type: ignore[arg-type]  # checked by Tests
        checker=checker,
        wrapped=bool(value.get("wrapped")),
    )


def _is_code(value: Any) -> bool:
    """Statements of Python, and not just a value or a name."""
    try:
        return isinstance(value, str) and any(
            not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call)
            for node in ast.parse(value).body
        )
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _from_code(code: str, row: Mapping[str, Any]) -> types.Tests:
    """A module in a string: BigCodeBench's `unittest`, HumanEval's `check`, or asserts."""
    if row.get("kind") == "unittest" or ("unittest" in code and "TestCase" in code):
        return types.Tests("unittest", code=(code,))
    entry_point = _text(row, "entry_point")
    if "def check(" in code and entry_point:
        return types.Tests("assert", code=(f"check({entry_point})",), setup=code)
    body = ast.parse(code).body
    asserts = [node for node in body if isinstance(node, ast.Assert)]
    before, after = body[: len(body) - len(asserts)], body[len(body) - len(asserts) :]
    if not asserts or after != asserts or any(map(_can_fail, before)):
        return _from_statements([code], row)  # in an order of its own
    pieces = [ast.get_source_segment(code, node) or "" for node in before + asserts]
    setup = "\n".join(pieces[: len(before)])
    return _from_statements(pieces[len(before) :], {**row, "test_setup_code": setup})


def _from_statements(code: list[str], row: Mapping[str, Any]) -> types.Tests:
    if row.get("kind") == "unittest":
        return types.Tests("unittest", code=("\n\n".join(code),))
    _require_assertions(code, setup := _setup(row))
    return types.Tests("assert", code=tuple(code), setup=setup)


def _require_assertions(code: list[str], setup: str) -> None:
    try:
        nodes = [node for text in (setup, *code) for node in ast.parse(text).body]
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"the tests are no Python: {error}") from None
    if not any(map(_can_fail, nodes)):
        raise ValueError(
            "the tests assert nothing; a `def check(candidate)` needs `entry_point`, the name of "
            f"the function to check, got {_brief(code)}"
        )


def _can_fail(node: ast.stmt) -> bool:
    """Does a statement of a module do anything that could refuse a program?"""
    if isinstance(node, ast.If):
        return not ast.unparse(node.test).startswith("__name__ ==")
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return not isinstance(node, (*quiet, ast.Assign, ast.AnnAssign, ast.Pass))


@dataclasses.dataclass(frozen=True)
class _Case:
    input: Any
    output: Any
    function: str  # "": the program is a script


def _cases(value: Any, function: str) -> list[_Case]:
    """The input/output cases of every dialect that has them."""
    if isinstance(value, Mapping):
        if "input_output" in value:
            return _cases(_decoded(value["input_output"]), function)
        if "test_cases" in value:
            if (language := value.get("language") or "python") not in ("python", "python3"):
                raise ValueError(f"the program must be Python, got language {language!r}")
            return _cases(_decoded(value["test_cases"]), function)
        plural = "s" if "inputs" in value else ""
        inputs, outputs = _field(value, "input" + plural), _field(value, "output" + plural)
        if isinstance(inputs, str) and isinstance(outputs, str):
            return [_case(value, function)]
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise ValueError(f"inputs and outputs must be lists, got {_brief(value)}")
        if len(inputs) != len(outputs):
            raise ValueError(f"got {len(inputs)} inputs and {len(outputs)} outputs")
        function = _text(value, "fn_name") or _text(value, "function") or function
        return [_Case(i, o, function) for i, o in zip(inputs, outputs, strict=True)]
    if isinstance(value, list):
        return [_case(item, function) for item in value]
    raise ValueError(f"no known dialect of tests, got {_brief(value)}")


def _case(item: Any, function: str) -> _Case:
    wanted, got = _field(item, "output"), _field(item, "input")
    kind = item.get("testtype") or item.get("type")
    function = _function(item) or function
    if kind in STDIN_TYPES:
        function = ""
    elif kind in CALL_TYPES and not function:
        raise ValueError("a test calls a function, and neither it nor the row names the function")
    elif kind not in (*CALL_TYPES, None):
        raise ValueError(f"a test's type must be one of {STDIN_TYPES + CALL_TYPES}, got {kind!r}")
    return _Case(got, wanted, function)


def _from_cases(cases: list[_Case]) -> types.Tests:
    functions = sorted({case.function for case in cases})
    if len(functions) > 1:
        raise ValueError(f"all tests of a problem must call one function, got {functions}")
    if not functions or not functions[0]:
        given = tuple(_stream(case.input, "stdin") for case in cases)
        return types.Tests("stdin", given, tuple(_stream(case.output, "stdout") for case in cases))
    inputs = tuple(_arguments(case.input) for case in cases)
    text = [isinstance(case.input, str) and isinstance(case.output, str) for case in cases]
    outputs = [_value(c.output) if t else c.output for c, t in zip(cases, text, strict=True)]
    # APPS wraps outputs in a list of one, some of its children do not, and its judge takes both.
    wrapped = not any(text) and all(isinstance(o, list) and len(o) == 1 for o in outputs)
    return types.Tests("call", inputs, tuple(outputs), function=functions[0], wrapped=wrapped)


def _stream(value: Any, name: str) -> str:
    """What goes into a script or comes out of it; APPS has it as a list of lines too."""
    if isinstance(value, Mapping):
        value = _field(value, name)
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str | int | float) for line in lines):
        raise ValueError(f"{name} must be text or a list of lines, got {_brief(value)}")
    return "\n".join(map(str, lines))


def _arguments(value: Any) -> tuple[Any, ...]:
    """A list of arguments, or one JSON value a line as in LiveCodeBench."""
    if isinstance(value, str):
        return tuple(_value(line) for line in value.split("\n") if line.strip())
    if not isinstance(value, list | tuple):
        raise ValueError(f"the input of a call must be a list of arguments, got {_brief(value)}")
    return tuple(value)


def _statement(row: Mapping[str, Any], column: str, tests: types.Tests) -> str:
    """What the policy is asked. MBPP shows its tests (arXiv 2108.07732, figure 1); HumanEval's code
    is put into a question as EvalPlus does; LiveCodeBench's last paragraph says how to answer."""
    text = message_text(row[column]).strip("\n")
    if not text.strip():
        raise ValueError("the statement is empty")
    if "test_list" in row and tests.kind == "assert":
        return f"{text}\nYour code should pass these tests:\n\n" + "\n".join(tests.code)
    if column == "prompt" and "entry_point" in row:
        return (
            "Write a self-contained Python program that completes this function:\n"
            f"```python\n{text}\n```"
        )
    if column in COMPLETE_COLUMNS:
        return text
    if starter := _text(row, "starter_code").strip("\n").rstrip():
        return f"{text}\n\nUse this starter code:\n```python\n{starter}\n```"
    if tests.kind == "call":
        return f"{text}\n\nWrite a function `{tests.function}`."
    return f"{text}\n\nRead the input from stdin and write the answer to stdout."


def _function(row: Mapping[str, Any]) -> str:
    """The function that a row or one of its tests names, "" for none."""
    metadata = row.get("metadata")
    if isinstance(metadata, str) and metadata.startswith("{"):
        metadata = _decoded(metadata)
    named = _text(metadata, "func_name") if isinstance(metadata, Mapping) else ""
    defined = _DEF.findall(_text(row, "starter_code"))
    return _text(row, "fn_name") or named or (defined[-1] if defined else "")


def _id(row: Mapping[str, Any], where: str) -> str:
    for name in ID_COLUMNS:
        if row.get(name) not in (None, ""):
            return str(row[name])
    extra = row.get("extra_info")  # verl
    if isinstance(extra, Mapping) and extra.get("index") is not None:
        return f"{row.get('data_source', '')}/{extra['index']}"
    return where


def _first(row: Mapping[str, Any], names: tuple[str, ...], where: str, what: str) -> str:
    for name in names:
        if row.get(name):
            return name
    raise ValueError(
        f"{where}: no column with {what}; wanted one of {', '.join(names)}, got {', '.join(row)}"
    )


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _text(row: Mapping[str, Any], key: str) -> str:
    """The text of a key that may be missing."""
    value = row.get(key)
    if not isinstance(value, str | None):
        raise ValueError(f"{key!r} must be text, got {_brief(value)}")
    return value or ""


def _field(value: Any, key: str) -> Any:
    if not isinstance(value, Mapping) or key not in value:
        raise ValueError(f"wanted an object with {key!r}, got {_brief(value)}")
    return value[key]


def _decoded(value: Any) -> Any:
    """A value, or what its string holds: JSON, a Python literal, or LiveCodeBench's packing."""
    if not isinstance(value, str):
        return value
    if _BASE64.fullmatch(value):
        return _decoded(_unpacked(value))
    return _value(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"wanted JSON or a Python literal, got {_brief(text)}") from None


class _Plain(pickle.Unpickler):
    """Reads strings, numbers and containers; what would import or call anything is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"packed tests must not import {module_name}.{global_name}")


def _unpacked(text: str) -> Any:
    """base64 of zlib of pickle, LiveCodeBench's private tests."""
    try:
        return _Plain(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
    except Exception as error:  # pickle documents no closed set of exceptions
        raise ValueError(f"packed tests (base64, zlib, pickle) do not unpack: {error}") from error


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@contextlib.contextmanager
def _located(where: str, column: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}, column {column!r}: {error}") from error
