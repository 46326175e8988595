"""A network that can be run once more by whoever has its outputs: on other images, or from one of its stages on.

A distiller that asks for it (a true property `reruns`) finds it in `Outputs.again` of student and teacher. What it runs changes
nothing: batch statistics of a student are those of the batch, and are not kept.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax

from pwkd_jax import models


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Again:
    """again(x) of images [B, H, W, C] and again(x, start=i) of maps in the place of the i-th of the network's `stages` give
    `Outputs`; with start, only the later `stages` and what follows them.

    The variables are its leaves, so gradients flow to them where they are trained, and do not where they are stopped. signed:
    whether its `stages` pass no ReLU. around(): a context in which it runs. then: what becomes of logits.
    """

    variables: dict
    model: Any = dataclasses.field(metadata={"static": True})
    train: bool = dataclasses.field(metadata={"static": True})
    around: Callable[[], Any] = dataclasses.field(default=contextlib.nullcontext, metadata={"static": True})
    then: Callable[[jax.Array], jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, x: jax.Array, start: int = 0, key: jax.Array | None = None) -> models.Outputs:
        """key: of a network that draws in training, such as dropout."""
        with self.around():
            out = models.forward(self.model, self.variables, x, train=self.train, key=key, start=start)[0]
        return out._replace(logits=self.then(out.logits)) if self.then else out

    @property
    def resumes(self) -> bool:
        return resumes(self.model)

    @property
    def signed(self) -> bool:
        return getattr(_plain(self.model), "signed", False)


def attach(
    outputs: models.Outputs, model: Any, variables: dict, train: bool, around: Callable[[], Any] = contextlib.nullcontext
) -> models.Outputs:
    """`outputs` of a model and its variables, with the network itself in `again`; train: as a student in training runs."""
    return outputs._replace(again=Again(variables, model, train, around))


def resumes(model: Any) -> bool:
    """Whether a model takes `start`, see `models.contract`."""
    plain = _plain(model)
    return callable(plain) and "start" in inspect.signature(plain.__call__).parameters


def _plain(model: Any) -> Any:
    from pwkd_jax.models import precision, sight

    return sight.inner(precision.plain(model), ())[0]
