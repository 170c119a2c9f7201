"""When is an answer the wanted one? Comparers of printed text and of returned values.

A comparer takes what was wanted and what came, and returns "" if they agree, else the first
difference in words. Whatever it is given it ends in time linear in the text, and never raises.
Part of the sandbox: standard library only.
"""

import decimal
import math
import re
from collections.abc import Callable
from typing import Any

TOLERANCE = 1e-6
_INTEGER = re.compile(rb"[+-]?[0-9]+")
_DECIMAL = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_LONGEST_DECIMAL = 400  # bytes; a longer token is text


# --- text


def lines(want: str, got: bytes) -> str:
    """Same lines, in each the same tokens in order; carriage returns and trailing blanks do not
    count."""
    want_lines, got_lines = _lines(_bytes(want)), _lines(got)
    for number, (wanted, came) in enumerate(zip(want_lines, got_lines, strict=False), 1):
        if not _same_tokens(wanted, came):
            return f"line {number}: wanted {brief(wanted)}, got {brief(came)}"
    if len(want_lines) != len(got_lines):
        return f"wanted {len(want_lines)} lines, got {len(got_lines)}"
    return ""


def tokens(want: str, got: bytes) -> str:
    """The same tokens in order, however they are laid out."""
    wanted, came = _bytes(want).split(), got.split()
    for number, (a, b) in enumerate(zip(wanted, came, strict=False), 1):
        if not _same_token(a, b):
            return f"word {number}: wanted {brief(a)}, got {brief(b)}"
    return "" if len(wanted) == len(came) else f"wanted {len(wanted)} words, got {len(came)}"


def floats(want: str, got: bytes) -> str:
    """The same tokens in order; any two numbers within TOLERANCE, a wanted integer as well."""
    wanted, came = _bytes(want).split(), got.split()
    for number, (a, b) in enumerate(zip(wanted, came, strict=False), 1):
        if not (_same_token(a, b) or _close_tokens(a, b)):
            return f"word {number}: wanted {brief(a)}, got {brief(b)}"
    return "" if len(wanted) == len(came) else f"wanted {len(wanted)} words, got {len(came)}"


def unordered_lines(want: str, got: bytes) -> str:
    """The same lines in any order, each as written but for trailing blanks."""
    wanted, came = sorted(_lines(_bytes(want))), sorted(_lines(got))
    for a, b in zip(wanted, came, strict=False):
        if a.split() != b.split():
            return f"in sorted order: wanted {brief(a)}, got {brief(b)}"
    return "" if len(wanted) == len(came) else f"wanted {len(wanted)} lines, got {len(came)}"


def exact(want: str, got: bytes) -> str:
    """The same bytes."""
    return "" if _bytes(want) == got else f"wanted {brief(_bytes(want))}, got {brief(got)}"


TEXT: dict[str, Callable[[str, bytes], str]] = {
    "lines": lines,
    "tokens": tokens,
    "floats": floats,
    "unordered_lines": unordered_lines,
    "exact": exact,
}


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _lines(text: bytes) -> list[bytes]:
    found = [line.rstrip() for line in text.replace(b"\r\n", b"\n").split(b"\n")]
    while found and not found[-1]:
        found.pop()
    return found


def _same_tokens(wanted: bytes, came: bytes) -> bool:
    if wanted == came:
        return True
    a, b = wanted.split(), came.split()
    return len(a) == len(b) and all(map(_same_token, a, b))


def _same_token(wanted: bytes, came: bytes) -> bool:
    """Equal text; or numbers: a wanted integer is met exactly, a wanted decimal within
    TOLERANCE."""
    if wanted == came:
        return True
    if max(len(wanted), len(came)) > _LONGEST_DECIMAL or not _DECIMAL.fullmatch(came):
        return False
    if _INTEGER.fullmatch(wanted):
        # "2.0" meets "2"; "02" does not: zeros in front are digits of a text
        return not _INTEGER.fullmatch(came) and _decimal(wanted) == _decimal(came)
    return _close_tokens(wanted, came)


def _close_tokens(wanted: bytes, came: bytes) -> bool:
    if max(len(wanted), len(came)) > _LONGEST_DECIMAL:
        return False
    if not (_DECIMAL.fullmatch(wanted) and _DECIMAL.fullmatch(came)):
        return False
    return _close(float(wanted), float(came))


def _decimal(token: bytes) -> decimal.Decimal:
    return decimal.Decimal(token.decode("ascii"))


def _close(want: float, got: float) -> bool:
    """|want - got| <= 1e-6 max(1, |want|), both finite."""
    if not (math.isfinite(want) and math.isfinite(got)):
        return False
    return abs(want - got) <= TOLERANCE * max(1.0, abs(want))


# --- values


def values(want: Any, got: Any) -> str:
    """Equal plain values: tuples equal lists, 2.0 equals 2, floats within TOLERANCE; sets equal
    sets only."""
    return _difference(want, got, _alike)


def wrapped_values(want: Any, got: Any) -> str:
    """The same, and where a list of one is wanted what is in it will do."""
    inner = isinstance(want, list) and len(want) == 1 and not values(want[0], got)
    return "" if inner else values(want, got)


def same_values(want: Any, got: Any) -> str:
    """What Python's `==` says of plain values."""
    return _difference(want, got, lambda a, b: bool(a == b))


def _difference(want: Any, got: Any, equal: Callable[[Any, Any], bool]) -> str:
    return "" if equal(want, got) else f"wanted {brief(want)}, got {brief(got)}"


def _alike(want: Any, got: Any) -> bool:
    if isinstance(want, list | tuple):
        if not isinstance(got, list | tuple) or len(want) != len(got):
            return False
        return all(map(_alike, want, got))
    if isinstance(want, dict):
        if not isinstance(got, dict) or want.keys() != got.keys():
            return False
        return all(_alike(value, got[key]) for key, value in want.items())
    if isinstance(want, float) or isinstance(got, float):
        return _alike_floats(want, got)
    return bool(want == got)


def _alike_floats(want: Any, got: Any) -> bool:
    if not all(isinstance(x, int | float) for x in (want, got)):
        return False
    if want == got:
        return True
    if isinstance(want, int):
        return False  # an integer is met exactly
    try:
        return _close(want, float(got)) or (math.isnan(want) and math.isnan(got))
    except OverflowError:  # an integer beyond every float
        return False


def brief(value: Any, length: int = 120) -> str:
    """What a value looks like, cut in the middle."""
    try:
        text = repr(value[: 4 * length] if isinstance(value, str | bytes) else value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} with a very long number"
    return text if len(text) <= length else f"{text[: length - 23]} ... {text[-18:]}"
