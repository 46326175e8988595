"""Distillers: what a frozen teacher's outputs tell a student, one file a method.

A distiller is a Flax module called as `distiller(student, teacher, batch, progress) -> (loss, metrics)`:

    student, teacher   `models.Outputs` of the same images; no gradient flows into the teacher's
    batch              {"image" [B, H, W, C] float, "label" [B] int, "index" [B] int: the sample's place in the training
                       set, "dataset_label" [N] int: the labels of that whole set, where the images lie in RAM or the
                       distiller has a true property `dataset_labels`}
    progress           `Progress`: the stage, and the steps and epochs seen in it; a warm-up counts from there
    loss               scalar, a mean over the batch; metrics: {name: scalar or [B]}, logged beside it

It may own parameters (connectors, trained with the student) and state (any other collection), and may draw random
numbers with `self.make_rng("distiller")`. Two fields say how its loss enters the total, ce_weight * CE + weight * loss,
and every field is a config key under `student.distiller`. Under staging nothing of this changes: parameters are built
for the widest teacher, and a stage uses their leading block (`Distillation`).

Two methods are optional. `initial(student, teacher, batch, progress) -> (loss, metrics)` alone is minimised, without cross
entropy, for the first `initial_epochs` of the run, or of every stage where the field `initial_each_stage` is true; they are
part of the stage, so that every arm has the same budget. `predict(student, teacher) -> logits` replaces the student's own
logits in evaluation.

`kd+at` is the sum of two methods: one ce_weight, and a group of keys for each (`student.distiller.at.weight`).
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax import models, slimmable
from pwkd_jax.distillers.ab import AB
from pwkd_jax.distillers.at import AT
from pwkd_jax.distillers.catkd import CATKD
from pwkd_jax.distillers.cc import CC
from pwkd_jax.distillers.crd import CRD
from pwkd_jax.distillers.ctkd import CTKD
from pwkd_jax.distillers.dist import DIST
from pwkd_jax.distillers.dkd import DKD
from pwkd_jax.distillers.fitnet import FitNet
from pwkd_jax.distillers.fsp import FSP
from pwkd_jax.distillers.ft import FT
from pwkd_jax.distillers.kd import KD
from pwkd_jax.distillers.kdsvd import KDSVD
from pwkd_jax.distillers.mgd import MGD
from pwkd_jax.distillers.mlkd import MLKD
from pwkd_jax.distillers.nkd import NKD
from pwkd_jax.distillers.nst import NST
from pwkd_jax.distillers.ofa import OFA
from pwkd_jax.distillers.ofd import OFD
from pwkd_jax.distillers.pkt import PKT
from pwkd_jax.distillers.reviewkd import ReviewKD
from pwkd_jax.distillers.rkd import RKD
from pwkd_jax.distillers.rld import RLD
from pwkd_jax.distillers.semckd import SemCKD
from pwkd_jax.distillers.simkd import SimKD
from pwkd_jax.distillers.sokd import SoKD
from pwkd_jax.distillers.sp import SP
from pwkd_jax.distillers.srrl import SRRL
from pwkd_jax.distillers.standardise import standardise
from pwkd_jax.distillers.student_friendly import StudentFriendly
from pwkd_jax.distillers.vid import VID
from pwkd_jax.errors import UserError
from pwkd_jax.models import convolution

BUILTIN = {
    "ab": AB, "at": AT, "catkd": CATKD, "cc": CC, "crd": CRD, "ctkd": CTKD, "dist": DIST, "dkd": DKD, "fitnet": FitNet,
    "fsp": FSP, "ft": FT, "kd": KD, "kdsvd": KDSVD, "mgd": MGD, "mlkd": MLKD, "nkd": NKD, "nst": NST, "ofa": OFA,
    "ofd": OFD, "pkt": PKT, "reviewkd": ReviewKD, "rkd": RKD, "rld": RLD, "semckd": SemCKD, "simkd": SimKD,
    "sokd": SoKD, "sp": SP, "srrl": SRRL, "student_friendly": StudentFriendly, "vid": VID,
}  # fmt: skip


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


def _parts(name: str) -> list[str]:
    parts = name.split("+")
    if len(set(parts)) < len(parts) or (len(parts) > 1 and any(":" in part for part in parts)):
        raise UserError(f"student.distiller.name: '{name}' should be a sum of different built-in methods, as in kd+at")
    return parts


def fields(name: str) -> dict[str, Any]:
    """The options of the distiller `name` with their defaults; a sum has a group for each of its methods.

    Raises UserError naming the known methods if there is none such.
    """
    if len(parts := _parts(name)) > 1:
        groups = {part: fields(part) for part in parts}
        weights = [group.pop("ce_weight", 1.0) for group in groups.values()]
        return {"ce_weight": weights[0], **groups}
    result = {}
    for f in dataclasses.fields(_class(name)):
        if f.name in ("parent", "name"):
            continue
        if f.default is dataclasses.MISSING or f.default is None:
            raise UserError(f"student.distiller.name: the field '{f.name}' of '{name}' needs a default that is not None")
        result[f.name] = f.default
    return result


def create(name: str, **options) -> nn.Module:
    """The distiller `name` (or sum of methods) with `options` as `fields` gives them."""
    if len(parts := _parts(name)) > 1:
        made = tuple(_class(part)(**dict(options.get(part, {}))) for part in parts)
        if judges := [part for part, method in zip(parts, made, strict=True) if hasattr(method, "predict")]:
            raise UserError(f"name: {judges[0]} replaces the student's predictions, so it cannot be part of a sum")
        return Sum(made, ce_weight=options.get("ce_weight", fields(name)["ce_weight"]))
    return _class(name)(**options)


class Sum(nn.Module):
    """The weighted losses of several methods added up, with one cross entropy beside them."""

    parts: tuple[nn.Module, ...]
    ce_weight: float = 1.0

    @property
    def initial_epochs(self) -> float:
        return max(getattr(part, "initial_epochs", 0.0) for part in self.parts)

    @property
    def initial_each_stage(self) -> bool:
        return any(getattr(part, "initial_each_stage", False) for part in self.parts)

    @property
    def dataset_labels(self) -> bool:
        return any(getattr(part, "dataset_labels", False) for part in self.parts)

    def __call__(self, *inputs):
        results = [(getattr(part, "weight", 1.0), *part(*inputs)) for part in self.parts]
        metrics = {name: value for _, _, values in results for name, value in values.items()}
        return sum(weight * loss for weight, loss, _ in results), metrics

    def initial(self, *inputs):
        return sum(part.initial(*inputs)[0] for part in self.parts if _starts(part)), {}


def _starts(distiller: nn.Module) -> bool:
    """Whether it has an initial phase."""
    return getattr(distiller, "initial_epochs", 0.0) > 0


START = Progress(np.int32(0), np.int32(0), np.float32(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """A distiller fitted to a pair: its full-width variables and, for every teacher width, their leading block's shapes.

    likes: {width: abstract variables when that width teaches}, widest first. standardise: whether the distiller sees
    logits standardised per image (Sun et al., CVPR 2024); the cross entropy never does.
    """

    distiller: nn.Module
    student: models.Outputs
    teachers: dict[float, models.Outputs]
    batch: dict[str, jax.ShapeDtypeStruct]
    likes: dict[float, dict]
    standardise: bool = False

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """(params, state) for the widest teacher; an initialiser sees zeros, not images."""
        widest = next(iter(self.teachers))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (self.student, self.teachers[widest], self.batch))
        variables = dict(self.distiller.init({"params": key, "distiller": key}, *zeros, START))
        return variables.pop("params", {}), variables

    def _block(self, params, state, width: float) -> dict:
        like = dict(self.likes[width])
        return {"params": slimmable.take(params, like.pop("params", {}))} | slimmable.take(state, like)

    def __call__(self, params, state, width: float, student, teacher, batch, progress: Progress, key):
        """(weighted loss, state, metrics) of one batch when the sub-network at `width` teaches."""
        block, rngs = self._block(params, state, width), {"distiller": key}
        teacher = jax.lax.stop_gradient(teacher)
        ce = jnp.mean(slimmable.cross_entropy(student.logits, batch["label"]))
        if self.standardise:
            student, teacher = (out._replace(logits=standardise(out.logits)) for out in (student, teacher))
        inputs = (student, teacher, batch, progress)
        with convolution.products():
            (loss, metrics), new = self.distiller.apply(block, *inputs, rngs=rngs, mutable=list(state))
        total = getattr(self.distiller, "ce_weight", 1.0) * ce + getattr(self.distiller, "weight", 1.0) * loss
        if _starts(self.distiller):
            with convolution.products():
                (first, _), started = self.distiller.apply(block, *inputs, rngs=rngs, mutable=list(state), method="initial")
            now = progress.epoch < self.distiller.initial_epochs
            if not self.distiller.initial_each_stage:
                now &= progress.stage == 0
            total = jnp.where(now, first, total)
            new = jax.tree.map(lambda a, b: jnp.where(now, a, b), dict(started), dict(new))
        return total, slimmable.put(state, dict(new)), {"cross_entropy": ce, "distillation": loss, **metrics}

    @property
    def predicts(self) -> bool:
        return hasattr(self.distiller, "predict")

    def predict(self, params, state, width: float, student, teacher) -> jax.Array:
        """The logits by which a method that `predicts` wants its student judged."""
        return self.distiller.apply(self._block(params, state, width), student, teacher, method="predict")


def build(
    distiller: nn.Module,
    student: models.Outputs,
    teachers: dict[float, models.Outputs],
    batch: dict[str, jax.ShapeDtypeStruct],
    *,
    standardise: bool = False,
) -> Distillation:
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
    return Distillation(distiller, student, teachers, batch, likes, standardise)
