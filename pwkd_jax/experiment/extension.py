"""A finished run made longer: possible where every step that was taken would have been the same in the longer one.

That is so for runs of one stage whose learning rate does not depend on their length, as under a constant schedule, with
what goes with it: EMA, or a schedule-free optimiser. They then end with the bits of a run that was never short.
"""

import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from pwkd_jax import storage
from pwkd_jax.config import leaves
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition
from pwkd_jax.experiment.workdir import FREE, config_of
from pwkd_jax.training import schedules


def extend(workdir: Path, config: ConfigDict, facts: dict) -> None:
    """Where `config` differs from that of the workdir's runs in a longer duration alone, let them go on to it: their results
    are taken away, their checkpoints stay. Raises UserError, with the reason, where they cannot."""
    path = workdir / "config.json"
    if not storage.exists(path):
        return
    before = config_of(workdir)
    then, now = dict(leaves(before)), dict(leaves(config))
    differ = {key for key in then.keys() | now.keys() if key not in FREE and then.get(key) != now.get(key)}
    if not differ or not differ <= {"teacher.duration", "student.duration"}:
        return
    students = [p.relative_to(workdir / "students") for p in storage.holding(workdir / "students", "checkpoints")]
    if "teacher.duration" in differ:
        if students:
            raise UserError(
                f"teacher.duration: the students of '{workdir}' were taught by a teacher of {before.teacher.duration}; give "
                "another workdir"
            )
        names = [p.name for p in storage.holding(workdir / "teacher", "checkpoints")]
        for name in names:
            _refuse(before, config, facts, "teacher", name)
        _go_on([workdir / "teacher" / name for name in names], workdir)
    if "student.duration" in differ and students:
        for arm in sorted({arm for run in students for arm in run.parts[0].split("+")}):
            _refuse(before, config, facts, "student", arm)
        learner = config.student
        trained = students if learner.study else {run.parts[-1] for run in students}
        if len(trained) > 1 and learner.batches == "shared" and learner.together != "none":
            raise UserError("student.duration: students of one program go on one by one; set student.together=none")
        _go_on([workdir / "students" / run for run in students], workdir)
    storage.replace(path, config.to_json(indent=2) + "\n")


def _refuse(before: ConfigDict, config: ConfigDict, facts: dict, who: str, name: str) -> None:
    """UserError unless the run `name` goes on from `before` to `config` as if it had always been as long."""
    key, rates, ends = f"{who}.duration", [], []
    for c in (before, config):
        if who == "teacher":
            spans, form, decay = [(0, _steps(c, facts))], "", 1.0
        else:
            plan = definition.plan(c, facts, name)
            if len(plan) > 1:
                raise UserError(f"{key}: the stages of '{name}' would begin and end at other steps; give another workdir")
            spans, form, decay = definition.spans(c, plan)
        ends.append(spans[-1][1])
        rates.append(schedules.table(definition.schedule(c, facts, who, spans, form, decay), ends[-1]))
    if ends[1] < ends[0]:
        raise UserError(f"{key}: '{name}' has had {ends[0]} steps, more than these {ends[1]}; give another workdir")
    if not np.array_equal(rates[0], rates[1][: ends[0]]):
        raise UserError(
            f"{key}: the learning rates of '{name}' depend on its length; what is to be made longer needs "
            "schedule.form=constant, so give another workdir, and the weights of this one where it should go on"
        )


def _steps(config: ConfigDict, facts: dict) -> int:
    c = config.teacher
    return schedules.steps(c.duration, "teacher.duration", batch_size=c.batch_size, images=facts["train_images"])


def _go_on(runs: list[Path], workdir: Path) -> None:
    for run in runs:
        for name in storage.names(run):
            if name == "result.json" or name.startswith("width_"):
                storage.remove(run / name)
    for name in ("summary.json", "report.html"):
        if storage.exists(workdir / name):
            storage.remove(workdir / name)
    print(f"{len(runs)} runs of '{workdir}' go on from where they ended", file=sys.stderr)
