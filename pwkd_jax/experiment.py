"""One experiment: its teachers, then every arm and seed of its students, then the report. Resumes by itself.

    WORKDIR/config.json, data.json            what it was started with, and facts of its data
    WORKDIR/teacher/slimmable, .../standard   checkpoints, metrics.jsonl, TensorBoard events; when finished, result.json and
                                              the frozen weights of every width as width_W.safetensors
    WORKDIR/students/ARM/seedN                the same without the last
    WORKDIR/summary.json, report.html
"""

import functools
import json
import time
from pathlib import Path

import flax.linen as nn
import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from pwkd_jax import lending, programs, runs, slimmable, stages, study, weights
from pwkd_jax.config import leaves
from pwkd_jax.errors import UserError
from pwkd_jax.files import replace
from pwkd_jax.models import costs
from pwkd_jax.reporting import summary as reporting
from pwkd_jax.reporting.environment import environment
from pwkd_jax.setting import Setting, prepare
from pwkd_jax.training import distributed, loop, preemption, teacher
from pwkd_jax.training import state as states

# Keys that may change between two commands in one workdir: they add runs to it, or change nothing of a finished one.
FREE = (
    "name", "arms", "seeds", "data.data_dir", "data.workers", "data.on_device", "steps_per_dispatch", "teacher.run",
    "student.ensemble", "log.every", "log.tensorboard", "checkpoint.every", "mesh.model", "teacher.sharding",
    "student.sharding", "student.teacher_sharding", "student.together", "profile",
)  # fmt: skip


def run(config: ConfigDict, workdir: Path) -> dict:
    """Train what is not yet trained, write summary.json and report.html, and return the summary."""
    setting = distributed.together(lambda: prepare(config))
    plans = {arm: setting.plan(arm) for arm in config.arms}
    teaching = {t: {w for plan in plans.values() for s in plan if s.teacher == t for w in s.widths} for t in setting.teachers}
    wanted = [t for t, widths in teaching.items() if widths]
    distillations = {t: setting.distillation(t, teaching[t]) for t in wanted}
    distributed.together(lambda: lending.check(config, setting.facts, wanted))
    distributed.decide(lambda: _claim(workdir, config, setting.facts))
    _announce(setting, wanted)

    taught = {name: functools.cache(functools.partial(_teach, setting, workdir, name)) for name in wanted}
    teacher_results = {name: runs.result(workdir / "teacher" / name) or taught[name]()[1] for name in wanted}
    students = []
    for arm, plan in plans.items():
        students += _students(setting, workdir, arm, plan, taught.get(plan[0].teacher), distillations.get(plan[0].teacher))

    known = [*([] if config.teacher.run else teacher_results.values()), *students]
    summary = reporting.build(
        name=config.name,
        config=json.loads(config.to_json()),
        environment=environment(),
        data=setting.facts,
        teachers=teacher_results,
        student={"model": _title(config.student.model, config.student.width), **_costs(setting, setting.student)},
        runs=students,
        seconds=sum(r["seconds"] for r in known),
        ensemble_members=config.student.ensemble,
    )
    distributed.decide(lambda: reporting.write(summary, workdir))
    if skipped := setting.dataset.train.skipped:
        print(f"warning: {len(skipped)} training images could not be read and were replaced by others; they are named above")
    return summary


# The teacher.


def _teach(setting: Setting, workdir: Path, name: str) -> tuple[dict[float, dict], dict]:
    """({width: frozen variables}, result) of a teacher, trained as far as it was not yet."""
    c, net, directory = setting.config.teacher, setting.teachers[name], workdir / "teacher" / name
    if c.run:
        distributed.decide(lambda: lending.copy(Path(c.run), workdir, name))
    if result := runs.result(directory):
        paths = {w: directory / f"width_{slimmable.width_key(w)}.safetensors" for w in net.table}
        # A file has no place for a collection without arrays: a model without batch norm has one.
        frozen = {w: {key: {} for key in net.likes[w]} | weights.read(path, c.model)[0] for w, path in paths.items()}
        return setting.place(frozen, setting.config.student.teacher_sharding), result
    if name == "standard" and name in setting.start:
        return _given(setting, directory)
    images = len(setting.dataset.train)
    total = stages.steps(c.duration, "teacher.duration", batch_size=c.batch_size, images=images)
    create, step = programs.teacher_step(setting, name)
    calibrate = teacher.make_calibration(net, setting.dataset.train, setting.preprocess, setting.mesh, **c.calibration)

    def freeze(state: states.State) -> dict[float, dict]:
        frozen = teacher.freeze(net, state.params, state.collections)
        frozen = calibrate(frozen) if c.calibration.images else frozen
        return setting.place(frozen, setting.config.student.teacher_sharding)

    def evaluate(state: states.State) -> dict[str, float]:
        scores = {w: setting.evaluator(net.members[w], v)["top1"] for w, v in freeze(state).items()}
        return {f"top1_{slimmable.width_key(w)}": score for w, score in scores.items()}

    state = create(setting.config.seed, setting.start.get(name))
    overview = parameter_overview.get_parameter_overview(net.extract(state.params, state.collections, net.widest)["params"])
    runs.write(directory / "parameters.txt", overview + "\n")
    state, rows = loop.run(
        directory, f"teacher/{name}", state, [loop.Segment(total, step, lambda s: s)],
        setting.batches(c.batch_size, setting.config.seed), evaluate, setting.cadence(total, c.batch_size),
        images=images, batch_size=c.batch_size, texts={"parameters": overview}, profiled=setting.config.profile,
    )  # fmt: skip
    evaluated = [r for r in rows if any(k.startswith("top1_") for k in r)]
    keys = {w: f"top1_{slimmable.width_key(w)}" for w in sorted(net.table)}
    result = {
        "model": c.model,
        "widths": [
            {
                "width": w,
                **_costs(setting, net.members[w]),
                "top1_last": evaluated[-1][key],
                "top1_best": max(r[key] for r in evaluated),
            }
            for w, key in keys.items()
        ],
        "curve": [runs.point(r) | {"top1": {slimmable.width_key(w): r[k] for w, k in keys.items()}} for r in evaluated],
        **runs.effort(rows, total, c.batch_size, images),
    }
    frozen = freeze(state)
    _keep(setting, directory, name, frozen, result)
    return frozen, result


def _given(setting: Setting, directory: Path) -> tuple[dict[float, dict], dict]:
    """The same of an ordinary teacher whose weights were given: it is not trained, only scored."""
    c, net, variables = setting.config.teacher, setting.teachers["standard"], setting.start["standard"]
    variables = setting.place(variables, setting.config.student.teacher_sharding)
    begun = time.monotonic()
    top1 = setting.evaluator(net.members[1.0], variables)["top1"]
    row = {"width": 1.0, **_costs(setting, net.members[1.0]), "top1_last": top1, "top1_best": top1}
    effort = {"steps": 0, "epochs": 0.0, "seconds": time.monotonic() - begun, "images_per_second": 0.0}
    result = {"model": c.model, "widths": [row], "curve": [], **effort}
    _keep(setting, directory, "standard", {1.0: variables}, result)
    return {1.0: variables}, result


def _keep(setting: Setting, directory: Path, name: str, frozen: dict[float, dict], result: dict) -> None:
    """Write a finished teacher's weights, then its result."""
    c = setting.config.teacher
    top1 = {row["width"]: row["top1_last"] for row in result["widths"]}
    for width, variables in frozen.items():
        variables = distributed.fetch(variables)
        if not distributed.primary():
            continue
        source = {"run": f"teacher/{name}", "steps": result["steps"], "top1": top1[width]}
        card = setting.card(c.model, width, c.divisor, source)
        weights.write(directory / f"width_{slimmable.width_key(width)}.safetensors", variables, card)
    runs.write(directory / "result.json", json.dumps(result))


def _students(setting: Setting, workdir: Path, arm: str, plan, taught, distillation) -> list[dict]:
    """The results of an arm's students, by seed; those that are not trained yet are now, together if the config says so."""
    c, directory = setting.config, workdir / "students" / arm
    seeds = range(c.seed, c.seed + c.seeds)
    found = {seed: runs.result(directory / f"seed{seed}") for seed in seeds}
    pending = [seed for seed in seeds if found[seed] is None]
    several = setting.several(len(pending))
    groups = [pending] if several else [[seed] for seed in pending]
    if pending:
        steps = programs.student_steps(setting, plan, distillation, several)
        own = study.Arm(setting, arm, plan, distillation, taught()[0] if taught else {})
    for group in groups:
        preemption.check()
        found |= dict(zip(group, study.study(own, directory, group, steps, several), strict=True))
    return list(found.values())


# Around them.


def _costs(setting: Setting, model: nn.Module) -> dict[str, int]:
    shape = setting.dataset.image_shape
    return {"params": costs.parameters(model, shape), "macs": costs.macs(model, shape)}


def _title(name: str, width: float) -> str:
    return name if width == 1 else f"{name} at width {width:g}"


def _claim(workdir: Path, config: ConfigDict, facts: dict) -> None:
    """Write config.json and data.json, or refuse a workdir that holds runs of another config."""
    path = workdir / "config.json"
    if path.exists():
        before = dict(leaves(ConfigDict(json.loads(path.read_text()))))
        now = dict(leaves(ConfigDict(json.loads(config.to_json()))))
        differ = [k for k in sorted(before.keys() | now.keys()) if k not in FREE and before.get(k) != now.get(k)]
        if differ:
            key = differ[0]
            more = f" (and {len(differ) - 1} more keys)" if len(differ) > 1 else ""
            raise UserError(
                f"--workdir: '{workdir}' holds runs with {key} = {before.get(key)!r}, not {now.get(key)!r}{more}; "
                "give another workdir"
            )
    try:
        replace(path, config.to_json(indent=2) + "\n")
        replace(workdir / "data.json", json.dumps(facts, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be written ({e.strerror})") from e


def _announce(setting: Setting, wanted: list[str]) -> None:
    c, d = setting.config, setting.dataset
    print(
        f"{c.name}: {len(d.train)} training and {len(d.test)} test images of {d.name}, "
        f"{d.num_classes} classes, {setting.mesh.size} {jax.devices()[0].platform} device(s)"
    )
    lines = [(f"teacher {c.teacher.model}", w, setting.teachers["slimmable"].members[w])
             for w in sorted(c.teacher.widths)]  # fmt: skip
    for label, width, model in [*lines, (f"student {c.student.model}", c.student.width, setting.student)]:
        cost = _costs(setting, model)
        print(f"  {label} at width {width:<5g} {cost['params']:>12,} parameters {cost['macs']:>15,} MACs an image")
    if "slimmable" in wanted and c.teacher.batch_norm == "shared" and not c.teacher.calibration.images:
        print("  warning: batch norm shared between widths is wrong for all of them without teacher.calibration.images")
