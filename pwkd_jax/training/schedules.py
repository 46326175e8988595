"""Durations, and learning rates by global step: one cycle, and cycles joined.

The one global step counter decides the learning rate, so a run resumed anywhere continues it.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pwkd_jax.errors import UserError

CYCLES = ("cosine", "step", "triangular", "one_cycle", "constant")
RISING = ("triangular", "one_cycle")  # begin low by themselves


def steps(duration: str, key: str, *, batch_size: int, images: int, total: int = 0, zero: bool = False) -> int:
    """Whole steps in a duration like `60 epochs`, `5000 steps`, `1e6 examples` or `10 %` (of `total` steps), at least 1.

    key: the config key, for the error. images: in one epoch. zero: whether 0 of a unit is meant too, and gives 0.
    Raises UserError for anything else.
    """
    units = {
        "step": 1.0,
        "epoch": images / batch_size,
        "example": 1 / batch_size,
        "%": total / 100,
    }
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]+?s?|%)\s*", duration)
    unit = match and {"percent": "%"}.get(match[2], match[2].rstrip("s"))
    try:
        count = float(match[1]) if match else -1.0
    except ValueError:
        count = -1.0
    if zero and count == 0 and unit in units:
        return 0
    if not match or unit not in units or count <= 0:
        known = "'60 epochs', '5000 steps', '1e6 examples'" + (" or '10 %'" if total else "")
        raise UserError(f"{key}: '{duration}' is not a duration: write a number above 0 and a unit, as in {known}")
    if unit == "%" and not total:
        raise UserError(f"{key}: '{duration}' cannot be a percentage, for it sets the whole; use epochs, steps or examples")
    if count * units[unit] >= 2**31:  # that of the step is an int32
        raise UserError(f"{key}: '{duration}' is {count * units[unit]:g} steps; give fewer than 2^31")
    return max(1, round(count * units[unit]))


def cycle(
    form: str, peak: float, length: int, floor: float, milestones: Sequence[float], factor: float, warmup: int
) -> optax.Schedule:
    """One learning-rate cycle of `length` steps from step 0, at most `peak`.

    cosine: peak to floor * peak, (peak - low) / 2 * (1 + cos(pi t / length)) + low, by SGDR (Loshchilov & Hutter 2017);
    step: times `factor` at each of `milestones` (fractions of the cycle); triangular: linear up to peak and down again,
    both ends at floor * peak (Smith 2017); one_cycle: optax.cosine_onecycle_schedule (peak / 25 up, 1 / 25e4 down);
    constant.

    warmup: steps of linear rise to the peak, the first of the cycle's `length`. A cosine then takes the rest of them to fall,
    so t and length count from the warm-up's end. The milestones of `step` stay where they are, at fractions of the whole
    cycle; those inside the warm-up take effect as it ends. `constant` stays at the peak. The forms of RISING need none, and
    would rise twice; `learning_rate` refuses it for them.
    """
    if form not in CYCLES:
        raise UserError(f"form: there is no '{form}'; known are {', '.join(CYCLES)}")
    low, body = floor * peak, length - warmup
    if form == "cosine":
        shape = optax.cosine_decay_schedule(peak, body, alpha=floor)
    elif form == "step":
        # Piecewise scales multiply; cycles too short to tell two milestones apart take both at once.
        scales: dict[int, float] = {}
        for m in milestones:
            at = max(0, round(m * length) - warmup)
            scales[at] = scales.get(at, 1.0) * factor
        shape = optax.piecewise_constant_schedule(peak, scales)
    elif form == "triangular":
        up = max(1, body // 2)
        rise, fall = optax.linear_schedule(low, peak, up), optax.linear_schedule(peak, low, max(1, body - up))
        shape = optax.join_schedules([rise, fall], [up])
    elif form == "one_cycle":
        shape = optax.cosine_onecycle_schedule(max(2, body), peak)
    else:
        shape = optax.constant_schedule(peak)
    if warmup:
        # Rises to the peak at step `warmup`; the first step is not wasted at zero.
        rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        shape = optax.join_schedules([rise, shape], [warmup])
    return shape


def learning_rate(
    spans: Sequence[tuple[int, int]],
    *,
    form: str,
    peak: float,
    floor: float = 0.0,
    milestones: Sequence[float] = (),
    factor: float = 0.1,
    warmup: int = 0,
    peak_decay: float = 1.0,
    key: str = "warmup",
) -> optax.Schedule:
    """The schedule on the global step: one `cycle` per span, joined; the c-th one's peak is peak * peak_decay ** c.

    warmup: steps of linear rise that every cycle begins with. Raises UserError, which names it by `key`, where it is as long as
    a cycle or the form rises by itself."""
    if warmup:
        _check_warmup(spans, form, warmup, key)
    pieces = [
        cycle(form, peak * peak_decay**c, end - start, floor, milestones, factor, warmup)
        for c, (start, end) in enumerate(spans)
    ]
    return optax.join_schedules(pieces, [end for _, end in spans[:-1]])


def _check_warmup(spans: Sequence[tuple[int, int]], form: str, warmup: int, key: str) -> None:
    shortest = min(end - start for start, end in spans)
    if warmup >= shortest:
        cycles = f"the cycle of {shortest} steps" if len(spans) == 1 else f"a cycle of {shortest} steps"
        raise UserError(f"{key}: {warmup} steps leave nothing of {cycles}, whose first part they are; give a shorter warm-up")
    if form in RISING:
        raise UserError(f"{key}: should be 0 where a cycle's form is {form}, which rises by itself")


def table(schedule: optax.Schedule, total: int) -> np.ndarray:
    """The learning rate of every step, [total] float32: for pictures and logs."""
    return np.asarray(jax.vmap(schedule)(jnp.arange(total)), np.float32)
