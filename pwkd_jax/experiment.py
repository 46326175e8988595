"""One experiment: its teachers, then every arm and seed of its students, then the report. Resumes by itself.

    WORKDIR/config.json                       what it was started with
    WORKDIR/teacher/slimmable, .../standard   checkpoints, metrics.jsonl, TensorBoard events, result.json when finished
    WORKDIR/students/ARM/seedN                the same
    WORKDIR/summary.json, report.html
"""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

import pwkd_jax
from pwkd_jax import data, distillers, models, slimmable, stages
from pwkd_jax.config import leaves
from pwkd_jax.errors import UserError
from pwkd_jax.files import replace
from pwkd_jax.models import costs
from pwkd_jax.reporting import summary as reporting
from pwkd_jax.training import loop, sharding, student, teacher
from pwkd_jax.training import state as states
from pwkd_jax.training.evaluation import Evaluator

# Keys that may change between two commands in one workdir: they add runs to it, or change nothing of a finished one.
FREE = ("name", "arms", "seeds", "data.data_dir", "student.ensemble", "log.every", "log.tensorboard", "checkpoint.every")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share, made and checked before anything is trained or written."""

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


def run(config: ConfigDict, workdir: Path) -> dict:
    """Train what is not yet trained, write summary.json and report.html, and return the summary."""
    setting = prepare(config)
    plans = {arm: _plan(setting, arm) for arm in config.arms}
    wanted = [t for t in ("slimmable", "standard") if any(s.teacher == t for plan in plans.values() for s in plan)]
    distillations = {t: _distillation(setting, setting.teachers[t], plans) for t in wanted}
    _claim(workdir, config)
    _announce(setting, wanted)

    taught = {name: functools.cache(functools.partial(_teach, setting, workdir, name)) for name in wanted}
    teacher_results = {name: _result(workdir / "teacher" / name) or taught[name]()[1] for name in wanted}
    runs = []
    for arm, plan in plans.items():
        source = plan[0].teacher
        steps = functools.cache(functools.partial(_student_steps, setting, plan, distillations.get(source)))
        for seed in range(config.seed, config.seed + config.seeds):
            directory = workdir / "students" / arm / f"seed{seed}"
            result = _result(directory)
            if result is None:
                frozen = taught[source]()[0] if source in taught else {}
                result = _study(setting, directory, arm, plan, seed, steps(), frozen, distillations.get(source))
            runs.append(result)

    known = [*teacher_results.values(), *runs]
    summary = reporting.build(
        name=config.name,
        config=json.loads(config.to_json()),
        environment=environment(),
        data={
            "name": setting.dataset.name,
            "train_images": len(setting.dataset.train.labels),
            "test_images": len(setting.dataset.test.labels),
            "num_classes": setting.dataset.num_classes,
            "image_shape": list(setting.dataset.image_shape),
        },
        teachers=teacher_results,
        student={"model": _title(config.student.model, config.student.width), **_costs(setting, setting.student)},
        runs=runs,
        seconds=sum(r["seconds"] for r in known),
        ensemble_members=config.student.ensemble,
    )
    reporting.write(summary, workdir)
    return summary


# The teacher.


def _teach(setting: Setting, workdir: Path, name: str) -> tuple[dict[float, dict], dict]:
    """({width: frozen variables}, result) of a teacher, trained as far as it was not yet."""
    c, net, directory = setting.config.teacher, setting.teachers[name], workdir / "teacher" / name
    images = len(setting.dataset.train.labels)
    total = stages.steps(c.duration, "teacher.duration", batch_size=c.batch_size, images=images)
    tx, schedule = setting.optimizer("teacher"), setting.schedule("teacher", [(0, total)])
    # A standard teacher is the same network with one width; then there is nothing to sample or to distil in place.
    sandwich = {"loss": c.loss, "sampling": c.sampling} if name == "slimmable" else {}
    step = teacher.make_step(
        net, tx, schedule, setting.preprocess, reduction=c.reduction, subnetworks=c.subnetworks, **sandwich
    )
    step = sharding.jit_step(setting.mesh, step)
    calibrate = lambda frozen: frozen  # noqa: E731
    if c.calibration.images:
        calibrate = teacher.make_calibration(
            net, setting.dataset.train, setting.preprocess, setting.mesh, **c.calibration
        )

    def freeze(state: states.State) -> dict[float, dict]:
        return calibrate(teacher.freeze(net, state.params, state.collections))

    def evaluate(state: states.State) -> dict[str, float]:
        scores = {w: setting.evaluator(net.members[w], v)["top1"] for w, v in freeze(state).items()}
        return {f"top1_{slimmable.width_key(w)}": score for w, score in scores.items()}

    params, statistics = net.init(jax.random.key(setting.config.seed), setting.dataset.image_shape)
    state = setting.place(states.create(setting.config.seed, params, statistics, tx))
    overview = parameter_overview.get_parameter_overview(net.extract(params, statistics, net.widest)["params"])
    replace(directory / "parameters.txt", overview + "\n")
    state, rows = loop.run(
        directory, f"teacher/{name}", state, [loop.Segment(total, step, lambda s: s)],
        setting.batches(c.batch_size, setting.config.seed), evaluate, setting.cadence(total, c.batch_size),
        images=images, batch_size=c.batch_size, texts={"parameters": overview},
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
        "curve": [_row(r) | {"top1": {slimmable.width_key(w): r[k] for w, k in keys.items()}} for r in evaluated],
        **_effort(rows, total, c.batch_size, images),
    }
    replace(directory / "result.json", json.dumps(result))
    return freeze(state), result


# The student.


def _plan(setting: Setting, arm: str) -> list[stages.Stage]:
    widths = setting.config.student.widths or tuple(sorted(setting.config.teacher.widths))
    return stages.plan(arm, widths, setting.stage_steps, setting.config.teacher.widths)


def _distillation(setting: Setting, net: slimmable.Slimmable, plans: dict) -> distillers.Distillation:
    """The distiller fitted to the student and to every width of `net` that teaches in some arm."""
    c, shape = setting.config.student, setting.dataset.image_shape
    options = {k: v for k, v in c.distiller.items() if k != "name"}
    batch = {
        "image": jax.ShapeDtypeStruct((c.batch_size, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((c.batch_size,), jnp.int32),
        "index": jax.ShapeDtypeStruct((c.batch_size,), jnp.int32),
        "dataset_label": jax.ShapeDtypeStruct(setting.dataset.train.labels.shape, jnp.int32),
    }

    def outputs(model: nn.Module) -> models.Outputs:
        variables = models.abstract(model, shape)
        return jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], variables, batch["image"])

    teachers = {w: outputs(net.members[w]) for w in net.table}
    return distillers.build(distillers.create(c.distiller.name, **options), outputs(setting.student), teachers, batch)


def _student_steps(setting: Setting, plan, distillation) -> dict[tuple[float, ...], Callable]:
    """{widths: compiled step} of an arm, made once for all its seeds and stages."""
    c, net = setting.config.student, setting.teachers.get(plan[0].teacher)
    schedule = setting.schedule("student", *_spans(setting, plan))
    steps = {}
    for widths in dict.fromkeys(stage.widths for stage in plan):
        step = student.make_step(
            setting.student, net.members if net else {}, widths, distillation, plan, setting.optimizer("student"),
            schedule, setting.preprocess, same_crop=c.same_crop,
        )  # fmt: skip
        steps[widths] = sharding.jit_step(setting.mesh, step)
    return steps


def _spans(setting: Setting, plan) -> tuple[list[tuple[int, int]], str, float]:
    """(cycles, form, peak decay) of an arm: its stages' own cycles, or one cycle of the ordinary schedule."""
    c = setting.config.student.schedule
    if len(plan) > 1 and c.cycles == "per_stage":
        return stages.cycles(plan, True), c.form, c.peak_decay
    return stages.cycles(plan, False), c.single_form or c.form, 1.0


def _study(setting: Setting, directory: Path, arm: str, plan, seed: int, steps, frozen, distillation) -> dict:
    """The result of one student: one arm, one seed."""
    c, images = setting.config.student, len(setting.dataset.train.labels)
    total, ends, tx = plan[-1].end, [s.end for s in plan], setting.optimizer("student")

    def fresh() -> states.State:
        return setting.place(student.init(setting.student, setting.dataset.image_shape, distillation, tx, seed))

    def enter(state: states.State) -> states.State:
        return setting.place(student.enter_stage(state, fresh, tx, c.reset, c.connectors)) if int(state.step) else state

    def evaluate(state: states.State) -> dict[str, float]:
        score = setting.evaluator(setting.student, student.variables(state))
        return {"top1": score["top1"], "test_loss": score["loss"]}

    segments = [
        loop.Segment(s.end, functools.partial(steps[s.widths], teacher={w: frozen[w] for w in s.widths}), enter)
        for s in plan
    ]
    state = fresh()
    overview = parameter_overview.get_parameter_overview(state.params)
    replace(directory / "parameters.txt", overview + "\n")
    state, rows = loop.run(
        directory, f"{arm}/seed{seed}", state, segments, setting.batches(c.batch_size, seed), evaluate,
        setting.cadence(total, c.batch_size), images=images, batch_size=c.batch_size, texts={"parameters": overview},
        keep=ends,
    )  # fmt: skip
    evaluated = [r for r in rows if "top1" in r]
    at_step = {r["step"]: r["top1"] for r in evaluated}
    saved = loop.snapshots(directory, state, ends) if len(ends) > 1 else []
    ensemble = setting.evaluator.ensemble_top1(setting.student, [student.variables(s) for s in saved])
    rates = stages.table(setting.schedule("student", *_spans(setting, plan)), total)
    shown = np.unique(np.concatenate([np.linspace(0, total - 1, min(total, 360)).astype(int), np.array(ends) - 1]))
    result = {
        "arm": arm,
        "seed": seed,
        "plan": [s._asdict() for s in plan],
        "cycles": _spans(setting, plan)[0],
        "top1_last": evaluated[-1]["top1"],
        "top1_best": max(r["top1"] for r in evaluated),
        "stage_ends": [at_step[end] for end in ends],
        "ensemble": [{"members": m + 1, "top1": score} for m, score in enumerate(ensemble)],
        "curve": [_row(r) | {"top1": r["top1"]} for r in evaluated],
        "learning_rates": [[int(s), float(rates[s])] for s in shown],
        **_effort(rows, total, c.batch_size, images),
    }
    replace(directory / "result.json", json.dumps(result))
    return json.loads(json.dumps(result))


# Around them.


def _row(row: dict) -> dict:
    return {key: row[key] for key in ("step", "epoch", "learning_rate", "train_loss")}


def _effort(rows: list[dict], total: int, batch_size: int, images: int) -> dict:
    """The median rate is that of a window without compilation; seconds count everything that was kept."""
    return {
        "steps": total,
        "epochs": total * batch_size / images,
        "seconds": sum(r["seconds"] for r in rows),
        "images_per_second": float(np.median([r["images_per_second"] for r in rows])),
    }


def _costs(setting: Setting, model: nn.Module) -> dict[str, int]:
    shape = setting.dataset.image_shape
    return {"params": costs.parameters(model, shape), "macs": costs.macs(model, shape)}


def _title(name: str, width: float) -> str:
    return name if width == 1 else f"{name} at width {width:g}"


def _result(directory: Path) -> dict | None:
    """What a finished run left, or None."""
    path = directory / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Write config.json, or refuse a workdir that holds runs of another config."""
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
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be written ({e.strerror})") from e


def _announce(setting: Setting, wanted: list[str]) -> None:
    c, d = setting.config, setting.dataset
    print(
        f"{c.name}: {len(d.train.labels)} training and {len(d.test.labels)} test images of {d.name}, "
        f"{d.num_classes} classes, {setting.mesh.size} {jax.devices()[0].platform} device(s)"
    )
    lines = [(f"teacher {c.teacher.model}", w, setting.teachers["slimmable"].members[w])
             for w in sorted(c.teacher.widths)]  # fmt: skip
    for label, width, model in [*lines, (f"student {c.student.model}", c.student.width, setting.student)]:
        cost = _costs(setting, model)
        print(f"  {label} at width {width:<5g} {cost['params']:>12,} parameters {cost['macs']:>15,} MACs an image")
    if "slimmable" in wanted and c.teacher.batch_norm == "shared" and not c.teacher.calibration.images:
        print("  warning: batch norm shared between widths is wrong for all of them without teacher.calibration.images")


def environment() -> dict:
    """Versions, device and git commit, as the summary records them."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

    def git(*args: str) -> str | None:
        try:
            here = Path(__file__).parent
            done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "pwkd_jax": pwkd_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "git_commit": git("rev-parse", "HEAD") or "unknown",
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
