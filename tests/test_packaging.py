"""Every way to install the package finds every module, in the place that it should."""

import ast
import configparser
import json
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OUTER = ("models", "kernels", "configs")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
WHERE = """
import importlib.util, json, sys
from pgrpo_jax import cli
found = {name: importlib.util.find_spec(name).origin for name in sys.argv[1:]}
found["built-in"] = cli.builtin()
print(json.dumps(found))
"""


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Each module's full name and its file in a checkout."""
    files = [p for f in ("pgrpo_jax", *OUTER) for p in (root / f).rglob("*.py")]
    parts = {p: p.relative_to(root).with_suffix("").parts for p in files}
    return {
        ".".join(n if n[0] == "pgrpo_jax" else ("pgrpo_jax", *n)).removesuffix(".__init__"): p
        for p, n in parts.items()
    }


def requirements(section: str, key: str) -> set[str]:
    lines = SETUP[section][key].split("\n")
    return {re.split(r"[><=\[; ]", line)[0].lower() for line in lines if line}


def run(*command: object, cwd: pathlib.Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_packages_of_setup_cfg_are_the_folders_that_hold_code():
    folders = {p.parent.relative_to(ROOT).parts for p in modules(ROOT).values()}
    names = {".".join(f if f[0] == "pgrpo_jax" else ("pgrpo_jax", *f)) for f in folders}
    assert set(SETUP["options"]["packages"].split()) == names
    lines = SETUP["options"]["package_dir"].strip().splitlines()
    mapped = dict(re.split(r"\s*=\s*", line.strip()) for line in lines)
    assert mapped == {n: n.removeprefix("pgrpo_jax.").replace(".", "/") for n in names}


def test_the_outer_folders_are_no_packages_of_their_own():
    assert not [p for folder in OUTER for p in (ROOT / folder).rglob("__init__.py")]


def test_what_is_imported_is_what_is_declared():
    distributions = {"orbax": "orbax-checkpoint", "tensorboardX": "tensorboardx"}
    nodes = [n for p in modules(ROOT).values() for n in ast.walk(ast.parse(p.read_text()))]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    tops = {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"pgrpo_jax"}
    needed = {distributions.get(top, top) for top in tops}
    optional = requirements("options.extras_require", "wandb")
    declared = requirements("options", "install_requires")
    assert needed - optional == declared


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A copy of what a clone holds, for builds leave folders behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pgrpo_jax", *OUTER):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *flags, checkout, cwd=checkout)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture
def python(tmp_path) -> pathlib.Path:
    """The interpreter of a new environment that sees this one's packages but not its installations.

    A path file's lines are appended to the path, but path files in there are not read.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    packages = next((tmp_path / "env").rglob("site-packages"))
    (packages / "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "env" / "bin" / "python"


def assert_all_found(python, cwd: pathlib.Path, checkout: pathlib.Path, home: pathlib.Path) -> None:
    """Run in `cwd`, every module of `checkout` is found below `home`."""
    found = json.loads(run(python, "-c", WHERE, *modules(checkout), cwd=cwd))
    assert found.pop("built-in") == sorted(p.stem for p in (checkout / "configs").glob("*.py"))
    assert {name for name, file in found.items() if not file.startswith(f"{home}/")} == set()


def test_without_installation_every_module_is_found_from_the_root(checkout, python):
    assert_all_found(python, checkout, checkout, checkout)


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_an_editable_installation_finds_every_module_from_anywhere(
    tool, checkout, python, tmp_path
):
    flags = ("install", "--no-deps", "--no-build-isolation", "-e", checkout)
    if tool == "pip":
        run(sys.executable, "-m", "pip", "--python", python, *flags, cwd=checkout)
    else:
        uv = pytest.importorskip("uv", reason="needs the dev extra").find_uv_bin()
        run(uv, "pip", *flags, "--python", python, "--offline", cwd=checkout)
    assert_all_found(python, tmp_path, checkout, checkout)
    assert_all_found(python, checkout, checkout, checkout)


def test_a_wheel_finds_every_module_from_anywhere(checkout, wheel, python, tmp_path):
    packages = next((tmp_path / "env").rglob("site-packages"))
    wheel.extractall(packages)
    assert_all_found(python, tmp_path, checkout, packages)
    assert_all_found(python, checkout, checkout, checkout)


def test_the_wheel_holds_the_code_and_the_licence_and_nothing_else(checkout, wheel):
    held = set(wheel.namelist())
    folders = {"pgrpo_jax": "pgrpo_jax"} | {name: f"pgrpo_jax/{name}" for name in OUTER}
    code = {
        f"{packaged}/{p.relative_to(checkout / folder).as_posix()}"
        for folder, packaged in folders.items()
        for p in (checkout / folder).rglob("*")
        if p.is_file()
    }
    assert {n for n in held if ".dist-info/" not in n} == code
    assert any(n.endswith("/LICENSE") for n in held)
