"""What all runs of an experiment share: read, built and checked by shapes alone before anything is trained or written."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pwkd_jax import data, distillers, models, slimmable, stages
from pwkd_jax.errors import UserError
from pwkd_jax.training import loop, sharding
from pwkd_jax.training import state as states
from pwkd_jax.training.evaluation import Evaluator


@dataclasses.dataclass(frozen=True)
class Setting:
    """The data, networks and schedules of a config. stage_steps: the length of each partial-to-whole stage."""

    config: ConfigDict
    dataset: data.Dataset
    mesh: jax.sharding.Mesh
    normalise: Callable
    evaluator: Evaluator
    teachers: dict[str, slimmable.Slimmable]
    student: nn.Module
    stage_steps: list[int]

    def preprocess(self, key: jax.Array, images: jax.Array) -> jax.Array:
        c = self.config.data
        return self.normalise(data.augment(key, images, c.crop_padding, c.flip))

    def batches(self, batch_size: int, seed: int) -> Callable:
        pipeline = data.Pipeline(self.dataset.train, batch_size, seed, jax.process_index(), jax.process_count())
        labels = jax.device_put(self.dataset.train.labels, sharding.replicated(self.mesh))
        return lambda step: sharding.put_batch(self.mesh, pipeline(step)) | {"dataset_label": labels}

    def cadence(self, total: int, batch_size: int) -> loop.Cadence:
        c, known = self.config, {"batch_size": batch_size, "images": len(self.dataset.train.labels), "total": total}
        every = (stages.steps(c[key].every, f"{key}.every", **known) for key in ("log", "evaluation", "checkpoint"))
        return loop.Cadence(*every, c.log.tensorboard)

    def schedule(self, who: str, spans, form: str = "", peak_decay: float = 1.0):
        c = self.config[who]
        warmup = stages.steps(
            c.schedule.warmup, f"{who}.schedule.warmup", batch_size=c.batch_size, zero=True,
            images=len(self.dataset.train.labels), total=spans[-1][1],
        )  # fmt: skip
        shape = {key: c.schedule[key] for key in ("peak", "floor", "milestones", "factor")}
        form = form or c.schedule.form
        return stages.learning_rate(spans, form=form, warmup=warmup, peak_decay=peak_decay, **shape)

    def optimizer(self, who: str):
        return states.optimizer(**self.config[who].optimizer)

    def place(self, state: states.State) -> states.State:
        return jax.device_put(state, sharding.replicated(self.mesh))

    def plan(self, arm: str) -> list[stages.Stage]:
        widths = self.config.student.widths or tuple(sorted(self.config.teacher.widths))
        return stages.plan(arm, widths, self.stage_steps, self.config.teacher.widths)

    def spans(self, plan: Sequence[stages.Stage]) -> tuple[list[tuple[int, int]], str, float]:
        """(cycles, form, peak decay) of an arm: its stages' own cycles, or one cycle of the ordinary schedule."""
        c = self.config.student.schedule
        if len(plan) > 1 and c.cycles == "per_stage":
            return stages.cycles(plan, True), c.form, c.peak_decay
        return stages.cycles(plan, False), c.single_form or c.form, 1.0

    def distillation(self, teacher: str, widths: Iterable[float]) -> distillers.Distillation:
        """The distiller fitted to the student and to those widths of that teacher, by abstract outputs."""
        c, shape, net = self.config.student, self.dataset.image_shape, self.teachers[teacher]
        options = {k: v for k, v in c.distiller.items() if k != "name"}
        batch = {
            "image": jax.ShapeDtypeStruct((c.batch_size, *shape), jnp.float32),
            "label": jax.ShapeDtypeStruct((c.batch_size,), jnp.int32),
            "index": jax.ShapeDtypeStruct((c.batch_size,), jnp.int32),
            "dataset_label": jax.ShapeDtypeStruct(self.dataset.train.labels.shape, jnp.int32),
        }

        def outputs(model: nn.Module) -> models.Outputs:
            variables = models.abstract(model, shape)
            return jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], variables, batch["image"])

        teachers = {w: outputs(net.members[w]) for w in {*widths, net.widest}}
        distiller = distillers.create(c.distiller.name, **options)
        return distillers.build(distiller, outputs(self.student), teachers, batch, standardise=c.standardise_logits)


def prepare(config: ConfigDict) -> Setting:
    """Read the data and check that everything fits, by shapes alone. Raises UserError; writes nothing."""
    c, mesh = config, sharding.make_mesh()
    sharding.check_batch(mesh, c.teacher.batch_size, "teacher.batch_size")
    sharding.check_batch(mesh, c.student.batch_size, "student.batch_size")
    if c.teacher.calibration.images:
        sharding.check_batch(mesh, c.teacher.calibration.batch_size, "teacher.calibration.batch_size")
    dataset = data.load(c.data.name, c.data.data_dir, c.data.train_split, c.data.test_split, c.data.num_classes)
    shape, classes = dataset.image_shape, dataset.num_classes
    mean, std = (c.data.mean, c.data.std) if c.data.mean else data.channel_statistics(dataset.train.images)
    if len(mean) != shape[-1]:
        raise UserError(f"data.mean: has {len(mean)} numbers for images of {shape[-1]} channels; give one for each")
    normalise = functools.partial(data.normalise, mean=mean, std=std)

    def family(width: float) -> nn.Module:
        options = {"divisor": c.teacher.divisor, "zero_gamma": c.teacher.zero_gamma}
        return models.create(c.teacher.model, width=width, num_classes=classes, **options)

    # Built even where no arm needs it: a width that does not fit is a mistake in the config all the same.
    nets = {"slimmable": slimmable.build(
        family, c.teacher.widths, shape, batch_norm=c.teacher.batch_norm, execution=c.teacher.execution,
        pool=c.teacher.pool,
    )}  # fmt: skip
    nets["standard"] = slimmable.build(family, (1.0,), shape)
    pupil = models.create(c.student.model, width=c.student.width, num_classes=classes)
    try:
        models.abstract(pupil, shape)
    except models.WidthError as e:
        raise UserError(f"student.width: {e}") from e

    count = len(c.student.widths or c.teacher.widths)
    total = stages.steps(
        c.student.duration, "student.duration", batch_size=c.student.batch_size, images=len(dataset.train.labels)
    ) * (count if c.student.budget == "per_stage" else 1)
    stage_steps = stages.split(total, c.student.stage_shares or (1,) * count)
    if min(stage_steps) < 1:
        raise UserError(f"student.duration: {total} steps are too few for {count} stages")
    evaluator = Evaluator(mesh, dataset.test, c.evaluation.batch_size, normalise)
    return Setting(config, dataset, mesh, normalise, evaluator, nets, pupil, stage_steps)
