"""The programs that a configuration runs, to be compiled for any mesh, also one of devices that are
not there.

They come from the functions that training calls. Of each kind there is the longest shape: what fits
for it fits for the shorter buckets.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgrpo_jax import (
    config,
    data,
    decoding,
    hlo,
    optimizer,
    packing,
    reshard,
    rewards,
    rollout,
    roofline,
    scheduler,
    sharding,
    supervised,
    update,
)
from pgrpo_jax.config import Architecture
from pgrpo_jax.models import attention, decoder, kernel_cache, load, reward

Bytes = Mapping[str, int]  # of one device, by kind


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    `arguments` are bytes a device of what it is called with, `resident` of what else lies in the
    device's memory meanwhile. `executions` of it make one P-GRPO step, 0 for the stages before.
    `runs` is what its text does not say.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: Bytes
    resident: Bytes
    work: roofline.Work
    executions: int = 0
    runs: hlo.Runs = hlo.Runs()


def architectures(cfg: config.Config) -> tuple[Architecture, Architecture]:
    """Of the policy and of the reward model, from the settings or the checkpoints' config.json."""

    def one(model: config.ModelConfig) -> Architecture:
        return model.architecture or load.architecture(model.checkpoint)

    policy = one(cfg.policy)
    return policy, policy if cfg.reward_training.trunk == "policy" else one(cfg.reward_model)


def on_tpu(cfg: config.Config) -> config.Config:
    """The settings, with the attention that "auto" means there."""

    def one(model: config.ModelConfig) -> config.ModelConfig:
        return dataclasses.replace(model, compute=attention.resolve(model.compute, "tpu"))

    return dataclasses.replace(cfg, policy=one(cfg.policy), reward_model=one(cfg.reward_model))


def programs(cfg: config.Config, mesh: Mesh, hbm_bytes: int) -> Iterator[Program]:
    """Every program of the run, in the order in which it runs them. The rollout's cache is as large
    as devices of `hbm_bytes` let it be."""
    policy, judge = architectures(cfg)
    if cfg.sft.steps:
        yield _sft(cfg, policy, mesh)
    if cfg.reward_training.steps:
        yield _reward_training(cfg, judge, mesh)
    if not cfg.update.steps:
        return
    yield _reshard(cfg, policy, judge, mesh)
    prefill, decode = _rollout(cfg, policy, judge, mesh, hbm_bytes)
    yield from (prefill, decode)
    yield _scoring(cfg, policy, judge, mesh, decode.arguments)
    if cfg.update.kl != "none":
        yield _logprobs(cfg, policy, judge, mesh, "reference logprobs", "reference")
    if cfg.update.importance_cap and cfg.update.num_iterations > 1:
        yield _logprobs(cfg, policy, judge, mesh, "policy logprobs", "policy's parameters")
    yield _update(cfg, policy, judge, mesh)


# --- what is where


@dataclasses.dataclass(frozen=True)
class Placed:
    """Abstract arrays, and where they lie."""

    shapes: Any
    places: Any

    @property
    def bytes(self) -> int:
        """Of one device."""
        return sharding.device_bytes(self.shapes, self.places)

    @property
    def arguments(self) -> Any:
        """As a jitted function is lowered with them."""
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            self.shapes,
            self.places,
        )


def _policy(cfg: config.Config, arch: Architecture, mesh: Mesh) -> Placed:
    init = jax.eval_shape(
        lambda key: decoder.init(arch, cfg.policy.compute, key), jax.random.key(0)
    )
    return Placed(init, sharding.shardings(init, mesh))


def _reward_model(cfg: config.Config, arch: Architecture, mesh: Mesh) -> Placed:
    """As it scores: in its computation's dtype."""
    compute = cfg.reward_model.compute
    frozen = dataclasses.replace(compute, param_dtype=compute.dtype)
    init = jax.eval_shape(lambda key: reward.init(arch, frozen, key), jax.random.key(0))
    return Placed(init, sharding.shardings(init, mesh))


def _state(params: Any, settings: config.Optimizer, steps: int, mesh: Mesh) -> Placed:
    tx = optimizer.build(settings, steps)
    state = optimizer.TrainState(
        params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((), jnp.int32)
    )
    return Placed(state, optimizer.state_shardings(params, tx, mesh))


def _state_bytes(state: Placed) -> dict[str, int]:
    parameters = Placed(state.shapes.params, state.places.params).bytes
    return {"parameters": parameters, "optimizer": state.bytes - parameters}


def _train_state(cfg: config.Config, arch: Architecture, mesh: Mesh) -> Placed:
    steps = cfg.update.steps * cfg.update.num_iterations
    params = _policy(cfg, arch, mesh).shapes
    return _state(params, cfg.update.optimizer, steps, mesh)


def _waiting(
    cfg: config.Config, policy: Architecture, judge: Architecture, mesh: Mesh, *used: str
) -> dict[str, int]:
    """What a P-GRPO step keeps on the device, but for what is `used` and so counted already."""
    kept = {
        f"policy's {kind}": size
        for kind, size in _state_bytes(_train_state(cfg, policy, mesh)).items()
    }
    if not cfg.rewards.offload:
        kept["reward model"] = _reward_model(cfg, judge, mesh).bytes
    if cfg.update.kl != "none":
        kept["reference"] = _policy(cfg, policy, mesh).bytes
    return {name: size for name, size in kept.items() if name not in used}


def _rows(mesh: Mesh, fields: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, Any]:
    """Abstract fields of a batch."""
    rows = sharding.batch(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in fields.items()
    }


def _tokens(mesh: Mesh, rows: int, length: int, *names: str) -> dict[str, Any]:
    return _rows(mesh, {name: ((rows, length), np.int32) for name in names})


def _longest(cfg: config.Config) -> int:
    """Tokens of a row with the longest prompt and the longest completion."""
    return cfg.rollout.prompt_buckets[-1] + cfg.rollout.max_completion_length


def _completions(cfg: config.Config) -> int:
    return cfg.rollout.prompts_per_step * cfg.rollout.num_generations


# --- the programs


def _lowered(program: Any, *arguments: Any) -> Callable[[], jax.stages.Lowered]:
    """How `program`, of jax.jit but typed by its maker as what it is called as, is lowered."""
    return lambda: program.lower(*arguments)


def _sft(cfg: config.Config, arch: Architecture, mesh: Mesh) -> Program:
    settings, compute = cfg.sft, cfg.policy.compute
    params = _policy(cfg, arch, mesh).shapes
    state = _state(params, settings.optimizer, settings.steps, mesh)
    length = settings.max_length or _longest(cfg)
    batch = data.SFTBatch(
        **_tokens(mesh, settings.batch_size, length, "ids_BT", "positions_BT", "segments_BT"),
        **_rows(mesh, {"loss_BT": ((settings.batch_size, length), bool)}),
    )
    step = supervised.compile_sft(cfg, arch, mesh)
    return Program(
        "sft",
        _lowered(step, state.arguments, batch),
        _state_bytes(state),
        {},
        roofline.training(arch, compute, roofline.rows(settings.batch_size, length, length)),
    )


def _reward_training(cfg: config.Config, arch: Architecture, mesh: Mesh) -> Program:
    settings, compute = cfg.reward_training, cfg.reward_model.compute
    init = jax.eval_shape(lambda key: reward.init(arch, compute, key), jax.random.key(0))
    state = _state(init, settings.optimizer, settings.steps, mesh)
    C, T = settings.batch_size, settings.max_length
    sides = [f"{side}_{what}_CT" for side in ("chosen", "rejected") for what in _TOKENS]
    batch = data.PairBatch(
        **_tokens(mesh, C, T, *sides),
        **_rows(mesh, {"margin_C": ((C,), np.float32), "valid_C": ((C,), bool)}),
    )
    step = supervised.compile_reward_update(cfg, arch, mesh)
    return Program(
        "reward training",
        _lowered(step, state.arguments, batch),
        _state_bytes(state),
        {},
        roofline.training(arch, compute, roofline.rows(2 * C, T)),
    )


_TOKENS = ("ids", "positions", "segments")


def _reshard(cfg: config.Config, policy: Architecture, judge: Architecture, mesh: Mesh) -> Program:
    params = _policy(cfg, policy, mesh)
    program = reshard.compile_reshard(policy, cfg.policy.compute, mesh)
    return Program(
        "reshard for rollout",
        _lowered(program, params.arguments),
        {"parameters": params.bytes},
        _waiting(cfg, policy, judge, mesh, "policy's parameters"),
        roofline.Work(0.0, 0.0),
        executions=1,
    )


def rollout_sizes(
    cfg: config.Config, policy: Architecture, judge: Architecture, mesh: Mesh, hbm_bytes: int
) -> scheduler.Sizes:
    """Slots and pages for the longest prompts on devices of so much memory; where that is too
    little, the pages of one completion, so that it can be said how much is missing."""
    settings, compute = cfg.rollout, cfg.policy.compute
    bucket, G = settings.prompt_buckets[-1], settings.num_generations
    engine = rollout.Engine(settings, policy, compute, mesh, stop_ids=(0,))
    taken = _weights(cfg, policy, mesh).bytes + sum(_waiting(cfg, policy, judge, mesh).values())
    return engine.plan(bucket, G, max(hbm_bytes - taken, engine.least_bytes(bucket, G)))


def _weights(cfg: config.Config, arch: Architecture, mesh: Mesh) -> Placed:
    """The policy as it decodes."""
    weights = reshard.abstract(arch, cfg.policy.compute, mesh)
    return Placed(weights, jax.tree.map(lambda x: x.sharding, weights))


def _rollout(
    cfg: config.Config, policy: Architecture, judge: Architecture, mesh: Mesh, hbm_bytes: int
) -> Iterator[Program]:
    settings = cfg.rollout
    engine = rollout.Engine(settings, policy, cfg.policy.compute, mesh, stop_ids=(0,))
    sizes = rollout_sizes(cfg, policy, judge, mesh, hbm_bytes)
    weights, cache = _weights(cfg, policy, mesh), Placed(*engine.cache(sizes))
    known = {"parameters": weights.bytes, "cache": cache.bytes}
    waiting = _waiting(cfg, policy, judge, mesh)

    def placed(values: Any) -> Any:
        return Placed(values, engine.places(values)).arguments

    bucket, length = settings.prompt_buckets[-1], engine.pieces()[-1]
    rows = engine.row_counts(length, sizes.slots)[-1]
    prompts = placed(rollout.blank_prompts(sizes, rows, length, engine.in_parts()))
    yield Program(
        "prefill",
        lambda: engine.prefill.lower(weights.arguments, cache.arguments, prompts),
        known,
        waiting,
        roofline.prefill(policy, rows, length, bucket),
        executions=math.ceil(settings.prompts_per_step / rows) * math.ceil(bucket / length),
    )
    batch = placed(rollout.blank_batch(sizes, sizes.own_pages))
    everywhere = sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    temperature, leave = (
        jax.ShapeDtypeStruct((), kind, sharding=everywhere) for kind in (np.float32, np.int32)
    )
    arguments = (weights.arguments, cache.arguments, batch, key, temperature, leave)
    limit, page = settings.max_completion_length, sizes.page_size
    live = min(sizes.slots, sizes.own_pages // sizes.own_table)
    context = bucket + limit / 2
    if engine.pages is kernel_cache:
        pairs = int(sizes.slots * context)
    else:  # all that the cache has room for
        pairs = (sizes.prompt_pages * sizes.owners + sizes.own_pages) * page
    yield Program(
        "decode",
        lambda: engine.decode.lower(*arguments),
        known,
        waiting,
        roofline.decoding(policy, sizes.slots, decoding.CHUNK, context, pairs),
        executions=math.ceil(_completions(cfg) / live * limit / decoding.CHUNK),
        runs=hlo.Runs(decoding.CHUNK),
    )


def _scoring(
    cfg: config.Config, policy: Architecture, judge: Architecture, mesh: Mesh, held: Bytes
) -> Program:
    """`held` is what a rollout has on the device. Where `rewards.ThinkingScorer.eager` says so,
    reasonings are scored between two of its visits."""
    one_process = len({device.process_index for device in mesh.devices.flat}) == 1
    beside = held if one_process and not cfg.rewards.offload else {}
    rows, length = cfg.rewards.thinking_batch_size, cfg.rewards.thinking_max_length
    params = _reward_model(cfg, judge, mesh)
    score = rewards.compile_score(judge, cfg.reward_model.compute, mesh)
    tokens = _tokens(mesh, rows, length, *_TOKENS).values()
    return Program(
        "reward scoring",
        _lowered(score, params.arguments, *tokens),
        {"parameters": params.bytes},
        _waiting(cfg, policy, judge, mesh, "reward model")
        | {f"rollout's {kind}": size for kind, size in beside.items()},
        roofline.forward(judge, roofline.rows(rows, length)),
        executions=math.ceil(_completions(cfg) / rows),
    )


def _update_batch(
    cfg: config.Config, mesh: Mesh
) -> tuple[update.UpdateBatch, roofline.Load, hlo.Runs]:
    """In the longest of the rows that packing may choose, of which as many micro-batches run as
    hold a step's completions, all of the greatest length."""
    B, G = _completions(cfg), cfg.rollout.num_generations
    prompt, drawn = cfg.rollout.prompt_buckets[-1], cfg.rollout.max_completion_length
    rows_at_once, parts = cfg.update.micro_batch_size, sharding.row_parts(mesh)
    T, R = max(packing.kinds(drawn + 1, prompt - 1, rows_at_once, parts))
    sequences = packing.Sequences([drawn + 1] * B, [prompt - 1] * B, [i // G for i in range(B)])
    trips = math.ceil(len(packing.best_fit(sequences, T)) / R)
    load = roofline.completions(B // G, G, prompt, drawn)
    places = update.batch_sharding(mesh)
    kinds = {"completion": bool, "old_logp": np.float32, "valid_B": bool, "truncated_B": bool}

    def field(name: str, shape: tuple[int, ...], default: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, kinds.get(name, default), sharding=place)

    rows = {
        name: field(name, (math.ceil(B / rows_at_once), R, T), np.int32, places.rows)
        for name in update.Rows.__annotations__
    }
    numbers = {
        name: field(name, (B,), np.float32, place)
        for name, place in vars(places).items()
        if name.endswith("_B")
    }
    micro_batches = field("micro_batches", (), np.int32, places.micro_batches)
    batch = update.UpdateBatch(update.Rows(**rows), micro_batches, **numbers)
    return batch, load, hlo.Runs(trips, load.predicted / (trips * R * T))


def _logprobs(
    cfg: config.Config,
    policy: Architecture,
    judge: Architecture,
    mesh: Mesh,
    name: str,
    used: str,
) -> Program:
    params, (batch, load, runs) = _policy(cfg, policy, mesh), _update_batch(cfg, mesh)
    program = update.compile_logprobs(cfg, policy, mesh)
    return Program(
        name,
        _lowered(program, params.arguments, batch),
        {"parameters": params.bytes},
        _waiting(cfg, policy, judge, mesh, used),
        roofline.forward(policy, load),
        executions=1,
        runs=runs,
    )


def _update(cfg: config.Config, policy: Architecture, judge: Architecture, mesh: Mesh) -> Program:
    state, (batch, load, runs) = _train_state(cfg, policy, mesh), _update_batch(cfg, mesh)
    if cfg.update.kl != "none":
        batch = batch.replace(ref_logp_ART=batch.rows.old_logp)
    if cfg.update.importance_cap and cfg.update.num_iterations > 1:
        batch = batch.replace(old_logp_ART=batch.rows.old_logp)
    step = update.compile_update(cfg, policy, mesh)
    return Program(
        "update",
        _lowered(step, state.arguments, batch),
        _state_bytes(state),
        _waiting(cfg, policy, judge, mesh, "policy's parameters", "policy's optimizer"),
        roofline.training(policy, cfg.policy.compute, load),
        executions=cfg.update.num_iterations,
        runs=runs,
    )
