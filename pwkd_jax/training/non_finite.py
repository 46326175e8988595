"""Numbers that are not finite: named by step, term and images, and left so that the same command runs that step again.

A mean over steps tells that a loss was not finite; `metrics.Running` keeps the step that was first, without the host waiting
for each. Parameters are looked at before they are saved, so that no checkpoint holds such ones.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.training import distributed

FILE = "non_finite.json"

# So many steps skipped in a row are no accident.
PATIENCE = 50

ADVICE = "lower the learning rate (schedule.peak), clip the gradient (optimizer.clip_norm), or skip such steps (non_finite)"


def skipping(step: Callable) -> Callable:
    """`step`, but one whose loss or gradient is not finite changes nothing, batch norm and momentum included, and is counted.

    Of its metrics only the learning rate counts; `skipped` is 100 or 0, so that its mean is the share of steps in percent.
    """

    def guarded(state: Any, batch: dict, **rest):
        after, found = step(state, batch, **rest)
        fine = jnp.isfinite(found["train_loss"].total) & jnp.all(jnp.stack(jax.tree.leaves(_fine(after.params))))
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after.replace(step=state.step), state)
        counted = {
            name: value if name == "learning_rate" else jax.tree.map(lambda x: jnp.where(fine, x, jnp.zeros_like(x)), value)
            for name, value in found.items()
        }
        one = found["train_loss"]
        counted["skipped"] = one.replace(total=jnp.where(fine, 0.0, 100.0), count=jnp.ones_like(one.count))
        return kept.replace(step=after.step), counted

    return guarded


@jax.jit
def _fine(params: Any) -> Any:
    """Of every array, whether all its numbers are finite."""
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), params)


class Watch:
    """Of one run, `label` in words, whose directory may be None. images(step) -> what the batch of that step holds, indices or
    names, or None where that is not known. place(step) -> the stage of that step in words, "" without stages.

    The first time a run ends here it has said which step it was. Given again, the command passes there with that in mind: it
    saves before the two steps that can be at fault, so that every further time begins just before them.
    """

    def __init__(
        self, directory: Path | None, label: str, images: Callable[[int], Sequence | None], place: Callable[[int], str]
    ):
        self._path, self._label = directory and directory / FILE, label
        self._images, self._place, self._in_vain = images, place, 0
        self._known = distributed.decide(self._read) if directory else None

    def _read(self) -> int | None:
        try:
            return int(json.loads(storage.read(self._path))["step"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def near(self, at: int) -> bool:
        """Whether to look at the parameters after step `at`, for it or one of the next two failed before."""
        return self._known is not None and self._known - 2 <= at <= self._known

    def ahead(self, at: int) -> bool:
        """Whether to save after step `at`, being before the one that failed."""
        return self._known is not None and at < self._known

    def passed(self, at: int) -> None:
        """That step `at` went well. The one that failed before may: another device, or a user's own data."""
        if self._known is not None and at >= self._known:
            print(f"{self._label}: step {self._known} is finite this time", file=sys.stderr)
            self._known = None
            distributed.decide(lambda: storage.remove(self._path))

    def params(self, at: int, params: Any) -> None:
        """Raise UserError where parameters are not finite after step `at`, which are then not to be saved."""
        fine = jax.device_get(_fine(params))
        bad = [jax.tree_util.keystr(path, simple=True, separator="/") for path, ok in jax.tree.leaves_with_path(fine) if not ok]
        if bad:
            more = f" and {len(bad) - 3} more arrays" if len(bad) > 3 else ""
            self._stop(at, f"the gradient is not finite at step {at}, nor are {', '.join(bad[:3])}{more} after it", {}, bad)

    def loss(
        self, since: int, last: int, found: dict[str, float], first: tuple[int, dict[str, float]] | None, end: bool
    ) -> None:
        """Raise UserError where the mean loss of the steps after `since` until `last` is not finite, or so many in a row were
        skipped that the next will be too. first: (step, its metrics) of the first one that was not. end: of the run."""
        self._in_vain = self._in_vain + last - since if found.get("skipped") == 100 else 0
        if self._in_vain >= PATIENCE or (end and self._in_vain == last):
            self._stop(last, f"none of the last {self._in_vain} steps until {last} had a finite loss and gradient", {}, [])
        if self._in_vain or math.isfinite(found["train_loss"]):
            return
        at, terms = first or (last, {})
        named = [f"{name} {value:.4g}" for name, value in terms.items() if not math.isfinite(value) and name != "train_loss"]
        loss = terms.get("train_loss", found["train_loss"])
        self._stop(at, f"the loss is {loss} at step {at}" + (f" ({', '.join(named[:6])})" if named else ""), terms, [])

    def _stop(self, at: int, what: str, terms: dict[str, float], arrays: list[str]) -> None:
        images = self._images(at - 1)
        shown, again = "", ""
        if images is not None:
            images = [x if isinstance(x, str) else int(x) for x in images]
            shown = f", in the batch of the images {', '.join(map(str, images[:4]))}{', ...' if len(images) > 4 else ''}"
        if self._path:
            record = {
                "run": self._label, "stage": self._place(at), "step": at, "what": what, "images": images, "arrays": arrays,
                "terms": {name: value if math.isfinite(value) else str(value) for name, value in terms.items()},
            }  # fmt: skip
            distributed.write(self._path, json.dumps(record, indent=1) + "\n")
            again = f"; {self._path} has it all, and the same command runs that step again from the last checkpoint"
        where = ", ".join(w for w in (self._label, self._place(at)) if w)
        raise UserError(f"{where + ': ' if where else ''}{what}{shown}{again}; {ADVICE}")

