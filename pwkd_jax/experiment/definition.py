"""What all runs of an experiment share: read, built and checked by shapes alone before anything is trained or written."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from pwkd_jax import data, distillers, models, slimmable, stages, storage, weights
from pwkd_jax.data import soundness
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import fellow_teachers, starting
from pwkd_jax.experiment.fellow_teachers import Fellows
from pwkd_jax.experiment.naming import naming
from pwkd_jax.models import contract, precision, sight
from pwkd_jax.reporting.environment import versions
from pwkd_jax.training import dispatch, fusion, layer_decay, loop, optimizers, record, schedules, sharding, students_together
from pwkd_jax.training.evaluation import Evaluator
from pwkd_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The data, networks and schedules of a config.

    facts: of the data, see `data_facts`. teachers: those that are trained; fellows: {name: others that teach beside one}.
    fixed: {"standard", "student"}: parts that are not trained.
    start: the variables given to start from, if any: {"slimmable" (channels in order), "standard", "student"}.
    """

    config: ConfigDict
    task: Task
    facts: dict
    teachers: dict[str, slimmable.Slimmable]
    student: nn.Module
    start: dict[str, dict]
    dataset: data.Dataset
    fellows: dict[str, Fellows] = dataclasses.field(default_factory=dict)
    fixed: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def teaching(self, name: str) -> slimmable.Slimmable | None:
        """The networks that teach as `name`, slimmable or standard: the trained one's, or with its fellows'."""
        return self.fellows[name].net if name in self.fellows else self.teachers.get(name)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.task.mesh

    @property
    def evaluator(self) -> Evaluator:
        return self.task.evaluator

    def batches(self, batch_size: int, seed: int) -> Callable:
        return self.task.batches(batch_size, seed)

    def cadence(self, total: int, batch_size: int) -> loop.Cadence:
        c, known = self.config, {"batch_size": batch_size, "images": len(self.dataset.train), "total": total}
        every = (schedules.steps(c[key].every, f"{key}.every", **known) for key in ("log", "evaluation", "checkpoint"))
        return loop.Cadence(*every, c.log.tensorboard, c.log.tracker)

    def schedule(self, who: str, spans, form: str = "", peak_decay: float = 1.0):
        """The learning rate of `who` on the global step, over cycles `spans`, see `schedule`."""
        return schedule(self.config, self.facts, who, spans, form, peak_decay)

    def rule(self, who: str, *schedule) -> optimizers.Rule:
        """The optimiser of `who` under its schedule; the arguments are those of `schedule`."""
        options = dict(self.config[who].optimizer)
        decay, found = options.pop("layer_decay"), optimizers.optimizer(**options)
        if decay != 1:
            net = next(iter(self.teachers.values()), None)  # slimmable and standard are of one family
            model = self.student if who == "student" else net.members[net.widest]
            found = layer_decay.scaled(found, layer_decay.layers(model, self.task.image_shape), decay)
        return optimizers.Rule(found, self.schedule(who, *schedule))

    def place(self, tree, how: str = "replicated"):
        return self.task.place(tree, how)

    def mix(self, who: str) -> data.Mixing | None:
        """What becomes of images and labels of `who`, see `mixing`."""
        return mixing(self.config, who, self.task.num_classes, self.dataset.train)

    @property
    def skips(self) -> bool:
        """Whether steps that are not finite are left out."""
        return self.config.non_finite == "skip"

    def several(self, count: int, arms: int = 1) -> students_together.Several | None:
        """How `count` students of each of `arms` that are still to be trained train in one program; None for one by one."""
        c = self.config.student
        # What one has to skip, the others need not, nor end where it does; in parts, each would need the teacher's forward pass
        # for itself.
        if c.batches != "shared" or self.skips or c.accumulate > 1 or self.config.evaluation.patience:
            return None
        return students_together.several(c.together, count, list(self.mesh.devices.flat), arms)

    def on(self, several: students_together.Several | None) -> "Experiment":
        """The experiment where those students train: on a mesh of their own if they have one."""
        return dataclasses.replace(self, task=self.task.on(several.mesh)) if several and several.mesh else self

    def plan(self, arm: str) -> list[stages.Stage]:
        return plan(self.config, self.facts, arm)

    def spans(self, plan: Sequence[stages.Stage]) -> tuple[list[tuple[int, int]], str, float]:
        """(cycles, form, peak decay) of an arm, see `spans`."""
        return spans(self.config, plan)

    def distillation(self, teacher: str, widths: Iterable[float]) -> distillers.Distillation:
        return fit_distiller(self.config, self.facts, self.teaching(teacher), self.student, widths)

    def card(self, model: str, width: float, divisor: int, source: dict, seen: dict | None = None) -> dict:
        f = self.facts
        own = {"experiment": self.config.name, "data": f["name"], "test_split": self.config.data.test_split,
               "digests": f["digests"], "made_with": versions(), **source}  # fmt: skip
        card = weights.card(model, width, divisor, f["num_classes"], f["image_shape"], f["mean"], f["std"], own,
                            sees=seen)  # fmt: skip
        return card | {"classes": f["classes"]}


def data_facts(dataset: data.Dataset, mean: Sequence[float], std: Sequence[float]) -> dict:
    """What of the data everything after training needs to know; what summary.json and data.json of a workdir hold."""
    splits = {"train": dataset.train, "test": dataset.test}
    splits |= {"validation": dataset.validation} if dataset.validation is not None else {}
    return {
        "name": dataset.name,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        "num_classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        "mean": list(mean),
        "std": list(std),
        "classes": list(dataset.classes),
        "digests": {name: record.of_split(split) for name, split in splits.items()},
    }


_FACTS = {"name": str, "train_images": int, "test_images": int, "num_classes": int, "image_shape": [int], "mean": [float],
          "std": [float], "classes?": [str], "digests?": {}}  # fmt: skip


def read_facts(path: Path) -> dict:
    """The facts in a workdir's data.json. Raises UserError where they are not whole, or contradict each other."""
    facts = storage.record(path, _FACTS)
    shape, classes = facts["image_shape"], facts["num_classes"]
    sizes = len(shape) == 3 and all(0 < n <= 2**16 for n in shape) and 0 < classes < 2**24 and facts["train_images"] > 0
    named = len(facts.get("classes", ())) in (0, classes)
    if not sizes or not named or not len(facts["mean"]) == len(facts["std"]) == shape[2]:
        raise UserError(f"'{path}' is not as it was written: its numbers do not fit each other; bring it back")
    return facts


def sees(config: ConfigDict, facts: dict) -> dict | None:
    """How the teacher of a config sees the images of these data, see `sight.sees`. Raises UserError."""
    t = config.teacher
    if t.mean and len(t.mean) != facts["image_shape"][-1]:
        raise UserError(f"teacher.mean: has {len(t.mean)} numbers for images of {facts['image_shape'][-1]} channels")
    return sight.sees(t.image_size, (t.mean, t.std), (facts.get("mean", ()), facts.get("std", ())))


def networks(config: ConfigDict, facts: dict) -> tuple[dict[str, slimmable.Slimmable], nn.Module]:
    """({name: teacher}, student) of a config, built and checked by shapes alone, computed as it says. Raises UserError."""
    c, shape, classes = config, tuple(facts["image_shape"]), facts["num_classes"]

    seen = sees(c, facts)

    def family(width: float) -> nn.Module:
        options = {key: c.teacher[key] for key in ("divisor", "zero_gamma", *models.RATES)}
        with naming("teacher.model"):
            return sight.wrap(models.create(c.teacher.model, width=width, num_classes=classes, **options), seen)

    # Built even where no arm needs it: a width that does not fit is a mistake in the config all the same.
    nets = {"slimmable": slimmable.build(
        family, c.teacher.widths, shape, batch_norm=c.teacher.batch_norm, execution=c.teacher.execution,
        pool=c.teacher.pool, num_classes=classes,
    )}  # fmt: skip
    nets["standard"] = slimmable.build(family, (1.0,), shape, num_classes=classes)
    with naming("student.model"):
        rates = {key: c.student[key] for key in models.RATES}
        pupil = models.create(c.student.model, width=c.student.width, num_classes=classes, **rates)
    try:
        contract.check(pupil, shape, "student.model", classes)
    except models.WidthError as e:
        raise UserError(f"student.width: {e}") from e
    wrap = functools.partial(precision.wrap, dtype=c.dtype, group=c.batch_norm_group)
    wrapped = {
        name: dataclasses.replace(net, members={w: wrap(m) for w, m in net.members.items()}) for name, net in nets.items()
    }
    return wrapped, wrap(pupil)


def stage_lengths(config: ConfigDict, facts: dict) -> list[int]:
    """Steps of each partial-to-whole stage. Raises UserError where there are too few for all."""
    c, images = config, facts["train_images"]
    count = len(c.student.widths or c.teacher.widths)
    total = schedules.steps(
        c.student.duration, "student.duration", batch_size=c.student.batch_size, images=images
    ) * (count if c.student.budget == "per_stage" else 1)
    stage_steps = stages.split(total, c.student.stage_shares or (1,) * count)
    if min(stage_steps) < 1:
        raise UserError(f"student.duration: {total} steps are too few for {count} stages")
    return stage_steps


def plan(config: ConfigDict, facts: dict, arm: str) -> list[stages.Stage]:
    widths = config.student.widths or tuple(sorted(config.teacher.widths))
    return stages.plan(arm, widths, stage_lengths(config, facts), config.teacher.widths)


def spans(config: ConfigDict, plan: Sequence[stages.Stage]) -> tuple[list[tuple[int, int]], str, float]:
    """(cycles, form, peak decay) of an arm: its stages' own cycles, or one cycle of the ordinary schedule."""
    c = config.student.schedule
    if len(plan) > 1 and c.cycles == "per_stage":
        return stages.cycles(plan, True), c.form, c.peak_decay
    return stages.cycles(plan, False), c.single_form or c.form, 1.0


def schedule(config: ConfigDict, facts: dict, who: str, spans, form: str = "", peak_decay: float = 1.0) -> Callable:
    """The learning rate of `who` on the global step, over cycles `spans`. Raises UserError for a warm-up that fills one."""
    c, key, images = config[who], f"{who}.schedule.warmup", facts["train_images"]
    warmup = schedules.steps(c.schedule.warmup, key, batch_size=c.batch_size, zero=True, images=images, total=spans[-1][1])
    shape = {key: c.schedule[key] for key in ("peak", "floor", "milestones", "factor")}
    # Goyal et al. 2017: so many times the images, so many times the learning rate.
    shape["peak"] *= c.batch_size / c.schedule.per_batch if c.schedule.per_batch else 1.0
    form = form or c.schedule.form
    return schedules.learning_rate(spans, form=form, warmup=warmup, peak_decay=peak_decay, key=key, **shape)


def distiller(config: ConfigDict) -> nn.Module:
    c = config.student.distiller
    return distillers.create(c.name, **{k: v for k, v in c.items() if k != "name"})


def wants_labels(config: ConfigDict) -> bool:
    """Whether batches carry the labels of the whole training split: of data in RAM always, of a stream, which would have to
    read all of it, only where the distiller asks."""
    return not config.data.image_size or getattr(distiller(config), "dataset_labels", False)


def fit_distiller(
    config: ConfigDict, facts: dict, net: slimmable.Slimmable, student: nn.Module, widths: Iterable[float]
) -> distillers.Distillation:
    """The distiller of a config fitted to the student and to those widths of a teacher, by abstract outputs."""
    c = config.student
    by_width = c.widths or tuple(sorted(config.teacher.widths))
    images = facts["train_images"] if wants_labels(config) else 0
    return distillers.fit(
        distiller(config), student, {w: net.members[w] for w in {*widths, net.widest}}, tuple(facts["image_shape"]),
        batch_size=c.batch_size // c.accumulate, images=images,
        standardise=c.standardise_logits, temperatures=dict(zip(by_width, c.temperatures, strict=False)),
        mixed=bool(c.mix.mixup or c.mix.cutmix) and c.mix.chance > 0,
    )  # fmt: skip


def mixing(config: ConfigDict, who: str, classes: int, train: data.Split | data.Stream) -> data.Mixing | None:
    """What `who`.mix makes of images and labels; None where it leaves them as they are. train: the training images, by whose
    labels classes are balanced. Raises UserError."""
    options = dict(config[who].mix)
    balance, weights = options.pop("balance"), tuple(options.pop("class_weights"))
    if weights and len(weights) != classes:
        raise UserError(f"{who}.mix.class_weights: has {len(weights)} numbers, and these data have {classes} classes")
    if balance:
        weights = data.balanced(np.asarray(train.labels), classes, balance)
    mix = data.Mixing(classes, **options, weights=weights)
    return mix if mix.changes else None


def streaming(config: ConfigDict) -> data.Streaming | None:
    keys = [field.name for field in dataclasses.fields(data.Streaming)]
    return data.Streaming(**{key: config.data[key] for key in keys}) if config.data.image_size else None


def prepare(config: ConfigDict) -> Experiment:
    """Read the data and check that everything fits, by shapes alone. Raises UserError; writes nothing."""
    mesh, d = sharding.make_mesh(config.mesh.model), config.data
    check_batches(config, mesh)
    splits = {f"data.{s}_split": d[f"{s}_split"] for s in ("train", "test", "validation") if d[f"{s}_split"]}
    folder = data.copied(d.name, d.data_dir, d.copy, splits)
    dataset = data.load(d.name, folder, d.train_split, d.test_split, d.num_classes, streaming(config), d.pixel_range,
                        d.validation_split)  # fmt: skip
    keys = ("data.data_dir" if d.data_dir else "data.name", "data.test_split")
    soundness.check(dataset.train, dataset.test, dataset.num_classes, dataset.classes, keys, d.train_split)
    dispatch.most(config.steps_per_dispatch, dispatch.on_device(d.on_device, dataset.train))
    return build(config, mesh, dataset)


def check_batches(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """UserError for a batch that does not divide over the mesh."""
    c = config
    for who in ("teacher", "student"):
        sharding.check_batch(mesh, c[who].batch_size, f"{who}.batch_size", c[who].accumulate)
    if c.teacher.calibration.images:
        sharding.check_batch(mesh, c.teacher.calibration.batch_size, "teacher.calibration.batch_size")


def build(config: ConfigDict, mesh: jax.sharding.Mesh, dataset: data.Dataset) -> Experiment:
    """The experiment of a config over `dataset`. Raises UserError where something does not fit."""
    c = config
    shape = dataset.image_shape
    mean, std = (c.data.mean, c.data.std) if c.data.mean else (
        starting.normalisation(c) or data.channel_statistics(dataset.train.images)
    )  # fmt: skip
    if len(mean) != shape[-1]:
        raise UserError(f"data.mean: has {len(mean)} numbers for images of {shape[-1]} channels; give one for each")
    facts = data_facts(dataset, mean, std)
    nets, pupil = networks(c, facts)
    start = {}
    if c.teacher.weights:
        whole = start["standard"] = starting.given(c, facts, "teacher", nets["standard"].members[1.0])
        start["slimmable"] = starting.ordered(c.teacher, nets["slimmable"], whole, shape)
    if c.student.weights:
        start["student"] = starting.given(c, facts, "student", pupil)

    stage_lengths(c, facts)
    normalise = functools.partial(data.normalise, mean=mean, std=std)
    evaluator = Evaluator(mesh, dataset.test, c.evaluation.batch_size, normalise)
    # Streamed images were mirrored where they were cropped, on the host.
    d = c.data
    augment = functools.partial(
        data.augment, crop_padding=d.crop_padding, flip=d.flip and not d.image_size,
        policy=data.Policy(d.policy, d.policy_layers, d.policy_magnitude) if d.policy else None, jitter=tuple(d.jitter),
        blur=d.blur, erasing=d.erasing, fill=tuple(round(255 * m) for m in mean),
    )  # fmt: skip
    task = Task(
        dataset.train, dataset.test, dataset.num_classes, tuple(mean), tuple(std), augment, mesh, evaluator,
        labels=wants_labels(c), on_device=c.data.on_device, steps_per_dispatch=c.steps_per_dispatch,
        validator=evaluator.on(dataset.validation) if dataset.validation is not None else None,
    )  # fmt: skip
    taught_by = {stage.teacher for arm in c.arms for stage in plan(c, facts, arm)} & {*nets} if c.student.teachers else ()
    fellows = {name: fellow_teachers.find(c, facts, name, nets[name]) for name in sorted(taught_by)}
    fixed = {"standard": starting.fixed(c, facts, "teacher", nets["standard"].members[1.0]),
             "student": starting.fixed(c, facts, "student", pupil)}  # fmt: skip
    experiment = Experiment(config, task, facts, nets, pupil, start, dataset, fellows, fixed)
    experiment.several(c.seeds)
    if c.student.online:
        fusion.check(pupil, shape)
    # A schedule that cannot be is a mistake before anything is compiled or written, like a network that does not fit.
    total = schedules.steps(c.teacher.duration, "teacher.duration", batch_size=c.teacher.batch_size, images=len(dataset.train))
    experiment.schedule("teacher", [(0, total)])
    for who in ("teacher", "student"):
        experiment.mix(who)
    epochs = c.student.batch_size / len(dataset.train)
    for arm in c.arms:
        schedule = experiment.plan(arm)
        experiment.schedule("student", *experiment.spans(schedule))
        if schedule[0].widths:
            distillers.check_initial(distiller(c), [(s.end - s.start) * epochs for s in schedule])
    return experiment
