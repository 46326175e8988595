"""The compiled programs of an experiment: what training runs and pre-flight compiles for a pod, built in one place."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pwkd_jax import distillers, models, slimmable, stages
from pwkd_jax.experiment.definition import Experiment, wants_labels
from pwkd_jax.models import precision
from pwkd_jax.training import dispatch, distil, schedules, sharding, student, students_together, study, teacher
from pwkd_jax.training.fusion import Fusion
from pwkd_jax.training.mutual import Mutual


def teacher_arguments(experiment: Experiment, name: str) -> dict:
    """How the teacher `name`, slimmable or standard, is trained: keywords that `training.teacher.programs` takes."""
    c = experiment.config.teacher
    total = schedules.steps(c.duration, "teacher.duration", batch_size=c.batch_size, images=len(experiment.dataset.train))
    # A standard teacher is the same network with one width; then there is nothing to sample or to distil in place.
    sandwich = {"loss": c.loss, "sampling": c.sampling} if name == "slimmable" else {}
    rule = experiment.rule("teacher", [(0, total)])
    return {"rule": rule, "sharding_how": c.sharding, "start": experiment.start.get(name), "reduction": c.reduction,
            "subnetworks": c.subnetworks, "skip": experiment.skips, "accumulate": c.accumulate, "ema": c.ema,
            "fixed": experiment.fixed.get(name, ()),
            "mix": experiment.mix("teacher"), **sandwich}  # fmt: skip


def teacher_step(experiment: Experiment, name: str) -> tuple[Callable, Callable]:
    """(creator of the first state, compiled step(state, batch)) of the teacher `name`, slimmable or standard."""
    return teacher.programs(experiment.teachers[name], experiment.task, **teacher_arguments(experiment, name))


def student_steps(
    experiment: Experiment, plan: Sequence[stages.Stage], distillation: distillers.Distillation | None,
    several: students_together.Several | None = None,
) -> tuple[Callable, dict[tuple[float, ...], Callable]]:  # fmt: skip
    """(creator of the first state, {widths: compiled step(state, batch, teacher)}) of an arm, for all its seeds and stages.

    several: of so many students at once.
    """
    args, options = _arm(experiment, plan, distillation, several)
    c = experiment.config.student
    return distil.programs(*args, **options, sharding_how=c.sharding, start=experiment.start.get("student"))


def study_steps(
    experiment: Experiment, plans: Mapping[str, Sequence[stages.Stage]],
    distillations: Mapping[str, distillers.Distillation | None], several: students_together.Several,
) -> tuple[Callable, dict[tuple, Callable]]:  # fmt: skip
    """The same of several arms in one program, see `study.programs`. distillations: by the teacher's name."""
    arms = {}
    for name, plan in plans.items():
        args, options = _arm(experiment, plan, distillations.get(plan[0].teacher), several)
        arms[name] = study.Arm(plan, *distil.uncompiled(*args, **options))
    c = experiment.config.student
    return study.programs(arms, experiment.task, several.seeds, c.sharding, experiment.start.get("student"))


def _arm(experiment: Experiment, plan: Sequence[stages.Stage], distillation, several) -> tuple[tuple, dict]:
    """Arguments and keywords of `distil.uncompiled` for an arm."""
    c, net = experiment.config.student, experiment.teaching(plan[0].teacher)
    members = {w: precision.inference(m, c.teacher_dtype, c.teacher_folded) for w, m in net.members.items()} if net else {}
    rule = experiment.rule("student", *experiment.spans(plan))
    return (experiment.student, members, plan, distillation, experiment.on(several).task, rule), {
        "same_crop": c.same_crop, "data_seed": experiment.config.seed if c.batches == "shared" else None, "several": several,
        "skip": experiment.skips, "mix": experiment.mix("student"), "accumulate": c.accumulate, "ema": c.ema,
        "fixed": experiment.fixed["student"], "mutual": Mutual(c.mutual, c.mutual_temperature) if c.mutual else None,
        "fusion": Fusion(several.count, **c.fusion) if c.online and several else None,
    }  # fmt: skip


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


def programs(experiment: Experiment) -> list[Program]:
    """Every training step and every evaluation of an experiment; those that only the constants of a schedule tell apart once.

    Those, like the arms `kd_whole` and the last stage of `pwkd`, compute the same but for a few scalars.
    """
    c = experiment.config
    plans = {arm: experiment.plan(arm) for arm in c.arms}
    teaching = {t: {w for p in plans.values() for s in p if s.teacher == t for w in s.widths} for t in experiment.teachers}
    found: list[Program] = []
    for name, widths in teaching.items():
        # An ordinary teacher whose weights were given is scored and not trained; no teacher is, where no arm has one.
        if widths:
            given = name == "standard" and c.teacher.weights and c.teacher.head == "keep"
            found += _teacher(experiment, name, trained=not given)
    pairs = {t: experiment.distillation(t, widths) for t, widths in teaching.items() if widths}
    merged: dict[tuple, Program] = {}
    study_of = c.student.study and experiment.several(c.seeds, len(plans))
    students = [_student(experiment, plan, pairs.get(plan[0].teacher), steps=not study_of) for plan in plans.values()]
    for each in [*students, *([_study(experiment, plans, pairs, study_of)] if study_of else [])]:
        for key, program in each:
            known = merged.get(key)
            merged[key] = known._replace(runs=known.runs + program.runs) if known else program
    # Partial before whole, as training has it: no teacher, the widths narrow to wide, a drawn one, then the scores.
    order = sorted(merged, key=lambda k: (k[0] == "evaluation", len(k[1]), k[1]))
    return found + [merged[key] for key in order]


def _teacher(experiment: Experiment, name: str, trained: bool) -> list[Program]:
    c, net, images = experiment.config.teacher, experiment.teachers[name], len(experiment.dataset.train)
    total = schedules.steps(c.duration, "teacher.duration", batch_size=c.batch_size, images=images)
    create, step = teacher_step(experiment, name)
    kind = "" if name == "slimmable" else f"{name} "
    args = create.like, _batch(experiment, c.batch_size)
    found = [Program(f"{kind}teacher step", step, args, {}, c.batch_size, "teacher.batch_size", total)] if trained else []
    runs = _scored(c) * _evaluations(experiment, [total], c.batch_size) if trained else _batches(experiment)
    for width in sorted(net.table):
        title = f"{kind}teacher {width:g} evaluation"
        found.append(_evaluation(experiment, title, net.members[width], _frozen(experiment, net, width), runs))
    return found


def student_title(widths: tuple[float, ...], several: students_together.Several | None, teacher: str = "slimmable") -> str:
    students = f"{several.count} students' step" if several else "student step"
    if not widths:
        return f"{students}, no teacher"
    kind = "" if teacher == "slimmable" else f"{teacher} "
    return f"{students}, {kind}teacher {'drawn' if len(widths) > 1 else format(widths[0], 'g')}"


def study_title(span: study.Span, count: int, several: students_together.Several) -> str:
    return f"{count} arms' step, {several.count} students each, from step {span.start}"


def _study(experiment: Experiment, plans, distillations, several) -> Iterator[tuple[tuple, Program]]:
    """The steps of a study, as `_student` gives those of an arm."""
    size, (create, steps) = experiment.config.student.batch_size, study_steps(experiment, plans, distillations, several)
    batch = _batch(experiment, size)
    for number, span in enumerate(study.spans([*plans.values()])):
        taught = study.taught_by(plans, span)
        frozen = {t: {w: _frozen(experiment, experiment.teaching(t), w) for w in widths} for t, widths in taught.items()}
        name, runs = study_title(span, len(plans), several), span.end - span.start
        program = Program(name, steps[span.widths], (create.like, batch), {"teacher": frozen}, size, "student.batch_size", runs)
        yield ("step", (number,), 0.0), program


def _student(
    experiment: Experiment, plan: Sequence[stages.Stage], distillation, steps: bool = True
) -> Iterator[tuple[tuple, Program]]:
    """((kind, widths, widest), program) of an arm; without its steps where these are those of a study."""
    c, name = experiment.config.student, plan[0].teacher
    several = experiment.several(experiment.config.seeds)
    create, stepping = student_steps(experiment, plan, distillation, several)
    like = jax.eval_shape(functools.partial(students_together.member, index=0), create.like) if several else create.like
    widest = experiment.teaching(name).widest if name in experiment.teachers else 0.0
    for widths, step in stepping.items() if steps else ():
        here = experiment.on(several)
        args, net = (create.like, _batch(here, c.batch_size)), experiment.teaching(name)
        frozen = {w: _frozen(here, net, w) for w in widths}
        runs = (1 if several else experiment.config.seeds) * sum(s.end - s.start for s in plan if s.widths == widths)
        title = student_title(widths, several)
        program = Program(title, step, args, {"teacher": frozen}, c.batch_size, "student.batch_size", runs)
        yield ("step", widths, widest), program
    if distillation is not None and distillation.predicts:  # the distiller has the last word on the logits, by width
        for stage in plan:
            width = max(stage.widths)
            model = student.Assisted(experiment.student, experiment.teaching(name).members[width], distillation, width)
            variables = model.variables(like, _frozen(experiment, experiment.teaching(name), width))
            runs = _scored(c) * experiment.config.seeds * _evaluations(experiment, [stage.end], c.batch_size, stage.start)
            title = f"student eval., teacher {width:g}"
            yield ("evaluation", (width,), widest), _evaluation(experiment, title, model, variables, runs)
    else:
        runs = _scored(c) * experiment.config.seeds * _evaluations(experiment, [s.end for s in plan], c.batch_size)
        variables = student.variables(like)
        yield ("evaluation", (), 0.0), _evaluation(experiment, "student evaluation", experiment.student, variables, runs)


def _evaluation(experiment: Experiment, title: str, model, variables, runs: int) -> Program:
    size = experiment.evaluator.batch_size
    args = model, variables, _batch(experiment, size, evaluation=True)
    return Program(title, experiment.evaluator.score, args, {}, size, "evaluation.batch_size", runs)


def _scored(config: ConfigDict) -> int:
    """How many weights of a teacher or a student an evaluation scores."""
    return 2 if config.ema else 1


def _evaluations(experiment: Experiment, ends: Sequence[int], batch_size: int, start: int = 0) -> int:
    """Batches scored by all evaluations of a run, or of its steps from `start`: at the cadence and at every end."""
    every = experiment.cadence(ends[-1], batch_size).evaluate
    held_out = -(-len(experiment.dataset.validation or ()) // experiment.evaluator.batch_size)
    return len({*range(every, ends[-1] + 1, every), *ends} - {*range(start + 1)}) * (_batches(experiment) + held_out)


def _batches(experiment: Experiment) -> int:
    return -(-len(experiment.dataset.test) // experiment.evaluator.batch_size)


def _frozen(experiment: Experiment, net: slimmable.Slimmable, width: float):
    like, how = models.whole(net.likes[width]), experiment.config.student.teacher_sharding
    return sharding.abstract(like, sharding.shardings(experiment.mesh, like, how))


def _batch(experiment: Experiment, size: int, evaluation: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    rows, whole = NamedSharding(experiment.mesh, P("data")), sharding.replicated(experiment.mesh)
    like = {
        "image": jax.ShapeDtypeStruct((size, *experiment.dataset.image_shape), np.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((size,), np.int32, sharding=rows),
        "index": jax.ShapeDtypeStruct((size,), np.int32, sharding=rows),
    }
    if evaluation:
        return like | {"mask": jax.ShapeDtypeStruct((size,), np.float32, sharding=rows)}
    if dispatch.on_device(experiment.config.data.on_device, experiment.dataset.train):
        return _resident(experiment, size)
    if not wants_labels(experiment.config):
        return like
    labels = len(experiment.dataset.train)
    return like | {"dataset_label": jax.ShapeDtypeStruct((labels,), np.int32, sharding=whole)}


def _resident(experiment: Experiment, size: int) -> dict:
    """The batch of `dispatch.Resident` for one step: the data set on every device, and the indices of the rows."""
    train, whole = experiment.dataset.train, sharding.replicated(experiment.mesh)
    rows = NamedSharding(experiment.mesh, P(None, "data"))
    stored = {
        "image": jax.ShapeDtypeStruct((len(train), math.prod(experiment.dataset.image_shape)), np.uint8, sharding=whole),
        "label": jax.ShapeDtypeStruct((len(train),), np.int32, sharding=whole),
    }
    return {
        "stored": stored,
        "count": jax.ShapeDtypeStruct((), np.int32, sharding=whole),
        "rows": jax.ShapeDtypeStruct((1, size), np.int32, sharding=rows),
    }
