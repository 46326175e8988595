"""Stage plans, durations and learning-rate cycles, against formulas computed here in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pwkd_jax import stages
from pwkd_jax.errors import UserError
from pwkd_jax.stages import Stage
from pwkd_jax.training import schedules

KNOWN = {"batch_size": 64, "images": 50_000}
SPANS = [(0, 40), (40, 60), (60, 100)]


@pytest.mark.parametrize(
    "duration, steps",
    [("240 epochs", 187_500), ("1 epoch", 781), ("500 steps", 500), ("1e6 examples", 15_625), ("10 %", 100),
     ("10%", 100), ("2.5 percent", 25), ("0.001 epochs", 1)],
)  # fmt: skip
def test_durations(duration, steps):
    assert schedules.steps(duration, "key", total=1000, **KNOWN) == steps


@pytest.mark.parametrize("duration", ["", "5", "epochs", "5 weeks", "-1 epochs", "0 steps", "1.2.3 steps", "nan epochs"])
def test_durations_that_are_none(duration):
    with pytest.raises(UserError, match=r"teacher.duration: .* is not a duration.*'60 epochs'"):
        schedules.steps(duration, "teacher.duration", **KNOWN)


def test_durations_of_nothing_and_of_an_unknown_whole():
    assert schedules.steps("0 epochs", "key", zero=True, **KNOWN) == 0
    with pytest.raises(UserError, match="percentage"):
        schedules.steps("10 %", "key", **KNOWN)


def test_splits_are_exact():
    assert stages.split(749, (1, 1, 1, 1)) == [187, 187, 188, 187]
    assert stages.split(100, (30, 30, 60, 120)) == [12, 13, 25, 50]
    for total in range(4, 60):
        assert sum(stages.split(total, (1, 2, 3))) == total


def test_plans_of_the_arms():
    def plan(arm):
        return stages.plan(arm, (0.25, 1.0, 0.5), [10, 20, 30], (0.25, 0.5, 0.75, 1.0))

    def staged(*widths):
        return [Stage("slimmable", w, *span) for w, span in zip(widths, [(0, 10), (10, 30), (30, 60)], strict=True)]

    assert plan("alone") == [Stage("none", (), 0, 60)]
    assert plan("kd_standard") == [Stage("standard", (1.0,), 0, 60)]
    assert plan("kd_whole") == [Stage("slimmable", (1.0,), 0, 60)]
    assert plan("kd_whole_cyclic") == staged((1.0,), (1.0,), (1.0,))
    assert plan("pwkd") == staged((0.25,), (1.0,), (0.5,))
    assert plan("pwkd_reversed") == staged((0.5,), (1.0,), (0.25,))
    assert plan("pwkd_random") == staged(*[(0.25, 1.0, 0.5)] * 3)
    assert {plan(arm)[-1].end for arm in stages.ARMS} == {60}


def cosine(t, length, peak, floor):
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * t / length)) / 2)


def triangle(t, length, peak, floor):
    up = length // 2
    rise = t / up if t <= up else 1 - (t - up) / (length - up)
    return peak * (floor + (1 - floor) * rise)


def step(t, length, peak, floor):
    return peak * 0.1 ** sum(t >= round(m * length) for m in (0.625, 0.75, 0.875))


@pytest.mark.parametrize("form, formula", [("cosine", cosine), ("triangular", triangle), ("step", step)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_one_cycle_per_stage_by_formula(form, formula, floor, decay):
    schedule = schedules.learning_rate(
        SPANS, form=form, peak=0.05, floor=floor, milestones=(0.625, 0.75, 0.875), factor=0.1, peak_decay=decay
    )
    expected = [
        formula(t, end - start, 0.05 * decay**c, floor) for c, (start, end) in enumerate(SPANS) for t in range(end - start)
    ]
    np.testing.assert_allclose(schedules.table(schedule, 100), expected, rtol=1e-5, atol=1e-9)
    if form == "cosine":
        # The peak at every stage start; the last step of a stage is near zero but not zero.
        assert [float(schedule(s)) for s, _ in SPANS] == pytest.approx([0.05 * decay**c for c in range(3)])
        assert float(schedule(39)) == pytest.approx(cosine(39, 40, 0.05, floor), rel=1e-4)


def test_one_cycle_and_constant():
    schedule = schedules.learning_rate(SPANS, form="one_cycle", peak=0.05)
    for start, end in SPANS:
        rates = [float(schedule(s)) for s in range(start, end)]
        assert rates[0] == pytest.approx(0.05 / 25) and max(rates) == pytest.approx(0.05)
        assert rates.index(max(rates)) == pytest.approx(0.3 * (end - start), abs=1)
    assert set(schedules.table(schedules.learning_rate(SPANS, form="constant", peak=0.05), 100)) == {np.float32(0.05)}


def test_warmup_is_inside_every_cycle():
    rates = schedules.table(schedules.learning_rate(SPANS, form="cosine", peak=0.05, warmup=4), 100)
    for start, end in SPANS:
        np.testing.assert_allclose(rates[start : start + 5], 0.05 * np.arange(1, 6) / 5, rtol=1e-5)
        body = [cosine(t, end - start - 4, 0.05, 0) for t in range(end - start - 4)]
        np.testing.assert_allclose(rates[start + 4 : end], body, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 1, 20, 149])
@pytest.mark.parametrize("length", [240, 480])
def test_warmup_moves_no_milestone(warmup, length):
    """RepDistiller's drops, after 150, 180 and 210 of 240 epochs, an epoch being one or two steps here."""
    each = length // 240
    rates = schedules.table(
        schedules.learning_rate([(0, length)], form="step", peak=0.05, milestones=(0.625, 0.75, 0.875), warmup=warmup), length
    )
    after = rates[warmup:]
    drops = warmup + 1 + np.flatnonzero(np.diff(after))
    assert drops.tolist() == [150 * each, 180 * each, 210 * each]
    plateaus = rates[[warmup, 150 * each - 1, 150 * each, 180 * each, -1]]
    np.testing.assert_allclose(plateaus, [0.05, 0.05, 5e-3, 5e-4, 5e-5], rtol=1e-5)
    assert np.all(np.diff(rates[: warmup + 1]) > 0)


def test_milestones_inside_the_warmup_take_effect_as_it_ends():
    rates = schedules.table(schedules.learning_rate([(0, 10)], form="step", peak=1.0, milestones=(0.1, 0.3, 0.8), warmup=4), 10)
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


@pytest.mark.parametrize(
    "form, warmup, sentence",
    [
        ("cosine", 20, r"^warmup: 20 steps leave nothing of a cycle of 20 steps, whose first part they are; give a shorter"),
        ("step", 25, r"^warmup: 25 steps leave nothing of a cycle of 20 steps"),
        ("constant", 1000, r"^warmup: 1000 steps leave nothing of a cycle of 20 steps"),
        ("triangular", 5, r"^warmup: should be 0 where a cycle's form is triangular, which rises by itself"),
        ("one_cycle", 5, r"^warmup: should be 0 where a cycle's form is one_cycle, which rises by itself"),
    ],
)
def test_warmups_that_cannot_be(form, warmup, sentence):
    with pytest.raises(UserError, match=sentence):
        schedules.learning_rate(SPANS, form=form, peak=0.05, milestones=(0.5,), warmup=warmup)


def test_cycles_are_the_stages_or_one():
    plan = [Stage("slimmable", (1.0,), *span) for span in SPANS]
    assert stages.cycles(plan, True) == SPANS
    assert stages.cycles(plan, False) == [(0, 100)]


def test_stage_and_rate_come_from_one_counter():
    plan = [Stage("slimmable", (1.0,), *span) for span in SPANS]
    found = [tuple(map(int, stages.place(plan)(jnp.asarray(s)))) for s in (0, 39, 40, 59, 60, 99)]
    assert found == [(0, 0), (0, 39), (1, 0), (1, 19), (2, 0), (2, 39)]
