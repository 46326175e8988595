"""Numbers that are not finite: named by step, term and images, run again by the same call, or skipped and counted."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_library import SHAPE, drawn
from test_training import Tiny

import pwkd_jax as pwkd
from pwkd_jax import data, train
from pwkd_jax.training import metrics
from pwkd_jax.training.metrics import Running


class Broken(nn.Module):
    """Mean squared error of logits, until step `at` of stage `stage`, whose loss is no number, or whose gradient alone."""

    at: int
    stage: int = 1
    gradient: bool = False
    ce_weight: float = 1.0
    weight: float = 1.0

    def __call__(self, student, teacher, batch, progress):
        now = (progress.stage == self.stage) & (progress.step == self.at)
        error = jnp.mean((student.logits - teacher.logits) ** 2)
        if self.gradient:  # the slope of a root at zero is infinite, and times zero no number
            return error + jnp.sqrt(jnp.where(now, 0.0, 1.0) * jnp.sum(student.logits**2)), {"error": error}
        broken = jnp.where(now, jnp.nan, error)
        return broken, {"error": broken}


@pytest.fixture(scope="module")
def task():
    return pwkd.task(drawn(96), test=drawn(40, 1))


@pytest.fixture(scope="module")
def teacher(task):
    net = pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, num_classes=3)
    return pwkd.train_teacher(net, task, duration=4, batch_size=16, label="")


def distil(teacher, task, distiller, directory=None, **options):
    """24 steps in two stages of 12; the losses of the steps that ran, by step."""
    seen = {}

    def note(step, state, found):
        seen[step] = jax.device_get(state.params)

    options = {"label": "pwkd/seed0"} | options
    try:
        return pwkd.distil(
            Tiny(width=0.5, num_classes=3), teacher, task, distiller=distiller, duration=24, batch_size=16, callback=note,
            directory=directory, cadence=pwkd.Cadence(10, 12, 6, False), **options,
        ), seen  # fmt: skip
    except pwkd.UserError as e:
        return e, seen


def test_the_step_its_stage_its_term_and_its_images_are_named(teacher, task, tmp_path):
    error, _ = distil(teacher, task, Broken(4), tmp_path / "run")
    held = data.Pipeline(task.train, 16, 0)(16)["index"].tolist()
    shown = ", ".join(map(str, held[:4]))
    where = "pwkd/seed0, stage 2 of 2, teacher width 1: the loss is nan at step 17"
    assert str(error).startswith(where), error
    assert f"error nan), in the batch of the images {shown}, ...; " in str(error)
    record = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert (record["step"], record["images"], record["stage"]) == (17, held, "stage 2 of 2, teacher width 1")
    assert record["terms"]["error"] == "nan" and np.isfinite(record["terms"]["cross_entropy"])


@pytest.mark.parametrize("gradient", [False, True])
def test_the_same_call_runs_that_step_again_from_just_before(teacher, task, tmp_path, gradient):
    """The first time from the last checkpoint, which is far; then from the two steps that can be at fault."""
    told, ran = [], []
    for _ in range(3):
        error, seen = distil(teacher, task, Broken(4, gradient=gradient), tmp_path / "run")
        told.append(str(error).partition(";")[0])
        ran.append(sorted(seen))
    assert ran[0][0] == 1 and ran[1][0] == 13 and ran[2][0] >= 15, ran
    assert max(map(max, ran)) <= 20
    what = "the gradient is not finite at step 17, nor are " if gradient else "the loss is nan at step 17 "
    assert what in told[1] and told[1] == told[2]
    if not gradient:
        assert told[0] == told[1]


def test_a_step_that_goes_well_the_second_time_lets_the_run_go_on(teacher, task, tmp_path, capsys):
    """As after a device's mistake: what it ends with is what it would have ended with."""
    distil(teacher, task, Broken(4), tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()  # another distiller, to the run's own record
    student, _ = distil(teacher, task, Broken(99), tmp_path / "run")
    assert "step 17 is finite this time" in capsys.readouterr().err
    assert not (tmp_path / "run" / "non_finite.json").exists()
    whole, _ = distil(teacher, task, Broken(99))
    jax.tree.map(np.testing.assert_array_equal, student.variables, whole.variables)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_skipped_step_changes_nothing_and_is_counted(teacher, task, gradient):
    student, seen = distil(teacher, task, Broken(4, gradient=gradient), non_finite="skip")
    jax.tree.map(np.testing.assert_array_equal, seen[16], seen[17])
    changed = jax.tree.map(lambda a, b: (a != b).any(), seen[15], seen[16])
    assert any(jax.tree.leaves(changed))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(student.variables))
    rows = {row["step"]: row["skipped"] for row in student.rows}
    assert rows == {6: 0, 10: 0, 12: 0, 18: pytest.approx(100 / 6), 20: 0, 24: 0}
    assert all(np.isfinite(row["train_loss"]) for row in student.rows)
    _, unbroken = distil(teacher, task, Broken(99, gradient=gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), seen[16], unbroken[16])


def test_a_teacher_that_would_skip_every_step_stops(task):
    net = pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, num_classes=3)
    nothing = optax.sgd(lambda step: jnp.nan)
    with pytest.raises(pwkd.UserError, match=r"none of the last 3 steps until 3 had a finite loss and gradient"):
        pwkd.train_teacher(net, task, duration=3, batch_size=16, optimizer=nothing, non_finite="skip", label="")


def test_a_command_says_it_in_a_sentence(tmp_path, capsys):
    arguments = [
        "--config=configs/digits.py", f"--workdir={tmp_path / 'work'}", "--config.data.train_split=train[:96]",
        "--config.data.test_split=test[:40]", "--config.teacher.model=test_training:Tiny", "--config.teacher.widths=(0.5,1.0)",
        "--config.student.model=test_training:Tiny", "--config.teacher.schedule.peak=1e30",
        "--config.evaluation.every=100 %", "--config.seeds=0",
    ]  # fmt: skip
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: teacher/slimmable: the loss is ") and error.count("\n") == 1, error
    assert "non_finite.json has it all" in error and "(schedule.peak)" in error


def test_the_first_of_several_steps_is_kept_however_they_come():
    """One by one, several in a dispatch whose end is empty, and after a stop in between."""
    losses = np.array([1, 2, np.inf, 4, np.nan, 6], np.float32)

    def several(values, room):
        found = metrics.collect({"train_loss": jnp.float32(0)})
        each = [metrics.collect({"train_loss": jnp.float32(v)}) for v in values]
        empty = jax.tree.map(jnp.zeros_like, found)
        return jax.tree.map(lambda *xs: jnp.stack(xs), *each, *[empty] * (room - len(values)))

    singly, chunked, stopped = Running(), Running(), Running()
    for loss in losses:
        singly.add(metrics.collect({"train_loss": jnp.float32(loss)}))
    chunked.add(several(losses[:1], 4))
    chunked.add(several(losses[1:], 8))
    stopped.add(several(losses[:4], 4))
    dumped = json.loads(json.dumps(stopped.dump()))
    resumed = Running()
    resumed.load(dumped)
    resumed.add(several(losses[4:], 4))
    for running in (singly, chunked, resumed):
        assert running.first() == (2, {"train_loss": np.inf})
        assert np.isnan(running.flush()["train_loss"]) and running.first() is None


def test_the_window_of_an_older_run_is_taken_over():
    old = {"train_loss": [["float32", 6.0], ["int32", 3]]}
    running = Running()
    running.load(old)
    running.add(metrics.collect({"train_loss": jnp.float32(2)}))
    assert running.first() is None and running.flush() == {"train_loss": 2.0}
