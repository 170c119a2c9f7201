"""What the README tells to type is understood."""

import pathlib
import re
import shlex

import pytest

from pgrpo_jax import cli, compile, judge

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))
COMMANDS = re.findall(r"python -m ((?:pgrpo_jax|benchmarks)\.\w+)(.*)", BLOCKS)


@pytest.mark.parametrize(("module", "options"), COMMANDS)
def test_each_command_names_a_module_and_options_that_exist(module, options):
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert "__main__" in file.read_text()
    if module == "pgrpo_jax.judge":
        judge.parser().parse_args(shlex.split(options))
    elif module.startswith("pgrpo_jax"):
        kind = compile.Line if module == "pgrpo_jax.compile" else cli.CommandLine
        cli.parse(shlex.split(options), "", module, kind)


def test_each_option_spoken_of_exists():
    known = set(cli.options(cli.load("tiny"))) | {"--config", "--dry-run", "--help"}
    assert set(re.findall(r"`(--[\w.-]+)", README)) <= known


def test_one_line_sets_up_and_tests_and_ci_finds_it():
    lines = [line for line in README.splitlines() if line.endswith("python -m pytest -n 2")]
    assert len(lines) == 1 and lines[0].startswith("python3 -m venv .venv && ")
    assert "grep -m 1 'python -m pytest -n 2$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_configurations_are_listed():
    assert re.findall(r"^\| `(\w+)` \| .* \| (?:yes|no) \|$", README, flags=re.MULTILINE) == sorted(
        cli.builtin(), key=lambda name: (name != "tiny", name)
    )
