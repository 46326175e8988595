"""The teachers of an experiment: trained as far as they were not yet, or given, lent by another workdir, or read again."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn

from pwkd_jax import slimmable, storage, weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import programs, results, shared_teachers
from pwkd_jax.experiment.definition import Experiment, sees
from pwkd_jax.models import costs
from pwkd_jax.reporting import per_class, summary
from pwkd_jax.training import distributed, schedules
from pwkd_jax.training import teacher as training
from pwkd_jax.training.teacher import Teacher


def teach(experiment: Experiment, workdir: Path, name: str) -> tuple[Teacher, dict]:
    """(teacher, its result.json) of `name`, slimmable or standard, its variables placed where they teach."""
    c, net, directory = experiment.config.teacher, experiment.teachers[name], workdir / "teacher" / name
    if c.run:
        distributed.decide(lambda: shared_teachers.copy(storage.path(c.run), workdir, name))
    if result := finished(experiment, workdir, name):
        likes = {w: net.likes[w] for w in net.table}
        found = weights.read_widths(directory, likes, lambda path, w: weights.read(path, c.model))
        for w, (_, card) in found.items():
            weights.refuse_another(weights.width_path(directory, w), card, c.model, w, experiment.facts)
        variables = experiment.place({w: v for w, (v, _) in found.items()}, experiment.config.student.teacher_sharding)
        return Teacher(net, variables, {w: card for w, (_, card) in found.items()}), result
    if name == "standard" and name in experiment.start and c.head == "keep":
        return _given(experiment, directory)
    size, images = c.batch_size, len(experiment.dataset.train)
    total = schedules.steps(c.duration, "teacher.duration", batch_size=size, images=images)
    arguments = programs.teacher_arguments(experiment, name)
    taught = training.train_teacher(
        net, experiment.task, duration=total, batch_size=size, optimizer=arguments["rule"], start=arguments["start"],
        calibration=c.calibration, seed=experiment.config.seed, directory=directory, label=f"teacher/{name}",
        cadence=experiment.cadence(total, size), frozen_sharding=experiment.config.student.teacher_sharding,
        profiled=experiment.config.profile, cards=_card(experiment, name, total),
        compiled=training.programs(net, experiment.task, **arguments),
    )  # fmt: skip
    evaluated = [r for r in taught.rows if any(k.startswith("top1_") for k in r)]
    keys = {w: f"top1_{slimmable.width_key(w)}" for w in sorted(net.table)}
    result = {
        "model": c.model,
        "widths": [
            {
                "width": w,
                **cost(experiment, net.members[w]),
                "top1_last": evaluated[-1][key],
                "top1_best": max(r[key] for r in evaluated),
            }
            for w, key in keys.items()
        ],
        "curve": [results.point(r) | {"top1": {slimmable.width_key(w): r[k] for w, k in keys.items()}} for r in evaluated],
        "classes": _classes(experiment, taught),
        **results.effort(taught.rows, total, size, images),
    }
    _keep(taught, directory, result)
    return taught, result


def finished(experiment: Experiment, workdir: Path, name: str) -> dict | None:
    """The result.json of a teacher that is trained already, or None. Raises UserError where it is another's."""
    directory = workdir / "teacher" / name
    found = results.result(directory, summary.TEACHER, model=experiment.config.teacher.model)
    if found and sorted(row["width"] for row in found["widths"]) != sorted(experiment.teachers[name].table):
        raise UserError(f"'{directory / 'result.json'}' is another run's, of other widths; bring it back, or make it anew")
    return found


def _given(experiment: Experiment, directory: Path) -> tuple[Teacher, dict]:
    """The same of an ordinary teacher whose weights were given: it is not trained, only scored."""
    c, net, variables = experiment.config.teacher, experiment.teachers["standard"], experiment.start["standard"]
    variables = experiment.place(variables, experiment.config.student.teacher_sharding)
    begun = time.monotonic()
    top1 = experiment.evaluator(net.members[1.0], variables)["top1"]
    row = {"width": 1.0, **cost(experiment, net.members[1.0]), "top1_last": top1, "top1_best": top1}
    effort = {"steps": 0, "epochs": 0.0, "seconds": time.monotonic() - begun, "images_per_second": 0.0}
    card = _card(experiment, "standard", 0)(1.0, [{"top1_1": top1}])
    taught = Teacher(net, {1.0: variables}, {1.0: card})
    result = {"model": c.model, "widths": [row], "curve": [], "classes": _classes(experiment, taught), **effort}
    _keep(taught, directory, result)
    return taught, result


def _classes(experiment: Experiment, taught: Teacher) -> dict:
    """Of the test images by class, at its full width."""
    whole = taught.at()
    return per_class.counts(*experiment.evaluator.predictions(whole.model, whole.variables), experiment.task.num_classes)


def _card(experiment: Experiment, name: str, steps: int) -> Callable[[float, list[dict]], dict]:
    c = experiment.config.teacher

    def card(width: float, rows: list[dict]) -> dict:
        top1 = rows[-1][f"top1_{slimmable.width_key(width)}"]
        source = {"run": f"teacher/{name}", "steps": steps, "top1": top1}
        return experiment.card(c.model, width, c.divisor, source, sees(experiment.config, experiment.facts))

    return card


def _keep(taught: Teacher, directory: Path, result: dict) -> None:
    """Write a finished teacher's weights, then its result."""
    taught.save(directory)
    distributed.write(directory / "result.json", json.dumps(result))


def cost(experiment: Experiment, model: nn.Module) -> dict[str, int]:
    """Parameters and multiply-accumulates an image."""
    shape = experiment.task.image_shape
    return {"params": costs.parameters(model, shape), "macs": costs.macs(model, shape)}
