"""A study in one program: the students of several arms, which share every batch, make their steps of it together.

At each step every sub-network that teaches any of them predicts once. Their state is one `State` whose fields, all but the step
that they share, are {arm: those of its students}. Another program begins where an arm is taught by another sub-network.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from pwkd_jax.stages import Stage
from pwkd_jax.training import distil, distributed, loop, metrics, selection, sharding
from pwkd_jax.training.lessons import Lesson
from pwkd_jax.training.state import State
from pwkd_jax.training.task import Task

FIELDS = [field.name for field in dataclasses.fields(State) if field.name != "step"]


def part(state: State, arm: str) -> State:
    """The stacked state of one arm's students."""
    return State(step=state.step, **{name: getattr(state, name)[arm] for name in FIELDS})


def joined(parts: Mapping[str, State]) -> State:
    """The state of a study, of those of its arms."""
    step = next(iter(parts.values())).step
    return State(step=step, **{name: {arm: getattr(one, name) for arm, one in parts.items()} for name in FIELDS})


class Span(NamedTuple):
    """Steps from start to end in which every arm stays in one stage: its number in each, and the widths that teach it."""

    stages: tuple[int, ...]
    widths: tuple[tuple[float, ...], ...]
    start: int
    end: int


def spans(plans: Sequence[Sequence[Stage]]) -> list[Span]:
    """The steps of several plans, divided wherever one of them enters a stage."""
    ends = sorted({stage.end for plan in plans for stage in plan})

    def at(start: int, end: int) -> Span:
        found = tuple(next(i for i, stage in enumerate(plan) if end <= stage.end) for plan in plans)
        return Span(found, tuple(plan[i].widths for plan, i in zip(plans, found, strict=True)), start, end)

    return [at(*each) for each in zip([0, *ends[:-1]], ends, strict=True)]


def taught_by(plans: Mapping[str, Sequence[Stage]], span: Span) -> dict[str, list[float]]:
    """{teacher: the widths at which it teaches any arm in those steps}."""
    found: dict[str, dict[float, None]] = {}
    for plan, widths in zip(plans.values(), span.widths, strict=True):
        if widths:
            found.setdefault(plan[0].teacher, {}).update(dict.fromkeys(widths))
    return {name: [*widths] for name, widths in found.items()}


class Arm(NamedTuple):
    """One arm of a study, before anything is compiled: its plan, and what `distil.uncompiled` made of it."""

    plan: Sequence[Stage]
    make: Callable
    stepping: Callable
    prepare: Callable


def programs(
    arms: Mapping[str, Arm], task: Task, seeds: np.ndarray, sharding_how: str = "replicated", start: dict | None = None
) -> tuple[Callable, dict[tuple, Callable]]:
    """(creator of the first state from (seeds, variables to start from or None), {widths of each arm: compiled step(state,
    batch, teacher)}) of a study. teacher: {its name: {width: frozen variables}}, of the widths that teach. seeds: of the
    students, the same in every arm, [students]."""

    def make(seeds, given) -> State:
        return joined({name: arm.make(seeds, given) for name, arm in arms.items()})

    create = sharding.creator(task.mesh, make, sharding_how, seeds, start)
    every = dict.fromkeys(span.widths for span in spans([arm.plan for arm in arms.values()]))
    own = {arm.plan[0].teacher: arm.prepare for arm in arms.values()}

    def prepare(teacher):
        return {name: own[name](found) for name, found in teacher.items()}

    return create, {widths: distil.compile_step(task, create.layout, prepare, _step(arms, widths)) for widths in every}


def _step(arms: Mapping[str, Arm], widths: Sequence[tuple[float, ...]]) -> Callable:
    taught = dict(zip(arms, widths, strict=True))
    steps = {name: arms[name].stepping(taught[name]) for name in arms}
    # Where the width is drawn it may be one that teaches another arm, which has then been asked already.
    order = sorted(arms, key=lambda name: len(taught[name]) > 1)

    def step(state: State, batch: dict, teacher: dict[str, dict]):
        once, after, found = {}, {}, {}
        for name in order:
            frozen = {w: teacher[arms[name].plan[0].teacher][w] for w in taught[name]}
            after[name], found[name] = steps[name](part(state, name), batch, teacher=frozen, once=once)
        losses = [each["train_loss"].compute() for each in found.values()]
        common = metrics.collect({"train_loss": jnp.mean(jnp.stack(losses))})
        own = {f"{name}/{key}": value for name in arms for key, value in found[name].items()}
        return joined({name: after[name] for name in arms}), common | own

    return step


class Learnt(NamedTuple):
    """What training left of one arm, as of students in a program of their own, see `outcome.Student`."""

    rows: list[dict]
    snapshots: list[State]
    best: list[State]


def learn(
    lessons: Mapping[str, Lesson], task: Task, seeds: Sequence[int], compiled: tuple[Callable, dict], *, batch_size: int,
    order: int, start: dict | None, directory: Path, label: str, cadence: loop.Cadence, profiled: str = "",
) -> dict[str, Learnt]:  # fmt: skip
    """Teach the students of every arm, `seeds` in each, and keep the run in `directory`, where a stopped one goes on. compiled:
    of `programs`. order: seed of the order and augmentation of images."""
    create, stepping = compiled
    frozen = {lesson.plan[0].teacher: lesson.teacher.variables for lesson in lessons.values() if lesson.teacher}
    total = spans([lesson.plan for lesson in lessons.values()])
    seeds = np.asarray(seeds, np.uint32)

    def fresh() -> State:
        return create(seeds, start)

    def enter(state: State) -> State:
        at, parts = int(state.step), {name: part(state, name) for name in lessons}
        entering = [name for name, lesson in lessons.items() if at and any(stage.start == at for stage in lesson.plan)]
        for name in entering:
            parts[name] = lessons[name].enter(parts[name], lambda name=name: part(fresh(), name))
        return jax.device_put(joined(parts), create.layout) if entering else state

    def due(lesson: Lesson, at: int) -> bool:
        return at % cadence.evaluate == 0 or any(stage.end == at for stage in lesson.plan)

    def evaluate(state: State) -> dict[str, float]:
        asked = {name: lesson for name, lesson in lessons.items() if due(lesson, int(state.step))}
        found = {name: lesson.evaluate(part(state, name)) for name, lesson in asked.items()}
        return {f"{name}/{key}": value for name, scores in found.items() for key, value in scores.items()}

    def segment(span: Span) -> loop.Segment:
        taught = taught_by({name: lesson.plan for name, lesson in lessons.items()}, span)
        teaching = {name: {w: frozen[name][w] for w in widths} for name, widths in taught.items()}
        return loop.Segment(span.end, functools.partial(stepping[span.widths], teacher=teaching), enter)

    own = [selection.KEY] if task.validator else []
    chosen = [f"{name}/{key}_student{i}" for name in lessons for key in own for i in range(len(seeds))]
    state = fresh()
    overview = parameter_overview.get_parameter_overview(state.params)
    distributed.write(directory / "parameters.txt", overview + "\n")
    state, rows, kept, best = distil.run(
        directory, label, state, [segment(span) for span in total], task, evaluate, cadence, batch_size=batch_size, order=order,
        chosen=chosen, profiled=profiled, texts={"parameters": overview},
    )  # fmt: skip
    result = {}
    for number, (name, lesson) in enumerate(lessons.items()):
        ends = {stage.end for stage in lesson.plan}
        steps = [at for at in range(1, total[-1].end + 1) if at in ends or any(at % every == 0 for every in cadence[:3])]
        snapshots = [part(state, name) for span, state in zip(total, kept, strict=True) if span.end in ends]
        mine = best[number * len(seeds) : (number + 1) * len(seeds)]
        result[name] = Learnt(own_rows(rows, name, len(lessons), steps), snapshots, [part(state, name) for state in mine])
    return result


def own_rows(rows: Sequence[dict], arm: str, count: int, steps: Sequence[int]) -> list[dict]:
    """Of the rows of a study of `count` arms those that one would have written by itself, at `steps`, in its share of the time.

    Where another arm ends a stage there is a row between: its means go into those of the next row.
    """
    result, window, last = [], [], 0
    for row in rows:
        own = {key.removeprefix(f"{arm}/"): value for key, value in row.items() if "/" not in key or key.startswith(f"{arm}/")}
        window.append((row["step"] - last, own))
        last = row["step"]
        if last not in steps:
            continue
        times = {"seconds": sum(each["seconds"] for _, each in window) / count,
                 "images_per_second": count / _mean(window, lambda each: 1 / each["images_per_second"])}  # fmt: skip
        found = own if len(window) == 1 else {
            key: _mean(window, lambda each, key=key, own=own: each.get(key, own[key])) for key in own
        }  # fmt: skip
        result.append(found | {"step": last, "epoch": row["epoch"]} | times)
        window = []
    return result


def _mean(window: Sequence[tuple[int, dict]], value: Callable[[dict], float]) -> float:
    """The mean over steps of what rows, (steps, row) each, tell."""
    return sum(steps * value(row) for steps, row in window) / sum(steps for steps, _ in window)
