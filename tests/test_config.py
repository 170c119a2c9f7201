"""The settings tree refuses what is wrong, and the command line reaches all of it."""

import ast
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pgrpo_jax import cli
from pgrpo_jax import config as c

ROOT = pathlib.Path(__file__).parent.parent
SMALL = c.Architecture(vocab_size=16, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=16)


def parse(*argv: str) -> c.Config:
    return cli.parse(argv, "A command.", "command", cli.CommandLine).run


def leaves(settings, prefix=""):
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif value is not None:
            yield f"{prefix}{field.name}", value


def reach(settings, path: str):
    for name in path.split("."):
        settings = getattr(settings, name)
    return settings


# --- values


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: c.UpdateConfig(steps=-1), "UpdateConfig.steps must be at least 0, got -1"),
        (lambda: c.RolloutConfig(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
        (lambda: c.RolloutConfig(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (lambda: c.UpdateConfig(gate="none"), "gate must be one of 'posterior', 'additive', "),
        (lambda: c.UpdateConfig(steps=1.0), "steps must be of type int, got 1.0"),
        (lambda: c.UpdateConfig(steps=True), "steps must be of type int, got True"),
        (
            lambda: c.PairsConfig(dimensions=("style",)),
            r"dimensions\[0\] must be one of 'accuracy'",
        ),
        (lambda: c.RolloutConfig(prompt_buckets=[64]), "prompt_buckets must be a tuple"),
        (lambda: c.RolloutConfig(prompt_buckets=(64, 32)), "rising order, got (64, 32)"),
        (lambda: c.UpdateConfig(kl="k3"), "`kl` and `beta` must agree: kl='k3' with beta=0.0"),
        (lambda: c.ModelConfig(), "needs a `checkpoint`"),
        (
            lambda: dataclasses.replace(SMALL, heads=3, kv_heads=2),
            "multiple of kv_heads, got 3 and 2",
        ),
        (lambda: dataclasses.replace(SMALL, head_dim=3), "head_dim must be even"),
        (lambda: c.MeshConfig(data=-1, fsdp=-1), "one may be -1, got data=-1, fsdp=-1"),
        (lambda: c.MeshConfig(tensor=0), "each axis of the mesh counts devices"),
    ],
)
def test_a_wrong_value_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError) as caught:
        make()
    assert sentence.replace("\\", "") in str(caught.value)


def test_settings_that_cannot_go_together_are_refused():
    tiny = cli.load("tiny")
    data = dataclasses.replace(tiny.data, max_prompt_length=4096)
    with pytest.raises(ValueError, match="4096 tokens does not fit the longest"):
        dataclasses.replace(tiny, data=data)
    rollout = dataclasses.replace(tiny.rollout, num_generations=1)
    with pytest.raises(ValueError, match="a group of one has no advantage"):
        dataclasses.replace(tiny, rollout=rollout)


def test_training_on_a_truncated_distribution_is_refused():
    tiny = cli.load("tiny")
    for change in ({"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}):
        rollout = dataclasses.replace(tiny.rollout, **change)
        with pytest.raises(ValueError, match="training samples from the whole distribution"):
            dataclasses.replace(tiny, rollout=rollout)
        dataclasses.replace(tiny, rollout=rollout, update=c.UpdateConfig(steps=0))


def test_every_field_is_read_somewhere():
    fields = {
        field.name
        for settings in vars(c).values()
        if isinstance(settings, type) and issubclass(settings, c.Settings)
        for field in (dataclasses.fields(settings) if settings is not c.Settings else ())
    }
    files = [
        p for folder in ("pgrpo_jax", "models", "kernels") for p in (ROOT / folder).glob("*.py")
    ]
    read = {
        node.attr
        for path in files
        if path.name not in ("config.py", "cli.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert not fields - read


# --- the command line

OTHER = {
    "": "other",
    "world": "other",
    "train": "other",
    "test": "other",
    "runs/tiny": "other",
    "~/.cache/pgrpo_jax": "other",
    "float32": "bfloat16",
    "none": "full",
    "auto": "reference",
    "drop": "refuse",
    "constant": "cosine",
    "cosine": "constant",
    "posterior": "additive",
    "group": "decoupled",
    "token": "sequence",
    "accuracy": "rigor",
    "own": "policy",
    "policy": "own",
    "compute": "int8",
}


def other(value):
    """A legal value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple | list):
        return tuple(map(other, value[:1])) or ("other",)
    return {
        int: lambda: 2 * value or 1,
        float: lambda: value / 2 or 0.5,
        str: lambda: OTHER[value],
    }[type(value)]()


def test_each_leaf_of_the_tree_is_an_option_with_its_type():
    tiny = cli.load("tiny")
    tree = json.loads(cli.to_json(tiny))
    changed = {
        path: other(value)
        for path, value in leaves(tiny)
        if not path.endswith(".checkpoint") and path.split(".")[0] != "mesh"
    } | {
        "judge.tier": "landlock",
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "mesh.tensor": -1,
        "rollout.filter_groups": "reward",
        "update.kl": "k3",
        "update.steps": 0,
        "rollout.prompt_buckets": (64, 4096),
    }
    argv = []
    for path, value in changed.items():
        *folders, name = path.split(".")
        functools.reduce(dict.__getitem__, folders, tree)[name] = value
        option = "--" + path.replace("_", "-")
        if value is False:
            option = option.replace(name.replace("_", "-"), "no-" + name.replace("_", "-"))
        argv += [option] if isinstance(value, bool) else [option, *map(str, np.ravel(value))]
    wanted = cli.from_json(json.dumps(tree))
    assert {path for path, value in leaves(tiny) if value != reach(wanted, path)} == set(changed)
    assert repr(parse(*argv)) == repr(wanted)


def test_options_are_taken_with_underscores_and_equal_signs_too():
    assert parse("--rollout.num_generations=4").rollout.num_generations == 4


def test_a_checkpoint_takes_the_place_of_the_architecture():
    policy = parse("--policy.checkpoint", "folder").policy
    assert policy.checkpoint == "folder" and policy.architecture is None


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--update.gaet", "x"), "unknown option --update.gaet; the nearest is --update.gate"),
        (("--gate", "additive"), "unknown option --gate; the nearest is --update.gate"),
        (("--config", "tinny"), "no configuration 'tinny'; the nearest is 'tiny'"),
        (("--config", "missing.py"), "no configuration file 'missing.py'"),
        (("--update.steps", "-1"), "UpdateConfig.steps must be at least 0, got -1"),
        (("--update.steps", "many"), "--update.steps"),
        (("--update.gate", "open"), "invalid choice 'open' for argument '--update.gate'"),
        (("stray",), "stray"),
    ],
)
def test_a_mistake_ends_with_status_2_and_names_what_is_wrong(argv, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda settings: pytest.fail("must not run"), "A command.", argv)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert sentence in " ".join((told.out + told.err).replace("│", "").split())


def test_what_a_command_refuses_is_a_sentence_and_what_breaks_keeps_its_traceback(capsys):
    def refuses(settings):
        c.require(False, "this folder holds another run")

    def breaks(settings):
        json.loads("no JSON")  # a ValueError, raised by a library

    nothing_kept = ("--compilation-cache", "")
    with pytest.raises(SystemExit) as caught:
        cli.run(refuses, "A command.", nothing_kept)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(": this folder holds another run\n")
    with pytest.raises(json.JSONDecodeError):
        cli.run(breaks, "A command.", nothing_kept)


def test_dry_run_prints_what_would_run_and_runs_nothing(capsys, tmp_path):
    argv = ("--dry-run", "--update.gate", "additive", "--rewards.functions", "a:b", "c:d")
    cli.run(lambda settings: pytest.fail("must not run"), "A command.", argv)
    file = tmp_path / "config.json"
    file.write_text(capsys.readouterr().out)
    seen = []
    changes = ("--seed", "7", "--compilation-cache", "")
    cli.run(seen.append, "A command.", ("--config", str(file), *changes))
    assert seen == [dataclasses.replace(parse(*argv), seed=7, compilation_cache="")]
    assert seen[0].rewards.functions == ("a:b", "c:d") and seen[0].update.gate == "additive"


def test_help_shows_every_option_with_its_unit(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda settings: None, "Does one thing.", ("--help",))
    told = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert caught.value.code == 0
    assert "Does one thing." in told and "Built-in configurations: " in told
    assert "--judge.timeout-s FLOAT CPU seconds a test" in told
    for path, _ in leaves(cli.load("tiny")):
        assert "--" + path.replace("_", "-") in told


def test_help_does_not_import_jax():
    code = (
        "import sys; from pgrpo_jax import cli; cli.load('tiny'); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- configuration files


@pytest.mark.parametrize("name", cli.builtin())
def test_each_built_in_configuration_survives_its_text(name):
    settings = cli.load(name)
    assert cli.from_json(cli.to_json(settings)) == settings


def test_each_built_in_configuration_names_its_command_and_hardware():
    for name in cli.builtin():
        told = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
        assert "python -m pgrpo_jax.train" in told, name
        assert name == "tiny" or "not been run" in told or "was run on" in told, name


def test_rope_scaling_and_tuples_survive_their_text():
    scaled = dataclasses.replace(SMALL, rope_scaling=c.RopeScaling(factor=32.0))
    model = c.ModelConfig(architecture=scaled)
    settings = c.Config(policy=model, reward_model=model, data=c.DataConfig(prefill="<think>\n"))
    assert cli.from_json(cli.to_json(settings)) == settings


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"upate": {}}, "unknown key 'upate' in the configuration; the nearest is 'update'"),
        ({"update": {"gaet": 1}}, "unknown key 'gaet' in update; the nearest is 'gate'"),
        ({"update": 3}, "update must be an object, got 3"),
        (
            {"policy": {"architecture": {"width": 8}}},
            "policy.architecture needs the key 'vocab_size'",
        ),
    ],
)
def test_a_wrong_json_file_is_refused_in_a_sentence(change, sentence, tmp_path):
    tree = json.loads(cli.to_json(cli.load("tiny"))) | change
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="wrong.json: ") as caught:
        cli.load(str(file))
    assert sentence in str(caught.value)


def test_a_python_file_is_a_configuration(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom pgrpo_jax import cli\n"
        "def config():\n    return dataclasses.replace(cli.load('tiny'), seed=5)\n"
    )
    assert parse("--config", str(file)) == dataclasses.replace(cli.load("tiny"), seed=5)
    file.write_text("def config():\n    return 3\n")
    with pytest.raises(ValueError, match="must return a pgrpo_jax.config.Config, got 3"):
        cli.load(str(file))
    file.write_text("")
    with pytest.raises(ValueError, match=r"has no function config\(\)"):
        cli.load(str(file))
