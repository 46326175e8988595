"""The very programs that training runs, timed in turns: the teacher's step at one width and at all, every student stage,
and the evaluations."""

import copy
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from pwkd_jax import data
from pwkd_jax.cost.timing import Case, Timer, nothing_kept, peak_here, processor
from pwkd_jax.data.shapes import outline
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition, programs
from pwkd_jax.models import costs
from pwkd_jax.reporting.environment import environment
from pwkd_jax.training import sharding, student, study

FORMS = ("plain", "sliced", "masked")


# Images that stand in for a data set: enough that gathering them is no cache's work, few enough to be made at once.
SYNTHETIC = 4096


def benchmark(
    settings: ConfigDict, *, synthetic: bool = False, only: str = "", rounds: int = 5, seconds: float = 2.0, peak: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """What the command prints, as plain data; tell: called with a line before every part. Raises UserError."""
    built = synthetic_setting(settings) if synthetic else definition.prepare(settings)
    cases = find_cases(built)
    wanted = [name for name in cases if only in name]
    if not wanted:
        raise UserError(f"--only: no program has '{only}' in its name; there are {'; '.join(cases)}")
    peak, source = (peak, "as given") if peak else peak_here(settings.dtype)
    timers, notes = [], []
    # Compiling is timed, so nothing may come from an earlier command.
    with nothing_kept():
        for number, name in enumerate(wanted, 1):
            tell(f"{number}/{len(wanted)} compiling {name} ...")
            try:
                timers.append(Timer(name, cases[name](), seconds))
            except UserError as e:
                notes.append(f"{name}: {e}")
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds} ...")
        for timer in timers:
            timer.round()
    rows = [timer.row(peak, built.mesh.size) for timer in timers]
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "config": settings.name,
        "data": built.facts | {"synthetic": synthetic},
        "dtype": settings.dtype,
        "environment": environment() | {"processor": processor()},
        "peak_flops": peak,
        "peak_source": source,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "programs": rows,
        "forms": _forms(rows),
        "notes": notes,
    }


def synthetic_setting(settings: ConfigDict) -> definition.Experiment:
    """The experiment of a config over random images of its data set's shapes. Raises UserError."""
    mesh = sharding.make_mesh(settings.mesh.model)
    definition.check_batches(settings, mesh)
    empty, _ = outline(settings)
    rng, shape, classes = np.random.default_rng(0), empty.image_shape, empty.num_classes

    def split(count: int) -> data.Split:
        count = min(count, SYNTHETIC)
        labels = rng.integers(0, classes, count).astype(np.int32)
        return data.Split(rng.integers(0, 256, (count, *shape), np.uint8), labels)

    dataset = data.Dataset(empty.name, split(len(empty.train)), split(len(empty.test)), classes)
    bare = copy.deepcopy(settings).unlock()
    bare.teacher.weights = bare.student.weights = ""
    bare.student.teachers = bare.student.teacher_shares = ()
    bare.data.image_size = 0  # its images are of one size, in RAM
    return definition.build(bare, mesh, dataset)


def find_cases(built: definition.Experiment) -> dict[str, Callable[[], Case]]:
    """{name: maker}, in the order of an experiment. Making one may raise UserError."""
    c, slimmable = built.config, built.teachers["slimmable"]
    found = {f"teacher step, {form}": functools.partial(_teacher, built, form) for form in FORMS}
    plans = {arm: built.plan(arm) for arm in c.arms}
    if c.student.study and (several := built.several(c.seeds, len(plans))):
        for span in study.spans([*plans.values()]):
            found[programs.study_title(span, len(plans), several)] = functools.partial(_study, built, plans, span, several)
    for plan in plans.values():
        several = built.several(c.seeds)
        for stage in plan:
            name = programs.student_title(stage.widths, several, stage.teacher)
            found.setdefault(name, functools.partial(_student, built, plan, stage, several))
    for width in sorted(slimmable.table):
        model = slimmable.members[width]
        maker = functools.partial(_evaluation, built, model, functools.partial(_variables, built, slimmable, width))
        found[f"teacher {width:g} evaluation"] = maker
    found["student evaluation"] = functools.partial(_evaluation, built, built.student, functools.partial(_pupil, built))
    return found


def _teacher(built: definition.Experiment, form: str) -> Case:
    c, shape = copy.deepcopy(built.config).unlock(), built.dataset.image_shape
    c.teacher.execution = "mask" if form == "masked" else "take"
    # Rebuilt, so that a family which cannot be masked says so here.
    built = built if c.teacher.execution == built.config.teacher.execution else definition.build(c, built.mesh, built.dataset)
    name = "standard" if form == "plain" else "slimmable"
    net = built.teachers[name]
    macs = {w: costs.macs(model, shape) for w, model in net.members.items()}
    work = sum(macs[w] for w in net.table)
    if name == "slimmable" and c.teacher.sampling == "sandwich":
        middle = [macs[w] for w in net.widths[1:-1]]
        drawn = min(c.teacher.subnetworks - 2, len(middle))
        work = macs[net.widest] + macs[net.widths[-1]] + (drawn * statistics.mean(middle) if drawn else 0)
    create, step = programs.teacher_step(built, name)
    size = c.teacher.batch_size
    return Case(step.lower, lambda: create(0, None), {}, built.batches(size, 0), size, 6.0 * work * size)


def _student(built: definition.Experiment, plan, stage, several) -> Case:
    c, shape, net = built.config.student, built.dataset.image_shape, built.teachers.get(stage.teacher)
    here, count = built.on(several), several.count if several else 1
    distillation = built.distillation(stage.teacher, {w for s in plan for w in s.widths}) if stage.widths else None
    create, steps = programs.student_steps(built, plan, distillation, several)
    step, seeds = steps[stage.widths], np.arange(count, dtype=np.uint32) if several else 0
    frozen = {w: here.place(_variables(built, net, w)) for w in stage.widths}
    taught = statistics.mean(costs.macs(net.members[w], shape) for w in stage.widths) if stage.widths else 0.0
    work = 6.0 * costs.macs(built.student, shape) * count + 2.0 * taught
    size = c.batch_size
    return Case(step.lower, lambda: create(seeds, None), {"teacher": frozen}, here.batches(size, 0), size, work * size)


def _study(built: definition.Experiment, plans, span: study.Span, several) -> Case:
    c, shape, taught = built.config.student, built.dataset.image_shape, study.taught_by(plans, span)
    every = {name: {w for p in plans.values() if p[0].teacher == name for s in p for w in s.widths} for name in taught}
    fitted = {name: built.distillation(name, widths) for name, widths in every.items()}
    create, steps = programs.study_steps(built, plans, fitted, several)
    frozen = {n: {w: built.place(_variables(built, built.teachers[n], w)) for w in widths} for n, widths in taught.items()}
    # Of a width that is drawn, as if it always were.
    asked = sum(costs.macs(built.teachers[n].members[w], shape) for n, widths in taught.items() for w in widths)
    work = 6.0 * costs.macs(built.student, shape) * several.count * len(plans) + 2.0 * asked
    return Case(steps[span.widths].lower, lambda: create(several.seeds, None), {"teacher": frozen},
                built.batches(c.batch_size, 0), c.batch_size, work * c.batch_size)  # fmt: skip


def _variables(built: definition.Experiment, net, width: float) -> dict:
    shape = built.dataset.image_shape
    return jax.jit(lambda key: net.extract(*net.init(key, shape), width))(jax.random.key(0))


def _pupil(built: definition.Experiment) -> dict:
    create, _ = programs.student_steps(built, built.plan("alone"), None)
    return student.variables(create(0, None))


def _evaluation(built: definition.Experiment, model, make: Callable[[], dict]) -> Case:
    size = built.evaluator.batch_size

    def scored() -> Iterator[dict]:
        while True:
            yield from data.eval_batches(built.dataset.test, size)

    found = scored()

    def batches(step: int) -> dict:
        return sharding.put_batch(built.mesh, next(found))

    def lower(variables, batch):
        return built.evaluator.score.lower(model, variables, batch)

    work = 2.0 * costs.macs(model, built.dataset.image_shape) * size
    return Case(lower, lambda: built.place(make()), None, batches, size, work)


def _forms(rows: Sequence[dict]) -> dict:
    """{sliced or masked: time and compile time in plain ones, and work by multiply-accumulates, near the sum of w^2}."""
    by_name = {row["name"].removeprefix("teacher step, "): row for row in rows}
    plain, result = by_name.get("plain"), {}
    for form in ("sliced", "masked"):
        if plain and (row := by_name.get(form)):
            share = row["model_flops"] / plain["model_flops"]
            pairs = zip(row["step_seconds_rounds"], plain["step_seconds_rounds"], strict=True)
            ratios = sorted(a / b for a, b in pairs)
            result[form] = {
                "plain_steps": [statistics.median(ratios), ratios[0], ratios[-1]],
                "work": share,
                "compile": row["compile_seconds"] / plain["compile_seconds"],
            }
    return result
