"""The training state, its optimiser, and the update that teacher and student share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pwkd_jax.errors import UserError


class State(flax.struct.PyTreeNode):
    """Everything that a step reads and writes; a checkpoint is exactly this.

    step: the one counter; it decides stage, learning rate, batch and random numbers. seed: constant, the run's.
    params: what trains. collections: what does not (batch-norm statistics, distiller state). opt_state: optax's.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    collections: Any
    opt_state: optax.OptState


def create(seed: int, params: Any, collections: Any, optimizer: optax.GradientTransformation) -> State:
    step, seed = jnp.zeros((), jnp.int32), jnp.asarray(seed, jnp.uint32)
    return State(step, seed, params, collections, optimizer.init(params))


def rng(state: State, purpose: int) -> jax.Array:
    """The random key of this step for one purpose: a pure function of (seed, step, purpose), so resume needs no key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.step), purpose)


def optimizer(
    name: str, *, momentum: float, nesterov: bool, weight_decay: float, decay: str, clip_norm: float
) -> optax.GradientTransformation:
    """The update's direction, without the learning rate, which `apply_gradients` multiplies in.

    sgd: decay is added to the gradient, then momentum, as PyTorch's SGD does. adamw: momentum is its beta1, beta2 is
    0.999, decay is added after (Loshchilov and Hutter 2019). decay `all`: every parameter, as the CIFAR recipes do;
    `kernels`: only arrays of two or more axes, so no batch norm and no bias. clip_norm: of the global gradient, 0 is off.
    """
    mask = None if decay == "all" else lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    decayed = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
    if name == "adamw":
        return optax.chain(*clip, optax.scale_by_adam(b1=momentum, nesterov=nesterov), *decayed)
    return optax.chain(*clip, *decayed, *([optax.trace(momentum, nesterov)] if momentum else []))


class Rule(NamedTuple):
    """How parameters are updated. direction: gradients to a direction, see `optimizer`. schedule: the learning rate by global
    step, by which the direction is multiplied and subtracted; None where `direction` is an optax optimiser as they come, whose
    updates have their learning rate in them and are added."""

    direction: optax.GradientTransformation
    schedule: Callable | None


def rule(
    given: "optax.GradientTransformation | Rule | None", learning_rate: float | Callable | None, schedule: Callable
) -> Rule:
    """The update rule that a user means: by default SGD as the CIFAR recipes have it, at `schedule(learning_rate)`.

    given: an optax chain with its own learning rate, or a `Rule`. learning_rate: the highest of every cycle, or a schedule on
    the global step. Raises UserError where both are given.
    """
    if given is not None:
        if learning_rate is not None:
            raise UserError("learning_rate: your own optimizer has its learning rate in it; leave one of the two away")
        return given if isinstance(given, Rule) else Rule(given, None)
    rate = 0.05 if learning_rate is None else learning_rate
    sgd = optimizer("sgd", momentum=0.9, nesterov=False, weight_decay=5e-4, decay="all", clip_norm=0.0)
    return Rule(sgd, rate if callable(rate) else schedule(rate))


def apply_gradients(
    state: State, grads: Any, collections: Any, tx: optax.GradientTransformation, schedule: Callable | None
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step at schedule(state.step), see `Rule`: the learning rate has no counter of its own that could drift.

    Returns the new state and {"learning_rate": the one that was used}, {} where the optimiser keeps it to itself.
    """
    direction, opt_state = tx.update(grads, state.opt_state, state.params)
    if schedule is None:
        params, used = optax.apply_updates(state.params, direction), {}
    else:
        rate = schedule(state.step)
        params, used = jax.tree.map(lambda p, d: p - rate * d, state.params, direction), {"learning_rate": rate}
    return state.replace(step=state.step + 1, params=params, collections=collections, opt_state=opt_state), used
