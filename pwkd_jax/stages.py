"""The stage plan of a student, counted in global steps.

A plan is a list of `Stage`s: one per width for partial to whole, one for ordinary distillation. The one global step
counter decides the stage and the learning rate, so a run resumed anywhere continues both.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.errors import UserError

ARMS = ("alone", "kd_standard", "kd_whole", "kd_whole_cyclic", "pwkd", "pwkd_reversed", "pwkd_random")


class Stage(NamedTuple):
    """teacher: `slimmable`, `standard` or `none`. widths: of the sub-network that teaches; several mean one drawn at
    each step. start, end: global steps, half open."""

    teacher: str
    widths: tuple[float, ...]
    start: int
    end: int


def split(total: int, shares: Sequence[float]) -> list[int]:
    """`total` steps in proportion to `shares`, exact in sum."""
    ends = [round(total * float(x)) for x in np.cumsum(shares) / np.sum(shares)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def plan(arm: str, widths: Sequence[float], stage_steps: Sequence[int], teacher_widths: Sequence[float]) -> list[Stage]:
    """The stages of an arm of an experiment.

    widths: of the partial-to-whole stages, in the order given; stage_steps: of each. All arms have the same total.
    Controls: `alone` without teacher; `kd_standard` and `kd_whole` in one stage; `kd_whole_cyclic` with the stages and
    cycles of `pwkd` but the widest sub-network in each; `pwkd_reversed` with the widths in reverse order;
    `pwkd_random` with one of the widths drawn at each step.
    """
    total, whole = sum(stage_steps), max(teacher_widths)
    single = {"alone": ("none", ()), "kd_standard": ("standard", (1.0,)), "kd_whole": ("slimmable", (whole,))}
    if arm in single:
        return [Stage(*single[arm], 0, total)]
    each = {
        "kd_whole_cyclic": [(whole,)] * len(widths),
        "pwkd": [(w,) for w in widths],
        "pwkd_reversed": [(w,) for w in reversed(widths)],
        "pwkd_random": [tuple(dict.fromkeys(widths))] * len(widths),
    }[arm]
    ends = np.cumsum(stage_steps).tolist()
    return [Stage("slimmable", w, e - s, e) for w, s, e in zip(each, stage_steps, ends, strict=True)]


def even(arm: str, teacher_widths: Sequence[float], total: int) -> list[Stage]:
    """The plan of an arm over all of a teacher's widths, narrow to wide, in stages of equal length, `total` steps together."""
    widths = sorted(teacher_widths) or [1.0]
    if arm not in ARMS:
        raise UserError(f"arm: there is no '{arm}'; known are {', '.join(ARMS)}")
    if total < len(widths):
        raise UserError(f"duration: {total} steps are too few for {len(widths)} stages")
    return plan(arm, widths, split(total, [1.0] * len(widths)), widths)


def cycles(arm_plan: Sequence[Stage], per_stage: bool) -> list[tuple[int, int]]:
    """[start, end) of each learning-rate cycle: one per stage, or one over the whole run."""
    spans = [(s.start, s.end) for s in arm_plan]
    return spans if per_stage else [(spans[0][0], spans[-1][1])]


def title(arm_plan: Sequence[Stage], index: int) -> str:
    """Which stage it is and who teaches, in words; "" of the only one without a teacher."""
    widths = " or ".join(f"{w:g}" for w in arm_plan[index].widths)
    taught = [f"teacher width {widths}"] if widths else []
    return ", ".join(([f"stage {index + 1} of {len(arm_plan)}"] if len(arm_plan) > 1 else []) + taught)


def place(arm_plan: Sequence[Stage]) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A traced function of the global step: (the number of the current stage, the steps that it has seen)."""
    starts = jnp.array([s.start for s in arm_plan])

    def at(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        stage = jnp.searchsorted(starts, step, side="right") - 1
        return stage, step - starts[stage]

    return at
