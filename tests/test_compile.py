"""The compile command: what it counts is right, and what has to fit a slice fits."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import fits
from pgrpo_jax import (
    cli,
    compile,
    decoding,
    footprint,
    hlo,
    programs,
    reshard,
    roofline,
    sharding,
    topology,
)
from pgrpo_jax import config as c
from pgrpo_jax.models import decoder

# --- what a module moves

LOOP = """HloModule loop

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%slice (stack: f32[5,8,16], at: s32[]) -> f32[8,16] {
  %stack = f32[5,8,16]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,16]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%one)
}

%body (state: (s32[], f32[5,8,16], f32[8,64])) -> (s32[], f32[5,8,16], f32[8,64]) {
  %state = (s32[], f32[5,8,16]{2,1,0}, /*index=2*/f32[8,64]{1,0:T(8,128)}) parameter(0)
  %at.1 = s32[] get-tuple-element(%state), index=0
  %stack.1 = f32[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %part = f32[8,16]{1,0:T(8,128)S(1)} fusion(%stack.1, %at.1), kind=kLoop, calls=%slice
  %whole = f32[8,64]{1,0:T(8,128)} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %next = (s32[], f32[5,8,16]{2,1,0}, f32[8,64]{1,0}) tuple(%at.1, %stack.1, %whole)
}

%condition (state: (s32[], f32[5,8,16], f32[8,64])) -> pred[] {
  %bound = s32[] constant(5)
  %state.1 = (s32[], f32[5,8,16]{2,1,0}, f32[8,64]{1,0}) parameter(0)
  %at.2 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%at.2, %bound), direction=LT
}

ENTRY %main (x: (s32[], f32[5,8,16], f32[8,64])) -> f32[8,64] {
  %x = (s32[], f32[5,8,16]{2,1,0}, f32[8,64]{1,0}) parameter(0)
  %loop = (s32[], f32[5,8,16]{2,1,0}, f32[8,64]{1,0}) while(%x), condition=%condition, body=%body
  %last = f32[8,64]{1,0} get-tuple-element(%loop), index=2
  ROOT %total = f32[8,64]{1,0} all-reduce(%last), replica_groups={{0,1},{2,3}}, to_apply=%sum
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    moved = hlo.collective_bytes(hlo.parse(LOOP))
    # Gathered: [8, 64] of 4 bytes, three quarters of it from the 3 others, 5 times.
    # Reduced: a ring of 2 passes half of the array on twice.
    assert moved == {"all-gather": 5 * 2048 * 3 / 4, "all-reduce": 2048.0}


def test_memory_counts_slices_and_not_what_they_are_cut_from():
    # In the loop: a slice of 8 x 16 floats and its place are read, its copy on the chip is free;
    # 8 x 64 are written. After it: 8 x 64 are read and written.
    assert hlo.memory_bytes(hlo.parse(LOOP)) == 5 * (8 * 16 * 4 + 4 + 2048) + 2 * 2048


PIECES = """HloModule pieces

%turn (table: f32[64,16]) -> f32[16,64] {
  %table = f32[64,16]{1,0} parameter(0)
  ROOT %turned = f32[16,64]{0,1} bitcast(%table)
}

%rows (table: f32[64,16], at: s32[4,1]) -> f32[4,16] {
  %table.1 = f32[64,16]{1,0} parameter(0)
  %at = s32[4,1]{1,0} parameter(1)
  ROOT %found = f32[4,16]{1,0} gather(%table.1, %at), offset_dims={1}, slice_sizes={1,16}
}

%product (x: f32[4,16], table: f32[64,16]) -> f32[4,64] {
  %x = f32[4,16]{1,0} parameter(0)
  %table.2 = f32[64,16]{1,0} parameter(1)
  %other = f32[16,64]{0,1} fusion(%table.2), kind=kLoop, calls=%turn
  ROOT %y = f32[4,64]{1,0} convolution(%x, %other), dim_labels=bf_io->bf
}

ENTRY %main (table: f32[64,16], at: s32[4,1]) -> f32[4,64] {
  %table.3 = f32[64,16]{1,0} parameter(0)
  %at.1 = s32[4,1]{1,0} parameter(1)
  %x.1 = f32[4,16]{1,0} fusion(%table.3, %at.1), kind=kLoop, calls=%rows
  %near = ((f32[64,16]{1,0}), f32[8,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%table.3), slice={}
  %there = f32[8,16]{1,0:S(1)} slice-done(%near)
  ROOT %y.1 = f32[4,64]{1,0} fusion(%x.1, %table.3), kind=kOutput, calls=%product
}
"""


def test_pieces_count_as_pieces_and_what_is_only_seen_in_another_shape_as_all_of_it():
    # Four rows of 64 bytes are read, with their 4 numbers, and written; they and the table are read
    # for the product, which is 4 x 64 floats; a slice of 8 rows is read, to where reading is free.
    moved = hlo.memory_bytes_by_kind(hlo.parse(PIECES))
    assert moved["product"] == 4 * (4 * 16 + 64 * 16 + 4 * 64)
    assert moved["other"] == 4 * (4 * 16 + 4 + 4 * 16) + 4 * 8 * 16
    assert moved["kernel"] == moved["collective"] == 0


def test_what_a_kernel_updates_in_place_counts_once():
    module = hlo.parse("""ENTRY %main (pages: f32[64,128], new: f32[8,128]) -> f32[64,128] {
  %pages = f32[64,128]{1,0} parameter(0)
  %new = f32[8,128]{1,0} parameter(1)
  %call = (f32[8,128]{1,0}, f32[64,128]{1,0}) custom-call(%new, %pages), custom_call_target="tpu", output_to_operand_aliasing={{1}: (1, {})}
  ROOT %pages.1 = f32[64,128]{1,0} get-tuple-element(%call), index=1
}""")  # noqa: E501
    # Read: both operands. Written: the first result; of the second nobody knows how much.
    assert hlo.memory_bytes(module) == (64 * 128 + 2 * 8 * 128) * 4


def test_a_loop_that_ends_on_the_device_takes_the_trips_it_is_told():
    module = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    assert hlo.collective_bytes(module, hlo.Runs(7))["all-gather"] == 7 * 2048 * 3 / 4


def test_a_conditional_moves_what_the_branch_moves_that_it_takes():
    # 6 steps, each of which multiplies by a matrix of 64 KB or writes 16 KB of zeros.
    def step(x_BD, some):
        return jax.lax.cond(some, lambda x: x @ w_DD, jnp.zeros_like, x_BD), None

    w_DD, x_BD = jnp.ones((128, 128)), jax.ShapeDtypeStruct((32, 128), jnp.float32)
    flags_L = jax.ShapeDtypeStruct((6,), bool)
    program = jax.jit(lambda x, flags: jax.lax.scan(step, x, flags)[0])
    module = hlo.parse(program.lower(x_BD, flags_L).compile().as_text())
    all_, none, third = (
        hlo.memory_bytes(module, hlo.Runs(taken=taken)) for taken in (1.0, 0.0, 1 / 3)
    )
    # Both write 16 KB; one reads w and x for it, the other a single zero.
    assert all_ - none == 6 * ((64 + 16) * 2**10 - 4)
    assert third == pytest.approx(none + (all_ - none) / 3)


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("hello")


def test_the_gathers_of_a_scan_are_those_of_its_layers():
    mesh = sharding.make_mesh(c.MeshConfig(fsdp=4, tensor=2))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", None))
    rows = sharding.batch(mesh)

    def layers(w_LDF, x_BD):
        return jax.lax.scan(lambda x_BD, w_DF: (jnp.tanh(x_BD @ w_DF), None), x_BD, w_LDF)[0]

    shapes = (
        jax.ShapeDtypeStruct((6, 32, 32), jnp.float32),
        jax.ShapeDtypeStruct((8, 32), jnp.float32),
    )
    compiled = (
        jax.jit(layers, in_shardings=(split, rows), out_shardings=rows).lower(*shapes).compile()
    )
    moved = hlo.collective_bytes(hlo.parse(compiled.as_text()))
    assert moved == {"all-gather": 6 * 32 * 32 * 4 * 3 / 4}


# --- formulas

ARCH = c.Architecture(
    vocab_size=256, width=128, layers=1, heads=4, kv_heads=2, head_dim=32, mlp=512
)


def test_the_formula_counts_what_the_compiler_counts_where_it_can():
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)

    def logits(params, *rows):
        x_BTD = decoder.forward(params, ARCH, c.Compute(), *rows)
        return x_BTD @ decoder.unembedding(params, ARCH)

    params = jax.eval_shape(lambda key: decoder.init(ARCH, c.Compute(), key), jax.random.key(0))
    analysis = jax.jit(logits).lower(params, tokens, tokens, tokens).compile().cost_analysis()
    # The reference computes the half above the diagonal too; norms and the like are not in it.
    half = roofline.attention(ARCH, 4 * 32 * 31 / 2)
    counted = roofline.forward(ARCH, roofline.rows(4, 32, 32)).model + half
    assert counted == pytest.approx(analysis["flops"], rel=0.05) and counted < analysis["flops"]


def test_training_is_three_times_forward_and_remat_one_more_of_the_layers():
    forward = roofline.forward(ARCH, roofline.rows(2, 16)).model
    none, full = (
        roofline.training(ARCH, c.Compute(remat=remat), roofline.rows(2, 16))
        for remat in ("none", "full")
    )
    assert (none.model, none.executed) == (3 * forward, 3 * forward)
    assert (full.model, full.executed) == (3 * forward, 4 * forward)


def test_tokens_of_prompts_do_not_meet_the_vocabulary():
    none, half, every = (
        roofline.forward(ARCH, roofline.rows(2, 16, predicted)).model for predicted in (0, 8, 16)
    )
    assert half - none == every - half == 2.0 * 2 * 8 * 128 * 256


def test_a_prompt_that_completions_share_is_read_once_but_for_its_last_token():
    load = roofline.completions(2, 3, prompt=4, drawn=5)
    # Six completions of 1 + 5 tokens behind two prefixes of 3.
    assert (load.tokens, load.predicted) == (6 * 6 + 2 * 3, 6 * 5)
    own, prefix = 6 * (6 * 7 / 2 + 6 * 3), 2 * (3 * 4 / 2)
    assert load.pairs == own + prefix


def test_the_slowest_resource_bounds_a_program():
    chip = topology.Chip(100.0, 1, 10.0, 5.0)
    bound = roofline.estimate(roofline.Work(300.0, 400.0), 10.0, 5.0, chip, chips=2)
    assert (bound.compute_s, bound.hbm_s, bound.links_s, bound.seconds) == (2.0, 1.0, 0.5, 2.0)
    assert bound.mfu == 300 / (2 * 100) / 2


# --- the command, with CPU devices in the place of the slice's


def test_another_name_for_a_slice_is_refused():
    for name in ("v5p", "v9:2x2x2", "v5p:2*2", ""):
        with pytest.raises(ValueError, match="topology must be a chip and its slice"):
            topology.chip(name)


def test_without_the_compiler_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tpu\]'"):
        topology.devices("v5e:1x1")


def small(**settings) -> c.Config:
    """The built-in world with every program there is, few rows, one layer."""
    tiny = cli.load("tiny")
    arch = dataclasses.replace(tiny.policy.architecture, layers=1, width=32, mlp=64)
    model = c.ModelConfig(architecture=arch, compute=c.Compute(attention="reference"))
    return dataclasses.replace(
        tiny,
        policy=model,
        reward_model=model,
        sft=dataclasses.replace(tiny.sft, batch_size=8),
        reward_training=dataclasses.replace(tiny.reward_training, batch_size=8),
        rollout=dataclasses.replace(tiny.rollout, prompts_per_step=8, num_generations=4),
        rewards=dataclasses.replace(tiny.rewards, thinking_batch_size=8),
        update=dataclasses.replace(tiny.update, kl="k3", beta=0.1, micro_batch_size=16),
        mesh=c.MeshConfig(tensor=2),
        **settings,
    )


NAMES = ["sft", "reward training", "reshard for rollout", "prefill", "decode", "reward scoring"]
NAMES += ["reference logprobs", "update"]


@pytest.fixture
def slice_of_cpus(monkeypatch):
    monkeypatch.setattr(topology, "devices", lambda name: jax.devices())


def run(capsys, tmp_path, cfg: c.Config, *argv: str) -> tuple[int, str, str]:
    file = tmp_path / "config.json"
    file.write_text(cli.to_json(cfg))
    argv = ("--config", str(file), "--topology", "v5e:2x4", *argv)
    with pytest.raises(SystemExit) as end:
        cli.run_line(compile.run, compile.Line, "A command.", argv)
    return end.value.code, *capsys.readouterr()


def test_every_program_of_a_run_is_reported_and_fits(slice_of_cpus, capsys, tmp_path):
    file = tmp_path / "figures.json"
    status, out, _ = run(capsys, tmp_path, small(), "--json", str(file))
    tree = json.loads(file.read_text())
    assert status == 0 and [row["name"] for row in tree["programs"]] == NAMES
    assert all(name in out for name in NAMES)
    for row in tree["programs"]:
        assert row["fits"] and row["total"] == sum(row["hbm"].values())
        assert row["name"] == "reshard for rollout" or 0 < row["estimate"]["mfu"] < 1
    by_name = {row["name"]: row for row in tree["programs"]}
    assert by_name["update"]["hbm"]["optimizer"] == pytest.approx(
        2 * by_name["update"]["hbm"]["parameters"], rel=0.01
    )
    # All 32 completions of 56 tokens have slots.
    assert by_name["decode"]["executions"] == math.ceil(56 / decoding.CHUNK)
    assert by_name["update"]["collectives"].keys() >= {"all-gather", "all-reduce"}


def test_what_does_not_fit_is_told_with_what_to_change_and_status_1(
    slice_of_cpus, capsys, tmp_path, monkeypatch
):
    chip = dataclasses.replace(topology.CHIPS["v5e"], hbm_bytes=600_000)
    monkeypatch.setitem(topology.CHIPS, "v5e", chip)
    status, out, _ = run(capsys, tmp_path, small())
    assert status == 1
    assert "update does not fit" in out and "--update.micro-batch-size" in out
    assert "temporaries" in out.split("update does not fit")[1]


def test_an_offloaded_reward_model_leaves_its_room_to_the_update():
    mesh = sharding.make_mesh(c.MeshConfig(tensor=2))
    kept, away = (
        next(p for p in programs.programs(cfg, mesh, 2**30) if p.name == "update").resident
        for cfg in (small(), dataclasses.replace(small(), rewards=c.RewardsConfig(offload=True)))
    )
    assert kept["reward model"] > 0 and "reward model" not in away


def test_reasonings_are_scored_beside_the_rollout_unless_the_reward_model_is_away():
    mesh = sharding.make_mesh(c.MeshConfig(tensor=2))
    beside, away = (
        {p.name: p for p in programs.programs(cfg, mesh, 2**30)}
        for cfg in (small(), dataclasses.replace(small(), rewards=c.RewardsConfig(offload=True)))
    )
    for kind, size in beside["decode"].arguments.items():
        assert beside["reward scoring"].resident[f"rollout's {kind}"] == size > 0
    assert not any("rollout's" in kind for kind in away["reward scoring"].resident)


def test_the_cache_takes_what_the_memory_leaves_and_at_least_one_completion():
    cfg, mesh = small(), sharding.make_mesh(c.MeshConfig(tensor=2))
    architectures = programs.architectures(cfg)
    plenty, some, none = (
        programs.rollout_sizes(cfg, *architectures, mesh, hbm_bytes)
        for hbm_bytes in (2**30, 300_000, 0)
    )
    assert plenty.slots == 8 * 4 and plenty.own_pages == plenty.slots * plenty.own_table
    assert none.own_table <= none.own_pages <= some.own_pages < plenty.own_pages


def test_the_search_ends_with_settings_that_fit(slice_of_cpus, capsys, tmp_path, monkeypatch):
    status, out, _ = run(capsys, tmp_path, small(), "--suggest")
    assert status == 0 and "fits: --mesh.fsdp" in out
    options = out.split("fits: ")[1].split()
    parsed = cli.parse(options, "", "command", cli.CommandLine).run
    assert parsed.mesh.fsdp * parsed.mesh.tensor == 8
    chip = dataclasses.replace(topology.CHIPS["v5e"], hbm_bytes=1000)
    monkeypatch.setitem(topology.CHIPS, "v5e", chip)
    status, out, _ = run(capsys, tmp_path, small(), "--suggest")
    assert status == 1 and "nothing fits" in out


def test_a_mistake_is_a_sentence_and_status_2(slice_of_cpus, capsys, tmp_path):
    status, _, error = run(capsys, tmp_path, small(), "--topology", "v5p")
    assert status == 2 and "such as v5p:4x4x4" in error


# --- with the compiler


@pytest.mark.parametrize("case", fits.CASES, ids=lambda case: "-".join(case[:2]))
@pytest.mark.tpu
@pytest.mark.slow
def test_a_configuration_fits_the_slice_it_is_meant_for(case):
    pytest.importorskip("libtpu")
    rows = fits.compiled(*case)
    assert {"prefill", "decode", "reward scoring", "update"} <= {row["name"] for row in rows}
    assert all(row["fits"] for row in rows), [row["name"] for row in rows if not row["fits"]]


@pytest.mark.tpu
def test_the_compiler_refuses_what_is_too_large_and_the_command_says_so():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "pgrpo_jax.compile", "--topology", "v5e:1x1"]
    command += ["--policy.architecture.width", "8192", "--policy.architecture.mlp", "65536"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "update does not fit" in done.stdout


@pytest.mark.tpu
def test_on_a_mesh_of_tpus_training_runs_the_flash_kernels_forward_and_backward():
    pytest.importorskip("libtpu")
    arch = c.Architecture(
        vocab_size=4096, width=512, layers=2, heads=8, kv_heads=4, head_dim=64, mlp=1024
    )
    model = c.ModelConfig(architecture=arch, compute=c.Compute(dtype="bfloat16"))
    cfg = dataclasses.replace(small(), policy=model, reward_model=model)
    mesh = sharding.make_mesh(c.MeshConfig(tensor=4), topology.devices("v5p:2x2x2"))
    chip = topology.chip("v5p:2x2x2")
    found = programs.programs(programs.on_tpu(cfg), mesh, chip.hbm_bytes)
    kernels = {
        program.name: set(re.findall("flash_attention_[a-z]+", program.lower().compile().as_text()))
        for program in found
        if program.name in ("update", "reward training")
    }
    wanted = {"flash_attention_forward", "flash_attention_backward"}
    assert kernels.keys() == {"update", "reward training"}
    assert all(names >= wanted for names in kernels.values())


@pytest.mark.tpu
@pytest.mark.parametrize("case", [fits.CASES[0], fits.CASES[-1]], ids=lambda case: case[1])
def test_the_compiler_reshards_with_no_more_than_twice_the_bytes_that_must_come(case):
    pytest.importorskip("libtpu")
    name, slice_, _ = case
    cfg = programs.on_tpu(cli.load(name))
    arch, _ = programs.architectures(cfg)
    chip, devices = topology.chip(slice_), topology.devices(slice_)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    found = programs.programs(cfg, mesh, chip.hbm_bytes)
    program = next(p for p in found if p.name == "reshard for rollout")
    moved = footprint.measure(program, chip, len(devices)).collectives
    least = reshard.received_bytes(arch, cfg.policy.compute, mesh)
    assert least > 0 and sum(moved.values()) <= 2 * least
