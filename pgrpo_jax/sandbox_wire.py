"""Values and messages between the judge's processes.

Values are tagged JSON, never pickle: `dumps` turns plain values into text that `loads` gives back
with their types. What comes from a program is hostile: `loads` makes builtins only, with limits on
depth, and raises Malformed for the rest. JSON stands for itself where it can; an object of one key
is a tag:

    {"i": hex} large int    {"f": text} inf, nan   {"c": [re, im]} complex
    {"b": hex} bytes        {"y": hex} bytearray   {"d": [[key, value], ...]} dict
    {"t": [...]} tuple      {"s": [...]} set       {"z": [...]} frozenset
    {"k": [name, parts]} a type of the standard library that is plain data, see _MAKE
    {"o": handle} what stays in the other process, if the caller says how

Part of the sandbox: standard library only.
"""

import array
import collections
import datetime
import decimal
import fractions
import functools
import json
import math
import socket
import struct
from collections.abc import Callable
from typing import Any

# --- what server and zygote say to each other, see `sandbox_zygote`
RUN, KILL = 1, 2
READY, BROKEN, HELLO, ENDED = 1, 2, 3, 4
ORDER = struct.Struct("!BIIIII")
REPORT = struct.Struct("!BIidI")
CONTROL = 3  # the zygote's descriptor
SCRIPT, CALLS, PROGRAM, TESTS, CHECKER = range(5)  # roles of a run
REPLY_LIMIT = 64 << 20  # bytes of one value out of a run
# --- what trainer and server say to each other: a number of the trainer's and a job as a value, or
# nothing to take it back; the same number, how many runs and rebuilt slots there were until then,
# and a result as a value
REQUEST = struct.Struct("!Q")
ANSWER = struct.Struct("!QQQ")

DEPTH = 64
FRAME_LIMIT = 1 << 28  # bytes of one message between trusted processes
_HEAD = struct.Struct("!I")
_PLAIN_INT = 1 << 62


class Unpackable(Exception):
    """The value is not plain data."""


class Malformed(Exception):
    """The text is not what `dumps` writes."""


def dumps(value: Any, foreign: Callable[[Any], Any] | None = None) -> bytes:
    """Text of a plain value. `foreign` gives the handle of what is not plain; without it
    Unpackable."""
    return json.dumps(_pack(value, foreign, 0), separators=(",", ":")).encode()


def loads(data: bytes | bytearray, foreign: Callable[[Any], Any] | None = None) -> Any:
    """The value in a text. `foreign` turns a handle into what stands for it here."""
    try:
        return _unpack(json.loads(data), foreign, 0)
    except (ValueError, TypeError, RecursionError, ArithmeticError, LookupError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def _pack(value: Any, foreign: Callable[[Any], Any] | None, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_PLAIN_INT < value < _PLAIN_INT else {"i": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"f": repr(value)}
    if depth >= DEPTH:
        raise Unpackable(f"a value that nests deeper than {DEPTH}")
    if kind is list:
        return [_pack(item, foreign, depth + 1) for item in value]
    if kind is tuple:
        return {"t": [_pack(item, foreign, depth + 1) for item in value]}
    if kind is dict:
        pairs = value.items()
        return {
            "d": [[_pack(k, foreign, depth + 1), _pack(v, foreign, depth + 1)] for k, v in pairs]
        }
    if kind is set or kind is frozenset:
        tag = "s" if kind is set else "z"
        return {tag: [_pack(item, foreign, depth + 1) for item in value]}
    if kind is bytes or kind is bytearray:
        return {"b" if kind is bytes else "y": value.hex()}
    if kind is complex:
        return {"c": [_pack(value.real, None, depth), _pack(value.imag, None, depth)]}
    return _pack_derived(value, foreign, depth)


def _pack_derived(value: Any, foreign: Callable[[Any], Any] | None, depth: int) -> Any:
    """Other subclasses of plain types lose the subclass, unless the caller keeps foreign things
    apart."""
    kind = type(value)
    if kind in _TAKE_APART:
        parts = [_pack(part, foreign, depth + 1) for part in _TAKE_APART[kind](value)]
        return {"k": [kind.__name__, parts]}
    if _is_named_tuple(value):
        parts = [kind.__name__, list(kind._fields), tuple(value)]
        return {"k": ["namedtuple", [_pack(part, foreign, depth + 1) for part in parts]]}
    if foreign is not None:  # which knows numpy's types too
        handle = foreign(value)
        if handle is not None:
            return {"o": handle}
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and not hasattr(value, "__len__"):
        return _pack(value.item(), None, DEPTH)
    bases: tuple[Any, ...] = (int, float, str, bytes, list, tuple, dict, set, frozenset)
    for base in bases:
        if isinstance(value, base):
            return _pack(base(value), foreign, depth)
    raise Unpackable(f"a value of type {kind.__name__}")


def _is_named_tuple(value: Any) -> bool:
    names = getattr(type(value), "_fields", None)
    return isinstance(value, tuple) and type(names) is tuple and len(names) == tuple.__len__(value)


def _unpack(data: Any, foreign: Callable[[Any], Any] | None, depth: int) -> Any:
    if depth > DEPTH:
        raise ValueError("nested too deep")
    if type(data) is list:
        return [_unpack(item, foreign, depth + 1) for item in data]
    if type(data) is not dict:
        return data
    ((tag, body),) = data.items()
    if tag == "o":
        if foreign is None:
            raise ValueError("a handle where none can be")
        return foreign(body)
    if tag in _SCALARS:
        if type(body) is not str:
            raise ValueError(f"the body of {tag!r} must be text")
        return _SCALARS[tag](body)
    if tag == "k":
        name, parts = body
        return _MAKE[name](*[_unpack(part, foreign, depth + 1) for part in parts])
    items = [_unpack(item, foreign, depth + 1) for item in body]
    if tag == "t":
        return tuple(items)
    if tag == "d":
        _refuse_collisions([pair[0] for pair in items])
        return {key: value for key, value in items}
    if tag in ("s", "z"):
        _refuse_collisions(items)
        return set(items) if tag == "s" else frozenset(items)
    if tag == "c":
        return complex(*map(float, items))
    raise ValueError(f"unknown tag {tag!r}")


@functools.lru_cache(maxsize=256)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)  # which refuses what is no identifier


_TAKE_APART: dict[type, Callable[[Any], Any]] = {
    collections.deque: lambda v: (list(v), v.maxlen),
    collections.Counter: lambda v: (dict(v),),
    collections.OrderedDict: lambda v: (list(v.items()),),
    collections.defaultdict: lambda v: (dict(v),),
    range: lambda v: (v.start, v.stop, v.step),
    slice: lambda v: (v.start, v.stop, v.step),
    type(Ellipsis): lambda v: (),
    type(NotImplemented): lambda v: (),
    decimal.Decimal: lambda v: (str(v),),
    fractions.Fraction: lambda v: (v.numerator, v.denominator),
    datetime.date: lambda v: (v.isoformat(),),
    datetime.time: lambda v: (v.isoformat(),),
    datetime.datetime: lambda v: (v.isoformat(),),
    datetime.timedelta: lambda v: (v.days, v.seconds, v.microseconds),
}
_MAKE: dict[str, Callable[..., Any]] = {
    "deque": collections.deque,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda content: collections.defaultdict(None, content),
    "range": range,
    "slice": slice,
    "ellipsis": lambda: Ellipsis,
    "NotImplementedType": lambda: NotImplemented,
    "Decimal": decimal.Decimal,
    "Fraction": fractions.Fraction,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "timedelta": datetime.timedelta,
    "namedtuple": lambda name, fields, values: _named_tuple(name, tuple(fields))(*values),
}
_SCALARS: dict[str, Callable[[str], Any]] = {
    "i": lambda body: int(body, 16),
    "f": float,
    "b": bytes.fromhex,
    "y": bytearray.fromhex,
}


def _refuse_collisions(keys: list[Any]) -> None:
    """Chosen integers that all hash alike would make building a set quadratic."""
    if len(keys) > 256:
        hashes = sorted(map(hash, keys))
        if sum(a == b for a, b in zip(hashes, hashes[1:], strict=False)) > len(keys) // 4:
            raise ValueError("too many keys of equal hash")


# --- messages over sockets


def frame(body: bytes) -> bytes:
    return _HEAD.pack(len(body)) + body


class Frames:
    """Cuts a stream into messages; Malformed once a message or the backlog is longer than
    `limit`."""

    def __init__(self, limit: int):
        self._limit = limit
        self._data = bytearray()

    def begun(self) -> bool:
        """Has a part of a message come?"""
        return bool(self._data)

    def feed(self, data: bytes) -> list[bytes]:
        self._data += data
        messages, start = [], 0
        while len(self._data) - start >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._data, start)
            if size > self._limit:
                raise Malformed(f"a message of {size} bytes; at most {self._limit}")
            end = start + _HEAD.size + size
            if len(self._data) < end:
                break
            messages.append(bytes(self._data[start + _HEAD.size : end]))
            start = end
        del self._data[:start]
        return messages


def send_frame(connection: socket.socket, body: bytes) -> None:
    connection.sendall(frame(body))


def receive_frame(connection: socket.socket, limit: int = FRAME_LIMIT) -> bytes | None:
    """The next message of a blocking socket, None at its end."""
    head = _receive_exactly(connection, _HEAD.size)
    if head is None:
        return None
    (size,) = _HEAD.unpack(head)
    if size > limit:
        raise Malformed(f"a message of {size} bytes; at most {limit}")
    return _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def receive_descriptors(
    connection: socket.socket, size: int, most: int
) -> tuple[bytes, list[int], int]:
    """One packet, the descriptors that came with it, and the sender's process id (0 if not
    told)."""
    space = socket.CMSG_SPACE(4 * most) + socket.CMSG_SPACE(12)
    data, ancillary, _, _ = connection.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    descriptors, pid = array.array("i"), 0
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(body[: len(body) - len(body) % descriptors.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = struct.unpack("iii", body)[0]
    return data, list(descriptors), pid
