"""Metrics as {name: clu Average}, a (sum, count) pair each; the mean is taken once, at the end.

A dict and not a clu Collection, which is a dataclass made for its names: to jaxlib (0.10.2, 0.12.0.1) two dataclasses with
as many fields are the same pytree, so a compiled function may give back the metrics of one run under the names of another.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

Metrics = dict[str, Average]


def collect(values: dict[str, jax.Array], mask: jax.Array | None = None) -> Metrics:
    """{name: per-image values [B] or a scalar mean of them} as sums and counts; mask [B] 1/0 leaves padding out."""
    return {name: Average.from_model_output(jnp.asarray(value), mask) for name, value in values.items()}


@jax.jit
def _merge(total: Metrics | None, metrics: Metrics) -> Metrics:
    """`total` and the steps of `metrics` one after another, so that the sums do not tell which steps came together."""
    steps = jax.tree.map(jnp.ravel, metrics)
    total = jax.tree.map(lambda x: jnp.zeros((), x.dtype), steps) if total is None else total
    return jax.lax.scan(lambda total, one: (jax.tree.map(jnp.add, total, one), None), total, steps)[0]


class Running:
    """Merges metrics on the device, one dispatch each, and reads the means once, in `flush`.

    They are those of one step, or of several along a leading axis.
    """

    def __init__(self):
        self._total = None

    def add(self, metrics: Metrics) -> None:
        self._total = _merge(self._total, metrics)

    def dump(self) -> dict | None:
        """The sums so far as JSON holds them exactly, or None if there are none."""
        if self._total is None:
            return None
        pairs = {name: [np.asarray(a.total), np.asarray(a.count)] for name, a in self._total.items()}
        return {name: [[x.dtype.name, x.tolist()] for x in pair] for name, pair in pairs.items()}

    def load(self, dumped: dict) -> None:
        """Go on from what `dump` gave."""
        self._total = {name: Average(*(np.asarray(x, dtype) for dtype, x in pair)) for name, pair in dumped.items()}

    def flush(self) -> dict[str, float]:
        total, self._total = self._total or {}, None
        # Divided in float64 on the host, so that 4 of 50 is 8 percent and not 7.9999998.
        return {name: float(a.total) / float(a.count) for name, a in total.items()}


def mean(each: Iterable[Metrics]) -> dict[str, float]:
    """The means over all given metrics."""
    running = Running()
    for metrics in each:
        running.add(metrics)
    return running.flush()


def means(metrics: Metrics) -> dict[str, jax.Array]:
    """{name: mean} of one step or of several along a leading axis, on the device: the host does not wait for it."""
    return {name: jnp.sum(a.total) / jnp.sum(a.count) for name, a in metrics.items()}


def top1(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """100 where the largest logit is the label's, else 0: [B, classes], [B] -> [B], so that means are in percent."""
    return 100.0 * (jnp.argmax(logits, axis=-1) == labels)
