"""Students that learn from each other: deep mutual learning's formula, in every way that students are put together."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, identical
from scipy.special import log_softmax, softmax
from test_commands import TINY, rows
from test_hosts import terminated_at
from test_together import state

from pwkd_jax import config, models, train
from pwkd_jax.experiment import definition, programs
from pwkd_jax.training.mutual import Mutual

MUTUAL = [*TINY, "--config.seeds=3", "--config.student.batches=shared", "--config.log.tensorboard=false",
          "--config.student.mutual=1.0"]  # fmt: skip
RUNS = [f"students/{arm}/seed{seed}" for arm in ("alone", "pwkd") for seed in range(3)]


def by_hand(logits: np.ndarray, own: int, temperature: float) -> float:
    """Of [K, B, classes]: the mean over the others of the batch's mean KL(other || own), by NumPy in float64, times T^2."""
    z = np.asarray(logits, np.float64) / temperature
    found = [np.mean(np.sum(softmax(z[j], -1) * (log_softmax(z[j], -1) - log_softmax(z[own], -1)), -1))
             for j in range(len(z)) if j != own]  # fmt: skip
    return temperature**2 * float(np.mean(found))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_is_its_formula(temperature):
    logits = np.random.default_rng(0).normal(0, 3, (3, 6, 10)).astype(np.float32)
    mutual = Mutual(0.5, temperature)
    for own in range(3):
        value, grad = jax.value_and_grad(mutual)(jnp.asarray(logits[own]), jnp.asarray(logits))
        assert float(value) == pytest.approx(0.5 * by_hand(logits, own, temperature), rel=1e-5)
        # T^2 d/dz of KL(p_other || p_own) is T (p_own - p_other), a mean over the batch.
        p = softmax(np.asarray(logits, np.float64) / temperature, -1)
        others = np.mean([p[j] for j in range(3) if j != own], 0)
        np.testing.assert_allclose(grad, 0.5 * temperature * (p[own] - others) / 6, atol=1e-6)
    same = np.broadcast_to(logits[:1], logits.shape)
    value, grad = jax.value_and_grad(mutual)(jnp.asarray(same[0]), jnp.asarray(same))
    assert abs(float(value)) < 1e-6 and float(jnp.abs(grad).max()) < 1e-7
    assert not np.any(jax.grad(lambda everyone: mutual(jnp.asarray(logits[0]), everyone))(jnp.asarray(logits)))


def steps(*options: str):
    """(experiment, creator, step) of three students without a teacher, whose optimiser is plain."""
    plain = ["arms=alone", "data.on_device=never", "data.crop_padding=0", "student.schedule.form=constant",
             "student.optimizer.momentum=0.0", "student.optimizer.weight_decay=0.0"]  # fmt: skip
    settings, _ = config.load([*MUTUAL, *(f"--config.{option}" for option in (*plain, *options))])
    experiment = definition.prepare(settings)
    several = experiment.several(3)
    create, made = programs.student_steps(experiment, experiment.plan("alone"), None, several)
    return experiment, create, made[()]


def test_a_step_is_that_of_the_formula():
    experiment, create, step = steps()
    task, pupil = experiment.task, experiment.student
    batch = jax.tree.map(np.asarray, task.batches(16, 0)(0))
    before = jax.tree.map(np.asarray, create(np.arange(3, dtype=np.uint32), None))
    rate = float(experiment.schedule("student", *experiment.spans(experiment.plan("alone")))(0))
    images = task.preprocess(jax.random.key(0), jnp.asarray(batch["image"]))  # nothing of it is random here
    labels = batch["label"]

    def logits(params, i):
        variables = {"params": params, "batch_stats": jax.tree.map(lambda x: x[i], before.collections["batch_stats"])}
        return models.apply(pupil, variables, images, train=True)[0].logits

    own = [jax.tree.map(lambda x, i=i: x[i], before.params["student"]) for i in range(3)]
    said = np.stack([logits(own[i], i) for i in range(3)])
    after, found = step(create(np.arange(3, dtype=np.uint32), None), batch, teacher={})
    after, found = jax.tree.map(np.asarray, (after, found))
    for i in range(3):

        def loss(params, i=i):
            p = jax.nn.log_softmax(logits(params, i))
            cross = -jnp.mean(p[jnp.arange(16), labels])
            return cross - sum(jnp.mean(jnp.sum(softmax(said[j], -1) * p, -1)) for j in range(3) if j != i) / 2

        expected = jax.tree.map(lambda x, g: x - rate * g, own[i], jax.grad(loss)(own[i]))
        close(jax.tree.map(lambda x, i=i: x[i], after.params["student"]), expected, 1e-5)
        off = [float(v.total / v.count) for k, v in found.items() if k == f"mutual_student{i}"]
        assert off == pytest.approx([by_hand(said, i, 1.0)], rel=1e-4)


def test_it_costs_no_second_forward_pass():
    flops = []
    for weight in (1.0, 0.0):
        _, create, step = steps(f"student.mutual={weight}")
        batch = {"image": np.zeros((16, 8, 8, 1), np.uint8), "label": np.zeros(16, np.int32), "index": np.zeros(16, np.int32)}
        lowered = step.lower(create.like, batch, teacher={})
        flops.append(lowered.compile().cost_analysis()["flops"])
    # Another forward pass would be a third more; of so small a network the divergences themselves are a twelfth.
    assert flops[0] < 1.15 * flops[1]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mutual") / "work"
    assert train.main([*MUTUAL, "--config.arms=alone,pwkd", f"--workdir={workdir}"]) == 0
    return workdir


def test_all_learn_from_each_other_staged_or_not(learnt):
    for name in RUNS:
        logged = [row for row in rows(learnt, name) if "mutual" in row]
        assert logged and all(0 < row["mutual"] < 10 for row in logged)
    summary = json.loads((learnt / "summary.json").read_text())
    assert any("learnt from each other" in line for line in summary["warnings"])


def test_scanned_it_is_the_same(learnt, tmp_path):
    options = ["--config.arms=alone", "--config.student.together=scan", f"--workdir={tmp_path / 'w'}"]
    assert train.main([*MUTUAL, *options]) == 0
    for name in RUNS[:3]:
        for x, y in zip(*(jax.tree.leaves(state(w, name, 24)) for w in (learnt, tmp_path / "w")), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_stopped_again_and_again_it_ends_the_same(learnt, tmp_path, monkeypatch):
    codes, line = [], [*MUTUAL, "--config.arms=pwkd", f"--config.teacher.run={learnt}", f"--workdir={tmp_path / 'w'}"]
    while not codes or codes[-1]:
        with monkeypatch.context() as patch:
            terminated_at(20, patch)
            codes.append(train.main(line))
        assert codes[-1] in (0, 75) and len(codes) < 40
    assert len(codes) > 2
    for name in RUNS[3:]:
        assert identical(state(learnt, name, 24), state(tmp_path / "w", name, 24)), name


def test_what_cannot_be_is_refused(learnt, tmp_path, capsys):
    for options, said in (
        (["seeds=1"], "with one seed: its student has nobody to learn from"),
        (["student.batches=own"], "0 unless student.batches is 'shared'"),
        (["student.accumulate=2"], "0 where student.accumulate, non_finite or evaluation.patience"),
        (["student.mutual_temperature=0.0"], "student.mutual_temperature: 0.0 is not possible"),
    ):
        assert train.main([*MUTUAL, *(f"--config.{option}" for option in options), f"--workdir={tmp_path / 'w'}"]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "w").exists()
    # Others cannot join those that have learnt already.
    assert train.main([*MUTUAL, "--config.arms=alone,pwkd", "--config.seeds=4", f"--workdir={learnt}"]) == 2
    assert "3 of 4 students are finished" in capsys.readouterr().err
