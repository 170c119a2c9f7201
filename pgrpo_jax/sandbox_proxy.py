"""Two processes that call each other: the tests in one, the program in the other.

What is plain travels by value; what is not stays where it is and is stood for by a `Foreign` with a
handle (`sandbox_foreign`). The tests' side is guarded: the program must neither decide a comparison
nor look around.

* Comparing a foreign object is not asked of the program: it equals only itself. Its operators work
  only if the tests speak of its class by name, and so do methods that plain values have as well
  (`f(x).startswith("a")` must not be answered by an impostor of a text).
* The program may call what the tests gave it and read public attributes of their objects. It sees
  no function's insides, no module, frame, code, traceback or test case.

Lists, dicts, sets and bytearrays that a call changed in place are sent back and changed in the
caller; what a call printed is printed by the caller, and `input` asks the tests' side.

Part of the sandbox: standard library only.
"""

import ast
import builtins
import contextlib
import importlib
import io
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from pgrpo_jax import sandbox_foreign, sandbox_wire
from pgrpo_jax.sandbox_foreign import Foreign, ForeignClass

MESSAGE_LIMIT = 64 << 20
PRINT_LIMIT = 1 << 20
_ARRAY_KINDS = "biufcSU"  # of numpy: numbers, bytes and texts

_MUTABLE = (list, dict, set, bytearray)
_HIDDEN = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType)
_CLOSED = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.GeneratorType,
    type,
)


class Gone(BaseException):
    """The other process has ended."""


class Link:
    """One side of the connection; `guarded` is the tests' side."""

    def __init__(self, descriptor: int, guarded: bool, names: Callable[[bool], dict[str, Any]]):
        """`names` gives what the other side may know by name, only the classes or all."""
        self._socket = socket.socket(fileno=descriptor)
        self._guarded = guarded
        self._names = names
        self._lock = threading.RLock()
        self._mine: dict[int, Any] = {}
        self._handles: dict[int, int] = {}  # id of one of mine: its handle
        self._operators: dict[int, list[str]] = {}  # of one of mine that is a class
        self._theirs: dict[int, Any] = {}
        self._errors: dict[int, type[BaseException]] = {}
        self._events: Any = None  # asyncio's loop, once something is awaited
        self.printed = io.StringIO()

    def trust(self, value: Any) -> None:
        """The tests speak of this class by name: what it defines is what they are about."""
        if isinstance(value, ForeignClass):
            sandbox_foreign.trust(value)

    def adopt(self, handle: int, made: ForeignClass) -> None:
        """The other process has made a subclass that the tests define here."""
        self._theirs[handle] = made

    # --- talking

    def ask(self, what: str, *rest: Any) -> Any:
        """Has the other side do something; serves it meanwhile. Raises what it raised there."""
        with self._lock:
            self._send(("ask", what, *rest))
            how, value, changed, printed = self._hear_answer()
        sys.stdout.write(printed)
        if how == "raised":
            raise value
        for index, content in changed:
            _put(rest[1][index], content)
        return rest[1][value] if how == "argument" else value

    def serve(self) -> None:
        """Answers until the other side has ended."""
        with contextlib.suppress(Gone):
            while True:
                self._answer(*self._receive()[1:])

    def _hear_answer(self) -> Any:
        while True:
            kind, *rest = self._receive()
            if kind == "answer":
                return rest
            self._answer(*rest)

    def _answer(self, what: str, *rest: Any) -> None:
        try:
            value = _SERVICES[what](self, *rest)
            how, changed = "value", []
            if what == "call":
                value, how, changed = value
            reply = ("answer", how, value, changed, self._take_printed())
            data = sandbox_wire.dumps(reply, self._export)
        except Gone:
            raise
        except BaseException as error:
            reply = ("answer", "raised", error, [], self._take_printed())
            data = sandbox_wire.dumps(reply, self._export)
        self._send_data(data)

    def _take_printed(self) -> str:
        text = self.printed.getvalue()[:PRINT_LIMIT]
        self.printed.seek(0)
        self.printed.truncate()
        return text

    def _send(self, message: tuple[Any, ...]) -> None:
        self._send_data(sandbox_wire.dumps(message, self._export))

    def _send_data(self, data: bytes) -> None:
        try:
            sandbox_wire.send_frame(self._socket, data)
        except OSError:
            raise Gone("the program's process ended") from None

    def _receive(self) -> Any:
        try:
            data = sandbox_wire.receive_frame(self._socket, MESSAGE_LIMIT)
            if data is None:
                raise Gone("the program's process ended")
            return sandbox_wire.loads(data, self._import)
        except (OSError, sandbox_wire.Malformed) as error:
            raise Gone(f"the program's process sent what no value is: {error}") from None

    # --- what is not plain

    def _export(self, value: Any) -> Any:
        kind = type(value)
        if issubclass(kind, (Foreign, ForeignClass)):
            return ["yours", value._sandbox_handle]
        if self._guarded and isinstance(value, (*_HIDDEN, *_loaded("unittest", "TestCase"))):
            raise sandbox_wire.Unpackable(f"a {kind.__name__} is not for the program")
        scalar = isinstance(value, _loaded("numpy", "generic"))
        if (scalar or kind in _loaded("numpy", "ndarray")) and value.dtype.kind in _ARRAY_KINDS:
            return ["array", value.dtype.str, list(value.shape), value.tobytes().hex(), scalar]
        if isinstance(value, type):
            return self._export_class(value)
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, BaseException):
            return self._export_error(value)
        if isinstance(value, sandbox_foreign.PLAIN) and not _has_methods(kind):
            return None
        if not self._guarded and hasattr(kind, "__await__"):
            return ["awaitable", self._handle_of(value)]
        return ["object", self._handle_of(value), *self._describe(kind)]

    def _describe(self, kind: type) -> list[Any]:
        handle = self._handle_of(kind)
        if handle not in self._operators:
            self._operators[handle] = sandbox_foreign.operators_of(kind)
        return [handle, kind.__name__, self._operators[handle]]

    def _export_class(self, value: type) -> Any:
        if value.__module__ == "builtins" and getattr(builtins, value.__name__, None) is value:
            return ["builtin", value.__name__]
        if _known_error(value):
            return ["known error", value.__module__, value.__name__]
        if issubclass(value, BaseException):
            bases = [base for base in value.__bases__ if issubclass(base, BaseException)]
            above = [self._export_class(base) for base in bases]
            return ["error class", self._handle_of(value), value.__name__, above]
        return ["class", *self._describe(value)]

    def _export_error(self, error: BaseException, causes_left: int = 3) -> Any:
        def plain(value: Any) -> bool:
            try:
                sandbox_wire.dumps(value)
            except (sandbox_wire.Unpackable, RecursionError):
                return False
            return True

        own = [
            base for base in type(error).__mro__ if not _known_error(base) and base is not object
        ]
        content = {k: v for base in reversed(own) for k, v in vars(base).items() if plain(v)}
        content |= {k: v for k, v in getattr(error, "__dict__", {}).items() if plain(v)}
        arguments = [v if plain(v) else str(type(v)) for v in error.args]
        body = sandbox_wire.dumps((arguments, content)).decode()
        causes: list[Any] = []
        if not self._guarded:  # what the tests were about to do is not for the program
            for cause in (error.__cause__, error.__context__):
                if cause is None or causes_left == 0:
                    causes.append(None)
                else:
                    causes.append(self._export_error(cause, causes_left - 1))
        return ["error", self._export_class(type(error)), body, causes]

    def _handle_of(self, value: Any) -> int:
        handle = self._handles.get(id(value))
        if handle is None:
            handle = self._handles[id(value)] = len(self._mine) + 1
            self._mine[handle] = value  # which also keeps its id from being used again
        return handle

    def _import(self, payload: Any) -> Any:
        if type(payload) is not list or not payload:
            raise ValueError("not a handle")
        return _IMPORTS[payload[0]](self, *payload[1:])

    def _import_object(self, handle: int, *kind: Any) -> Any:
        if handle not in self._theirs:
            self._theirs[handle] = sandbox_foreign.object_for(self._import_class(*kind), handle)
        return self._theirs[handle]

    def _import_class(self, handle: int, name: str, operators: list[str]) -> Any:
        if handle not in self._theirs:
            self._theirs[handle] = sandbox_foreign.class_for(
                self, handle, str(name), operators, trusted=not self._guarded
            )
        return self._theirs[handle]

    def _import_known_error(self, module: str, name: str) -> type[BaseException]:
        found = getattr(sys.modules[module], name)
        if not _known_error(found):
            raise ValueError("not an exception of the standard library")
        return found

    def _import_error_class(self, handle: int, name: str, bases: Any) -> type[BaseException]:
        if handle not in self._errors:
            above = tuple(_error_class(self._import(base)) for base in bases)
            self._errors[handle] = type(str(name), above, {})
        return self._errors[handle]

    def _import_error(self, kind: Any, body: str, causes: list[Any]) -> BaseException:
        arguments, content = sandbox_wire.loads(body.encode())
        made = _error_class(self._import(kind))
        error = made.__new__(made, *arguments)
        with contextlib.suppress(TypeError, ValueError):
            error.args = tuple(arguments)
        for name, value in content.items():
            if not name.startswith("__"):
                error.__dict__[name] = value
        if causes:
            cause, context = [self._import(payload) if payload else None for payload in causes]
            error.__context__ = context
            if cause is not None:
                error.__cause__ = cause  # which also says that the context is not to be shown
        return error

    def _import_array(self, dtype: str, shape: list[int], body: str, scalar: bool) -> Any:
        """An array of numbers or texts, by value: its class is not one of the program's."""
        numpy = importlib.import_module("numpy")
        kind = numpy.dtype(str(dtype))
        if kind.kind not in _ARRAY_KINDS:
            raise ValueError(f"an array of {dtype!r}")
        array = numpy.frombuffer(bytes.fromhex(body), kind).reshape([int(n) for n in shape]).copy()
        return array[()] if scalar else array

    def _import_awaitable(self, handle: int) -> Any:
        """A coroutine that, once awaited, lets the other one run to its end in its own process."""

        async def wait() -> Any:
            return self.ask("await", handle)

        return wait()

    def _import_module(self, name: str) -> Any:
        top = str(name).partition(".")[0]
        if top in sys.stdlib_module_names or name in sys.modules:
            return importlib.import_module(str(name))
        raise ValueError(f"no module {name!r} here")

    # --- services

    def _object(self, handle: int) -> Any:
        return self._mine[handle]

    def _call(self, handle: int, args: Any, kwargs: Any) -> Any:
        mutable = any(type(value) in _MUTABLE for value in args)
        before = [self._text(value) for value in args] if mutable else []
        value = self._object(handle)(*args, **kwargs)
        changed = []
        for index, text in enumerate(before):
            if type(args[index]) in _MUTABLE and self._text(args[index]) != text:
                changed.append((index, args[index]))
        for index, argument in enumerate(args):
            if argument is value and type(value) in _MUTABLE:
                return index, "argument", changed
        return value, "value", changed

    def _text(self, value: Any) -> bytes:
        return sandbox_wire.dumps(value, self._export) if type(value) in _MUTABLE else b""

    def _get(self, handle: int, name: str) -> Any:
        target = self._object(handle)
        self._refuse(target, name)
        return getattr(target, name)

    def _set(self, handle: int, name: str, value: Any) -> None:
        target = self._object(handle)
        self._refuse(target, name)
        if self._guarded and isinstance(target, _loaded("unittest.mock", "NonCallableMock")):
            raise AttributeError("the tests' mocks are not for the program to change")
        setattr(target, name, value)

    def _refuse(self, target: Any, name: str) -> None:
        if self._guarded and (name.startswith("_") or isinstance(target, _CLOSED)):
            raise AttributeError(
                f"{name!r} of the tests' {type(target).__name__} is not for the program"
            )

    def _operate(self, handle: int, name: str, args: Any) -> Any:
        if name not in sandbox_foreign.OPERATORS:
            raise AttributeError(name)
        target = self._object(handle)
        return getattr(type(target), name)(target, *args)

    def _item(self, handle: int, key: Any) -> Any:
        return self._object(handle)[key]

    def _await(self, handle: int) -> Any:
        async def wait() -> Any:
            return await self._object(handle)

        if self._events is None:  # one for all: its end would close generators that go on
            self._events = importlib.import_module("asyncio").new_event_loop()
        return self._events.run_until_complete(wait())

    def _is_instance(self, handle: int, value: Any) -> bool:
        return isinstance(value, self._object(handle))

    def _is_subclass(self, handle: int, kind: Any) -> bool:
        return issubclass(kind, self._object(handle))

    def _signature(self, handle: int) -> Any:
        target = self._object(handle)
        self._refuse(target, "__signature__")
        return sandbox_foreign.signature_parts(target)

    def _methods(self, handle: int) -> list[str]:
        target = self._object(handle)
        self._refuse(target, "__dict__")
        return sandbox_foreign.methods_of(target)

    def _subclass(self, name: str, bases: Any, members: Any, options: Any) -> int:
        if self._guarded:  # an object of such a class would answer comparisons here
            raise TypeError("the program makes no classes in the tests' process")
        content = {key: sandbox_foreign.put_together(*parts) for key, parts in members.items()}
        return self._handle_of(types.new_class(name, bases, options, lambda c: c.update(content)))

    def _input(self, prompt: str) -> str:
        return input(prompt)


_SERVICES: dict[str, Callable[..., Any]] = {
    "call": Link._call,
    "get": Link._get,
    "set": Link._set,
    "op": Link._operate,
    "item": Link._item,
    "await": Link._await,
    "isinstance": Link._is_instance,
    "issubclass": Link._is_subclass,
    "signature": Link._signature,
    "methods": Link._methods,
    "subclass": Link._subclass,
    "input": Link._input,
    "names": lambda link, classes: link._names(classes),
}
_IMPORTS: dict[str, Callable[..., Any]] = {
    "yours": Link._object,
    "object": Link._import_object,
    "class": Link._import_class,
    "awaitable": Link._import_awaitable,
    "builtin": lambda _, name: _builtin_class(name),
    "error class": Link._import_error_class,
    "known error": Link._import_known_error,
    "error": Link._import_error,
    "module": Link._import_module,
    "array": Link._import_array,
}


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """The class if its module is loaded; the sandbox does without it, being large."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _error_class(value: Any) -> type[BaseException]:
    if not (isinstance(value, type) and issubclass(value, BaseException)):
        raise ValueError("not an exception")
    return value


def _builtin_class(name: str) -> type:
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise ValueError(f"{name!r} is no class")
    return found


def _known_error(kind: type) -> bool:
    """An exception that both processes have."""
    module = sys.modules.get(kind.__module__)
    return (
        isinstance(kind, type)
        and issubclass(kind, BaseException)
        and kind.__module__.partition(".")[0] in sys.stdlib_module_names
        and kind.__module__ != "__main__"
        and getattr(module, kind.__name__, None) is kind
    )


def _has_methods(kind: type) -> bool:
    """Does a subclass of a plain type add behaviour, so that its objects are more than their
    value?"""
    if kind.__module__ == "numpy" or hasattr(kind, "_fields"):
        return False
    bases = [base for base in kind.__mro__ if base.__module__ not in ("builtins", "enum")]
    return any(
        callable(value) and not name.startswith("_")
        for base in bases
        for name, value in vars(base).items()
    )


def _put(target: Any, content: Any) -> None:
    """Gives a mutable builtin the content of another."""
    if isinstance(target, list | bytearray):
        target[:] = content
    elif isinstance(target, dict | set):
        target.clear()
        target.update(content)


def mentioned_names(*sources: str) -> frozenset[str]:
    """Every name and attribute that occurs in code."""
    names: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
    return frozenset(names)
