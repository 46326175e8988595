"""The training state, and the update that teacher and student share."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pwkd_jax.training.optimizers import Whole


class State(flax.struct.PyTreeNode):
    """Everything that a step reads and writes; a checkpoint is exactly this.

    step: the one counter; it decides stage, learning rate, batch and random numbers. seed: constant, the run's.
    params: what trains. collections: what does not (batch-norm statistics, distiller state). opt_state: optax's. average: see
    `averaging`; () without one.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    collections: Any
    opt_state: optax.OptState
    average: Any = ()


def create(seed: int, params: Any, collections: Any, optimizer: optax.GradientTransformation) -> State:
    step, seed = jnp.zeros((), jnp.int32), jnp.asarray(seed, jnp.uint32)
    return State(step, seed, params, collections, optimizer.init(params))


def rng(state: State, purpose: int) -> jax.Array:
    """The random key of this step for one purpose: a pure function of (seed, step, purpose), so resume needs no key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.step), purpose)


def apply_gradients(
    state: State, grads: Any, collections: Any, tx: optax.GradientTransformation, schedule: Callable | None
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step at schedule(state.step), see `optimizers.Rule`: the learning rate has no counter of its own that could
    drift.

    Returns the new state and {"learning_rate": the one that was used}, {} where the optimiser keeps it to itself.
    """
    rate = schedule(state.step) if schedule else None
    given = {"learning_rate": rate} if isinstance(tx, Whole) else {}
    direction, opt_state = tx.update(grads, state.opt_state, state.params, **given)
    if schedule is None or given:
        params = optax.apply_updates(state.params, direction)
    else:
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    used = {"learning_rate": rate} if schedule else {}
    return state.replace(step=state.step + 1, params=params, collections=collections, opt_state=opt_state), used
