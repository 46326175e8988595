"""Distillers: what a frozen teacher's outputs tell a student, one file a method.

A distiller is a Flax module called as `distiller(student, teacher, batch, progress) -> (loss, metrics)`:

    student, teacher   `models.Outputs` of the same images; no gradient flows into the teacher's
    batch              {"image" [B, H, W, C] float, "label" [B] int, "index" [B] int: the sample's place in the training
                       set, "dataset_label" [N] int: the labels of that whole set, where the images lie in RAM or the
                       distiller has a true property `dataset_labels`, "target" [B, classes] float: soft labels, where
                       labels are smoothed or images mixed; mixed ones have no label, and a method that reads it is refused}
    progress           `Progress`: the stage, and the steps and epochs seen in it; a warm-up counts from there
    loss               scalar, a mean over the batch; metrics: {name: scalar or [B]}, logged beside it

It may own parameters (connectors, trained with the student) and state (any other collection), and may draw random numbers with
`self.make_rng("distiller")` or from a stream of any other name, as `nn.Dropout` does. Two fields say how its loss enters the
total, ce_weight * CE + weight * loss, and every field is a config key under `student.distiller`. Under staging nothing of this
changes: parameters are built for the widest teacher, and a stage uses their leading block (`connectors`).

A true property `reruns` gives it student and teacher themselves, as `Outputs.again` (see `models.again`); a true `views` a
strong view of the same images, batch["strong"] [B, H, W, C] (see `data.strong`).

Two methods are optional. `initial(student, teacher, batch, progress) -> (loss, metrics)` alone is minimised, without cross
entropy, for the first `initial_epochs` of the run, or of every stage where the field `initial_each_stage` is true; they are
part of the stage, so that every arm has the same budget. `predict(student, teacher) -> logits` replaces the student's own
logits in evaluation.

`kd+at` is the sum of two methods: one ce_weight, and a group of keys for each (`student.distiller.at.weight`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from pwkd_jax import models
from pwkd_jax.distillers.ab import AB
from pwkd_jax.distillers.abkd import ABKD
from pwkd_jax.distillers.at import AT
from pwkd_jax.distillers.catkd import CATKD
from pwkd_jax.distillers.cc import CC
from pwkd_jax.distillers.connectors import START, Distillation, Progress, build, check_initial, fit, reruns, starts
from pwkd_jax.distillers.crd import CRD
from pwkd_jax.distillers.crld import CRLD
from pwkd_jax.distillers.ctkd import CTKD
from pwkd_jax.distillers.diffkd import DiffKD
from pwkd_jax.distillers.dist import DIST
from pwkd_jax.distillers.dkd import DKD
from pwkd_jax.distillers.fcfd import FCFD
from pwkd_jax.distillers.fitnet import FitNet
from pwkd_jax.distillers.fsp import FSP
from pwkd_jax.distillers.ft import FT
from pwkd_jax.distillers.ickd import ICKD
from pwkd_jax.distillers.kd import KD
from pwkd_jax.distillers.kdsvd import KDSVD
from pwkd_jax.distillers.mgd import MGD
from pwkd_jax.distillers.mlkd import MLKD
from pwkd_jax.distillers.nkd import NKD
from pwkd_jax.distillers.norm import NORM
from pwkd_jax.distillers.nst import NST
from pwkd_jax.distillers.ofa import OFA
from pwkd_jax.distillers.ofd import OFD
from pwkd_jax.distillers.pkt import PKT
from pwkd_jax.distillers.reviewkd import ReviewKD
from pwkd_jax.distillers.rkd import RKD
from pwkd_jax.distillers.rld import RLD
from pwkd_jax.distillers.scalekd import ScaleKD
from pwkd_jax.distillers.sdd import SDD, SDDDKD
from pwkd_jax.distillers.semckd import SemCKD
from pwkd_jax.distillers.simkd import SimKD
from pwkd_jax.distillers.sokd import SoKD
from pwkd_jax.distillers.sp import SP
from pwkd_jax.distillers.srd import SRD
from pwkd_jax.distillers.srrl import SRRL
from pwkd_jax.distillers.streamlined import Streamlined
from pwkd_jax.distillers.student_friendly import StudentFriendly
from pwkd_jax.distillers.ttm import TTM, WTTM
from pwkd_jax.distillers.vid import VID
from pwkd_jax.distillers.vkd import VkD
from pwkd_jax.distillers.wkd import WKDF, WKDL
from pwkd_jax.errors import UserError

__all__ = ["BUILTIN", "START", "Distillation", "Progress", "Sum", "build", "check_initial", "create", "fields", "fit", "reruns"]

BUILTIN = {
    "ab": AB, "abkd": ABKD, "at": AT, "catkd": CATKD, "cc": CC, "crd": CRD, "crld": CRLD, "ctkd": CTKD, "diffkd": DiffKD,
    "dist": DIST, "dkd": DKD, "fcfd": FCFD, "fitnet": FitNet, "fsp": FSP, "ft": FT, "ickd": ICKD, "kd": KD, "kdsvd": KDSVD,
    "mgd": MGD, "mlkd": MLKD, "nkd": NKD, "norm": NORM, "nst": NST, "ofa": OFA, "ofd": OFD, "pkt": PKT, "reviewkd": ReviewKD,
    "rkd": RKD, "rld": RLD, "scalekd": ScaleKD, "sdd": SDD, "sdd_dkd": SDDDKD, "semckd": SemCKD, "simkd": SimKD, "sokd": SoKD,
    "sp": SP, "srd": SRD, "srrl": SRRL, "streamlined": Streamlined, "student_friendly": StudentFriendly, "ttm": TTM, "vid": VID,
    "vkd": VkD, "wkd_f": WKDF, "wkd_l": WKDL, "wttm": WTTM,
}  # fmt: skip




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


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; groups may be dictionaries or dotted already."""
    found = {}
    for key, value in options.items():
        found |= _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return found


def create(name: str, **options: Any) -> nn.Module:
    """The distiller `name` (or sum of methods) with `options` as `fields` gives them; those of a method in a sum as a group,
    kd={"temperature": 2.0}, or by dotted keys, **{"kd.temperature": 2.0}. Raises UserError for an option that there is not."""
    if not isinstance(name, str):
        raise UserError(f"student.distiller.name: should be a name, and this is a {type(name).__name__}")
    given, known = _flat(options), _flat(fields(name))
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{key}: '{name}' has no such option; it has {', '.join(known)}")
        if isinstance(known[key], float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key}: {value!r} is not a number")
    if len(parts := _parts(name)) > 1:
        groups = {part: {k.partition(".")[2]: v for k, v in given.items() if k.startswith(f"{part}.")} for part in parts}
        made = tuple(_class(part)(**groups[part]) for part in parts)
        if judges := [part for part, method in zip(parts, made, strict=True) if hasattr(method, "predict")]:
            raise UserError(f"name: {judges[0]} replaces the student's predictions, so it cannot be part of a sum")
        return Sum(made, ce_weight=given.get("ce_weight", known["ce_weight"]))
    return _class(name)(**given)


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

    @property
    def reruns(self) -> bool:
        return any(getattr(part, "reruns", False) for part in self.parts)

    @property
    def views(self) -> bool:
        return any(getattr(part, "views", False) for part in self.parts)

    def __call__(self, *inputs):
        results = [(getattr(part, "weight", 1.0), *part(*inputs)) for part in self.parts]
        metrics = {name: value for _, _, values in results for name, value in values.items()}
        return sum(weight * loss for weight, loss, _ in results), metrics

    def initial(self, *inputs):
        return sum(part.initial(*inputs)[0] for part in self.parts if starts(part)), {}








