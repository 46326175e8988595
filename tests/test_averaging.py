"""Means of weights (EMA), and batches learnt from in parts: against their formulas, in every step that trains."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, identical
from test_commands import TINY
from test_training import CLASSES, SHAPE, Tiny, optimizer, preprocess, split

import pwkd_jax as pwkd
from pwkd_jax import distillers, evaluate, models, slimmable, stages, train
from pwkd_jax.errors import UserError
from pwkd_jax.training import accumulation, loop, sharding, student, students_together, teacher
from pwkd_jax.training import state as states
from pwkd_jax.training.outcome import judged
from pwkd_jax.training.writers import read_rows

DECAY = 0.6


@pytest.fixture(scope="module")
def task():
    return pwkd.task((split(40).images, split(40).labels), test=(split(20, 1).images, split(20, 1).labels))


@pytest.fixture(scope="module")
def net():
    return slimmable.build(lambda w: Tiny(width=w), (0.5, 1.0), SHAPE)


@pytest.fixture(scope="module")
def recorded(task, net):
    """(teacher, [(params, statistics) after every step])."""
    seen = []

    def keep(step, state, means):
        seen.append(jax.tree.map(np.asarray, (state.params, state.collections, state.average)))

    taught = pwkd.train_teacher(net, task, duration=8, batch_size=8, ema=DECAY, callback=keep, label="")
    return taught, seen


def mean_of(first, rest):
    """a <- d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)), in float64."""
    mean = jax.tree.map(np.float64, first)
    for t, now in enumerate(rest):
        d = min(DECAY, (1 + t) / (10 + t))
        mean = jax.tree.map(lambda a, w, d=d: d * a + (1 - d) * np.float64(w), mean, now)
    return mean


def test_a_teacher_is_the_mean_of_its_weights_and_statistics(recorded, net, task):
    taught, seen = recorded
    first = net.init(jax.random.key(0), SHAPE)
    params, statistics = (mean_of(first[i], [one[i] for one in seen]) for i in (0, 1))
    close(seen[-1][2], {"params": params, "collections": statistics}, 1e-5)
    as_float = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, statistics))
    for width in (0.5, 1.0):
        close(taught.variables[width], net.extract(*as_float, width), 1e-5)
    raw = task.evaluator(net.members[1.0], net.extract(*jax.tree.map(jnp.asarray, seen[-1][:2]), 1.0))["top1"]
    row = taught.rows[-1]
    assert row["raw_top1_1"] == raw and row["top1_1"] == task.evaluator(net.members[1.0], taught.variables[1.0])["top1"]
    assert not identical(seen[-1][0], seen[-1][2]["params"])


def learn(task, taught, directory=None, seen=None, stop=None, **options):
    def keep(step, state, means):
        if seen is not None:
            seen.append(jax.tree.map(np.asarray, state))
        if step == stop:
            raise KeyboardInterrupt

    options = {"batch_size": 8, "ema": DECAY, "label": "", "duration": 10, "data_seed": 0, "callback": keep} | options
    return pwkd.distil(Tiny(width=0.25), taught, task, directory=directory, **options)


@pytest.fixture(scope="module")
def learnt(recorded, task):
    seen = []
    return learn(task, recorded[0], seen=seen), seen


def test_a_student_is_the_mean_of_its_weights_and_statistics(learnt, task):
    found, seen = learnt
    first = student.init(Tiny(width=0.25), SHAPE, None, optimizer(), 0)
    mean = mean_of(student.variables(first), [student.variables(state) for state in seen])
    close(found.variables, mean, 1e-5)
    assert found.rows[-1]["raw_top1"] == task.scores(Tiny(width=0.25), student.variables(found.state))["top1"]
    assert found.rows[-1]["top1"] == task.scores(Tiny(width=0.25), found.variables)["top1"]


def test_a_stopped_run_ends_with_the_same_mean(learnt, recorded, task, tmp_path):
    cadence = loop.Cadence(50, 5, 3, False)
    with pytest.raises(KeyboardInterrupt):
        learn(task, recorded[0], tmp_path / "run", stop=8, cadence=cadence)
    again = learn(task, recorded[0], tmp_path / "run", cadence=cadence)
    assert identical(again.variables, learnt[0].variables) and identical(again.state, learnt[0].state)
    with pytest.raises(UserError, match=r"ema"):
        learn(task, recorded[0], tmp_path / "run", ema=0.5)


def test_several_students_have_the_means_that_each_has_alone(learnt, recorded, task):
    together = students_together.several("unroll", 2, jax.devices())
    found = learn(task, recorded[0], seed=[0, 1], several=together)
    for seed, alone in enumerate([learnt[0], learn(task, recorded[0], seed=1)]):
        plan = stages.even("pwkd", (0.5, 1.0), 10)
        mine = judged(Tiny(width=0.25), None, plan, None, students_together.member(found.state, seed))[1]
        close(mine, alone.variables, 1e-5)


def test_weights_begun_anew_begin_a_new_mean(recorded, task):
    seen = []
    learn(task, recorded[0], seen=seen, reset=("weights",))
    fresh = student.init(Tiny(width=0.25), SHAPE, None, optimizer(), 0)
    # After one step of the second stage: d = min(0.6, 6 / 15) of the first weights, the rest of the new ones.
    expected = jax.tree.map(lambda a, w: 0.4 * a + 0.6 * w, fresh.params["student"], seen[5].params["student"])
    close(seen[5].average["params"]["student"], expected, 1e-5)


# Parts of a batch.


class Plain(nn.Module):
    """A network without batch norm."""

    width: float = 1.0
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(models.channels(8, self.width), (3, 3), name="conv")(x))
        return models.Outputs(nn.Dense(self.num_classes, name="head")(x.mean((1, 2))), (x,))


def batch_of(count: int) -> dict:
    images = split(count)
    return {"image": images.images, "label": images.labels, "index": np.arange(count, dtype=np.int32)}


def values(metrics) -> dict[str, float]:
    return {name: float(average.compute()) for name, average in metrics.items()}


@pytest.mark.parametrize("loss", ["hard", "inplace_mix"])
def test_a_teacher_learns_the_same_from_parts(loss):
    net, tx = slimmable.build(lambda w: Plain(width=w), (0.5, 1.0), SHAPE), optimizer()
    results = []
    for parts in (1, 4):
        step = jax.jit(teacher.make_step(net, tx, lambda s: 0.1, preprocess, sharding.make_mesh(), None, parts, loss=loss))
        state = states.create(0, *net.init(jax.random.key(0), SHAPE), tx)
        for _ in range(2):
            state, found = step(state, batch_of(16))
        results.append(({"params": state.params, "opt_state": state.opt_state}, values(found)))
    close(*(r[0] for r in results), 1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("make", [Plain, Tiny])
def test_a_student_learns_from_parts_what_they_say_together(make):
    """Without batch norm what it would of the whole; with it, the mean gradient of the parts, each normalised by itself."""
    pupil, whole, tx, parts = make(width=0.5), Plain(), optimizer(), 4
    taught = models.abstract(whole, SHAPE)
    frozen = {1.0: jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32), taught)}
    shapes = {"image": (16, *SHAPE), "label": (16,), "index": (16,)}
    like = {k: jax.ShapeDtypeStruct(s, jnp.float32 if k == "image" else jnp.int32) for k, s in shapes.items()}
    outputs = [
        jax.eval_shape(lambda v, x, m=m: models.apply(m, v, x, train=False)[0], models.abstract(m, SHAPE), like["image"])
        for m in (pupil, whole)
    ]
    distillation = distillers.build(distillers.create("kd"), outputs[0], {1.0: outputs[1]}, like)
    plan = [stages.Stage("slimmable", (1.0,), 0, 8)]

    def step(count: int):
        made = student.make_step(pupil, {1.0: whole}, (1.0,), distillation, plan, tx, lambda s: 0.1, preprocess, images=40,
                                 accumulate=count)  # fmt: skip
        return jax.jit(made)

    batch, fresh = batch_of(16), student.init(pupil, SHAPE, distillation, tx, 0)
    after, found = step(parts)(fresh, batch, teacher=frozen)
    if make is Plain:
        expected, metrics = step(1)(fresh, batch, teacher=frozen)
        close(after.params, expected.params, 1e-6)
        assert values(found) == pytest.approx(values(metrics), rel=1e-5)
        return
    # By hand: a step of SGD from rest is linear in the gradient, so the parts' own steps have the mean that counts.
    ends, state = [], fresh
    for i in range(parts):
        own, _ = step(1)(state.replace(params=fresh.params, opt_state=fresh.opt_state, step=fresh.step),
                         {k: v[i::parts] for k, v in batch.items()}, teacher=frozen)  # fmt: skip
        ends.append(own.params)
        state = own
    close(after.params, jax.tree.map(lambda *xs: sum(xs) / parts, *ends), 1e-5)
    close(after.collections["batch_stats"], state.collections["batch_stats"], 1e-5)


def test_every_part_draws_for_itself_and_hands_on_what_is_kept():
    def gradient(params, kept, key, rows):
        draw = jax.random.uniform(key)
        return (jnp.sum(rows["x"]), (kept + 1, {"drawn": jnp.full(rows["x"].shape, draw), "count": kept})), params

    run = accumulation.accumulate(gradient, 3)
    (loss, (kept, found)), grads = run(jnp.ones(2), jnp.float32(0), jax.random.key(0), {"x": jnp.arange(6.0)})
    assert (float(loss), float(kept), float(found["count"])) == (5.0, 3.0, 1.0) and list(grads) == [1, 1]
    assert len(set(np.asarray(found["drawn"]).tolist())) == 3


def test_parts_must_divide_a_batch(task, net):
    with pytest.raises(UserError, match=r"a global batch of 8 does not divide over 1 device\(s\), each in 3 parts"):
        pwkd.train_teacher(net, task, duration=2, batch_size=8, accumulate=3, label="")
    with pytest.raises(UserError, match=r"^ema: 1 is not possible; it should be 0 \(off\) or a decay below 1"):
        pwkd.train_teacher(net, task, duration=2, batch_size=8, ema=1, label="")


@pytest.mark.parametrize("options", [
    ["ema=0.9"], ["optimizer.name=optax.contrib:schedule_free_sgd", "optimizer.weight_decay=0.0", "schedule.form=constant"],
])  # fmt: skip
def test_a_run_that_is_read_again_is_what_was_scored(options, tmp_path):
    """Whether a run has ended or one of its checkpoints is named, the weights that count are read."""
    both = [f"--config.{who}.{option}" for who in ("teacher", "student") for option in options]
    assert train.main([*TINY, *both, "--config.arms=pwkd", f"--workdir={tmp_path}/w"]) == 0
    for run, key in (("teacher/slimmable", "top1_1"), ("students/pwkd/seed0", "top1")):
        rows = {row["step"]: row for row in read_rows(tmp_path / "w" / run / "metrics.jsonl")}
        assert "raw_" + key in rows[24]
        for target in (f"{run}/checkpoints/24", run):
            assert evaluate.evaluate(str(tmp_path / "w" / target))["top1"] == pytest.approx(rows[24][key])
