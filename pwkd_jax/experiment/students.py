"""The students of every arm: each by itself, or several in one program, which leaves the same in the directory of each."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from clu import parameter_overview

from pwkd_jax import distillers, stages, storage
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import programs, results
from pwkd_jax.experiment.definition import Experiment
from pwkd_jax.reporting import per_class, summary
from pwkd_jax.training import distributed, loop, preemption, schedules, selection, students_together, study
from pwkd_jax.training import state as states
from pwkd_jax.training.checkpoints import Checkpoints
from pwkd_jax.training.distil import distil
from pwkd_jax.training.lessons import Lesson
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


class Group(NamedTuple):
    """Students in one program: `seeds` of each of `arms`."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]


def students(
    experiment: Experiment, workdir: Path, plans: Mapping[str, Sequence[stages.Stage]],
    taught: Mapping[str, Callable[[], tuple[Teacher, dict]]], distillations: Mapping[str, distillers.Distillation],
) -> list[dict]:  # fmt: skip
    """The results of all students, by arm and seed; those that are not trained yet are now, together if the config says so.

    taught: gives a teacher by its name, asked only where a student is to be trained. distillations: by the teacher's name.
    """
    c, directory = experiment.config, workdir / "students"
    seeds, found = range(c.seed, c.seed + c.seeds), {}
    for arm, plan in plans.items():
        own = {"arm": arm, "plan": [stage._asdict() for stage in plan]}
        for seed in seeds:
            found[arm, seed] = results.result(directory / arm / f"seed{seed}", summary.STUDENT, seed=seed, **own)

    @functools.cache
    def compiled(arms: tuple[str, ...], several: Several | None) -> tuple:
        if len(arms) > 1:
            return programs.study_steps(experiment, {arm: plans[arm] for arm in arms}, distillations, several)
        return programs.student_steps(experiment, plans[arms[0]], distillations.get(plans[arms[0]][0].teacher), several)

    pending = {arm: tuple(seed for seed in seeds if found[arm, seed] is None) for arm in plans}
    for group in groups(experiment, directory, pending):
        preemption.check()
        several = experiment.several(len(group.seeds), len(group.arms))
        arms = {}
        for arm in group.arms:
            name = plans[arm][0].teacher
            teacher = taught[name]()[0] if name in taught else None
            arms[arm] = Arm(experiment, arm, plans[arm], distillations.get(name), teacher)
        found |= _learn(arms, directory, group.seeds, compiled(group.arms, several), several)
    return [*found.values()]


def groups(experiment: Experiment, directory: Path, pending: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """Who trains with whom, of the seeds of each arm that are not trained yet; those who have begun together go on so.

    directory: of all students. Raises UserError where some of those who learn from each other are finished.
    """
    c = experiment.config
    seeds = tuple(range(c.seed, c.seed + c.seeds))
    left, found = {arm: list(own) for arm, own in pending.items()}, []
    online = "student.online" if c.student.online else "student.mutual"
    for group in distributed.decide(lambda: _begun(directory)):
        ours = {*group.arms} <= {*left} and {*group.seeds} <= {*seeds} and (c.student.study or len(group.arms) == 1)
        whole = group.seeds == seeds or not c.student[online.removeprefix("student.")]
        waiting = [seed for arm in group.arms for seed in left.get(arm, ()) if seed in group.seeds]
        if ours and whole and waiting and experiment.several(len(group.seeds), len(group.arms)):
            found.append(group)
            left |= {arm: [seed for seed in left[arm] if seed not in group.seeds] for arm in group.arms}
    for arm, own in left.items():
        if c.student[online.removeprefix("student.")] and 0 < len(own) < len(seeds):
            raise UserError(
                f"seeds: of {arm} {len(seeds) - len(own)} of {len(seeds)} students are finished, and those of {online} "
                "learn from each other from their first step on; begin a new workdir"
            )
    by_seeds: dict[tuple, list[str]] = {}
    for arm, own in left.items():
        by_seeds.setdefault((*own,) if c.student.study else (*own, arm), []).append(arm)
    for arms in by_seeds.values():
        own = tuple(left[arms[0]])
        if experiment.several(len(own), len(arms)):
            found.append(Group(tuple(arms), own))
        else:
            found += [Group((arm,), (seed,)) for arm in arms for seed in own]
    return [group for group in found if group.seeds]


def _folder(group: Group) -> str:
    """Where they train together, below `students`: not at home in any seed's directory; those are written when all have
    finished."""
    return f"{'+'.join(group.arms)}/seeds{'+'.join(map(str, group.seeds))}"


def _begun(directory: Path) -> list[Group]:
    """Those who have trained together, and not to their end."""
    found = []
    for path in storage.holding(directory, "checkpoints"):
        arms, seeds = path.parts[-2].split("+"), path.parts[-1].removeprefix("seeds").split("+")
        if path.parts[-1].startswith("seeds") and all(map(str.isdigit, seeds)):
            found.append(Group(tuple(arms), tuple(map(int, seeds))))
    return found


def _learn(
    arms: Mapping[str, Arm], directory: Path, seeds: Sequence[int], compiled: tuple, several: Several | None
) -> dict[tuple[str, int], dict]:
    """{(arm, seed): result} of students that are not trained yet, in `directory`/ARM/seedN. compiled: `programs.student_steps`,
    or `study_steps`, of so many."""
    name = next(iter(arms))
    if several:
        path = directory / _folder(Group(tuple(arms), tuple(seeds)))
        if len(arms) > 1:
            learnt = _study(arms, path, f"study of {len(arms)} arms, {len(seeds)} seeds", seeds, compiled, several)
        else:
            learnt = {name: _train(arms[name], path, f"{name}, {len(seeds)} seeds", seeds, compiled, several)}
        done = {
            (name, seed): _leave(arm, directory / name, seeds, i, learnt[name])
            for name, arm in arms.items() for i, seed in enumerate(seeds)
        }  # fmt: skip
    else:
        learnt = _train(arms[name], directory / name / f"seed{seeds[0]}", f"{name}/seed{seeds[0]}", seeds[0], compiled)
        done = {(name, seeds[0]): arms[name].result(seeds[0], learnt.rows, learnt.snapshots)}
    for (name, seed), result in done.items():
        distributed.write(directory / name / f"seed{seed}" / "result.json", json.dumps(result))
    if several and distributed.primary():
        storage.remove(path)
        if len(arms) > 1 and not storage.names(path.parent):
            storage.remove(path.parent, missing_ok=True)
    return {key: json.loads(json.dumps(result)) for key, result in done.items()}


def _train(
    arm: Arm, directory: Path, label: str, seed: int | Sequence[int], compiled: tuple, several: Several | None = None
) -> Student:
    """A run of one student, or of several, whose seeds are [students]."""
    experiment, c = arm.experiment, arm.experiment.config.student
    return distil(
        experiment.student, arm.teacher, experiment.task, distiller=arm.distillation, plan=arm.plan, batch_size=c.batch_size,
        optimizer=experiment.rule("student", *experiment.spans(arm.plan)), seed=seed,
        # Students that share their batches see those of the first seed, whether they train together or not.
        data_seed=experiment.config.seed if c.batches == "shared" else None,
        start=experiment.start.get("student"), reset=c.reset, connectors=c.connectors, directory=directory, label=label,
        cadence=_cadence(arm, several), several=several, profiled=experiment.config.profile,
        patience=experiment.config.evaluation.patience, compiled=compiled,
    )  # fmt: skip


def _study(
    arms: Mapping[str, Arm], directory: Path, label: str, seeds: Sequence[int], compiled: tuple, several: Several
) -> dict[str, study.Learnt]:
    """A run of the students of several arms."""
    first = next(iter(arms.values()))
    experiment, c = first.experiment, first.experiment.config.student
    lessons = {
        name: Lesson(experiment.student, arm.plan, arm.distillation, arm.teacher, experiment.task,
                     experiment.rule("student", *experiment.spans(arm.plan)), several, c.reset, c.connectors)
        for name, arm in arms.items()
    }  # fmt: skip
    return study.learn(
        lessons, experiment.task, seeds, compiled, batch_size=c.batch_size, order=experiment.config.seed,
        start=experiment.start.get("student"), directory=directory, label=label, cadence=_cadence(first, several),
        profiled=experiment.config.profile,
    )  # fmt: skip


def _cadence(arm: Arm, several: Several | None) -> loop.Cadence:
    cadence = arm.experiment.cadence(arm.ends[-1], arm.experiment.config.student.batch_size)
    return cadence._replace(tracker="") if several else cadence  # each is a run by itself, in `_leave`


def _leave(arm: Arm, directory: Path, seeds: Sequence[int], index: int, learnt: Student | study.Learnt) -> dict:
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
