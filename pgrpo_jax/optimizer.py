"""AdamW with clipping and a schedule, the training state that every stage steps, and gradients that
are summed over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from pgrpo_jax import config, sharding

UNDECAYED = ("bias", "scale")  # last names of parameters without weight decay


class TrainState(struct.PyTreeNode):
    """What a step replaces: parameters, optimizer state, and optimizer steps taken (int32)."""

    params: Any
    opt_state: Any
    step: jax.Array


def schedule(settings: config.Optimizer, steps: int) -> optax.Schedule:
    """The learning rate: it rises over `warmup_steps`, then stays, or falls to 0 at `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(steps - warmup, 1)),
    }[settings.schedule]()
    # From peak / (warmup + 1), not from 0: a first step with rate 0 would be a step for nothing.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules((rise, after), (warmup,))


def build(settings: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; the schedule is `steps` optimizer steps long."""
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


def init_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state before the first step, on `mesh`.

    It takes `params` over: the first step donates them, so a copy must be made of what is kept.
    All of it is placed here: for a state that lies elsewhere a step would compile once more.
    Raises ValueError unless the parameters are float32.
    """
    places = state_shardings(params, optimizer, mesh)
    params = jax.device_put(params, places.params)
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), places.step))


def state_shardings(
    params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where the state of (abstract) parameters lives: moments lie as their parameters do."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:  # a step of 1e-6 is lost in the rounding of bfloat16
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name!r} is {leaf.dtype}, training needs float32: set "
                "compute.param_dtype='float32' (compute.dtype may be 'bfloat16')"
            )
    places = sharding.shardings(params, mesh)
    opt_state = jax.eval_shape(optimizer.init, params)
    moments = sharding.state_shardings(optimizer, opt_state, places, mesh)
    return TrainState(places, moments, sharding.replicated(mesh))


def apply(state: TrainState, grads: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state after one step along `grads`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def accumulate(
    loss: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    rows: Any,
    micro_batches: jax.Array | int,
) -> tuple[jax.Array, Any, Any]:
    """(value, aux, gradient) of `loss(params, *rows) -> (value, aux)`, summed over micro-batches.

    `rows` hold arrays with micro-batches in front. Only the first `micro_batches` are computed, a
    number that is data: the program is one for any number of rows. Of the rest `aux` says 0.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(i, carry, batch):
        total, aux = carry
        (value, new), grads = gradient(params, *batch)
        aux = jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), aux, new)
        return jax.tree.map(jnp.add, total, (value, grads)), aux

    shapes = jax.eval_shape(lambda: loss(params, *jax.tree.map(lambda x: x[0], rows))[1])
    count = len(jax.tree.leaves(rows)[0])
    aux = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, grads), aux = over_micro_batches(step, (zero, aux), rows, micro_batches)
    return value, aux, grads


def over_micro_batches(
    step: Callable[[jax.Array, Any, Any], Any], carry: Any, rows: Any, count: jax.Array | int
) -> Any:
    """The last of `carry = step(i, carry, micro-batch i of rows)` for i in 0 .. count - 1.

    A micro-batch is carried into the iteration that reads it. Cut out there, it would be a part of
    all that reads it for XLA on CPUs: attention's masks would look every number up in all rows,
    once for each pair of tokens.
    """

    def cut(i: jax.Array | int) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), rows)

    def body(i: jax.Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        return step(i, *carried), cut(i + 1)

    return lax.fori_loop(0, count, body, (carry, cut(0)))[0]
