"""The compiled programs of an experiment: what training runs and pre-flight compiles for a pod, built in one place."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pwkd_jax import distillers, stages
from pwkd_jax.models import compute
from pwkd_jax.setting import Setting, wants_labels
from pwkd_jax.training import dispatch, sharding, student, teacher, together


def teacher_step(setting: Setting, name: str) -> tuple[Callable, Callable]:
    """(creator of the first state, compiled step(state, batch)) of the teacher `name`, slimmable or standard."""
    c, net = setting.config.teacher, setting.teachers[name]
    total = stages.steps(c.duration, "teacher.duration", batch_size=c.batch_size, images=len(setting.dataset.train))
    # A standard teacher is the same network with one width; then there is nothing to sample or to distil in place.
    sandwich = {"loss": c.loss, "sampling": c.sampling} if name == "slimmable" else {}
    step = teacher.make_step(
        net, setting.optimizer("teacher"), setting.schedule("teacher", [(0, total)]), setting.preprocess,
        setting.mesh if c.sharding == "replicated" else None, reduction=c.reduction, subnetworks=c.subnetworks, **sandwich,
    )  # fmt: skip
    create = setting.teacher_state(name)
    return create, sharding.jit_step(setting.mesh, dispatch.many(step, setting.dataset.image_shape), create.layout)


def student_steps(
    setting: Setting, plan: Sequence[stages.Stage], distillation: distillers.Distillation | None,
    several: together.Several | None = None,
) -> tuple[Callable, dict[tuple[float, ...], Callable]]:  # fmt: skip
    """(creator of the first state, {widths: compiled step(state, batch, teacher)}) of an arm, for all its seeds and stages.

    several: of so many students at once.
    """
    setting = setting.on(several)
    c, net = setting.config.student, setting.teachers.get(plan[0].teacher)
    schedule = setting.schedule("student", *setting.spans(plan))
    create, steps = setting.student_state(distillation, several), {}
    members = {w: compute.inference(m, c.teacher_dtype, c.teacher_folded) for w, m in net.members.items()} if net else {}
    for widths in dict.fromkeys(stage.widths for stage in plan):
        step = student.make_step(
            setting.student, members, widths, distillation, plan, setting.optimizer("student"),
            schedule, setting.preprocess, images=len(setting.dataset.train), same_crop=c.same_crop,
            data_seed=setting.config.seed if c.batches == "shared" else None, several=several,
        )  # fmt: skip
        steps[widths] = sharding.jit_step(setting.mesh, dispatch.many(step, setting.dataset.image_shape), create.layout)
    return create, steps


class Program(NamedTuple):
    """A compiled program and the shapes and places of its arguments. batch: images in its global batch, which the config's key
    `batch_key` sets. runs: how often the whole experiment runs it."""

    name: str
    function: Callable
    args: tuple
    kwargs: dict
    batch: int
    batch_key: str
    runs: int

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.args, **self.kwargs)

    @property
    def argument_bytes(self) -> int:
        """On one device, without the padding of its layouts."""
        arrays = [x for x in jax.tree.leaves((self.args, self.kwargs)) if isinstance(x, jax.ShapeDtypeStruct)]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def programs(setting: Setting) -> list[Program]:
    """Every training step and every evaluation of an experiment; those that only the constants of a schedule tell apart once.

    Those, like the arms `kd_whole` and the last stage of `pwkd`, compute the same but for a few scalars.
    """
    c = setting.config
    plans = {arm: setting.plan(arm) for arm in c.arms}
    teaching = {t: {w for p in plans.values() for s in p if s.teacher == t for w in s.widths} for t in setting.teachers}
    found: list[Program] = []
    for name, widths in teaching.items():
        # An ordinary teacher whose weights were given is scored and not trained; no teacher is, where no arm has one.
        if widths:
            found += _teacher(setting, name, trained=not (name == "standard" and c.teacher.weights))
    pairs = {t: setting.distillation(t, widths) for t, widths in teaching.items() if widths}
    merged: dict[tuple, Program] = {}
    for plan in plans.values():
        for key, program in _student(setting, plan, pairs.get(plan[0].teacher)):
            known = merged.get(key)
            merged[key] = known._replace(runs=known.runs + program.runs) if known else program
    # Partial before whole, as training has it: no teacher, the widths narrow to wide, a drawn one, then the scores.
    order = sorted(merged, key=lambda k: (k[0] == "evaluation", len(k[1]), k[1]))
    return found + [merged[key] for key in order]


def _teacher(setting: Setting, name: str, trained: bool) -> list[Program]:
    c, net, images = setting.config.teacher, setting.teachers[name], len(setting.dataset.train)
    total = stages.steps(c.duration, "teacher.duration", batch_size=c.batch_size, images=images)
    create, step = teacher_step(setting, name)
    kind = "" if name == "slimmable" else f"{name} "
    args = create.like, _batch(setting, c.batch_size)
    found = [Program(f"{kind}teacher step", step, args, {}, c.batch_size, "teacher.batch_size", total)] if trained else []
    runs = _evaluations(setting, [total], c.batch_size) if trained else _batches(setting)
    for width in sorted(net.table):
        title = f"{kind}teacher {width:g} evaluation"
        found.append(_evaluation(setting, title, net.members[width], _frozen(setting, name, width), runs))
    return found


def student_title(widths: tuple[float, ...], several: together.Several | None, teacher: str = "slimmable") -> str:
    students = f"{several.count} students' step" if several else "student step"
    if not widths:
        return f"{students}, no teacher"
    kind = "" if teacher == "slimmable" else f"{teacher} "
    return f"{students}, {kind}teacher {'drawn' if len(widths) > 1 else format(widths[0], 'g')}"


def _student(setting: Setting, plan: Sequence[stages.Stage], distillation) -> Iterator[tuple[tuple, Program]]:
    """((kind, widths, widest), program) of an arm."""
    c, name = setting.config.student, plan[0].teacher
    several = setting.several(setting.config.seeds)
    create, steps = student_steps(setting, plan, distillation, several)
    like = jax.eval_shape(functools.partial(together.member, index=0), create.like) if several else create.like
    widest = setting.teachers[name].widest if name in setting.teachers else 0.0
    for widths, step in steps.items():
        here = setting.on(several)
        args, frozen = (create.like, _batch(here, c.batch_size)), {w: _frozen(here, name, w) for w in widths}
        runs = (1 if several else setting.config.seeds) * sum(s.end - s.start for s in plan if s.widths == widths)
        title = student_title(widths, several)
        program = Program(title, step, args, {"teacher": frozen}, c.batch_size, "student.batch_size", runs)
        yield ("step", widths, widest), program
    if distillation is not None and distillation.predicts:  # the distiller has the last word on the logits, by width
        for stage in plan:
            width = max(stage.widths)
            model = student.Assisted(setting.student, setting.teachers[name].members[width], distillation, width)
            variables = model.variables(like, _frozen(setting, name, width))
            runs = setting.config.seeds * _evaluations(setting, [stage.end], c.batch_size, stage.start)
            title = f"student eval., teacher {width:g}"
            yield ("evaluation", (width,), widest), _evaluation(setting, title, model, variables, runs)
    else:
        runs = setting.config.seeds * _evaluations(setting, [s.end for s in plan], c.batch_size)
        variables = student.variables(like)
        yield ("evaluation", (), 0.0), _evaluation(setting, "student evaluation", setting.student, variables, runs)


def _evaluation(setting: Setting, title: str, model, variables, runs: int) -> Program:
    size = setting.evaluator.batch_size
    args = model, variables, _batch(setting, size, evaluation=True)
    return Program(title, setting.evaluator.score, args, {}, size, "evaluation.batch_size", runs)


def _evaluations(setting: Setting, ends: Sequence[int], batch_size: int, start: int = 0) -> int:
    """Batches scored by all evaluations of a run, or of its steps from `start`: at the cadence and at every end."""
    every = setting.cadence(ends[-1], batch_size).evaluate
    return len({*range(every, ends[-1] + 1, every), *ends} - {*range(start + 1)}) * _batches(setting)


def _batches(setting: Setting) -> int:
    return -(-len(setting.dataset.test) // setting.evaluator.batch_size)


def _frozen(setting: Setting, name: str, width: float):
    like, how = setting.teachers[name].likes[width], setting.config.student.teacher_sharding
    like = {"params": like["params"], "batch_stats": like.get("batch_stats", {})}
    return sharding.abstract(like, sharding.shardings(setting.mesh, like, how))


def _batch(setting: Setting, size: int, evaluation: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    rows, whole = NamedSharding(setting.mesh, P("data")), sharding.replicated(setting.mesh)
    like = {
        "image": jax.ShapeDtypeStruct((size, *setting.dataset.image_shape), np.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((size,), np.int32, sharding=rows),
        "index": jax.ShapeDtypeStruct((size,), np.int32, sharding=rows),
    }
    if evaluation:
        return like | {"mask": jax.ShapeDtypeStruct((size,), np.float32, sharding=rows)}
    if dispatch.on_device(setting.config.data.on_device, setting.dataset.train):
        return _resident(setting, size)
    if not wants_labels(setting.config):
        return like
    labels = len(setting.dataset.train)
    return like | {"dataset_label": jax.ShapeDtypeStruct((labels,), np.int32, sharding=whole)}


def _resident(setting: Setting, size: int) -> dict:
    """The batch of `dispatch.Resident` for one step: the data set on every device, and the indices of the rows."""
    train, whole = setting.dataset.train, sharding.replicated(setting.mesh)
    rows = NamedSharding(setting.mesh, P(None, "data"))
    stored = {
        "image": jax.ShapeDtypeStruct((len(train), math.prod(setting.dataset.image_shape)), np.uint8, sharding=whole),
        "label": jax.ShapeDtypeStruct((len(train),), np.int32, sharding=whole),
    }
    return {
        "stored": stored,
        "count": jax.ShapeDtypeStruct((), np.int32, sharding=whole),
        "rows": jax.ShapeDtypeStruct((1, size), np.int32, sharding=rows),
    }
