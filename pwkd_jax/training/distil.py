"""Distillation: a student taught stage by stage, from its first weights to its last."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from clu import parameter_overview

from pwkd_jax import data, distillers, models, stages, storage, weights
from pwkd_jax.distillers import Distillation
from pwkd_jax.errors import UserError
from pwkd_jax.models import contract, precision
from pwkd_jax.stages import Stage
from pwkd_jax.training import (
    arguments,
    averaging,
    dispatch,
    distributed,
    freezing,
    loop,
    optimizers,
    record,
    schedules,
    selection,
    sharding,
    students_together,
)
from pwkd_jax.training import student as students
from pwkd_jax.training.fusion import Fusion
from pwkd_jax.training.lessons import Lesson
from pwkd_jax.training.mutual import Mutual
from pwkd_jax.training.non_finite import skipping
from pwkd_jax.training.outcome import Student, judged
from pwkd_jax.training.state import State
from pwkd_jax.training.task import Task
from pwkd_jax.training.teacher import Teacher, as_teacher
from pwkd_jax.weights import Network


def fit(
    student: nn.Module, teacher: "Teacher | Network", task: Task, distiller: str | nn.Module | Distillation = "kd", *,
    batch_size: int | None = None, standardise: bool = False, mixed: bool = False,
) -> Distillation:  # fmt: skip
    """A distiller fitted to a student and every sub-network of a teacher, by shapes alone: its loss for a loop of your own.

    distiller: a name (see `distillers`), a Flax module, or what was fitted before. standardise: whether it sees standardised
    logits. mixed: whether images are mixed ones, with more than one label. Raises UserError where it cannot serve this pair, or
    the student these images.
    """
    if isinstance(distiller, Distillation):
        return distiller
    if not isinstance(distiller, str):
        arguments.module("distiller", distiller)
    method = distillers.create(distiller) if isinstance(distiller, str) else distiller
    arguments.task(task)
    arguments.module("student", student)
    contract.check(student, task.image_shape, "student.model", task.num_classes)
    net, size = as_teacher(teacher).net, arguments.batch_size(task, batch_size)
    return distillers.fit(
        method, student, net.members, task.image_shape, batch_size=size, images=len(task.train) if task.labels else 0,
        index="index" in getattr(task.train, "keys", ("index",)), standardise=standardise, mixed=mixed,
    )  # fmt: skip


def uncompiled(
    student: nn.Module,
    members: dict[float, nn.Module],
    plan: Sequence[Stage],
    distillation: Distillation | None,
    task: Task,
    rule: optimizers.Rule,
    *,
    same_crop: bool = True,
    data_seed: int | None = None,
    several: students_together.Several | None = None,
    metrics: Callable | None = None,
    skip: bool = False,
    mix: data.Mixing | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
    fixed: Sequence[str] = (),
    mutual: Mutual | None = None,
    fusion: Fusion | None = None,
) -> tuple[Callable, Callable, Callable]:
    """(make(seed, variables to start from or None) -> first state, stepping(widths) -> step(state, batch, teacher, once),
    prepare({width: the teacher's variables}) -> what a step may be given in their place, see `precision.prepared`) of all seeds
    and stages of a plan. members: {width: model} of the teacher. The rest as `student.make_step` has it; several: of
    so many students at once, by their seeds [students]; skip: steps that are not finite, see `non_finite.skipping`; ema: see
    `averaging`, 0 is off."""

    def make(seed, given):
        made = students.init(student, task.image_shape, distillation, rule.direction, seed, given, fusion)
        return made.replace(average=averaging.begin(made.params, made.collections)) if ema else made

    def stepping(widths: tuple[float, ...]) -> Callable:
        step = students.make_step(
            student, members, widths, distillation, plan, *rule, task.preprocess, images=len(task.train), same_crop=same_crop,
            data_seed=data_seed, several=several, own=metrics, mix=mix, accumulate=accumulate,
            fixed=fixed, mutual=mutual, fusion=fusion, strong=task.strong,
        )  # fmt: skip
        step = averaging.averaging(step, ema) if ema else step
        return skipping(step) if skip else step

    def prepare(teacher):
        return {w: precision.prepared(members[w], found, task.image_shape) for w, found in teacher.items()}

    return students_together.stacked(make) if several else make, stepping, prepare


def programs(
    student: nn.Module, members: dict[float, nn.Module], plan: Sequence[Stage], distillation: Distillation | None, task: Task,
    rule: optimizers.Rule, *, several: students_together.Several | None = None, sharding_how: str = "replicated",
    start: dict | None = None, **options,
) -> tuple[Callable, dict[tuple[float, ...], Callable]]:  # fmt: skip
    """(creator of the first state from (seed, variables to start from or None), {widths: compiled step(state, batch, teacher)})
    of `uncompiled`, which takes `options` too."""
    make, stepping, prepare = uncompiled(student, members, plan, distillation, task, rule, several=several, **options)
    layout = several.layout if several and several.mesh else None
    create = sharding.creator(task.mesh, make, sharding_how, several.seeds if several else 0, start, layout=layout)
    compiled = functools.partial(compile_step, task, create.layout, prepare)
    return create, {widths: compiled(stepping(widths)) for widths in dict.fromkeys(stage.widths for stage in plan)}


def compile_step(task: Task, layout: State, prepare: Callable, step: Callable) -> Callable:
    """A step compiled for the batches of a task, its state left in `layout`, its teacher `prepare`d once a dispatch."""

    def once(frozen):
        return frozen | {"teacher": prepare(frozen["teacher"])} if frozen.get("teacher") else frozen

    return sharding.jit_step(task.mesh, dispatch.many(step, task.image_shape, once), layout)


def distil(
    student: nn.Module,
    teacher: Teacher | Network | None,
    task: Task,
    *,
    distiller: str | nn.Module | Distillation = "kd",
    arm: str = "pwkd",
    duration: str | int = "60 epochs",
    plan: Sequence[Stage] | None = None,
    batch_size: int | None = None,
    optimizer: optax.GradientTransformation | optimizers.Rule | None = None,
    learning_rate: float | Callable[[jax.Array], jax.Array] | None = None,
    seed: int | Sequence[int] = 0,
    data_seed: int | None = None,
    start: dict | None = None,
    same_crop: bool = True,
    reset: Sequence[str] = (),
    connectors: str = "leading",
    metrics: Callable[[models.Outputs, jax.Array], dict[str, jax.Array]] | None = None,
    callback: Callable[[int, State, dict[str, jax.Array]], None] | None = None,
    directory: str | Path | None = None,
    label: str = "student",
    cadence: loop.Cadence | None = None,
    several: students_together.Several | None = None,
    sharding: str = "replicated",
    profiled: str = "",
    non_finite: str = "stop",
    patience: int = 0,
    mix: data.Mixing | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
    fixed: Sequence[str] = (),
    compiled: tuple[Callable, dict] | None = None,
) -> Student:
    """Teach `student`, stage by stage as the plan says, with any distiller; without a teacher, by the labels alone.

    teacher: of any number of widths, or any trained network. arm: which plan of `stages.plan` (partial to whole by default)
    over `duration`, all stages equally long; plan: another one. optimizer: an optax chain with its learning rate in it; by
    default SGD (momentum 0.9, weight decay 5e-4) at `learning_rate`: the peak of one cosine a stage, 0.05 by default, or a
    schedule on the global step. data_seed: of the order and augmentation of images and of drawn widths, in place of `seed`.
    start: variables to start from. same_crop: whether the teacher sees the student's augmented images. reset, connectors: see
    `student.enter_stage`. metrics(outputs, labels) -> {name: per-image values [B]}, logged. callback(step, state, {name:
    mean}): after every step. directory: where checkpoints and metrics go, and where a stopped run goes on; nothing is kept
    without one. label: '' prints nothing. several: seeds together in one program, `seed` being theirs [students]; model and
    variables are then the first one's. non_finite: `stop` at a step whose loss or gradient is not finite, or `skip` and count
    it. patience: evaluations of the last stage without a better one on the task's validation images, after which training
    ends; 0: never. mix: mixup, CutMix, label smoothing. accumulate: parts of a batch that are learnt from in turn, see
    `accumulation`. ema: decay of a mean of the weights that counts in their place, see `averaging`; 0 is off. fixed: parts
    of the student that stay as `start` has them, see `freezing`. compiled: of `programs`, to use again. Raises UserError where
    something does not fit or is not finite.
    """
    teacher = None if teacher is None else as_teacher(teacher)
    arguments.task(task)
    arguments.module("student", student)
    arguments.optimizer(optimizer, learning_rate)
    arguments.one_of("connectors", connectors, ("leading", "reinit"))
    arguments.one_of("non_finite", non_finite, ("stop", "skip"))
    arguments.averaging(ema)
    for word in reset:
        arguments.one_of("reset", word, ("momentum", "batch_norm", "weights"))
    images, size = len(task.train), arguments.batch_size(task, batch_size)
    arguments.parts(accumulate, size, task.mesh)
    if plan is None:
        arguments.duration(duration)
        steps = schedules.steps(duration, "duration", batch_size=size, images=images) if isinstance(duration, str) else duration
        plan = stages.even("alone" if teacher is None else arm, teacher.widths if teacher else (), steps)
    arguments.plan(plan)
    if not compiled and not several:
        arguments.seed(seed)
        contract.check(student, task.image_shape, "student.model", task.num_classes)
        freezing.check("fixed", fixed, models.abstract(student, task.image_shape))
        if teacher:
            _refuse_unlike(teacher, task)
    if teacher is None and any(s.widths for s in plan):
        raise UserError("teacher: the plan has stages that are taught, and there is none; give one, or leave the plan away")
    if teacher and (missing := {w for s in plan for w in s.widths} - {*teacher.variables}):
        raise UserError(f"plan: a stage is taught at width {min(missing):g}, which the teacher does not have: {teacher.widths}")
    mixed = mix is not None and mix.mixes
    # A method sees one part of a batch at a time.
    seen = size // accumulate
    distillation = fit(student, teacher, task, distiller, batch_size=seen, mixed=mixed) if teacher else None
    if teacher and not compiled:
        distillers.check_initial(distillation.distiller, [(s.end - s.start) * size / images for s in plan])
    ends = [s.end for s in plan]
    spans = stages.cycles(plan, True)
    rule = optimizers.rule(optimizer, learning_rate, lambda peak: schedules.learning_rate(spans, form="cosine", peak=peak))
    create, stepping = compiled or programs(
        student, teacher.net.members if teacher else {}, plan, distillation, task, rule, same_crop=same_crop,
        data_seed=data_seed, several=several, sharding_how=sharding, start=start, metrics=arguments.own_metrics(metrics),
        skip=non_finite == "skip", mix=mix, accumulate=accumulate, ema=ema, fixed=fixed,
    )  # fmt: skip
    lesson = Lesson(student, plan, distillation, teacher, task, rule, several, reset, connectors)
    seed = np.asarray(seed, np.uint32) if several else seed

    def fresh() -> State:
        return create(seed, start)

    def enter(state: State) -> State:
        return jax.device_put(lesson.enter(state, fresh), create.layout) if int(state.step) else state

    here = task.on(several.mesh) if several and several.mesh else task
    frozen = here.place(teacher.variables) if teacher and here is not task else teacher.variables if teacher else {}
    order = data_seed if data_seed is not None else int(np.ravel(seed)[0])

    def segment(number: int, stage: Stage) -> loop.Segment:
        taught = {w: frozen[w] for w in stage.widths}
        step = functools.partial(stepping[stage.widths], teacher=taught)
        return loop.Segment(stage.end, step, enter, stages.title(plan, number))

    segments = [segment(i, s) for i, s in enumerate(plan)]
    chosen = [selection.KEY] if task.validator else []
    chosen = [f"{key}_student{i}" for key in chosen for i in range(several.count)] if several else chosen
    state, directory = fresh(), directory and storage.path(directory, "directory")
    overview = parameter_overview.get_parameter_overview(state.params)
    if directory and not compiled and not several:
        record.claim(directory, {
            "kind": "student", **record.of_data(task), "model": repr(precision.plain(student)),
            "teacher": None if teacher is None else record.digest(teacher.variables), "distiller": _named(distiller),
            "plan": [list(s) for s in plan], "batch size": size, "seed": int(seed), "data seed": data_seed,
            "optimizer": str(jax.tree.structure(state.opt_state)), "learning rate": record.schedule(rule.schedule, ends[-1]),
            "start": None if start is None else record.digest(start), "same crop": same_crop, "reset": list(reset),
            "connectors": connectors, **({"mix": repr(mix)} if mix else {}), **({"ema": ema} if ema else {}),
            **({"accumulate": accumulate} if accumulate > 1 else {}), **({"fixed": list(fixed)} if fixed else {}),
        })  # fmt: skip
    if directory:
        distributed.write(directory / "parameters.txt", overview + "\n")
    state, rows, kept, best = run(
        directory, label, state, segments, here, lesson.evaluate, cadence or loop.usual(ends[-1], -(-images // size)),
        batch_size=size, order=order, chosen=chosen, profiled=profiled, callback=callback, patience=patience,
        texts={"parameters": overview},
    )  # fmt: skip
    own = task.place(students_together.member(state, 0)) if several else state
    model, variables = judged(student, distillation, plan, teacher, own)
    found = Student(model, variables, task.card(precision.plain(student), {"steps": int(state.step)}), rows, state, kept, best)
    if directory and not compiled and not isinstance(model, students.Assisted):
        found.save(directory / weights.STUDENT)
    return found


def run(
    directory: Path | None, label: str, state: State, segments: Sequence[loop.Segment], task: Task, evaluate: Callable,
    cadence: loop.Cadence, *, batch_size: int, order: int, chosen: Sequence[str], **options,
) -> tuple[State, list[dict], list[State], list[State]]:  # fmt: skip
    """(last state, rows, states at the segments' ends, states that were best by each of the keys `chosen`) of `loop.run`, which
    takes `options` too. order: seed of the order of images."""
    ends = [segment.end for segment in segments]
    state, rows = loop.run(
        directory, label, state, segments, task.batches(batch_size, order), evaluate, cadence, images=len(task.train),
        batch_size=batch_size, keep=ends, held=functools.partial(task.held, batch_size, order), chosen=chosen, **options,
    )  # fmt: skip
    ends[-1] = int(state.step)  # earlier than planned, where patience ended
    kept = loop.snapshots(directory, state, ends) if directory and len(ends) > 1 else [state]
    bests = [selection.best(rows, key) for key in chosen] if directory else []
    return state, rows, kept, loop.snapshots(directory, state, bests) if bests else []


def _refuse_unlike(teacher: Teacher, task: Task) -> None:
    """UserError for a teacher whose images were of another shape, other classes or another normalisation."""
    card = teacher.cards[max(teacher.variables)]
    if tuple(card["image_shape"]) != task.image_shape or card["num_classes"] != task.num_classes:
        raise UserError(
            f"teacher: takes {card['image_shape']} images and knows {card['num_classes']} classes, but the task has "
            f"{list(task.image_shape)} images in {task.num_classes} classes"
        )
    for key in ("mean", "std"):
        if np.abs(np.subtract(card[key], getattr(task, key))).max() > 1e-3:
            given = ", ".join(f"{key}=({', '.join(f'{x:.4f}' for x in card[key])},)" for key in ("mean", "std"))
            raise UserError(f"teacher: its images were normalised by another {key} than the task's; make the task with {given}")


def _named(distiller: str | nn.Module | Distillation) -> str:
    return repr(distiller.distiller) if isinstance(distiller, Distillation) else str(distiller)
