"""The sandwich rule: the joint loss of a slimmable network's sub-networks, those of a step fixed or drawn."""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp

from pwkd_jax.errors import UserError
from pwkd_jax.slimmable import Slimmable, cross_entropy, width_key


def sandwich_loss(
    net: Slimmable,
    params: dict,
    statistics: dict,
    images: jax.Array,
    labels: jax.Array,
    *,
    loss: str = "hard",
    reduction: str = "sum",
    sampling: str = "all",
    subnetworks: int = 4,
    key: jax.Array | None = None,
    own: Callable | None = None,
) -> tuple[jax.Array, tuple[dict, dict]]:
    """Joint loss of the sub-networks on one batch: images [B, H, W, C] float, labels [B] int or targets [B, classes] float.

    sampling `all`: every width of the table, widest first; `sandwich`: the widest, then the narrowest, then
    `subnetworks - 2` drawn with `key` from the rest (US-Net, Yu and Huang, ICCV 2019).
    The widest learns from the labels. The others by `loss`: `hard` from the labels; `inplace` from the widest one's
    softmax, -sum softmax(z_max) log softmax(z_w) at temperature 1 and without gradient into the target (US-Net);
    `inplace_mix` from the sum of both. reduction `sum` (S-Net) or `mean` over sub-networks.
    own(outputs, labels) -> {name: per-image values [B]}: metrics of each sub-network besides ours. key: needed where widths are
    drawn, and by a network with dropout, each sub-network of which draws its own. Raises UserError where it is missing.
    Returns (scalar, (statistics after this step, {metric name: per-image values [B]})).
    """

    def learn(width: float, one: Callable, images: jax.Array, statistics: dict) -> tuple[jax.Array, tuple]:
        return one(params, images, statistics)

    return _joint(net, learn, statistics, images, labels, loss, reduction, sampling, subnetworks, key, own)


def sandwich_gradient(
    net: Slimmable,
    params: dict,
    statistics: dict,
    images: jax.Array,
    labels: jax.Array,
    *,
    view: Callable[[dict], dict] = lambda params: params,
    loss: str = "hard",
    reduction: str = "sum",
    sampling: str = "all",
    subnetworks: int = 4,
    key: jax.Array | None = None,
    own: Callable | None = None,
) -> tuple[tuple[jax.Array, tuple[dict, dict]], dict]:
    """`jax.value_and_grad` of `sandwich_loss` of view(params), width by width: a width runs forward and backward before the
    next begins, so that no more than one width's activations are in memory. Equal to rounding."""

    def read(width: float) -> tuple[dict, Callable]:
        return jax.vjp(lambda params: net.block(view(params), width), params)

    def learn(width: float, one: Callable, images: jax.Array, statistics: dict) -> tuple[tuple, tuple]:
        (value, found), grads = jax.value_and_grad(one, has_aux=True)(read(width)[0], images, statistics)
        return (value, grads), found

    def whole(width: float, learnt: tuple) -> tuple[jax.Array, dict]:
        return learnt[0], *read(width)[1](learnt[1])

    (total, grads), found = _joint(
        net, learn, statistics, images, labels, loss, reduction, sampling, subnetworks, key, own, whole,
        # Else the compiler may run all widths forward first. Of what a width reads the images wait, not its parameters, which
        # may then be gathered once.
        jax.lax.optimization_barrier,
    )  # fmt: skip
    return (total, found), grads


def _joint(
    net: Slimmable, learn: Callable, statistics: dict, images: jax.Array, labels: jax.Array, loss: str, reduction: str,
    sampling: str, subnetworks: int, key: jax.Array | None, own: Callable | None,
    whole: Callable = lambda width, learnt: learnt, then: Callable = lambda between: between,
) -> tuple:  # fmt: skip
    """(what was learnt of every sub-network, added up, (statistics, metrics)).

    learn(width, one, images, statistics) -> (learnt, rest), of one(params, images, statistics) -> (scalar, rest): of one
    sub-network. whole(width, learnt): in the shapes that all have. then((learnt, images)): the same, before the next one.
    """
    target = None
    label = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    noisy = net.draws(images.shape[1:])
    if noisy and key is None:
        raise UserError("key: this network draws random numbers in training (dropout); give a jax.random.key of the step")
    fixed = net.table if sampling == "all" else (net.widest, net.widths[-1])
    drawn = draws(net, subnetworks, key) if sampling == "sandwich" else []
    count = len(fixed) + len(drawn) if reduction == "mean" else 1

    def visit(width: float, images: jax.Array, statistics: dict):
        own_key = jax.random.fold_in(key, net.widths.index(width)) if noisy else None

        def one(params: dict, images: jax.Array, statistics: dict):
            out, statistics = net.forward(params, statistics, width, images, train=True, key=own_key)
            hard = cross_entropy(out.logits, labels)
            if target is None or loss == "hard":
                value = hard
            else:
                soft = -jnp.sum(target * jax.nn.log_softmax(out.logits), axis=-1)
                value = soft if loss == "inplace" else hard + soft
            seen = {"train_loss": value, "train_top1": 100.0 * (jnp.argmax(out.logits, -1) == label)}
            return jnp.mean(value) / count, (statistics, seen | (own(out, label) if own else {}), out.logits)

        return learn(width, one, images, statistics)

    def drawing(width: float, images: jax.Array, statistics: dict):
        learnt, (statistics, seen, _) = visit(width, images, statistics)
        return whole(width, learnt), statistics, seen

    parts, metrics = [], {}
    for width in fixed:
        if parts:
            parts[-1], images = then((parts[-1], images))
        learnt, (statistics, seen, logits) = visit(width, images, statistics)
        parts.append(learnt)
        if target is None:
            target = jax.lax.stop_gradient(jax.nn.softmax(logits))
        metrics |= {f"{name}_{width_key(width)}": values for name, values in seen.items()}
    # A gradient is taken within its branch: one taken of the switch would keep what the backward passes of all branches need.
    branches = [partial(drawing, width) for width in net.widths[1:-1]]
    for index in drawn:
        parts[-1], images = then((parts[-1], images))
        learnt, statistics, seen = jax.lax.switch(index, branches, images, statistics)
        parts.append(learnt)
        metrics |= {f"{name}_drawn": values for name, values in seen.items()}
    wholes = [whole(width, learnt) for width, learnt in zip(fixed, parts, strict=False)] + parts[len(fixed) :]
    return jax.tree.map(lambda *each: reduce(jnp.add, each), *wholes), (statistics, metrics)


def draws(net: Slimmable, subnetworks: int, key: jax.Array) -> list[jax.Array]:
    """Indices into the widths between the ends for one step's drawn sub-networks, all different."""
    middle = len(net.widths) - 2
    count = min(subnetworks - 2, middle)
    return list(jax.random.permutation(key, middle)[:count]) if count > 0 else []
