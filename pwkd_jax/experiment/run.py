"""One experiment: its teachers, then every arm and seed of its students, then the report. Resumes by itself.

    WORKDIR/config.json, data.json            what it was started with, and facts of its data
    WORKDIR/made_with.json                    the version of this layout, and those of all packages that began it
    WORKDIR/teacher/slimmable, .../standard   checkpoints, metrics.jsonl, TensorBoard events; when finished, result.json and
                                              the frozen weights of every width as width_W.safetensors
    WORKDIR/students/ARM/seedN                the same without the last
    WORKDIR/summary.json, report.html
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import shared_teachers
from pwkd_jax.experiment.definition import Experiment, prepare
from pwkd_jax.experiment.extension import extend
from pwkd_jax.experiment.students import students
from pwkd_jax.experiment.teachers import cost, finished, teach
from pwkd_jax.experiment.workdir import claim, held
from pwkd_jax.reporting import summary as reporting
from pwkd_jax.reporting.environment import environment
from pwkd_jax.training import distributed
from pwkd_jax.training.teacher import Teacher


def run(config: ConfigDict, workdir: Path) -> dict:
    """Train what is not yet trained, write summary.json and report.html, and return the summary."""
    experiment = distributed.together(lambda: prepare(config))
    plans = {arm: experiment.plan(arm) for arm in config.arms}
    taking = [s for plan in plans.values() for s in plan]
    teaching = {t: {w for s in taking if s.teacher == t for w in s.widths} for t in experiment.teachers}
    wanted = [t for t, widths in teaching.items() if widths]
    distillations = {t: experiment.distillation(t, teaching[t]) for t in wanted}
    distributed.together(lambda: shared_teachers.check(config, experiment.facts, wanted))
    with held(workdir):
        distributed.decide(lambda: extend(workdir, config, experiment.facts))
        distributed.decide(lambda: claim(workdir, config, experiment.facts))
        _announce(experiment, wanted)
        try:
            return _run(experiment, plans, wanted, distillations, workdir)
        except Exception as e:  # Orbax and TensorStore raise of everything, from threads of their own too
            if isinstance(e, UserError):
                raise
            lost = storage.unreachable(e, workdir)
            if not lost and (reason := storage.failure(e, workdir)):
                lost = UserError(
                    f"--workdir: '{workdir}' cannot be written any more ({reason}); the same command continues from the last "
                    "checkpoint once it can"
                )
            if not lost:
                raise
            distributed.leave(lost)
            raise lost from e


def _run(experiment: Experiment, plans: dict, wanted: list[str], distillations: dict, workdir: Path) -> dict:
    config = experiment.config

    own = {name: functools.cache(functools.partial(teach, experiment, workdir, name)) for name in wanted}
    teacher_results = {name: finished(experiment, workdir, name) or own[name]()[1] for name in wanted}
    taught = {name: functools.cache(functools.partial(_with_fellows, experiment, name, own[name])) for name in wanted}
    for line in reporting.gates(teacher_results, {}):
        print(f"warning: {line}")
    learnt = students(experiment, workdir, plans, taught, distillations)
    known = [*([] if config.teacher.run else teacher_results.values()), *learnt]
    summary = reporting.build(
        name=config.name,
        config=json.loads(config.to_json()),
        environment=environment(),
        data=experiment.facts,
        teachers=teacher_results,
        student={"model": _title(config.student.model, config.student.width), **cost(experiment, experiment.student)},
        runs=learnt,
        seconds=sum(r["seconds"] for r in known),
        ensemble_members=config.student.ensemble,
    )
    distributed.decide(lambda: reporting.write(summary, workdir))
    if skipped := experiment.dataset.train.skipped:
        print(f"warning: {len(skipped)} training images could not be read and were replaced by others; they are named above")
    return summary


def _with_fellows(experiment: Experiment, name: str, own: Callable[[], tuple[Teacher, dict]]) -> tuple[Teacher, dict]:
    """The teacher `name` as it teaches: alone, or with those of other workdirs."""
    teacher, result = own()
    if name in experiment.fellows:
        how = experiment.config.student.teacher_sharding
        teacher = experiment.fellows[name].with_own(teacher, lambda tree: experiment.place(tree, how))
    return teacher, result


def _title(name: str, width: float) -> str:
    return name if width == 1 else f"{name} at width {width:g}"


def _announce(experiment: Experiment, wanted: list[str]) -> None:
    c, d = experiment.config, experiment.dataset
    held_out = f"{len(d.validation)} validation and " if d.validation is not None else ""
    print(
        f"{c.name}: {len(d.train)} training, {held_out}{len(d.test)} test images of {d.name}, "
        f"{d.num_classes} classes, {experiment.mesh.size} {jax.devices()[0].platform} device(s)"
    )
    lines = [(f"teacher {c.teacher.model}", w, experiment.teachers["slimmable"].members[w])
             for w in sorted(c.teacher.widths)]  # fmt: skip
    for label, width, model in [*lines, (f"student {c.student.model}", c.student.width, experiment.student)]:
        costs = cost(experiment, model)
        print(f"  {label} at width {width:<5g} {costs['params']:>12,} parameters {costs['macs']:>15,} MACs an image")
    for name, fellows in experiment.fellows.items():
        beside = ", ".join(f"{model} of {run}" for model, run in zip(fellows.models, fellows.runs, strict=True))
        print(f"  the {name} teacher teaches together with {beside}")
    if "slimmable" in wanted and c.teacher.batch_norm == "shared" and not c.teacher.calibration.images:
        print("  warning: batch norm shared between widths is wrong for all of them without teacher.calibration.images")
