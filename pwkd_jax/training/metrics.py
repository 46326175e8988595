"""Metrics as {name: clu Average}, a (sum, count) pair each; the mean is taken once, at the end.

A dict and not a clu Collection, which is a dataclass made for its names: to jaxlib (0.10.2, 0.12.0.1) two dataclasses with
as many fields are the same pytree, so a compiled function may give back the metrics of one run under the names of another.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

Metrics = dict[str, Average]


def collect(values: dict[str, jax.Array], mask: jax.Array | None = None) -> Metrics:
    """{name: per-image values [B] or a scalar mean of them} as sums and counts; mask [B] 1/0 leaves padding out."""
    return {name: Average.from_model_output(jnp.asarray(value), mask) for name, value in values.items()}


class _Total(NamedTuple):
    """sums: over `steps` of them. first: the metrics of the first step whose `train_loss` is not finite, and which it was."""

    sums: Metrics
    steps: jax.Array
    at: jax.Array
    first: Metrics


@jax.jit
def _merge(total: _Total | None, metrics: Metrics) -> _Total:
    """`total` and the steps of `metrics` one after another, so that the sums do not tell which steps came together."""
    steps = jax.tree.map(jnp.ravel, metrics)
    if total is None:
        zero = jax.tree.map(lambda x: jnp.zeros((), x.dtype), steps)
        total = _Total(zero, jnp.int32(0), jnp.int32(-1), zero)

    def add(total: _Total, one: Metrics) -> tuple[_Total, None]:
        sums, steps, at, first = total
        if "train_loss" in one:
            now = ~jnp.isfinite(one["train_loss"].total) & (at < 0)
            first = jax.tree.map(lambda a, b: jnp.where(now, a, b), one, first)
            at = jnp.where(now, steps, at)
        real = sum(value.count for value in one.values()) > 0
        return _Total(jax.tree.map(jnp.add, sums, one), steps + real, at, first), None

    return jax.lax.scan(add, total, steps)[0]


class Running:
    """Merges metrics on the device, one dispatch each, and reads the means once, in `flush`.

    They are those of one step, or of several along a leading axis, those after the last of them zero.
    """

    def __init__(self):
        self._total: _Total | None = None

    def add(self, metrics: Metrics) -> None:
        self._total = _merge(self._total, metrics)

    def dump(self) -> dict | None:
        """The sums so far as JSON holds them exactly, or None if there are none."""
        if self._total is None:
            return None
        total = self._total
        return {"sums": _dumped(total.sums), "steps": int(total.steps), "at": int(total.at), "first": _dumped(total.first)}

    def load(self, dumped: dict) -> None:
        """Go on from what `dump` gave."""
        if "sums" not in dumped:  # as runs of before the first step was kept have it
            sums = _loaded(dumped)
            dumped = {"steps": 0, "at": -1}
        else:
            sums = _loaded(dumped["sums"])
        first = _loaded(dumped["first"]) if "first" in dumped else jax.tree.map(np.zeros_like, sums)
        self._total = _Total(sums, np.int32(dumped["steps"]), np.int32(dumped["at"]), first)

    def first(self) -> tuple[int, dict[str, float]] | None:
        """(which it was, its metrics) of the first step since `flush` whose loss is not finite, counted from 0."""
        at = -1 if self._total is None else int(self._total.at)
        return None if at < 0 else (at, _divided(self._total.first))

    def flush(self) -> dict[str, float]:
        total, self._total = self._total, None
        return {} if total is None else _divided(total.sums)


def _divided(metrics: Metrics) -> dict[str, float]:
    # Divided in float64 on the host, so that 4 of 50 is 8 percent and not 7.9999998.
    return {name: float(a.total) / float(a.count) if float(a.count) else math.nan for name, a in metrics.items()}


def _dumped(metrics: Metrics) -> dict:
    pairs = {name: [np.asarray(a.total), np.asarray(a.count)] for name, a in metrics.items()}
    return {name: [[x.dtype.name, x.tolist()] for x in pair] for name, pair in pairs.items()}


def _loaded(dumped: dict) -> Metrics:
    return {name: Average(*(np.asarray(x, dtype) for dtype, x in pair)) for name, pair in dumped.items()}


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
