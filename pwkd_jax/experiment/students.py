"""The students of one arm: each seed by itself, or all in one program, which leaves the same in the directory of each."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from clu import parameter_overview

from pwkd_jax import distillers, stages, storage
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import programs, results
from pwkd_jax.experiment.definition import Experiment
from pwkd_jax.reporting import per_class, summary
from pwkd_jax.training import distributed, preemption, schedules, selection, students_together
from pwkd_jax.training import state as states
from pwkd_jax.training.checkpoints import Checkpoints
from pwkd_jax.training.distil import distil
from pwkd_jax.training.outcome import Student, judged
from pwkd_jax.training.students_together import Several
from pwkd_jax.training.teacher import Teacher
from pwkd_jax.training.writers import Writer


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of an experiment: who learns what. teacher: None without one."""

    experiment: Experiment
    name: str
    plan: Sequence[stages.Stage]
    distillation: distillers.Distillation | None
    teacher: Teacher | None

    @property
    def ends(self) -> list[int]:
        return [s.end for s in self.plan]

    def judged(self, state: states.State) -> tuple:
        """(model, variables) whose logits count, see `outcome.judged`."""
        return judged(self.experiment.student, self.distillation, self.plan, self.teacher, state)

    def result(self, seed: int, rows: Sequence[dict], saved: Sequence[states.State]) -> dict:
        """result.json of a student. saved: its states at the ends of its stages; it is judged by the last."""
        experiment, total = self.experiment, rows[-1]["step"]
        ends = [*self.ends[:-1], total]  # of a last stage that patience cut short
        evaluated = [r for r in rows if "top1" in r]
        best = selection.best(rows)
        chosen = {} if best is None else {"selected": next(
            {key: r[key] for key in ("step", "validation_top1", "top1")} for r in rows if r["step"] == best
        )}  # fmt: skip
        at_step = {r["step"]: r["top1"] for r in evaluated}
        judged = [self.judged(s) for s in saved]
        ensemble = experiment.evaluator.ensemble_top1(judged) if len(ends) > 1 else []
        rates = schedules.table(experiment.schedule("student", *experiment.spans(self.plan)), total)
        shown = np.unique(np.concatenate([np.linspace(0, total - 1, min(total, 360)).astype(int), np.array(ends) - 1]))
        return {
            "arm": self.name,
            "seed": seed,
            "plan": [s._asdict() for s in self.plan],
            "cycles": experiment.spans(self.plan)[0],
            "top1_last": evaluated[-1]["top1"],
            "top1_best": max(r["top1"] for r in evaluated),
            "stage_ends": [at_step[end] for end in ends],
            "ensemble": [{"members": m + 1, "top1": score} for m, score in enumerate(ensemble)],
            "curve": [results.point(r) | {"top1": r["top1"]} for r in evaluated],
            "learning_rates": [[int(s), float(rates[s])] for s in shown],
            "classes": per_class.counts(*experiment.evaluator.predictions(*judged[-1]), experiment.task.num_classes),
            **chosen,
            **results.effort(rows, total, experiment.config.student.batch_size, len(experiment.dataset.train)),
        }


def students(
    experiment: Experiment, workdir: Path, arm: str, plan: Sequence[stages.Stage],
    taught: Callable[[], tuple[Teacher, dict]] | None, distillation: distillers.Distillation | None,
) -> list[dict]:  # fmt: skip
    """The results of an arm's students, by seed; those that are not trained yet are now, together if the config says so.

    taught: gives the arm's teacher, asked only where a student is to be trained.
    """
    c, directory = experiment.config, workdir / "students" / arm
    seeds = range(c.seed, c.seed + c.seeds)
    own = {"arm": arm, "plan": [stage._asdict() for stage in plan]}
    found = {seed: results.result(directory / f"seed{seed}", summary.STUDENT, seed=seed, **own) for seed in seeds}
    pending = [seed for seed in seeds if found[seed] is None]
    online = "student.online" if experiment.config.student.online else "student.mutual"
    if experiment.config.student[online.removeprefix("student.")] and 0 < len(pending) < len(seeds):
        raise UserError(
            f"seeds: of {arm} {len(seeds) - len(pending)} of {len(seeds)} students are finished, and those of {online} "
            "learn from each other from their first step on; begin a new workdir"
        )
    several = experiment.several(len(pending))
    groups = [pending] if several else [[seed] for seed in pending]
    if pending:
        compiled = programs.student_steps(experiment, plan, distillation, several)
        own = Arm(experiment, arm, plan, distillation, taught()[0] if taught else None)
    for group in groups:
        preemption.check()
        found |= dict(zip(group, _learn(own, directory, group, compiled, several), strict=True))
    return list(found.values())


def _learn(arm: Arm, directory: Path, seeds: Sequence[int], compiled: tuple, several: Several | None) -> list[dict]:
    """The results of students that are not trained yet, in `directory`/seedN. compiled: `programs.student_steps` of so many."""
    if several:
        # Not at home in any seed's directory while they train; those are written when all have finished.
        path, label = directory / f"seeds{'+'.join(map(str, seeds))}", f"{arm.name}, {len(seeds)} seeds"
        learnt = _train(arm, path, label, seeds, compiled, several)
        done = [_leave(arm, directory, seeds, i, learnt) for i in range(len(seeds))]
    else:
        path = directory / f"seed{seeds[0]}"
        learnt = _train(arm, path, f"{arm.name}/seed{seeds[0]}", seeds[0], compiled)
        done = [arm.result(seeds[0], learnt.rows, learnt.snapshots)]
    for seed, result in zip(seeds, done, strict=True):
        distributed.write(directory / f"seed{seed}" / "result.json", json.dumps(result))
    if several and distributed.primary():
        storage.remove(path)
    return json.loads(json.dumps(done))


def _train(
    arm: Arm, directory: Path, label: str, seed: int | Sequence[int], compiled: tuple, several: Several | None = None
) -> Student:
    """A run of one student, or of several, whose seeds are [students]."""
    experiment, c = arm.experiment, arm.experiment.config.student
    cadence = experiment.cadence(arm.ends[-1], c.batch_size)
    cadence = cadence._replace(tracker="") if several else cadence  # each is a run by itself, in `_leave`
    return distil(
        experiment.student, arm.teacher, experiment.task, distiller=arm.distillation, plan=arm.plan, batch_size=c.batch_size,
        optimizer=experiment.rule("student", *experiment.spans(arm.plan)), seed=seed,
        # Students that share their batches see those of the first seed, whether they train together or not.
        data_seed=experiment.config.seed if c.batches == "shared" else None,
        start=experiment.start.get("student"), reset=c.reset, connectors=c.connectors, directory=directory, label=label,
        cadence=cadence, several=several, profiled=experiment.config.profile,
        patience=experiment.config.evaluation.patience, compiled=compiled,
    )  # fmt: skip


def _leave(arm: Arm, directory: Path, seeds: Sequence[int], index: int, learnt: Student) -> dict:
    """The result of one of several students; writes the rows and checkpoints that it would have written alone."""
    directory = directory / f"seed{seeds[index]}"
    if distributed.primary():
        storage.remove(directory, missing_ok=True)  # what a run alone began, or a kill tore
    rows = students_together.own_rows(learnt.rows, index, len(seeds))
    own, best = (
        [arm.experiment.place(students_together.member(state, index)) for state in states]
        for states in (learnt.snapshots, learnt.best[index : index + 1])
    )
    checkpoints = Checkpoints(directory / "checkpoints", keep=arm.ends)
    checkpoints.choose({int(state.step) for state in best})
    for state in sorted([*best, *own], key=lambda state: int(state.step)):
        checkpoints.save(int(state.step), state)
    checkpoints.close()
    overview = parameter_overview.get_parameter_overview(own[-1].params)
    distributed.write(directory / "parameters.txt", overview + "\n")
    log = arm.experiment.config.log
    writer = Writer(directory, tensorboard=log.tensorboard, tracker=log.tracker)
    for row in rows:
        writer.write_scalars(row["step"], {key: value for key, value in row.items() if key != "step"})
    writer.flush()
    writer.close()
    return arm.result(seeds[index], rows, own)
