"""The weights that count: those that are trained, or a mean of them over the steps.

An exponential moving average keeps one beside them, in `State.average`; a schedule-free optimiser (Defazio et al. 2024) has one
in its own state. Both are what is scored, frozen, saved and taught by; the weights that are trained are scored beside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from pwkd_jax.training.state import State


def begin(params: Any, collections: Any) -> dict:
    """The average of one state. A distiller's memory is not a weight, so it is left out."""
    kept = {name: tree for name, tree in collections.items() if name != "distiller"}
    # A step is given the state to overwrite, so its arrays may not share memory.
    return jax.tree.map(jnp.copy, {"params": params, "collections": kept})


def averaging(step: Callable, decay: float) -> Callable:
    """`step`, which also moves `State.average` by a <- d a + (1 - d) w, of parameters and batch-norm statistics alike.

    d after t steps is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten (the rule of TensorFlow's
    ExponentialMovingAverage with `num_updates`)."""

    def averaged(state: State, batch: dict, **rest):
        after, found = step(state, batch, **rest)
        t = state.step.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        now = {"params": after.params, "collections": {k: after.collections[k] for k in state.average["collections"]}}

        def move(mean, new):
            return d * mean + (1 - d) * new if jnp.issubdtype(new.dtype, jnp.floating) else new

        return after.replace(average=jax.tree.map(move, state.average, now)), found

    return averaged


def averages(state: State) -> bool:
    """Whether other weights count than those that are trained."""
    return bool(state.average) or _schedule_free(state.opt_state) is not None


def outcome(state: State) -> State:
    """The state with the weights that count in place of those that are trained."""
    if state.average:
        mean = state.average
        return state.replace(params=mean["params"], collections={**state.collections, **mean["collections"]})
    if (found := _schedule_free(state.opt_state)) is not None:
        return state.replace(params=schedule_free_eval_params(found, state.params))
    return state


def read(saved: dict) -> tuple[dict, dict]:
    """(params, collections) that count, of a checkpoint's state as nested dicts."""
    if mean := saved.get("average"):
        return mean["params"], saved["collections"] | mean["collections"]
    if found := _saved_schedule_free(saved["opt_state"]):
        b1 = found["b1"]
        return jax.tree.map(lambda y, z: (y - (1 - b1) * z) / b1, saved["params"], found["z"]), saved["collections"]
    return saved["params"], saved["collections"]


def _saved_schedule_free(tree: Any) -> dict | None:
    if isinstance(tree, dict) and {*ScheduleFreeState._fields} <= {*tree}:
        return tree
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return next((found for x in inner if (found := _saved_schedule_free(x))), None)


def _schedule_free(opt_state: optax.OptState) -> ScheduleFreeState | None:
    def known(x: Any) -> bool:
        return isinstance(x, ScheduleFreeState)

    return next((x for x in jax.tree.leaves(opt_state, is_leaf=known) if known(x)), None)
