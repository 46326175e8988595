"""Gradient accumulation: a batch learnt from in parts, one after another, by the mean of their gradients.

The optimiser sees what it would of the whole batch, to rounding, for losses that are means over images. Batch norm sees one
part at a time and moves its statistics once for each; so do methods that compare images of a batch, or remember some.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def accumulate(gradient: Callable, parts: int) -> Callable:
    """gradient(params, kept, key, rows) -> ((loss, (kept, values)), grads), over `parts` of the rows in turn.

    rows: a pytree of arrays [B, ...], B a multiple of `parts`; a part is every `parts`-th row, so that each device finds its
    share of it among its own. kept: what one part hands to the next. key: one or a tuple of them, folded with the part's
    number. values: {name: per-image values [B] or scalar means}.
    """
    if parts == 1:
        return gradient

    def run(params, kept, key, rows):
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)

        def one(carry, part):
            total, kept = carry
            number, mine = part
            own = jax.tree.map(lambda k: jax.random.fold_in(k, number), key)
            (loss, (kept, values)), grads = gradient(params, kept, own, mine)
            return (jax.tree.map(jnp.add, total, grads), kept), (loss, values)

        zero = jax.tree.map(lambda p: p * 0, params)  # not zeros_like, which forgets that devices' copies differ
        # Outside a loop where XLA would lose its fast convolutions (see `dispatch`).
        unroll = parts if jax.default_backend() == "cpu" else 1
        (total, kept), (losses, values) = jax.lax.scan(one, (zero, kept), (jnp.arange(parts), split), unroll=unroll)
        values = {name: jnp.ravel(v) if v.ndim > 1 else jnp.mean(v) for name, v in values.items()}
        return (jnp.mean(losses), (kept, values)), jax.tree.map(lambda g: g / parts, total)

    return run


def rows_of(batch: dict, size: int, shared: tuple[str, ...] = ("dataset_label",)) -> tuple[dict, dict]:
    """({what of a batch has one row an image}, {the rest})."""
    own = {name: value for name, value in batch.items() if name not in shared and jnp.shape(value)[:1] == (size,)}
    return own, {name: value for name, value in batch.items() if name not in own}
