"""The command line that every command shares, and the settings tree as text.

    python -m pgrpo_jax.train --config tiny --update.gate additive --rollout.num-generations 4

`--config` takes the name of a built-in configuration, a .py file with a function `config()`, or a
.json file as a run and `--dry-run` write it. Every field of the tree is an option. Nothing that
takes long to import, jax least of all, is needed to show help or to refuse a mistake.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import json
import linecache
import pathlib
import pkgutil
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import tyro

from pgrpo_jax import allocator
from pgrpo_jax.config import Config, require

DEFAULT = "tiny"


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The settings tree, and the two options that stand outside it. A command that has more options
    adds them in a subclass, each with a default."""

    run: Annotated[Config, tyro.conf.arg(name="")]
    config: str = DEFAULT  # a built-in name, a .py file with config(), or a .json file
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False  # print the settings and stop


Line = typing.TypeVar("Line", bound=CommandLine)


def run(main: Callable[[Config], None], doc: str, argv: Sequence[str] | None = None) -> None:
    """Parses the command line, then calls `main` with the settings, or prints them for `--dry-run`.

    A mistake on the command line ends the process with one sentence and status 2, and so does what
    the command itself refuses: a folder, a file, a device.
    """
    run_line(lambda line: main(line.run), CommandLine, doc, argv)


def run_line(
    main: Callable[[Line], None], kind: type[Line], doc: str, argv: Sequence[str] | None = None
) -> None:
    """The same for a command with options of its own, those of `kind`."""
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else pathlib.Path(sys.argv[0]).name
    try:
        line = parse(sys.argv[1:] if argv is None else argv, doc, program, kind)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    if line.dry_run:
        print(to_json(line.run))
        return
    from pgrpo_jax import compilation

    allocator.keep_freed_memory()
    compilation.keep(line.run)
    try:
        main(line)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if not is_refusal(error):
            raise
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


def is_refusal(error: Exception) -> bool:
    """Whether this package raised the error, in a statement of its own: its words are for the user.
    What a library raised, or an expression of ours, is a bug's and keeps its traceback."""
    frame, number = list(traceback.walk_tb(error.__traceback__))[-1]
    package = str(frame.f_globals.get("__package__")).split(".")[0]
    line = linecache.getline(frame.f_code.co_filename, number)
    return package == __package__ and line.lstrip().startswith("raise ")


def parse(argv: Sequence[str], doc: str, program: str, kind: type[Line]) -> Line:
    """The settings that `argv` asks for. Raises ValueError; tyro ends with status 2 by itself."""
    chooser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", default=DEFAULT)
    name = chooser.parse_known_args(argv)[0].config
    given = [arg.split("=")[0].replace("_", "-") for arg in argv if arg.startswith("--")]
    default = _prefer_checkpoints(load(name), given)
    own = (f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)[1:])
    known = ["--help", *own, *options(default)]
    for option in given:
        require(
            option in known,
            f"unknown option {option}; the nearest is {nearest(option, known)} (--help lists all)",
        )
    return tyro.cli(
        kind,
        default=kind(default, name),
        args=argv,
        prog=program,
        description=f"{doc.strip()}\n\nBuilt-in configurations: {', '.join(builtin())}.",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _prefer_checkpoints(settings: Config, given: Iterable[str]) -> Config:
    """A checkpoint named on the command line takes the place of the file's architecture."""
    models = {}
    for name in ("policy", "reward_model"):
        option = f"--{name.replace('_', '-')}.checkpoint"
        if option in given:
            model = getattr(settings, name)
            models[name] = dataclasses.replace(model, checkpoint=option, architecture=None)
    return dataclasses.replace(settings, **models)


def options(settings: Any, prefix: str = "") -> Iterator[str]:
    """The options that set the fields of a tree."""
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"--{prefix}{name}"
        if isinstance(value, bool):
            yield f"--{prefix}no-{name}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The most similar of `known`; an equal part behind the last dot counts as much as the rest."""

    def similarity(other: str) -> float:
        pairs = ((word, other), (_last(word), _last(other)))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(known, key=similarity)


def _last(option: str) -> str:
    return option.lstrip("-").split(".")[-1]


def builtin() -> list[str]:
    """The names of the built-in configurations."""
    folder = importlib.import_module("pgrpo_jax.configs")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def load(name: str) -> Config:
    """The configuration of this name, or in this .py or .json file. Raises ValueError."""
    path = pathlib.Path(name)
    if path.suffix in (".json", ".py"):
        require(path.is_file(), f"there is no configuration file {name!r}")
    else:
        known = builtin()
        require(
            name in known,
            f"there is no configuration {name!r}; the nearest is {nearest(name, known)!r}. Known "
            f"are {', '.join(known)}, and paths of .py and .json files",
        )
    if path.suffix == ".json":
        try:
            return from_json(path.read_text())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if path.suffix == ".py":
        return _call(_module(path), name)
    return _call(importlib.import_module(f"pgrpo_jax.configs.{name}"), name)


def _module(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"{path} has the suffix of a module"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(module: types.ModuleType, name: str) -> Config:
    require(hasattr(module, "config"), f"{name!r} has no function config()")
    settings = module.config()
    require(
        isinstance(settings, Config),
        f"config() of {name!r} must return a pgrpo_jax.config.Config, got {settings!r}",
    )
    return settings


def to_json(settings: Config) -> str:
    """The whole tree, defaults included."""
    return json.dumps(dataclasses.asdict(settings), indent=2)


def from_json(text: str) -> Config:
    """The tree that `to_json` wrote. A key left out takes its default. Raises ValueError."""
    return _build(Config, json.loads(text), "")


def _build(hint: Any, value: Any, path: str) -> Any:
    if typing.get_origin(hint) is Annotated:
        return _build(typing.get_args(hint)[0], value, path)
    if typing.get_origin(hint) is types.UnionType:
        return None if value is None else _build(typing.get_args(hint)[0], value, path)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if not dataclasses.is_dataclass(hint):
        return value
    where = path or "the configuration"
    require(isinstance(value, dict), f"{where} must be an object, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(hint)}
    for key in value:
        require(
            key in fields,
            f"unknown key {key!r} in {where}; the nearest is {nearest(key, fields)!r}",
        )
    for name, field in fields.items():
        given = name in value or field.default is not dataclasses.MISSING
        require(given, f"{where} needs the key {name!r}")
    hints = typing.get_type_hints(hint, include_extras=True)
    return hint(**{k: _build(hints[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()})  # type: ignore[operator]
