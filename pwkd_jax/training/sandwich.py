"""The sandwich rule: the joint loss of a slimmable network's sub-networks, those of a step fixed or drawn."""

from collections.abc import Callable

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
    target = None
    label = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    noisy = net.draws(images.shape[1:])
    if noisy and key is None:
        raise UserError("key: this network draws random numbers in training (dropout); give a jax.random.key of the step")

    def one(width: float, statistics: dict):
        own_key = jax.random.fold_in(key, net.widths.index(width)) if noisy else None
        out, statistics = net.forward(params, statistics, width, images, train=True, key=own_key)
        hard = cross_entropy(out.logits, labels)
        if target is None or loss == "hard":
            value = hard
        else:
            soft = -jnp.sum(target * jax.nn.log_softmax(out.logits), axis=-1)
            value = soft if loss == "inplace" else hard + soft
        seen = {"train_loss": value, "train_top1": 100.0 * (jnp.argmax(out.logits, -1) == label)}
        return (value, seen | (own(out, label) if own else {}), out.logits), statistics

    total, metrics = 0.0, {}
    fixed = net.table if sampling == "all" else (net.widest, net.widths[-1])
    for width in fixed:
        (value, seen, logits), statistics = one(width, statistics)
        if target is None:
            target = jax.lax.stop_gradient(jax.nn.softmax(logits))
        total += jnp.mean(value)
        metrics |= {f"{name}_{width_key(width)}": values for name, values in seen.items()}
    count = len(fixed)
    if sampling == "sandwich" and (drawn := draws(net, subnetworks, key)) is not None:
        middle = net.widths[1:-1]
        for index in drawn:
            branches = [lambda s, w=w: one(w, s) for w in middle]
            (value, seen, _), statistics = jax.lax.switch(index, branches, statistics)
            total += jnp.mean(value)
            metrics |= {f"{name}_drawn": values for name, values in seen.items()}
        count += len(drawn)
    return total / (count if reduction == "mean" else 1), (statistics, metrics)


def draws(net: Slimmable, subnetworks: int, key: jax.Array) -> list[jax.Array] | None:
    """Indices into the widths between the ends for one step's drawn sub-networks, all different; None without any."""
    middle = len(net.widths) - 2
    count = min(subnetworks - 2, middle)
    return list(jax.random.permutation(key, middle)[:count]) if count > 0 else None
