"""AdamW with clipping and a schedule, and the training state that every stage steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pgrpo_jax import config

UNDECAYED = ("bias", "scale")  # last names of parameters without weight decay


class TrainState(struct.PyTreeNode):
    """What a step reads and replaces: parameters, the optimizer's state, optimizer steps taken (int32)."""

    params: Any
    opt_state: Any
    step: jax.Array


def schedule(settings: config.Optimizer, steps: int) -> optax.Schedule:
    """The learning rate at a step: rises over `warmup_steps`, then stays or falls to 0 at `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(steps - warmup, 1)),
    }[settings.schedule]()
    # From peak / (warmup + 1), not from 0: a first step with rate 0 would be a step for nothing.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules((rise, after), (warmup,))


def build(settings: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; `steps` is the length of the schedule in optimizer steps."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            schedule(settings, steps),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: all but biases and norm scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) not in UNDECAYED, params
    )


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. ValueError unless parameters are float32.

    A step of a learning rate of 1e-6 is lost in the rounding of bfloat16 parameters.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name} is {leaf.dtype}; training needs float32: set compute.param_dtype to "
                "'float32' (compute.dtype may be 'bfloat16')"
            )
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def apply(state: TrainState, grads: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state after one step along `grads`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
