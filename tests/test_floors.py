"""Imports go strictly down the floors, and no module is imported under a second name."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = {
    12: "benchmarks",
    11: "compile",
    10: "suggest train",
    9: "judge footprint grpo",  # the whole run: it calls the stages
    8: "programs collect",
    7: "sft make_pairs train_reward evaluate rewards canaries",
    6: "start fit update supervised report summary sandbox sandbox_server rollout",
    5: "models.reward checkpoint sandbox_pool reshard decoding",
    4: "models.decoder models.load data sandbox_work sandbox_zygote models.decode "
    "models.kernel_cache",
    3: "models.attention models.cache models.logprobs problems sampling sandbox_tests "
    "sandbox_check",
    2: "sandbox_slot models.layers tokenizer optimizer configs sandbox_run "
    "kernels.flash_attention kernels.blocked_attention roofline kernels.paged_attention cli",
    1: "kernels.attention kernels.flash_forward kernels.flash_backward sharding algo world figures "
    "sandbox_proxy topology memory compilation",
    0: "types config rng masked metrics allocator parse compare charts interrupt progress "
    "sandbox_wire sandbox_jail sandbox_probes hlo hosts scheduler packing kernels.flash_blocks "
    "kernels.paged_kernel sandbox_semaphore sandbox_foreign",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
WORKERS = {"compare"} | {m for m in FLOOR if m.startswith("sandbox_")}
ARRAYS_ONLY = ("algo", *(m for m in FLOOR if m.startswith("kernels.")))


def module_name(path: pathlib.Path) -> str:
    """`models.layers` for models/layers.py, `rng` for pgrpo_jax/rng.py; all of configs/ is one, all
    of benchmarks/ too."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("configs", "benchmarks"):
        return parts[0]
    return ".".join(parts).removeprefix("pgrpo_jax.")


def files(*folders: str) -> dict[pathlib.Path, str]:
    paths = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return {p: module_name(p) for p in paths if p.name != "__init__.py"}


def imported(path: pathlib.Path) -> set[str]:
    """The full names of what a file imports anywhere, inside functions as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def listed(name: str) -> str:
    """The module of the table that a full name means: itself, or the one that it is a member of."""
    parts = name.removeprefix("pgrpo_jax.").split(".")
    known = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((m for m in known if m in FLOOR), name)


MODULES = files("pgrpo_jax", "models", "kernels", "configs", "benchmarks")
OWN = {
    (module, listed(name))
    for path, module in MODULES.items()
    for name in imported(path)
    if name.split(".")[0] in ("pgrpo_jax", "benchmarks")
    and (module, listed(name)) != ("benchmarks", "benchmarks")
}


def test_the_table_lists_each_module_and_nothing_else():
    assert set(MODULES.values()) == set(FLOOR)


def test_imports_go_strictly_down():
    assert not {
        (upper, lower) for upper, lower in OWN if FLOOR.get(upper, -1) <= FLOOR.get(lower, 99)
    }


def test_configurations_are_imported_by_name_only():
    assert not {upper for upper, lower in OWN if lower == "configs"}


def test_what_is_mathematics_sees_arrays_only():
    seen = {lower for upper, lower in OWN if upper in ARRAYS_ONLY}
    assert seen <= {"masked", *ARRAYS_ONLY}


def test_the_outer_folders_are_never_imported_by_their_bare_names():
    everything = MODULES | files("tests", "tools")
    bare = {(str(p), n) for p in everything for n in imported(p)}
    assert not {(p, n) for p, n in bare if n.split(".")[0] in ("models", "kernels", "configs")}


def test_sandbox_workers_import_the_standard_library_and_each_other_only():
    packages = {n.split(".")[0] for p, m in MODULES.items() if m in WORKERS for n in imported(p)}
    assert packages - {"pgrpo_jax"} <= sys.stdlib_module_names
    assert {lower for upper, lower in OWN if upper in WORKERS} <= WORKERS
