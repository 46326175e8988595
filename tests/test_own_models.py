"""Models of one's own: what of Flax they may use, and every mistake in one sentence before anything is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import own_modules
import pytest
from conftest import identical

import pwkd_jax as pwkd
from pwkd_jax import models, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading
from pwkd_jax.models import contract, precision
from pwkd_jax.training import sandwich

SHAPE = (8, 8, 1)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("Head5", "Head5 gives 5 logits an image, and the data have 10 classes; its last layer should have"),
        ("Head20", "Head20 gives 20 logits an image, and the data have 10 classes"),
        ("ReturnsDict", r"ReturnsDict returns a dict; it should return logits \[images, classes\]"),
        ("ReturnsTuple", "ReturnsTuple returns a tuple; it should return logits"),
        ("ReturnsFrozen", "ReturnsFrozen returns a FrozenDict; it should return logits"),
        ("NoTrain", "takes x, training; it is called as .*: name the argument that tells training from evaluation 'train'"),
        ("MoreArguments", "cannot be called without 'mask'"),
        ("Integers", "returns logits of int32, which have no gradient"),
        ("Maps", r"returns logits of shape \[2, 8, 8, 10\] for 2 images"),
        ("NoBatch", r"returns logits of shape \[10\] for 2 images"),
        ("Raises", r"Raises fails on images of 8x8x1 \(ZeroDivisionError: three\); mend its __call__"),
        ("RaisesInTraining", r"fails on images of 8x8x1 with train=True \(TypeError: "),
        ("AlwaysDrops", "draws random numbers with train=False; give its dropout deterministic=not train"),
        ("ChangesInEvaluation", "changes a variable with train=False"),
        ("Grows", "adds to its collection 'losses' with every step"),
        ("Halves", r"makes of 'ema/count', which is int32 \[\], float32 \[\]"),
        ("Empty", r"Empty leaves nothing of images of 8x8x1: 'stages' has \[2, 0, 0, 8\]"),
        ("NoParameters", "has no parameters, so there is nothing to train"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_sentence(name, sentence):
    make = getattr(own_modules, name)
    with pytest.raises(UserError) as e:
        contract.check(make(), SHAPE, "student.model", 10)
    assert re.search(sentence, str(e.value)), str(e.value)
    assert str(e.value).startswith("student.model: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["Dropout", "Noise", "Counter", "Both", "Sows"])
def test_what_flax_offers_passes(name):
    contract.check(getattr(own_modules, name)(), SHAPE, "student.model", 10)


def test_random_numbers_are_found_by_shapes():
    found = [models.draws(getattr(own_modules, name)(), SHAPE) for name in ("Dropout", "Noise", "Counter")]
    assert found == [True, True, False]
    assert models.draws(precision.wrap(own_modules.Dropout(), "bfloat16", 4), SHAPE)
    assert not models.draws(models.create("resnet8"), SHAPE)


@pytest.mark.parametrize(
    "make, sentence",
    [
        ("own_modules:NoWidth", r"has no field 'width': give it one, as in width: float = 1.0, and build its layers by it"),
        ("own_modules:NoClasses", r"has no field 'num_classes': give it one, as in num_classes: int = 10"),
        ("own_modules:NeedsDepth", r"cannot be made with width=1.0, num_classes=10 \(TypeError: .*depth"),
        ("own_modules:channels", r"has no field 'num_classes'"),
        ("pathlib:Path", "'pathlib:Path' is no Flax module"),
        ("flax.nnx:Linear", "is a module of flax.nnx; it should be one of flax.linen"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(make, sentence):
    with pytest.raises(UserError) as e:
        models.create(make)
    assert re.search(sentence, str(e.value)), str(e.value)
    assert "\n" not in str(e.value)


def test_the_library_says_the_same():
    task = _task()
    with pytest.raises(UserError, match=r"the model 'NoWidth' has no field 'width'"):
        pwkd.make_slimmable(own_modules.NoWidth, (0.5, 1.0), SHAPE)
    with pytest.raises(UserError, match=r"teacher.model: ReturnsDict returns a dict"):
        pwkd.make_slimmable(own_modules.ReturnsDict, (0.5, 1.0), SHAPE)
    with pytest.raises(UserError, match=r"teacher.model: Head20 gives 20 logits an image, and the data have 3 classes"):
        pwkd.train_teacher(pwkd.make_slimmable(own_modules.Head20, (0.5, 1.0), SHAPE), task, duration=1, label="")
    with pytest.raises(UserError, match=r"student.model: Head5 gives 5 logits"):
        pwkd.distil(own_modules.Head5(), None, task, duration=1, label="")
    with pytest.raises(UserError, match=r"Dropout is a class; give a module made of it"):
        pwkd.distil(own_modules.Dropout, None, task, duration=1, label="")
    with pytest.raises(UserError, match=r"student.model: the field 'sizes' of Listed is a list, which cannot be hashed"):
        pwkd.distil(own_modules.Listed(sizes=[8]), None, task, duration=1, label="")


def _task():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 48)
    images = rng.random((48, *SHAPE), np.float32) * 0.3 + 0.35 * labels[:, None, None, None].astype(np.float32)
    return pwkd.task((images, labels), test=(images[:16], labels[:16]))


def test_a_commands_mistake_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    model = "own_modules:Head20"
    assert train.main([*COMMAND, f"--config.student.model={model}", f"--workdir={tmp_path / 'w'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: student.model: Head20 gives 20 logits") and "\n" not in said
    assert not (tmp_path / "w").exists()


COMMAND = [
    "--config=configs/digits.py", "--config.data.train_split=train[:64]", "--config.data.test_split=test[:24]",
    "--config.teacher.widths=(0.5,1.0)", "--config.student.width=0.5", "--config.teacher.duration=6 steps",
    "--config.student.duration=6 steps", "--config.teacher.batch_size=16", "--config.student.batch_size=16",
    "--config.evaluation.every=3 steps", "--config.checkpoint.every=2 steps", "--config.arms=pwkd", "--config.seeds=1",
    "--config.log.tensorboard=false", "--config.steps_per_dispatch=1", "--config.teacher.model=own_modules:Both",
    "--config.student.model=own_modules:Both",
]  # fmt: skip


# Dropout.


def test_dropout_draws_anew_for_every_step_seed_and_width():
    model = own_modules.Dropout()
    net = pwkd.make_slimmable(own_modules.Dropout, (0.5, 1.0), SHAPE, num_classes=3)
    images = jnp.ones((4, *SHAPE))
    params, statistics = net.init(jax.random.key(0), SHAPE)
    keys = [jax.random.key(n) for n in (0, 0, 1)]
    outs = [net.forward(params, statistics, 1.0, images, train=True, key=k)[0].pooled for k in keys]
    assert identical(outs[0], outs[1]) and not identical(outs[0], outs[2])
    zeros = np.mean(np.asarray(outs[0]) == 0)
    assert zeros > 0
    # A mask has one entry an image and channel; in evaluation there is none.
    plain = net.forward(params, statistics, 1.0, images, train=False)[0].pooled
    np.testing.assert_array_equal(plain[0], plain[1])
    labels = jnp.zeros(4, jnp.int32)
    with pytest.raises(UserError, match=r"key: this network draws random numbers in training"):
        sandwich.sandwich_loss(net, params, statistics, images, labels)
    with pytest.raises(UserError, match=r"teacher.execution: 'mask' is not possible for a model that draws"):
        pwkd.make_slimmable(own_modules.Dropout, (0.5, 1.0), SHAPE, execution="mask")
    assert model.width == 1.0


def test_groups_draw_their_own_and_keep_the_mean_of_collections():
    images = jnp.tile(jnp.linspace(0, 1, 64).reshape(1, *SHAPE), (8, 1, 1, 1))
    model = own_modules.Both(num_classes=3)
    variables = model.init(jax.random.key(0), images)
    out, _ = models.forward(precision.wrap(model, group=4), variables, images, train=True, key=jax.random.key(1))
    logits = np.asarray(out.logits).reshape(2, 4, 3)
    assert not np.array_equal(logits[0], logits[1])
    counter = own_modules.Counter(num_classes=3)
    variables = counter.init(jax.random.key(0), images)
    new = models.forward(precision.wrap(counter, group=4), variables, images, train=True)[1]["ema"]
    alone = models.forward(counter, variables, images[:4], train=True)[1]["ema"]
    assert new["steps"].dtype == jnp.int32 and int(new["steps"]) == 1
    np.testing.assert_allclose(new["mean"], alone["mean"], rtol=1e-6)  # groups of the same images
    half = models.forward(precision.wrap(counter, "bfloat16"), variables, images, train=True)[1]["ema"]
    assert half["mean"].dtype == jnp.float32


# Collections of one's own.


@pytest.mark.parametrize("batch_norm", ["switchable", "private_stats", "shared"])
def test_widths_keep_their_collections(batch_norm):
    net = pwkd.make_slimmable(own_modules.Counter, (0.5, 1.0), SHAPE, num_classes=3, batch_norm=batch_norm)
    params, statistics = net.init(jax.random.key(0), SHAPE)
    images = jax.random.uniform(jax.random.key(1), (4, *SHAPE))
    out, after = net.forward(params, statistics, 0.5, images, train=True)
    narrow = net.extract(params, after, 0.5)
    assert narrow["ema"]["mean"].shape == (4,) and int(narrow["ema"]["steps"]) == 1
    # What the narrow network by itself would keep.
    alone = own_modules.Counter(width=0.5, num_classes=3)
    before = net.extract(params, statistics, 0.5)
    _, expected = alone.apply(before, images, train=True, mutable=["batch_stats", "ema"])
    np.testing.assert_allclose(narrow["ema"]["mean"], expected["ema"]["mean"], rtol=1e-5)  # by Flax's own sums
    wide = net.extract(params, after, 1.0)["ema"]
    assert int(wide["steps"]) == (1 if batch_norm == "shared" else 0) and wide["mean"].shape == (8,)
    masked = pwkd.make_slimmable(own_modules.Counter, (0.5, 1.0), SHAPE, num_classes=3, batch_norm=batch_norm, execution="mask")
    out2, after2 = masked.forward(params, statistics, 0.5, images, train=True)
    np.testing.assert_allclose(out2.logits, out.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(masked.extract(params, after2, 0.5)["ema"]["mean"], narrow["ema"]["mean"], rtol=1e-5)


def test_a_model_without_them_has_the_state_that_it_always_had(tmp_path):
    net = pwkd.make_slimmable(own_modules.Sows, (0.5, 1.0), SHAPE, num_classes=3)
    _, statistics = net.init(jax.random.key(0), SHAPE)
    assert set(statistics) == {"0.5", "1"}
    student = pwkd.distil(own_modules.Sows(num_classes=3), None, _task(), duration=1, batch_size=16, label="")
    assert set(student.state.collections) == {"batch_stats", "distiller"}
    assert set(student.variables) == {"params", "batch_stats"}


def test_a_run_of_dropout_and_a_collection_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Teacher, student, scores and files; and again after a stop in the middle of each."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert train.main([*COMMAND, f"--workdir={whole}"]) == 0
    from pwkd_jax.training.checkpoints import Checkpoints

    class Stop(Exception):
        pass

    save, left = Checkpoints.save, [2]

    def stopping(self, step, state, *args, **options):
        save(self, step, state, *args, **options)
        left[0] -= 1
        if left[0] == 0:
            self.close()
            raise Stop

    monkeypatch.setattr(Checkpoints, "save", stopping)
    for _ in range(2):
        left[0] = 2
        with pytest.raises(Stop):
            train.main([*COMMAND, f"--workdir={torn}"])
    monkeypatch.undo()
    assert train.main([*COMMAND, f"--workdir={torn}"]) == 0
    for run in ("teacher/slimmable", "students/pwkd/seed0"):
        a, b = (loading.load(str(w / run), model="own_modules:Both")[0].variables for w in (whole, torn))
        a, b = (jax.tree.map(np.asarray, dict(v)) for v in (a, b))
        assert set(a) == {"params", "batch_stats", "distiller"} and identical(a, b)
        assert np.any(a["distiller"]["seen"])


def test_seeds_in_one_program_draw_apart_and_end_as_they_would_alone():
    from pwkd_jax.training import students_together

    task = _task()
    together = students_together.several("unroll", 2, jax.devices())
    options = {"duration": 3, "batch_size": 16, "label": "", "data_seed": 0, "learning_rate": 0.1}
    both = pwkd.distil(own_modules.Both(num_classes=3), None, task, seed=[0, 1], several=together, **options)
    alone = [pwkd.distil(own_modules.Both(num_classes=3), None, task, seed=s, **options) for s in (0, 1)]
    seen = [students_together.member(both.state, i).collections["own"]["distiller"]["seen"] for i in (0, 1)]
    for ours, one in zip(seen, alone, strict=True):
        np.testing.assert_allclose(ours, one.variables["distiller"]["seen"], rtol=1e-5)
    assert not np.array_equal(seen[0], seen[1])


def test_a_count_goes_through_a_file(tmp_path):
    student = pwkd.distil(own_modules.Counter(num_classes=3), None, _task(), duration=2, batch_size=16, label="")
    assert int(student.variables["ema"]["steps"]) == 2
    student.save(tmp_path / "counter.safetensors")
    again = pwkd.load(tmp_path / "counter.safetensors", model=own_modules.Counter(num_classes=3))
    assert identical(jax.tree.map(np.asarray, dict(again.variables)), jax.tree.map(np.asarray, dict(student.variables)))
