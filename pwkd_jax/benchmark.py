"""How fast a config trains here, program by program: compile time, step time, images/s, utilisation, memory, waiting for input.

    python -m pwkd_jax.benchmark --config=configs/digits.py
    python -m pwkd_jax.benchmark --config=configs/cifar100.py --synthetic --only=teacher
    python -m pwkd_jax.benchmark --config=configs/imagenet.py:resnet50-mobilenetv1 --config.dtype=bfloat16 --json > speed.json

Times the very programs that training runs: the teacher's step at one width (plain) and at all of them, sliced and masked, every
student stage, and the evaluations. --synthetic needs no data: random images of the config's shapes. Programs take turns, round
by round, so that ratios hold on a busy machine too. Exits with code 2 and one sentence on a mistake.
"""

import argparse
import copy
import functools
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from pwkd_jax import config, data, programs, setting
from pwkd_jax.data.outline import outline
from pwkd_jax.errors import UserError
from pwkd_jax.models import costs
from pwkd_jax.reporting import benchmark as report
from pwkd_jax.reporting.environment import environment
from pwkd_jax.timing import Case, Timer, nothing_kept, peak_here, processor
from pwkd_jax.training import sharding, student

FORMS = ("plain", "sliced", "masked")

# Images that stand in for a data set: enough that gathering them is no cache's work, few enough to be made at once.
SYNTHETIC = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m pwkd_jax.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--synthetic", action="store_true", help="random images in place of the data set")
    parser.add_argument("--only", default="", help="programs whose name has this word: teacher, sliced, student, ...")
    parser.add_argument("--rounds", type=int, default=5, help="every program once a round")
    parser.add_argument("--seconds", type=float, default=2.0, help="a program runs in a round, about")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of a device, in place of what is known or measured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", help="the config file and its argument; --config.KEY=VALUE overrides")
    logging.set_verbosity(logging.ERROR)
    if {"-h", "--help"} & {*argv}:
        parser.print_help()
        return 0
    try:
        settings, rest = config.load(argv)
        options, unknown = parser.parse_known_args(rest)
        if unknown:
            raise UserError(f"'{unknown[0]}' is not an option; see --help")
        if options.rounds < 1 or options.seconds <= 0 or options.peak < 0:
            raise UserError("--rounds, --seconds and --peak: take 1 or more rounds, more than 0 seconds and no negative peak")
        result = benchmark(
            settings, synthetic=options.synthetic, only=options.only, rounds=options.rounds, seconds=options.seconds,
            peak=options.peak * 1e12, tell=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    result["command"] = "python -m pwkd_jax.benchmark " + shlex.join(argv)
    print(json.dumps(result, indent=2) if options.json else report.text(result))
    return 0


def benchmark(
    settings: ConfigDict, *, synthetic: bool = False, only: str = "", rounds: int = 5, seconds: float = 2.0, peak: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """What the command prints, as plain data; tell: called with a line before every part. Raises UserError."""
    built = synthetic_setting(settings) if synthetic else setting.prepare(settings)
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


def synthetic_setting(settings: ConfigDict) -> setting.Setting:
    """The setting of a config over random images of its data set's shapes. Raises UserError."""
    mesh = sharding.make_mesh(settings.mesh.model)
    setting.check_batches(settings, mesh)
    empty, _ = outline(settings)
    rng, shape, classes = np.random.default_rng(0), empty.image_shape, empty.num_classes

    def split(count: int) -> data.Split:
        count = min(count, SYNTHETIC)
        labels = rng.integers(0, classes, count).astype(np.int32)
        return data.Split(rng.integers(0, 256, (count, *shape), np.uint8), labels)

    dataset = data.Dataset(empty.name, split(len(empty.train)), split(len(empty.test)), classes)
    bare = copy.deepcopy(settings).unlock()
    bare.teacher.weights = bare.student.weights = ""
    bare.data.image_size = 0  # its images are of one size, in RAM
    return setting.build(bare, mesh, dataset)


# What is timed.


def find_cases(built: setting.Setting) -> dict[str, Callable[[], Case]]:
    """{name: maker}, in the order of an experiment. Making one may raise UserError."""
    c, slimmable = built.config, built.teachers["slimmable"]
    found = {f"teacher step, {form}": functools.partial(_teacher, built, form) for form in FORMS}
    for arm in c.arms:
        plan, several = built.plan(arm), built.several(c.seeds)
        for stage in plan:
            name = programs.student_title(stage.widths, several, stage.teacher)
            found.setdefault(name, functools.partial(_student, built, plan, stage, several))
    for width in sorted(slimmable.table):
        model = slimmable.members[width]
        maker = functools.partial(_evaluation, built, model, functools.partial(_variables, built, slimmable, width))
        found[f"teacher {width:g} evaluation"] = maker
    pupil = functools.partial(built.student_state(None), 0, None)
    found["student evaluation"] = functools.partial(_evaluation, built, built.student, lambda: student.variables(pupil()))
    return found


def _teacher(built: setting.Setting, form: str) -> Case:
    c, shape = copy.deepcopy(built.config).unlock(), built.dataset.image_shape
    c.teacher.execution = "mask" if form == "masked" else "take"
    # Rebuilt, so that a family which cannot be masked says so here.
    built = built if c.teacher.execution == built.config.teacher.execution else setting.build(c, built.mesh, built.dataset)
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


def _student(built: setting.Setting, plan, stage, several) -> Case:
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


def _variables(built: setting.Setting, net, width: float) -> dict:
    shape = built.dataset.image_shape
    variables = jax.jit(lambda key: net.extract(*net.init(key, shape), width))(jax.random.key(0))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _evaluation(built: setting.Setting, model, make: Callable[[], dict]) -> Case:
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


if __name__ == "__main__":
    sys.exit(main())
