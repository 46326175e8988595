"""The training state, its optimiser, and the update that teacher and student share."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


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


def apply_gradients(
    state: State, grads: Any, collections: Any, tx: optax.GradientTransformation, schedule: Callable
) -> tuple[State, jax.Array]:
    """One optimiser step at schedule(state.step): the learning rate has no counter of its own that could drift.

    Returns the new state and the learning rate that was used.
    """
    direction, opt_state = tx.update(grads, state.opt_state, state.params)
    rate = schedule(state.step)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    return state.replace(step=state.step + 1, params=params, collections=collections, opt_state=opt_state), rate
