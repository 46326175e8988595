"""The loop, the optimiser, both steps, and what a run leaves on disk."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import close, identical

from pwkd_jax import data, distillers, models, slimmable, stages
from pwkd_jax.errors import UserError
from pwkd_jax.training import loop, metrics, optimizers, schedules, sharding, student, teacher
from pwkd_jax.training import state as states
from pwkd_jax.training.checkpoints import Checkpoints
from pwkd_jax.training.evaluation import Evaluator
from pwkd_jax.training.writers import Writer, read_rows

SHAPE, CLASSES, BATCH = (4, 4, 1), 3, 8


class Tiny(nn.Module):
    """One convolution, batch norm and a classifier: the smallest slimmable network."""

    width: float = 1.0
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(models.channels(8, self.width), (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x))
        pooled = x.mean((1, 2))
        head = nn.Dense(self.num_classes, name="head")
        logits = head(pooled)
        weights = (head.variables["params"]["kernel"], head.variables["params"]["bias"])
        return models.Outputs(logits, (x,), (x,), pooled, weights, final=x)


def split(n: int, seed: int = 0) -> data.Split:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    images = rng.integers(0, 100, (n, *SHAPE)) + 50 * labels[:, None, None, None]
    return data.Split(images.astype(np.uint8), labels)


def preprocess(key, images):
    return data.normalise(images, (0.5,), (0.25,))


def optimizer(**options):
    known = {"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "decay": "all", "clip_norm": 0.0}
    return optimizers.optimizer(options.pop("name", "sgd"), **{**known, **options})


class Bench:
    """A frozen two-width teacher, a student, and everything to step it."""

    def __init__(self, plan, distiller="kd", schedule=None, **options):
        self.net = slimmable.build(lambda w: Tiny(width=w), (0.5, 1.0), SHAPE)
        params, statistics = self.net.init(jax.random.key(9), SHAPE)
        self.frozen = teacher.freeze(self.net, params, statistics)
        self.model, self.plan, self.tx = Tiny(width=0.25), plan, optimizer(**options)
        images = split(40)
        pipeline = data.Pipeline(images, BATCH, 3)
        self.pipeline = lambda step: pipeline(step) | {"dataset_label": images.labels}
        shapes = {"image": (BATCH, *SHAPE), "label": (BATCH,), "index": (BATCH,), "dataset_label": (40,)}
        batch = {k: jax.ShapeDtypeStruct(s, jnp.float32 if k == "image" else jnp.int32) for k, s in shapes.items()}

        def outputs(model):
            v = models.abstract(model, SHAPE)
            return jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], v, batch["image"])

        teachers = {w: outputs(m) for w, m in self.net.members.items()}
        self.distillation = distillers.build(distillers.create(distiller), outputs(self.model), teachers, batch)
        spans = stages.cycles(plan, True)
        self.schedule = schedule or schedules.learning_rate(spans, form="cosine", peak=0.1)
        self.steps = {}

    def fresh(self, seed=3):
        return student.init(self.model, SHAPE, self.distillation, self.tx, seed)

    def step(self, widths):
        if widths not in self.steps:
            made = student.make_step(
                self.model, self.net.members, widths, self.distillation, self.plan, self.tx, self.schedule, preprocess,
                images=40,
            )  # fmt: skip
            self.steps[widths] = jax.jit(made)
        return lambda state, batch: self.steps[widths](state, batch, teacher={w: self.frozen[w] for w in widths})

    def run(self, state=None, until=None, enter=lambda s: s):
        state = state or self.fresh()
        for stage in self.plan:
            if int(state.step) == stage.start and stage.start:
                state = enter(state)
            state = loop.fit(state, self.step(stage.widths), self.pipeline, min(stage.end, until or stage.end))
        return state


def two_stages(widths=((0.5,), (1.0,))):
    return [stages.Stage("slimmable", w, 6 * i, 6 * (i + 1)) for i, w in enumerate(widths)]


# The optimiser.


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(nesterov):
    """d = g + wd p; v = 0.9 v + d; p -= lr (d + 0.9 v if nesterov else v), in float64 by hand."""
    tx, rng = optimizer(nesterov=nesterov, weight_decay=0.01), np.random.default_rng(0)
    p, v = rng.standard_normal(5), np.zeros(5)
    state = states.create(0, {"w": jnp.asarray(p, jnp.float32)}, {}, tx)
    for step in range(4):
        g, lr = rng.standard_normal(5), 0.1 / (step + 1)
        d = g + 0.01 * p
        v = 0.9 * v + d
        p = p - lr * (d + 0.9 * v if nesterov else v)
        state, used = states.apply_gradients(
            state, {"w": jnp.asarray(g, jnp.float32)}, {}, tx, lambda s: 0.1 / (s + 1)
        )
        assert float(used["learning_rate"]) == pytest.approx(lr)
    np.testing.assert_allclose(state.params["w"], p, rtol=1e-5)
    assert int(state.step) == 4


def test_adamw_is_optaxs_and_decay_can_spare_vectors():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    grads = {"kernel": jnp.full((2, 2), 0.3), "bias": jnp.full(2, -0.2)}
    ours, theirs = optimizer(name="adamw", weight_decay=0.1, decay="kernels"), optax.adamw(
        0.01, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    state, opt, expected = states.create(0, params, {}, ours), theirs.init(params), params
    for _ in range(3):
        state, _ = states.apply_gradients(state, grads, {}, ours, lambda s: 0.01)
        updates, opt = theirs.update(grads, opt, expected)
        expected = optax.apply_updates(expected, updates)
    close(state.params, expected, 1e-6)


def test_clipping_bounds_the_update():
    tx = optimizer(momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    state = states.create(0, {"w": jnp.zeros(4)}, {}, tx)
    state, _ = states.apply_gradients(state, {"w": jnp.full(4, 100.0)}, {}, tx, lambda s: 1.0)
    assert float(jnp.linalg.norm(state.params["w"])) == pytest.approx(1.0)


# The steps.


def test_plain_distillation_by_hand_is_one_full_width_stage():
    """K = 1, width 1, one cycle is plain KD: here rewritten from nothing but flax and optax."""
    bench = Bench([stages.Stage("slimmable", (1.0,), 0, 8)])
    found = bench.run()

    model, whole = bench.model, bench.frozen[1.0]
    state = bench.fresh()
    params, stats = state.params["student"], state.collections["batch_stats"]
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(optax.cosine_decay_schedule(0.1, 8), momentum=0.9))
    opt = tx.init(params)

    @jax.jit
    def plain(params, stats, opt, batch):
        x = (batch["image"].astype(jnp.float32) / 255 - 0.5) / 0.25
        taught = Tiny().apply(whole, x).logits

        def loss(params):
            out, new = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            log_s, log_t = jax.nn.log_softmax(out.logits / 4), jax.nn.log_softmax(taught / 4)
            kd = 16 * (jnp.exp(log_t) * (log_t - log_s)).sum(-1).mean()
            ce = optax.softmax_cross_entropy_with_integer_labels(out.logits, batch["label"]).mean()
            return 0.1 * ce + 0.9 * kd, new["batch_stats"]

        (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_ = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), stats, opt_

    for n in range(8):
        params, stats, opt = plain(params, stats, opt, bench.pipeline(n))
    close(student.variables(found), {"params": params, "batch_stats": stats}, 1e-6)


def test_teacher_is_bit_identical_after_the_student():
    bench = Bench(two_stages())
    before = jax.tree.map(lambda x: np.array(x, copy=True), bench.frozen)
    bench.run()
    assert identical(before, bench.frozen)


def test_stages_are_taught_by_their_own_width():
    """Each stage's step depends on its sub-network and on no other."""
    bench = Bench(two_stages())
    reference = bench.run(until=6)
    broken = jax.tree.map(jnp.zeros_like, bench.frozen[1.0])
    bench.frozen = {0.5: bench.frozen[0.5], 1.0: broken}
    assert identical(reference, bench.run(until=6))
    bench.frozen = {0.5: jax.tree.map(jnp.zeros_like, bench.frozen[0.5]), 1.0: broken}
    assert not identical(reference, bench.run(until=6))


def test_resuming_anywhere_is_bit_identical():
    bench = Bench(two_stages())
    whole = bench.run()
    for stop in (3, 6, 9):
        assert identical(whole, bench.run(bench.run(until=stop)))


def test_momentum_is_carried_or_reset_and_weights_stay():
    bench = Bench(two_stages())
    at_end = bench.run(until=6)
    kept = student.enter_stage(at_end, bench.fresh, bench.tx.init, (), "leading")
    assert identical(kept, at_end)
    reset = student.enter_stage(at_end, bench.fresh, bench.tx.init, ("momentum",), "leading")
    assert all(not np.any(x) for x in jax.tree.leaves(reset.opt_state)) and identical(reset.params, at_end.params)
    twice = student.enter_stage(reset, bench.fresh, bench.tx.init, ("momentum",), "leading")
    assert int(reset.step) == 6 and identical(reset, twice)
    assert not identical(bench.run(), bench.run(enter=lambda s: s.replace(opt_state=bench.tx.init(s.params))))
    weights = student.enter_stage(at_end, bench.fresh, bench.tx.init, ("weights",), "leading")
    assert identical(student.variables(weights), student.variables(bench.fresh()))
    norm = student.enter_stage(at_end, bench.fresh, bench.tx.init, ("batch_norm",), "leading")
    assert identical(norm.collections, bench.fresh().collections) and identical(norm.params, at_end.params)


def test_connectors_survive_a_stage_or_start_anew():
    bench = Bench(two_stages(), distiller="test_distillers:Hint")
    first = bench.run(until=6)
    initial = bench.fresh().params["distiller"]["Dense_0"]["kernel"]
    kernel = first.params["distiller"]["Dense_0"]["kernel"]
    assert np.all(np.any(kernel[:, :4] != initial[:, :4], axis=0))  # the narrow stage trains its leading block
    assert np.array_equal(kernel[:, 4:], initial[:, 4:])  # and weight decay leaves what waits for the wide one alone
    leading = student.enter_stage(first, bench.fresh, bench.tx.init, (), "leading")
    assert identical(leading.params["distiller"], first.params["distiller"])
    anew = student.enter_stage(first, bench.fresh, bench.tx.init, (), "reinit")
    assert identical(anew.params["distiller"], bench.fresh().params["distiller"])
    assert identical(anew.params["student"], first.params["student"])
    last = bench.run(first)
    assert int(last.collections["distiller"]["counts"]["calls"]) == 12


def test_a_method_that_predicts_is_judged_by_its_own_logits():
    bench, images = Bench(two_stages(), distiller="simkd"), split(37)
    state = bench.run()
    model = student.Assisted(bench.model, bench.net.members[1.0], bench.distillation, 1.0)
    variables, x = model.variables(state, bench.frozen[1.0]), preprocess(None, images.images)
    out = models.apply(bench.model, student.variables(state), x, train=False)[0]
    taught = models.apply(bench.net.members[1.0], bench.frozen[1.0], x, train=False)[0]
    own, kept = state.params["distiller"], state.collections["distiller"]
    logits = bench.distillation.predict(own, kept, 1.0, out, taught)
    close(model.apply(variables, x), logits, 1e-6)
    assert float(jnp.abs(logits - out.logits).max()) > 0.01
    found = Evaluator(sharding.make_mesh(), images, 16, lambda x: preprocess(None, x))(model, variables)
    assert found["top1"] == pytest.approx(100 * np.mean(np.argmax(logits, -1) == images.labels))
    # Its student's classifier has no gradient, and weight decay leaves it alone.
    assert identical(state.params["student"]["head"], bench.fresh().params["student"]["head"])


def test_random_width_each_step_is_drawn_from_the_seed():
    bench = Bench(two_stages(((0.5, 1.0), (0.5, 1.0))))
    assert identical(bench.run(), bench.run(bench.run(until=7)))
    drawn = []
    for n in range(12):
        state = bench.fresh().replace(step=jnp.asarray(n, jnp.int32))
        found = bench.step((0.5, 1.0))(state, bench.pipeline(n))[0].params
        each = [bench.step((w,))(state, bench.pipeline(n))[0].params for w in (0.5, 1.0)]
        errors = [max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, e))) for e in each]
        assert min(errors) < 1e-6 < max(errors)
        drawn.append(errors.index(min(errors)))
    assert {0, 1} == set(drawn)


def test_one_compilation_per_stage_and_none_between_seeds():
    bench = Bench(two_stages())
    for seed in (3, 4):
        bench.run(bench.fresh(seed))
    assert {w: f._cache_size() for w, f in bench.steps.items()} == {(0.5,): 1, (1.0,): 1}


def test_another_crop_for_the_teacher_changes_the_loss():
    bench = Bench([stages.Stage("slimmable", (1.0,), 0, 8)])

    def noisy(key, images):
        return preprocess(key, data.augment(key, images, 1, True))

    results = []
    for same in (True, False):
        step = jax.jit(student.make_step(
            bench.model, bench.net.members, (1.0,), bench.distillation, bench.plan, bench.tx, bench.schedule, noisy,
            images=40, same_crop=same,
        ))  # fmt: skip
        results.append(step(bench.fresh(), bench.pipeline(0), teacher={1.0: bench.frozen[1.0]})[1])
    one, two = ({name: float(average.compute()) for name, average in found.items()} for found in results)
    assert one["train_top1"] == two["train_top1"]  # the student's own view is the same
    assert one["distillation"] != two["distillation"]


@pytest.mark.parametrize("options", [{}, {"sampling": "sandwich", "subnetworks": 3}])
def test_teacher_step_trains_every_width(options):
    net = slimmable.build(lambda w: Tiny(width=w), (0.25, 0.5, 0.75, 1.0), SHAPE)
    tx, images = optimizer(), split(60)
    step = jax.jit(teacher.make_step(net, tx, lambda s: 0.1, preprocess, **options))
    state = states.create(0, *net.init(jax.random.key(0), SHAPE), tx)
    state = loop.fit(state, step, data.Pipeline(images, 20, 0), 60)
    evaluator = Evaluator(sharding.make_mesh(), images, 16, lambda x: preprocess(None, x))
    scores = {w: evaluator(net.members[w], v)["top1"] for w, v in teacher.freeze(net, state.params, state.collections).items()}
    assert min(scores.values()) > 60, scores  # chance is 33


def test_teacher_calibration_sets_what_training_left_unset():
    net = slimmable.build(lambda w: Tiny(width=w), (0.5, 1.0), SHAPE, batch_norm="shared")
    images, mesh = split(64), sharding.make_mesh()
    frozen = teacher.freeze(net, *net.init(jax.random.key(0), SHAPE))
    calibrate = teacher.make_calibration(net, images, preprocess, mesh, images=100, batch_size=32, seed=5)
    found = calibrate(frozen)[0.5]["batch_stats"]["bn"]
    # By hand: 100 images are 4 batches of 32, two epochs of 64, so the mean over batches is the mean over images.
    variables = frozen[0.5]
    maps = nn.Conv(4, (3, 3)).apply({"params": variables["params"]["conv"]}, preprocess(None, images.images))
    np.testing.assert_allclose(found["mean"], np.asarray(maps, np.float64).mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    assert identical(calibrate(frozen), calibrate(frozen))


# Metrics and evaluation.


def test_metrics_are_sums_and_counts():
    running = metrics.Running()
    for values in ([1.0, 2.0, 3.0], [10.0]):
        running.add(metrics.collect({"loss": jnp.array(values), "loss_0.25": jnp.array(values) * 2}))
    assert running.flush() == {"loss": 4.0, "loss_0.25": 8.0}  # not the mean of means, 6
    assert running.flush() == {}


def test_metrics_of_other_names_are_another_pytree():
    """Or one compiled function would take them for the same, and return the names that it saw first."""
    found = [metrics.collect({"train_loss": 1.0, f"loss_{w}": jnp.ones(3)}) for w in range(5)]
    structures = [jax.tree.structure(m) for m in found]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])


def test_evaluation_counts_every_image_once():
    images = split(37)
    model = Tiny()
    variables = dict(model.init(jax.random.key(0), jnp.zeros((1, *SHAPE))))
    logits = np.asarray(model.apply(variables, preprocess(None, images.images)).logits, np.float64)
    for batch_size in (5, 37, 64):
        evaluator = Evaluator(sharding.make_mesh(), images, batch_size, lambda x: preprocess(None, x))
        found = evaluator(model, variables)
        assert found["top1"] == pytest.approx(100 * np.mean(logits.argmax(-1) == images.labels))
        log_z = np.log(np.exp(logits).sum(-1))
        assert found["loss"] == pytest.approx(np.mean(log_z - logits[np.arange(37), images.labels]), rel=1e-5)


def test_ensemble_is_the_mean_softmax_of_the_last():
    images, model = split(37), Tiny()
    members = [dict(model.init(jax.random.key(k), jnp.zeros((1, *SHAPE)))) for k in range(3)]
    softmax = [np.asarray(jax.nn.softmax(model.apply(v, preprocess(None, images.images)).logits), np.float64) for v in members]
    expected = [100 * np.mean(sum(softmax[-m:]).argmax(-1) == images.labels) for m in (1, 2, 3)]
    evaluator = Evaluator(sharding.make_mesh(), images, 16, lambda x: preprocess(None, x))
    assert evaluator.ensemble_top1([(model, v) for v in members]) == pytest.approx(expected)


# On disk.


def test_checkpoints_keep_the_latest_and_the_stage_ends(tmp_path):
    state = {"w": jnp.arange(3.0), "n": {"0.25": jnp.ones((2, 2)), "1": jnp.zeros(())}}
    checkpoints = Checkpoints(tmp_path / "c", keep=[2, 4])
    assert checkpoints.restore(state) is None
    for step in range(1, 7):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, state))
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=[2, 4])
    assert again.steps == [2, 4, 5, 6]  # the latest two, and the stage ends
    assert identical(again.restore(state), jax.tree.map(lambda x: x + 6, state))
    assert identical(again.restore(state, 2), jax.tree.map(lambda x: x + 2, state))
    other = {"w": jnp.arange(4.0), "n": {"0.25": jnp.ones((2, 2)), "0.5": jnp.zeros(())}}
    with pytest.raises(UserError) as e:
        again.restore(other)
    for path in ("n/1 is saved", "n/0.5 is wanted", "w is float32[3], not float32[4]"):
        assert path in str(e.value)


def test_a_torn_checkpoint_is_skipped(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"w": jnp.ones(3)})
    checkpoints.close()
    (tmp_path / "c" / "2.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path / "c")
    assert again.steps == [1] and identical(again.restore({"w": jnp.zeros(3)}), {"w": jnp.ones(3)})


def test_donated_buffers_do_not_reach_a_checkpoint(tmp_path):
    """The step after a save overwrites the state's buffers while the save is still being written."""
    step = jax.jit(lambda s: s + 1, donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path / "c"), jnp.zeros((2048, 2048))
    checkpoints.save(1, {"w": state})
    for _ in range(50):
        state = step(state)
    checkpoints.close()
    assert not np.any(Checkpoints(tmp_path / "c").restore({"w": state})["w"])


def test_metrics_file_reads_like_an_unbroken_run(tmp_path):
    writer = Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')  # torn by a kill
    writer = Writer(tmp_path, start=2)
    assert [r["step"] for r in writer.rows] == [1, 2]
    writer.write_scalars(3, {"loss": 0.5})
    writer.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}
    ]  # fmt: skip
    assert any(p.name.startswith("events") for p in tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    tx = optimizer()
    state = states.create(0, {"w": jnp.ones(2)}, {}, tx)

    def step(state, batch):
        return state.replace(step=state.step + 1), metrics.collect({"train_loss": jnp.nan, "learning_rate": 0.1})

    with pytest.raises(UserError, match=r"teacher/x: the loss is nan at step 1; .*; lower the learning rate"):
        loop.run(
            tmp_path, "teacher/x", state, [loop.Segment(9, step, lambda s: s)], lambda n: None, lambda s: {},
            loop.Cadence(2, 4, 4, False), images=10, batch_size=2, texts={},
        )  # fmt: skip
    assert json.loads((tmp_path / "metrics.jsonl").read_text() or "null") is None


def test_names_that_orbax_would_write_to_one_place_are_refused(tmp_path):
    """Orbax 0.12.8 keeps one of the two without a word; a dot alone is no harm."""
    params = {"layer1.0": jnp.ones(2), "layer1": {"0": jnp.zeros(2)}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"both params/layer1/0 and params/layer1\.0"):
        checkpoints.save(1, states.create(0, params, {}, optimizer()))
    del params["layer1"]
    checkpoints.save(1, state := states.create(0, params, {}, optimizer()))
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert identical(again.restore(state), state)
    again.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of one run, and their states."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    rng, kept, checkpoints = np.random.default_rng(0), [], Checkpoints(folder)
    for n in (1, 2):
        params = {"w": jnp.asarray(rng.standard_normal((40, 50)), jnp.float32)}
        kept.append(states.create(n, params, {"n": {"m": jnp.arange(9.0)}}, optimizer()).replace(step=jnp.int32(n)))
        checkpoints.save(n, kept[-1])
    checkpoints.close()
    return folder, kept


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(how, saved, tmp_path, capsys):
    """25 bits flipped, and 25 files cut, at random places of the newest checkpoint: what is loaded is always what was saved."""
    folder, kept = saved
    rng, found = np.random.default_rng(len(how)), 0
    for number in range(25):
        copy = tmp_path / str(number) / "checkpoints"
        shutil.copytree(folder, copy)
        files = sorted(p for p in (copy / "2").rglob("*") if p.is_file() and p.stat().st_size)
        path = files[rng.integers(len(files))]
        content = bytearray(path.read_bytes())
        place = int(rng.integers(len(content)))
        if how == "flip":
            content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content if how == "flip" else content[:place])
        checkpoints = Checkpoints(copy)
        state = checkpoints.restore(kept[1])
        said = capsys.readouterr().err
        if int(state.step) == 2:
            assert identical(state, kept[1]), path
        else:
            found += 1
            assert identical(state, kept[0]) and f"{copy / '2'} is not a whole checkpoint" in said, said
            assert (copy / "2.damaged").exists() and not (copy / "2").exists()
            checkpoints.save(2, kept[1])
        checkpoints.close()
        again = Checkpoints(copy)
        assert identical(again.restore(kept[1]), kept[1]) and again.steps == [1, 2]
        again.close()
    assert found >= 5  # others hit what Orbax keeps for itself, such as the time of a save


def test_without_a_whole_checkpoint_there_is_none(saved, tmp_path):
    folder, kept = saved
    shutil.copytree(folder, tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(kept[0]) is None and checkpoints.steps == []
    checkpoints.close()
