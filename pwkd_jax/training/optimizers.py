"""Optimisers: by name, any of optax or your own, and how they meet the schedule."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pwkd_jax.errors import UserError
from pwkd_jax.models import import_path, reason
from pwkd_jax.training import dot as two_momenta

NAMES = ("sgd", "adamw", "lamb", "lars", "lion")
# What a function that makes an optimiser may call our options.
ALIASES = {"momentum": ("momentum", "b1"), "nesterov": ("nesterov",), "weight_decay": ("weight_decay",),
           "decay": ("mask", "weight_decay_mask")}  # fmt: skip


class Whole(optax.GradientTransformationExtraArgs):
    """An optimiser whose updates have their learning rate in them, to be added; `update` takes it as `learning_rate`."""


class Rule(NamedTuple):
    """How parameters are updated. direction: gradients to a direction, see `optimizer`. schedule: the learning rate by global
    step, by which the direction is multiplied and subtracted, or which a `Whole` is given; None where `direction` is an optax
    optimiser as they come, whose updates have a learning rate of their own in them and are added."""

    direction: optax.GradientTransformation
    schedule: Callable | None


def optimizer(
    name: str, *, momentum: float, nesterov: bool, weight_decay: float, decay: str, clip_norm: float, dot: float = 0.0
) -> optax.GradientTransformation:
    """The update's direction, without the learning rate, which `state.apply_gradients` multiplies in.

    sgd: decay is added to the gradient, then momentum, as PyTorch's SGD does. adamw: momentum is its beta1, beta2 is 0.999,
    decay is added after (Loshchilov and Hutter 2019). lion: the sign of a mean, momentum its beta1, beta2 is 0.99 (Chen et al.
    2023). lamb: Adam's direction and decay, each array's scaled to its norm (You et al. 2020); lars: the same of the gradient,
    times 0.001 and before momentum (You et al. 2017), which here is of directions, not of steps at their learning rates.
    `module:function`, as in optax:adamw or optax.contrib:schedule_free_adamw: function(learning_rate=number, ...) -> an optax
    optimiser, a `Whole`; it is given the learning rate of every step, and those of our options that it names.

    decay `all`: every parameter, as the CIFAR recipes do; `kernels`: only arrays of two or more axes, so no batch norm and no
    bias (lars leaves those unscaled too). clip_norm: of the global gradient, 0 is off. dot: of sgd, how far the momenta of
    labels and teacher lie from `momentum`, see `dot`. Raises UserError for a function that cannot be had, or has no place for
    an option that was set.
    """
    kernels = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)  # noqa: E731
    mask = None if decay == "all" else kernels
    if dot:
        return two_momenta.dot(momentum, dot, weight_decay, mask)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if ":" in name:
        given = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "decay": mask}
        return _whole(name, given, *clip)
    decayed = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
    average = [optax.trace(momentum, nesterov)] if momentum else []
    if name == "adamw":
        return optax.chain(*clip, optax.scale_by_adam(b1=momentum, nesterov=nesterov), *decayed)
    if name == "lion":
        return optax.chain(*clip, optax.scale_by_lion(b1=momentum, b2=0.99), *decayed)
    if name == "lamb":
        return optax.chain(*clip, optax.scale_by_adam(b1=momentum, eps=1e-6), *decayed, optax.scale_by_trust_ratio())
    if name == "lars":
        trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001), kernels)
        return optax.chain(*clip, *decayed, trust, *average)
    return optax.chain(*clip, *decayed, *average) if clip or decayed or average else optax.identity()


def _whole(name: str, options: dict, clip: optax.GradientTransformation | None = None) -> Whole:
    """The optimiser of a function that is given the learning rate of each step."""
    make = import_path(name)
    try:
        known = inspect.signature(make).parameters
    except (TypeError, ValueError) as e:
        raise UserError(f"'{name}' should be a function that returns an optax optimiser") from e
    if "learning_rate" not in known:
        raise UserError(f"'{name}' should be a function(learning_rate=...), which returns an optax optimiser")
    own = {}
    for option, value in options.items():
        if takes := next((alias for alias in ALIASES[option] if alias in known), None):
            own[takes] = value

    def fresh(learning_rate):
        return make(learning_rate=learning_rate, **own)

    try:
        inner = optax.inject_hyperparams(fresh)(learning_rate=0.0)
        like = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
        # Some, such as a line search, ask for more than gradients, which is known once they are called.
        jax.eval_shape(lambda params: inner.update(params, inner.init(params), params), like)
    except Exception as e:  # of a function of someone's own, which may fail in any way
        raise UserError(f"'{name}' did not give an optax optimiser ({reason(e)})") from e

    def update(grads, state, params=None, *, learning_rate, **_):
        if clip:
            grads, _ = clip.update(grads, clip.init(params), params)
        rate = jnp.asarray(learning_rate, state.hyperparams["learning_rate"].dtype)
        return inner.update(grads, state._replace(hyperparams=state.hyperparams | {"learning_rate": rate}), params)

    return Whole(inner.init, update)


def refused(name: str, options: dict, defaults: dict) -> str | None:
    """Of options that differ from their defaults, the first for which the optimiser `name` has no place; None without one."""
    if name in NAMES:
        none = {"lion": ("nesterov",), "lamb": ("nesterov",)}.get(name, ())
    else:
        known = inspect.signature(import_path(name)).parameters
        none = [option for option, aliases in ALIASES.items() if not {*aliases} & {*known}]
    return next((option for option in none if options[option] != defaults[option]), None)


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
