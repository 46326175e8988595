"""DOT, the distillation-oriented trainer: SGD that remembers the labels' gradients and the teacher's apart.

Zhao, Cui, Song and Liang, ICCV 2023, arXiv 2307.08436: v_task = (m - D) v_task + g_task, v_kd = (m + D) v_kd + g_kd, and the
step is -rate (v_task + v_kd), so that a student follows its teacher with the greater inertia. The authors have m = 0.9, and
D = 0.075 on CIFAR-100 and Tiny-ImageNet, 0.09 on ImageNet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Parts(NamedTuple):
    """Gradients of the labels' part of a loss, and of the rest: two trees like the parameters."""

    task: Any
    distillation: Any


class Apart(optax.GradientTransformation):
    """An optimiser whose `update` takes `Parts`; or plain gradients, where no teacher speaks."""


def dot(momentum: float, delta: float, weight_decay: float, mask: Callable | None) -> Apart:
    """The direction, without the learning rate. mask(params): where decay is added; None everywhere.

    As the authors' code has it, array by array: decay belongs to the task; an array that only one of the two parts moves, such
    as a connector or, of methods on features, the classifier, has the momentum of plain SGD, and a connector its decay (from
    the first step, where theirs begins with the second).
    """

    def update(grads, state: Parts, params=None):
        grads = grads if isinstance(grads, Parts) else Parts(grads, jax.tree.map(jnp.zeros_like, grads))
        decays = mask(params) if mask else jax.tree.map(lambda _: True, params)

        def move(g_task, g_kd, v_task, v_kd, p, decayed):
            works, hears = jnp.any(g_task != 0), jnp.any(g_kd != 0)
            decay = (weight_decay if decayed else 0.0) * p
            v_task = jnp.where(hears, momentum - delta, momentum) * v_task + g_task + jnp.where(works, decay, 0)
            v_kd = jnp.where(works, momentum + delta, momentum) * v_kd + g_kd + jnp.where(works, 0, decay)
            return v_task.astype(p.dtype), v_kd.astype(p.dtype)

        moved = jax.tree.map(move, *grads, *state, params, decays)
        task, heard = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), moved)
        return jax.tree.map(jnp.add, task, heard), Parts(task, heard)

    def init(params):
        return Parts(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    return Apart(init, update)


def gradient(loss: Callable, task: Callable) -> Callable:
    """As jax.value_and_grad(loss, has_aux=True), but the gradients are `Parts`.

    loss(params, ...) -> (value, aux); task(aux): the labels' part of the value."""

    def run(params, *rest):
        def both(params):
            value, aux = loss(params, *rest)
            own = task(aux)
            return (own, value - own), (value, aux)

        _, back, (value, aux) = jax.vjp(both, params, has_aux=True)
        one, none = jnp.ones_like(value), jnp.zeros_like(value)
        return (value, aux), Parts(back((one, none))[0], back((none, one))[0])

    return run
