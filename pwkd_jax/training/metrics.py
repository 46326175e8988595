"""Metrics as clu collections of (sum, count) pairs; the mean is taken once, at the end."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics


@functools.cache
def _collection(names: tuple[str, ...]) -> type[clu_metrics.Collection]:
    # Cached by name, so that every step program returns one and the same pytree type.
    return clu_metrics.Collection.create(**{name: clu_metrics.Average.from_output(name) for name in names})


def collect(values: dict[str, jax.Array], mask: jax.Array | None = None) -> clu_metrics.Collection:
    """{name: per-image values [B] or a scalar mean of them} as a collection; mask [B] 1/0 leaves padding out."""
    # clu makes dataclass fields of the names, which may not hold the dot of a width; the middle dot may stand in one.
    values = {name.replace(".", "·"): value for name, value in values.items()}
    return _collection(tuple(values)).single_from_model_output(**values, mask=mask)


@jax.jit
def _merge(total, metrics):
    """`total` and the steps of `metrics` one after another, so that the sums do not tell which steps came together."""
    steps = jax.tree.map(jnp.ravel, metrics)
    total = jax.tree.map(lambda x: jnp.zeros((), x.dtype), steps) if total is None else total
    return jax.lax.scan(lambda total, one: (total.merge(one), None), total, steps)[0]


class Running:
    """Merges collections on the device, one dispatch each, and reads the means once, in `flush`.

    A collection is that of one step, or of several along a leading axis.
    """

    def __init__(self):
        self._total = None

    def add(self, metrics: clu_metrics.Collection) -> None:
        self._total = _merge(self._total, metrics)

    def dump(self) -> dict | None:
        """The sums so far as JSON holds them exactly, or None if there are none."""
        if self._total is None:
            return None
        names = [field.name for field in dataclasses.fields(self._total) if not field.name.startswith("_")]
        arrays = [np.asarray(x) for x in jax.tree.leaves(self._total)]
        return {"names": names, "sums": [[a.dtype.name, a.tolist()] for a in arrays]}

    def load(self, dumped: dict) -> None:
        """Go on from what `dump` gave."""
        like = jax.tree.structure(_collection(tuple(dumped["names"])).empty())
        self._total = jax.tree.unflatten(like, [np.asarray(x, dtype) for dtype, x in dumped["sums"]])

    def flush(self) -> dict[str, float]:
        if self._total is None:
            return {}
        sums = {field.name: getattr(self._total, field.name) for field in dataclasses.fields(self._total)}
        self._total = None
        # Divided in float64 on the host, so that 4 of 50 is 8 percent and not 7.9999998.
        averages = {name: s for name, s in sums.items() if isinstance(s, clu_metrics.Average)}
        return {name.replace("·", "."): float(s.total) / float(s.count) for name, s in averages.items()}


def mean(collections: Iterable[clu_metrics.Collection]) -> dict[str, float]:
    """The means over all given collections."""
    running = Running()
    for metrics in collections:
        running.add(metrics)
    return running.flush()


def top1(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """100 where the largest logit is the label's, else 0: [B, classes], [B] -> [B], so that means are in percent."""
    return 100.0 * (jnp.argmax(logits, axis=-1) == labels)
