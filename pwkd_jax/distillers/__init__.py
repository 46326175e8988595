"""Distillers: what a frozen teacher's outputs tell a student, one file a method.

A distiller is a Flax module called as `distiller(student, teacher, batch, progress) -> (loss, metrics)`:

    student, teacher   `models.Outputs` of the same images; no gradient flows into the teacher's
    batch              {"image" [B, H, W, C] float, "label" [B] int, "index" [B] int: the sample's place in the training
                       set, "dataset_label" [N] int: the labels of that whole set}
    progress           `Progress`: the stage, and the steps and epochs seen in it; a warm-up counts from there
    loss               scalar, a mean over the batch; metrics: {name: scalar or [B]}, logged beside it

It may own parameters (connectors, trained with the student) and state (any other collection), and may draw random
numbers with `self.make_rng("distiller")`. Two fields say how its loss enters the total, ce_weight * CE + weight * loss,
and every field is a config key under `student.distiller`. Under staging nothing of this changes: parameters are built
for the widest teacher, and a stage uses their leading block (`Distillation`).
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax import models, slimmable
from pwkd_jax.distillers.kd import KD
from pwkd_jax.errors import UserError

BUILTIN = {"kd": KD}


class Progress(NamedTuple):
    """Where a step stands: the stage's number, and the steps and epochs that this stage has seen before it."""

    stage: jax.Array
    step: jax.Array
    epoch: jax.Array


def _class(name: str):
    builtin = {key: (make, {}) for key, make in BUILTIN.items()}
    try:
        make, _ = models.from_name(name, builtin.get, "distiller", ", ".join(sorted(BUILTIN)))
    except UserError as e:
        raise UserError(f"student.distiller.name: {e}") from e
    if not (isinstance(make, type) and issubclass(make, nn.Module)):
        raise UserError(f"student.distiller.name: '{name}' is not a Flax module; a distiller is one")
    return make


def fields(name: str) -> dict[str, Any]:
    """The options of the distiller `name` with their defaults; UserError naming the known ones if there is none such."""
    result = {}
    for f in dataclasses.fields(_class(name)):
        if f.name in ("parent", "name"):
            continue
        if f.default is dataclasses.MISSING or f.default is None:
            raise UserError(f"student.distiller.name: the field '{f.name}' of '{name}' needs a default that is not None")
        result[f.name] = f.default
    return result


def create(name: str, **options) -> nn.Module:
    return _class(name)(**options)


START = Progress(np.int32(0), np.int32(0), np.float32(0))


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A distiller fitted to a pair: its full-width variables and, for every teacher width, their leading block's shapes.

    likes: {width: abstract variables when that width teaches}, widest first.
    """

    distiller: nn.Module
    student: models.Outputs
    teachers: dict[float, models.Outputs]
    batch: dict[str, jax.ShapeDtypeStruct]
    likes: dict[float, dict]

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """(params, state) for the widest teacher; an initialiser sees zeros, not images."""
        widest = next(iter(self.teachers))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (self.student, self.teachers[widest], self.batch))
        variables = dict(self.distiller.init({"params": key, "distiller": key}, *zeros, START))
        return variables.pop("params", {}), variables

    def __call__(self, params, state, width: float, student, teacher, batch, progress: Progress, key):
        """(weighted loss, state, metrics) of one batch when the sub-network at `width` teaches."""
        like = dict(self.likes[width])
        block = {"params": slimmable.take(params, like.pop("params", {}))} | slimmable.take(state, like)
        teacher = jax.lax.stop_gradient(teacher)
        (loss, metrics), new = self.distiller.apply(
            block, student, teacher, batch, progress, rngs={"distiller": key}, mutable=list(state)
        )
        ce = jnp.mean(slimmable.cross_entropy(student.logits, batch["label"]))
        total = getattr(self.distiller, "ce_weight", 1.0) * ce + getattr(self.distiller, "weight", 1.0) * loss
        return total, slimmable.put(state, dict(new)), {"cross_entropy": ce, "distillation": loss, **metrics}


def build(distiller: nn.Module, student: models.Outputs, teachers: dict[float, models.Outputs], batch) -> Distillation:
    """Fit `distiller` to abstract outputs of the student and of the teacher at each width, without allocating.

    Raises UserError where the method cannot serve this pair: its own reason, or the path of a parameter that is no
    leading block at some width.
    """
    teachers = dict(sorted(teachers.items(), reverse=True))
    key = jax.eval_shape(lambda: jax.random.key(0))
    likes = {}
    for width, outputs in teachers.items():
        rngs = {"params": key, "distiller": key}
        likes[width] = dict(jax.eval_shape(distiller.init, rngs, student, outputs, batch, START))
        if bad := slimmable.misfit(next(iter(likes.values())), likes[width]):
            raise UserError(
                f"student.distiller: at teacher width {width:g} '{bad}' is not a leading block of the same parameter at "
                "full width, so it cannot follow the stages"
            )
    return Distillation(distiller, student, teachers, batch, likes)
