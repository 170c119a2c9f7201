"""What every stage begins with: problems, and the models in their newest state in this run's
folder."""

import contextlib
import dataclasses
import fcntl
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import rich.console

from pgrpo_jax import config, data, decoding, hosts, rng, sharding, types, world
from pgrpo_jax.config import Architecture, Config
from pgrpo_jax.models import attention, decoder, kernel_cache, load, reward

# What the stages leave in the run's folder.
SFT, REWARD_MODEL, PAIRS, POLICY = "sft", "reward_model", "pairs.jsonl", "policy"

Params = Any

_log = logging.getLogger(__name__)
_held: set[pathlib.Path] = set()  # the folders that are this process's own


def stage(run: Callable[[Config], None]) -> Callable[[Config], None]:
    """A command that writes into the run's folder: joins the run's processes, and keeps every other
    command out of the folder until it returns.

    Raises:
      ValueError: another command is at work in that folder, or another number of processes came
        together.
    """

    @functools.wraps(run)
    def alone(cfg: Config) -> None:
        hosts.join(cfg.mesh.hosts)
        with held(pathlib.Path(cfg.workdir)):
            run(cfg)

    return alone


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """The folder belongs to this process alone in the block, which may stand in another of its
    kind. Where a file system has no locks, nothing is held, and the log says so."""
    folder = folder.resolve()
    if folder in _held or jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another command is at work in {folder}; wait until it ends, or name another folder "
            "with --workdir"
        ) from None
    except OSError as error:
        _log.warning("%s cannot be locked (%s): start no second command in it", folder, error)
    _held.add(folder)
    try:
        yield
    finally:
        _held.remove(folder)
        os.close(descriptor)


def resolved(cfg: Config) -> Config:
    """`cfg` whose models name their attention, by the platform; says which, if it chose one.

    Raises:
      ValueError: a model names one that this platform does not have.
    """
    platform = jax.default_backend()

    def one(model: config.ModelConfig) -> config.ModelConfig:
        return dataclasses.replace(model, compute=attention.resolve(model.compute, platform))

    chosen = dataclasses.replace(cfg, policy=one(cfg.policy), reward_model=one(cfg.reward_model))
    if chosen != cfg:
        _say(
            f"attention  policy {chosen.policy.compute.attention}, reward model "
            f"{chosen.reward_model.compute.attention} (on {platform})"
        )
    return chosen


def resolved_to_decode(cfg: Config) -> Config:
    """`resolved`, for a command whose policy decodes; says also what with: for some heads and cache
    dtypes that is not the attention of its other passes."""
    cfg = resolved(cfg)
    arch = cfg.policy.architecture
    if arch is None:
        made = (str(folder(cfg, name)) for name in (POLICY, SFT) if is_done(folder(cfg, name)))
        arch = load.architecture(next(made, cfg.policy.checkpoint))
    layout = decoding.layout(arch, cfg.policy.compute, cfg.rollout.cache_dtype)
    words = "the paged kernel" if layout is kernel_cache else "plain attention"
    if layout is not kernel_cache and cfg.policy.compute.attention == "pallas":
        words += f": the kernel takes heads of a multiple of {kernel_cache.HEAD_DIM}, and no int8"
    _say(f"decoding   {words}")
    return cfg


def _say(words: str) -> None:
    if jax.process_index() == 0:
        rich.console.Console(stderr=True).print(words, highlight=False, soft_wrap=True)


def problems(cfg: Config, split: Literal["train", "evaluation"]) -> list[types.Problem]:
    """The problems of one split, from the built-in world or from the files named in `cfg.data`."""
    settings = cfg.data
    if split == "train":
        name, hub_split, limit = settings.train, settings.train_split, settings.train_limit
        count = cfg.world.train_problems
    else:
        name, hub_split, limit = (
            settings.evaluation,
            settings.evaluation_split,
            settings.evaluation_limit,
        )
        count = cfg.world.heldout_problems
    if name == "world":
        return world.problems("train" if split == "train" else "heldout", count, cfg.seed)[
            : limit or None
        ]
    return data.load_problems(name, hub_split, limit)


def folder(cfg: Config, name: str) -> pathlib.Path:
    """A stage's output in the run's folder."""
    return pathlib.Path(cfg.workdir) / name


def is_done(folder: pathlib.Path) -> bool:
    """Whether a stage's output stands there, whole."""
    return (folder / "config.json").is_file()


def initial_policy(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[Architecture, Params]:
    """The policy before any stage: a checkpoint, or random parameters, made in their shardings."""
    return _model(cfg.policy, mesh, load.load_policy, decoder.init, rng.key(cfg.seed, "policy"))


def policy(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[Architecture, Params]:
    """The policy after its warm-up, if this run has one."""
    warmed = folder(cfg, SFT)
    if is_done(warmed):
        return load.load_policy(str(warmed), cfg.policy.compute, mesh)
    if cfg.sft.steps:
        raise FileNotFoundError(
            f"{warmed} holds no policy, but sft.steps={cfg.sft.steps}: run "
            "`python -m pgrpo_jax.sft` with this configuration first, or set --sft.steps 0 to go "
            "on from the policy's own checkpoint"
        )
    return initial_policy(cfg, mesh)


def newest_policy(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[Architecture, Params]:
    """The policy that the run has come to: trained, warmed up, or as it starts."""
    trained = folder(cfg, POLICY)
    if is_done(trained):
        return load.load_policy(str(trained), cfg.policy.compute, mesh)
    return policy(cfg, mesh)


def initial_reward_model(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[Architecture, Params]:
    """The reward model before its training: its own checkpoint, random, or the warmed-up policy as
    trunk."""
    key = rng.key(cfg.seed, "reward model")
    if cfg.reward_training.trunk == "policy":
        arch, params = policy(cfg, mesh)
        return arch, reward.from_policy(params, key)
    return _model(cfg.reward_model, mesh, load.load_reward_model, reward.init, key)


def reward_model(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[Architecture, Params]:
    """The reward model after its training, if this run has one. Its parameters are of the
    computation's dtype: no step is taken on them any more."""
    trained, compute = folder(cfg, REWARD_MODEL), cfg.reward_model.compute
    if is_done(trained):
        frozen = dataclasses.replace(compute, param_dtype=compute.dtype)
        return load.load_reward_model(str(trained), frozen, mesh)
    if cfg.reward_training.steps:
        raise FileNotFoundError(
            f"{trained} holds no reward model, but reward_training.steps="
            f"{cfg.reward_training.steps}: run "
            "`python -m pgrpo_jax.train_reward` with this configuration first, or set "
            "--reward-training.steps 0 to use the reward model's own checkpoint"
        )
    arch, params = initial_reward_model(cfg, mesh)
    return arch, jax.tree.map(lambda x: x.astype(compute.dtype), params)


def _model(settings: config.ModelConfig, mesh, load_from, init, key) -> tuple[Architecture, Params]:
    if settings.checkpoint:
        arch, params = load_from(settings.checkpoint, settings.compute, mesh)
        config.require(
            settings.architecture in (None, arch),
            f"{settings.checkpoint!r} is of {arch}, the configuration says "
            f"{settings.architecture}; correct its `architecture`, or leave it out",
        )
        return arch, params
    arch, compute = settings.architecture, settings.compute
    assert arch is not None, "settings without a checkpoint have an architecture"

    def make(key):
        return init(arch, compute, key)

    shapes = jax.eval_shape(make, key)
    return arch, jax.jit(make, out_shardings=sharding.shardings(shapes, mesh))(key)
