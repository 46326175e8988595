"""How a distiller follows the stages: its connectors (whatever it trains beside the student) and its state are built once, for
the widest teacher, and a stage cuts out their leading block."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax import models, slimmable
from pwkd_jax.distillers import protocol
from pwkd_jax.distillers.standardise import standardise
from pwkd_jax.errors import UserError
from pwkd_jax.models import again, compute, costs


class Progress(NamedTuple):
    """Where a step stands: the stage's number, and the steps and epochs that this stage has seen before it."""

    stage: jax.Array
    step: jax.Array
    epoch: jax.Array


def starts(distiller: nn.Module) -> bool:
    """Whether it has an initial phase."""
    return getattr(distiller, "initial_epochs", 0.0) > 0


def check_initial(distiller: nn.Module, epochs: Sequence[float]) -> None:
    """UserError where the initial phase, in which no label is seen, fills a run whose stages have so many epochs."""
    each = getattr(distiller, "initial_each_stage", False)
    if starts(distiller) and (each or len(epochs) == 1) and max(epochs) <= distiller.initial_epochs:
        where = "each stage" if each and len(epochs) > 1 else "the run"
        raise UserError(
            f"student.distiller.initial_epochs: {distiller.initial_epochs:g} epochs in which no label is seen fill {where}, of "
            f"{max(epochs):.3g} epochs; give fewer, such as {max(epochs) / 8:.2g}"
        )


def reruns(distiller: Any) -> bool:
    """Whether it runs the networks once more, see `models.again`."""
    return getattr(distiller, "reruns", False)


START = Progress(np.int32(0), np.int32(0), np.float32(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """A distiller fitted to a pair: its full-width variables and, for every teacher width, their leading block's shapes.

    likes: {width: abstract variables when that width teaches}, widest first. standardise: whether the distiller sees
    logits standardised per image (Sun et al., CVPR 2024); the cross entropy never does. draws: whether it asks for other random
    numbers than its own stream "distiller", as dropout does. temperatures: {width: the method's while that width teaches}, its
    own at others.
    """

    distiller: nn.Module
    student: models.Outputs
    teachers: dict[float, models.Outputs]
    batch: dict[str, jax.ShapeDtypeStruct]
    likes: dict[float, dict]
    standardise: bool = False
    draws: bool = False
    temperatures: Mapping[float, float] = dataclasses.field(default_factory=dict)

    def _method(self, width: float) -> nn.Module:
        return at_temperature(self.distiller, self.temperatures[width]) if width in self.temperatures else self.distiller

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
        block, rngs, method = self._block(params, state, width), protocol.rngs(key, self.draws), self._method(width)
        teacher = jax.lax.stop_gradient(teacher)
        ce = jnp.mean(slimmable.cross_entropy(student.logits, batch.get("target", batch["label"])))
        if self.standardise:
            student, teacher = map(_standardised, (student, teacher))
        inputs = (student, teacher, batch, progress)
        with compute.layers():
            (loss, metrics), new = method.apply(block, *inputs, rngs=rngs, mutable=list(state))
        total = getattr(self.distiller, "ce_weight", 1.0) * ce + getattr(self.distiller, "weight", 1.0) * loss
        if starts(self.distiller):
            with compute.layers():
                (first, _), started = method.apply(block, *inputs, rngs=rngs, mutable=list(state), method="initial")
            now = progress.epoch < self.distiller.initial_epochs
            if not getattr(self.distiller, "initial_each_stage", False):
                now &= progress.stage == 0
            total = jnp.where(now, first, total)
            new = jax.tree.map(lambda a, b: jnp.where(now, a, b), dict(started), dict(new))
        return total, slimmable.put(state, dict(new)), {"cross_entropy": ce, "distillation": loss, **metrics}

    def loss(
        self,
        student: models.Outputs | jax.Array,
        teacher: models.Outputs | jax.Array,
        batch: Mapping[str, jax.Array] | jax.Array,
        *,
        width: float | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(weighted loss, metrics) of one batch, for a loop of your own: of a method that trains and keeps nothing.

        student, teacher: `models.Outputs`, or logits [B, classes]. batch: {"label": int [B], ...}, or the labels alone.
        width: of the teacher's sub-network, the widest by default. Raises UserError for a method with connectors or a state,
        which `init` gives and a call of this object takes and returns.
        """
        widest = next(iter(self.likes))
        if any(self.likes[widest].values()):
            kinds = " and ".join(sorted(kind for kind, tree in self.likes[widest].items() if tree))
            raise UserError(
                f"student.distiller: {type(self.distiller).__name__} has {kinds} of its own, which a loss alone would lose; "
                "make them with init(key) and call the distillation itself"
            )
        if (width or widest) not in self.likes:
            raise UserError(f"width: {width:g} is none of the teacher's, {', '.join(f'{w:g}' for w in sorted(self.likes))}")
        batch = batch if isinstance(batch, Mapping) else {"label": batch}
        labels = batch["label"]
        if jnp.ndim(labels) != 1 or not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
            raise UserError("labels: should be whole numbers [B], one an image; of one-hot rows take argmax(-1)")
        outputs = (models.as_outputs(student), models.as_outputs(teacher))
        value, _, metrics = self({}, {}, width or widest, *outputs, batch, START, jax.random.key(0))
        return value, metrics

    @property
    def predicts(self) -> bool:
        return hasattr(self.distiller, "predict")

    def predict(
        self, params: dict, state: dict, width: float, student: models.Outputs, teacher: models.Outputs
    ) -> jax.Array:
        """The logits by which a method that `predicts` wants its student judged."""
        return self._method(width).apply(self._block(params, state, width), student, teacher, method="predict")


def _standardised(out: models.Outputs) -> models.Outputs:
    later = out.again and dataclasses.replace(out.again, then=standardise)
    return out._replace(logits=standardise(out.logits), again=later)


def at_temperature(distiller: nn.Module, temperature: float) -> nn.Module:
    """The method at another temperature; of a sum, every part that has one. Raises UserError for a method that has none."""
    if hasattr(distiller, "parts"):
        has = [hasattr(part, "temperature") for part in distiller.parts]
        if any(has):
            parts = (at_temperature(p, temperature) if h else p for p, h in zip(distiller.parts, has, strict=True))
            return distiller.clone(parts=tuple(parts))
    elif hasattr(distiller, "temperature"):
        return distiller.clone(temperature=float(temperature))
    raise UserError(f"student.temperatures: {type(distiller).__name__} has no temperature; leave the key away")


def build(
    distiller: nn.Module,
    student: models.Outputs,
    teachers: dict[float, models.Outputs],
    batch: dict[str, jax.ShapeDtypeStruct],
    *,
    standardise: bool = False,
    temperatures: Mapping[float, float] | None = None,
    mixed: bool = False,
) -> Distillation:
    """Fit `distiller` to abstract outputs of the student and of the teacher at each width, without allocating.

    Raises UserError where the method cannot serve this pair: its own reason, the path of a parameter that is no leading
    block at some width, or what a method of your own does wrong, see `protocol`; and where images are `mixed`, of several
    labels, and the method reads the one.
    """
    protocol.takes(distiller)
    temperatures = temperatures or {}
    for temperature in temperatures.values():
        at_temperature(distiller, temperature)
    teachers = dict(sorted(teachers.items(), reverse=True))
    key = jax.eval_shape(lambda: jax.random.key(0))
    likes = {}
    for width, outputs in teachers.items():
        rngs = {"params": key, "distiller": key}
        with protocol.explained(distiller, student, outputs):
            likes[width] = dict(jax.eval_shape(distiller.init, rngs, student, outputs, batch, START))
        protocol.arrays(distiller, likes[width])
        if bad := slimmable.misfit(next(iter(likes.values())), likes[width]):
            raise UserError(
                f"student.distiller: at teacher width {width:g} '{bad}' is not a leading block of the same parameter at "
                "full width, so it cannot follow the stages"
            )
    widest = next(iter(teachers))
    if mixed:
        protocol.unlabelled(distiller, likes[widest], (student, teachers[widest], batch, START))
    draws = protocol.check(distiller, likes[widest], (student, teachers[widest], batch, START))
    return Distillation(distiller, student, teachers, batch, likes, standardise, draws, temperatures)


def fit(
    distiller: nn.Module,
    student: nn.Module,
    teachers: Mapping[float, nn.Module],
    image_shape: tuple[int, ...],
    *,
    batch_size: int,
    images: int = 0,
    index: bool = True,
    standardise: bool = False,
    temperatures: Mapping[float, float] | None = None,
    mixed: bool = False,
) -> Distillation:
    """`build` for the models themselves: a student, and the teacher's member at every width, of images [H, W, C].

    images: of the training set whose labels every batch carries, 0 where it does not. index: whether batches say where in that
    set their images stand. Raises UserError as `build` does, and where the method reads what these batches do not carry.
    """
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    if index:
        batch["index"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    if getattr(distiller, "views", False):
        batch["strong"] = batch["image"]
    if images:
        batch["dataset_label"] = jax.ShapeDtypeStruct((images,), jnp.int32)

    def outputs(model: nn.Module, train: bool = False) -> models.Outputs:
        variables = models.abstract(model, image_shape)
        if models.ours(model):  # traced once, for its cost too
            out = costs.outputs(model, image_shape, batch_size)
        else:
            out = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], variables, batch["image"])
        return again.attach(out, model, variables, train) if reruns(distiller) else out

    try:
        return build(
            distiller, outputs(student, train=True), {w: outputs(m) for w, m in teachers.items()}, batch,
            standardise=standardise, temperatures=temperatures, mixed=mixed,
        )  # fmt: skip
    except KeyError as e:
        if e.args[0] in ("index", "dataset_label"):
            raise UserError(
                f"student.distiller: {type(distiller).__name__} reads batch['{e.args[0]}'], which these batches do not have; "
                "give the training images as arrays"
            ) from e
        raise
