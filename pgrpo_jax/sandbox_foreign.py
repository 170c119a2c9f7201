"""What stands for objects and classes of another process. `sandbox_proxy` makes them.

A class of the other process has one here, and its objects are instances of that: `type(x) is A`,
`issubclass`, `inspect.signature` and subclasses that the tests define mean what they mean in one
interpreter. Whatever is not known here, the other process is asked for.

Part of the sandbox: standard library only.
"""

import importlib
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

PLAIN = (int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset, complex, bool)
_PLAIN_NAMES = {name for kind in PLAIN for name in dir(kind)}
_ALWAYS: tuple[str, ...] = (
    "__call__",
    "__iter__",
    "__next__",
    "__len__",
    "__getitem__",
    "__setitem__",
)
_ALWAYS += ("__delitem__", "__enter__", "__exit__", "__str__", "__repr__", "__format__")
_ALWAYS += ("__bool__", "__aenter__", "__aexit__", "__aiter__", "__anext__")
_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()  # noqa: SIM905
_BY_NAME: tuple[str, ...] = tuple(
    f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r", "i")
)
_BY_NAME += ("__lt__", "__le__", "__gt__", "__ge__", "__contains__", "__neg__", "__pos__")
_BY_NAME += ("__abs__", "__invert__", "__int__", "__float__", "__index__", "__round__")
OPERATORS = (*_ALWAYS, *_BY_NAME)
_SPOKEN = ("__name__", "__qualname__", "__wrapped__")
# Of a class statement: what the other process finds out itself, and what makes classes or objects,
# of which the other process has its own.
_NOT_MEMBERS: tuple[str, ...] = ("__module__", "__qualname__", "__classcell__", "__firstlineno__")
_NOT_MEMBERS += ("__static_attributes__", "__new__", "__init_subclass__", "__class_getitem__")


class Connection(Protocol):
    """What the stand-ins need of `sandbox_proxy.Link`."""

    def ask(self, what: str, *rest: Any) -> Any: ...

    def adopt(self, handle: int, made: "ForeignClass") -> None: ...


def _asked_for(name: str) -> property:
    return property(lambda self: self._sandbox_link.ask("get", self._sandbox_handle, name))


class ForeignClass(type):
    """The class of the classes that stand for others. Made by `class_for`, or by a class statement
    over one of them: then the other process gets the subclass too."""

    if TYPE_CHECKING:  # not at run time: they would be the other class's `__annotations__`
        _sandbox_link: Connection
        _sandbox_handle: int
        _sandbox_trusted: bool
        _sandbox_operators: tuple[str, ...]

    def __new__(
        cls, name: str, bases: tuple[type, ...], content: dict[str, Any], **options: Any
    ) -> "ForeignClass":
        if "_sandbox_handle" in content:
            return super().__new__(cls, name, bases, content)
        above = [base for base in bases if isinstance(base, ForeignClass)]
        for base in above:
            _open_to_super(base)
        link = above[0]._sandbox_link
        members = {k: _take_apart(v) for k, v in content.items() if k not in _NOT_MEMBERS}
        handle = link.ask("subclass", name, bases, members, options)
        made = super().__new__(
            cls, name, bases, {**content, "_sandbox_handle": handle, "_sandbox_trusted": True}
        )
        link.adopt(handle, made)
        return made

    def __init__(cls, name: str, bases: tuple[type, ...], content: Any, **_: Any) -> None:
        super().__init__(name, bases, content)

    __doc__ = _asked_for("__doc__")  # type: ignore[assignment]
    __annotations__ = _asked_for("__annotations__")  # type: ignore[assignment]

    def __getattr__(cls, name: str) -> Any:
        return _get(cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        cls._sandbox_link.ask("set", cls._sandbox_handle, name, value)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._sandbox_link.ask("call", cls._sandbox_handle, args, kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return (
            isinstance(value, Foreign)
            and cls._sandbox_link.ask("isinstance", cls._sandbox_handle, value) is True
        )

    def __subclasscheck__(cls, kind: type) -> bool:
        return (
            isinstance(kind, ForeignClass)
            and cls._sandbox_link.ask("issubclass", cls._sandbox_handle, kind) is True
        )

    def __getitem__(cls, key: Any) -> Any:
        return cls._sandbox_link.ask("item", cls._sandbox_handle, key)

    def __iter__(cls) -> Any:
        return cls._sandbox_link.ask("op", cls._sandbox_handle, "__iter__", ())

    def __len__(cls) -> int:
        return cls._sandbox_link.ask("op", cls._sandbox_handle, "__len__", ())

    def __bool__(cls) -> bool:
        return True  # a length has the class of an enumeration only


class Foreign:
    """Stands for an object of the other process. Made by `object_for` only."""

    if TYPE_CHECKING:
        _sandbox_link: Connection
        _sandbox_handle: int
        _sandbox_trusted: bool

    __dict__ = _asked_for("__dict__")  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name in _PLAIN_NAMES and not self._sandbox_trusted and name not in _SPOKEN:
            raise AttributeError(f"{name!r} of a {type(self).__name__} that is no plain value")
        return _get(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._sandbox_link.ask("set", self._sandbox_handle, name, value)


def class_for(
    link: Connection, handle: int, name: str, operators: Iterable[str], trusted: bool
) -> ForeignClass:
    """The stand-in of a class whose objects have these operators."""
    own: dict[str, Any] = {
        "_sandbox_link": link,
        "_sandbox_handle": handle,
        "_sandbox_trusted": trusted,
    }
    own |= {name: _asked_for(name) for name in ("__doc__", "__annotations__")}
    own["_sandbox_operators"] = tuple(operators)
    made = ForeignClass(name, (Foreign,), own)
    _forward_operators(made, OPERATORS if trusted else _ALWAYS)
    return made


def object_for(kind: Any, handle: int) -> Foreign:
    made: Foreign = object.__new__(kind)  # without its `__init__`, which is the other process's
    object.__setattr__(made, "_sandbox_handle", handle)
    return made


def trust(kind: ForeignClass) -> None:
    """Lets objects of a class have all its operators, and methods that plain values have too."""
    type.__setattr__(kind, "_sandbox_trusted", True)
    _forward_operators(kind, OPERATORS)


def operators_of(kind: type) -> list[str]:
    return [name for name in OPERATORS if any(name in vars(base) for base in kind.__mro__)]


def _get(target: Any, name: str) -> Any:
    if name == "__signature__":
        return _signature(target)
    if name.startswith("__") and name not in _SPOKEN:
        raise AttributeError(name)
    return target._sandbox_link.ask("get", target._sandbox_handle, name)


def _forward_operators(kind: ForeignClass, allowed: Iterable[str]) -> None:
    for name in set(allowed).intersection(kind._sandbox_operators):
        type.__setattr__(kind, name, _forward(name))


def _forward(name: str) -> Callable[..., Any]:
    if name == "__call__":
        return lambda self, *args, **kwargs: self._sandbox_link.ask(
            "call", self._sandbox_handle, args, kwargs
        )
    return lambda self, *args: self._sandbox_link.ask("op", self._sandbox_handle, name, args)


# --- signatures, as values


def signature_parts(target: Any) -> Any:
    """What `inspect.signature` says, for `_signature` of the other process."""
    inspect = importlib.import_module("inspect")  # large, and most runs do without
    found = inspect.signature(target)

    def known(value: Any) -> tuple[Any, ...]:
        return () if value is inspect.Parameter.empty else (value,)

    parts = [
        (p.name, int(p.kind), known(p.default), known(p.annotation))
        for p in found.parameters.values()
    ]
    return parts, known(found.return_annotation)


def _signature(target: Any) -> Any:
    inspect = importlib.import_module("inspect")
    parts, returned = target._sandbox_link.ask("signature", target._sandbox_handle)
    parameters = [
        inspect.Parameter(
            name,
            kind,
            **dict(zip(("default",), default, strict=False)),
            **dict(zip(("annotation",), annotation, strict=False)),
        )
        for name, kind, default, annotation in parts
    ]
    return inspect.Signature(
        parameters, **dict(zip(("return_annotation",), returned, strict=False))
    )


# --- a subclass


def _open_to_super(kind: ForeignClass) -> None:
    """`super()` looks into classes and asks nobody: they get the methods of the class itself."""
    link, handle = kind._sandbox_link, kind._sandbox_handle
    if "__init__" not in vars(kind):  # not done yet, for another subclass
        for name in link.ask("methods", handle):
            type.__setattr__(kind, name, _method(link.ask("get", handle, name)))


def methods_of(kind: type) -> list[str]:
    """What a subclass may ask of `super()`."""
    names = {name for base in kind.__mro__ for name, v in vars(base).items() if callable(v)}
    return [name for name in names if name in ("__init__", *OPERATORS) or name[:2] != "__"]


def _take_apart(member: Any) -> tuple[Any, ...]:
    if isinstance(member, types.FunctionType):
        return "method", member
    if isinstance(member, staticmethod | classmethod):
        return type(member).__name__, member.__func__
    if isinstance(member, property):
        return "property", member.fget, member.fset, member.fdel
    return "value", member


def put_together(how: str, *parts: Any) -> Any:
    """A member of a class out of what `_take_apart` made of it in the other process."""
    if how == "value":
        return parts[0]
    made = [part if part is None else _method(part) for part in parts]
    makers = {"staticmethod": staticmethod, "classmethod": classmethod, "property": property}
    return makers[how](*made) if how in makers else made[0]


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that binds its object, which a foreign one does not."""

    def method(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method
