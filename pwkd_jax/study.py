"""The students of one arm: each seed by itself, or all in one program, which leaves the same in the directory of each."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from pwkd_jax import distillers, runs, stages
from pwkd_jax.setting import Setting
from pwkd_jax.training import distributed, loop, student, together
from pwkd_jax.training import state as states
from pwkd_jax.training.checkpoints import Checkpoints
from pwkd_jax.training.together import Several
from pwkd_jax.training.writers import Writer


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of an experiment: who learns what. frozen: {width: variables} of the teacher, {} without one."""

    setting: Setting
    name: str
    plan: Sequence[stages.Stage]
    distillation: distillers.Distillation | None
    frozen: dict[float, dict]

    @property
    def ends(self) -> list[int]:
        return [s.end for s in self.plan]

    def judged(self, state: states.State) -> tuple:
        """(model, variables) whose logits count: the student's, unless its distiller has the last word on them."""
        if self.distillation is None or not self.distillation.predicts:
            return self.setting.student, student.variables(state)
        stage = next(s for s in self.plan if int(state.step) <= s.end)
        width, net = max(stage.widths), self.setting.teachers[stage.teacher]
        model = student.Assisted(self.setting.student, net.members[width], self.distillation, width)
        return model, model.variables(state, self.frozen[width])

    def evaluate(self, state: states.State) -> dict[str, float]:
        score = self.setting.evaluator(*self.judged(state))
        return {"top1": score["top1"], "test_loss": score["loss"]}

    def result(self, seed: int, rows: Sequence[dict], saved: Sequence[states.State]) -> dict:
        """result.json of a student. saved: its states at the ends of stages, none where there is one stage."""
        setting, ends, total = self.setting, self.ends, self.ends[-1]
        evaluated = [r for r in rows if "top1" in r]
        at_step = {r["step"]: r["top1"] for r in evaluated}
        ensemble = setting.evaluator.ensemble_top1([self.judged(s) for s in saved])
        rates = stages.table(setting.schedule("student", *setting.spans(self.plan)), total)
        shown = np.unique(np.concatenate([np.linspace(0, total - 1, min(total, 360)).astype(int), np.array(ends) - 1]))
        return {
            "arm": self.name,
            "seed": seed,
            "plan": [s._asdict() for s in self.plan],
            "cycles": setting.spans(self.plan)[0],
            "top1_last": evaluated[-1]["top1"],
            "top1_best": max(r["top1"] for r in evaluated),
            "stage_ends": [at_step[end] for end in ends],
            "ensemble": [{"members": m + 1, "top1": score} for m, score in enumerate(ensemble)],
            "curve": [runs.point(r) | {"top1": r["top1"]} for r in evaluated],
            "learning_rates": [[int(s), float(rates[s])] for s in shown],
            **runs.effort(rows, total, setting.config.student.batch_size, len(setting.dataset.train)),
        }


def study(arm: Arm, directory: Path, seeds: Sequence[int], steps: tuple, several: Several | None) -> list[dict]:
    """The results of students that are not trained yet, in `directory`/seedN. steps: `programs.student_steps` of so many."""
    if several:
        # Not at home in any seed's directory while they train; those are written when all have finished.
        path, label = directory / f"seeds{'+'.join(map(str, seeds))}", f"{arm.name}, {len(seeds)} seeds"
        state, rows = _train(arm, path, label, np.asarray(seeds, np.uint32), steps, several)
        saved = loop.snapshots(path, state, arm.ends) if len(arm.ends) > 1 else [state]
        results = [_leave(arm, directory, seeds, i, rows, saved) for i in range(len(seeds))]
    else:
        path = directory / f"seed{seeds[0]}"
        state, rows = _train(arm, path, f"{arm.name}/seed{seeds[0]}", seeds[0], steps)
        saved = loop.snapshots(path, state, arm.ends) if len(arm.ends) > 1 else []
        results = [arm.result(seeds[0], rows, saved)]
    for seed, result in zip(seeds, results, strict=True):
        runs.write(directory / f"seed{seed}" / "result.json", json.dumps(result))
    if several and distributed.primary():
        shutil.rmtree(path)
    return json.loads(json.dumps(results))


def _train(arm: Arm, directory: Path, label: str, seed, steps: tuple, several: Several | None = None) -> tuple:
    """(final state, rows) of a run of one student, or of several, whose seeds are [students]."""
    setting, c = arm.setting.on(several), arm.setting.config.student
    (create, programs), tx = steps, setting.optimizer("student")
    init = jax.vmap(tx.init) if several else tx.init

    def fresh() -> states.State:
        return create(seed, setting.start.get("student"))

    def enter(state: states.State) -> states.State:
        if not int(state.step):
            return state
        return jax.device_put(student.enter_stage(state, fresh, init, c.reset, c.connectors), create.layout)

    def evaluate(state: states.State) -> dict[str, float]:
        if not several:
            return arm.evaluate(state)
        return together.names([arm.evaluate(arm.setting.place(together.member(state, i))) for i in range(several.count)])

    frozen = arm.frozen if setting is arm.setting else setting.place(arm.frozen)
    segments = [
        loop.Segment(s.end, functools.partial(programs[s.widths], teacher={w: frozen[w] for w in s.widths}), enter)
        for s in arm.plan
    ]
    state = fresh()
    overview = parameter_overview.get_parameter_overview(state.params)
    runs.write(directory / "parameters.txt", overview + "\n")
    # Students that share their batches see those of the first seed, whether they train together or not.
    batches = setting.batches(c.batch_size, setting.config.seed if c.batches == "shared" else seed)
    return loop.run(
        directory, label, state, segments, batches, evaluate, setting.cadence(arm.ends[-1], c.batch_size),
        images=len(setting.dataset.train), batch_size=c.batch_size, texts={"parameters": overview}, keep=arm.ends,
        profiled=setting.config.profile,
    )  # fmt: skip


def _leave(arm: Arm, directory: Path, seeds: Sequence[int], index: int, rows, saved: Sequence[states.State]) -> dict:
    """The result of one of several students; writes the rows and checkpoints that it would have written alone."""
    directory = directory / f"seed{seeds[index]}"
    if distributed.primary():
        shutil.rmtree(directory, ignore_errors=True)  # what a run alone began, or a kill tore
    rows = together.own_rows(rows, index, len(seeds))
    own = [arm.setting.place(together.member(state, index)) for state in saved]
    checkpoints = Checkpoints(directory / "checkpoints", keep=arm.ends)
    for state in own:
        checkpoints.save(int(state.step), state)
    checkpoints.close()
    overview = parameter_overview.get_parameter_overview(own[-1].params)
    runs.write(directory / "parameters.txt", overview + "\n")
    writer = Writer(directory, tensorboard=arm.setting.config.log.tensorboard)
    for row in rows:
        writer.write_scalars(row["step"], {key: value for key, value in row.items() if key != "step"})
    writer.flush()
    writer.close()
    return arm.result(seeds[index], rows, own if len(arm.ends) > 1 else [])
