"""Mixup, CutMix and label smoothing: their formulas, by NumPy in float64, and what they do to every step that trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_commands import TINY
from test_training import CLASSES, SHAPE, Bench, Tiny, optimizer, preprocess, split

from pwkd_jax import config, data, distillers, models, slimmable, stages, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition
from pwkd_jax.training import sharding, state, student, teacher

IMAGES, LABELS = np.random.default_rng(0).normal(size=(6, 9, 7, 2)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0])


def mixed(mixing: data.Mixing, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, targets, the weight map that made them), float64; the map is read off two constant images."""
    shades = jnp.stack([jnp.ones((9, 7, 1)), jnp.zeros((9, 7, 1))])
    weights = mixing(jax.random.key(seed), shades, jnp.array([0, 1]))[0][0, :, :, 0]
    images, targets = mixing(jax.random.key(seed), IMAGES, LABELS)
    return np.float64(images), np.float64(targets), np.float64(weights)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1}])
def test_images_and_labels_are_mixed_by_one_map(options):
    smoothing, shares, boxes = options.get("smoothing", 0.0), [], 0
    for seed in range(12):
        images, targets, w = mixed(data.Mixing(3, **options), seed)
        np.testing.assert_allclose(images, w[..., None] * IMAGES + (1 - w[..., None]) * IMAGES[::-1], atol=1e-6)
        own = (1 - smoothing) * np.eye(3)[LABELS] + smoothing / 3
        np.testing.assert_allclose(targets, w.mean() * own + (1 - w.mean()) * own[::-1], atol=1e-6)
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
        if set(np.unique(w)) <= {0, 1}:  # what is cut out is a box
            boxes += 1
            rows, columns = np.nonzero(w == 0)
            assert len(rows) == 0 or len(rows) == np.ptp(rows) * np.ptp(columns) + np.ptp(rows) + np.ptp(columns) + 1
        else:
            assert np.ptp(w) == 0
        shares.append(w.mean())
    assert np.std(shares) > 0.05 and boxes == {"mixup": 0, "cutmix": 12}.get("+".join(options), boxes)
    assert 0 < boxes < 12 or len(options) == 1


def test_a_batch_is_mixed_by_chance_and_smoothing_alone_leaves_images():
    none = data.Mixing(3, mixup=1.0, chance=0.5)
    kept = [np.array_equal(none(jax.random.key(seed), IMAGES, LABELS)[0], IMAGES) for seed in range(40)]
    assert 8 < sum(kept) < 32
    images, targets = data.Mixing(3, smoothing=0.3)(jax.random.key(0), IMAGES, LABELS)
    assert images is IMAGES and not data.Mixing(3, smoothing=0.3).mixes
    np.testing.assert_allclose(targets, 0.7 * np.eye(3)[LABELS] + 0.1, atol=1e-6)
    with pytest.raises(UserError, match=r"^mixup: -1 is not possible; it should be from 0 to 100$"):
        data.Mixing(3, mixup=-1)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = np.float64(z) - np.float64(z).max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("same_crop", [True, False])
def test_kd_of_mixed_images_is_its_formula_in_float64(same_crop):
    """Student and teacher see one mixture, and the cross entropy its labels; with crops of its own the teacher sees another."""
    bench, mixing = Bench([stages.Stage("slimmable", (1.0,), 0, 8)]), data.Mixing(CLASSES, mixup=0.8, smoothing=0.1)
    step = student.make_step(
        bench.model, bench.net.members, (1.0,), bench.distillation, bench.plan, bench.tx, bench.schedule, preprocess,
        images=40, same_crop=same_crop, mix=mixing,
    )  # fmt: skip
    before, batch = bench.fresh(), bench.pipeline(0)
    with jax.default_matmul_precision("highest"):
        _, found = jax.jit(step)(before, batch, teacher={1.0: bench.frozen[1.0]})
        x = preprocess(None, batch["image"])
        seen, targets = mixing(state.rng(before, 5), x, batch["label"])
        taught_by = seen if same_crop else mixing(state.rng(before, 6), x, batch["label"])[0]
        s = models.apply(bench.model, student.variables(before), seen, train=True)[0].logits
        t = models.apply(bench.net.members[1.0], bench.frozen[1.0], taught_by, train=False)[0].logits
    ce = -(np.float64(targets) * log_softmax(s)).sum(-1).mean()
    kd = 16 * (np.exp(log_softmax(t / 4)) * (log_softmax(t / 4) - log_softmax(s / 4))).sum(-1).mean()
    for name, value in (("cross_entropy", ce), ("distillation", kd), ("train_loss", 0.1 * ce + 0.9 * kd)):
        assert float(found[name].compute()) == pytest.approx(value, rel=1e-5)
    assert not np.array_equal(seen, x)


@pytest.mark.parametrize("loss", ["hard", "inplace_mix"])
def test_every_sub_network_learns_from_soft_targets(loss):
    net, mixing = slimmable.build(lambda w: Tiny(width=w), (0.5, 1.0), SHAPE), data.Mixing(CLASSES, cutmix=1.0, smoothing=0.1)
    first = state.create(0, *net.init(jax.random.key(0), SHAPE), optimizer())
    images = split(16)
    batch = {"image": images.images, "label": images.labels}
    step = teacher.make_step(net, optimizer(), lambda s: 0.1, preprocess, sharding.make_mesh(), mixing, loss=loss)
    with jax.default_matmul_precision("highest"):
        _, found = jax.jit(step)(first, batch)
        seen, targets = mixing(state.rng(first, 2), preprocess(None, images.images), images.labels)
        narrow, wide = (
            log_softmax(net.forward(first.params, first.collections, w, seen, train=True)[0].logits) for w in (0.5, 1.0)
        )
    own = -(np.float64(targets) * wide).sum(-1).mean()
    expected = -(np.float64(targets) * narrow).sum(-1).mean() - (loss != "hard") * (np.exp(wide) * narrow).sum(-1).mean()
    assert float(found["train_loss"].compute()) == pytest.approx(own + expected, rel=1e-5)


def fitted(name: str, *options: str):
    if name in ("fsp", "kdsvd"):  # which want the teacher's channels
        options = (*options, "--config.student.width=1.0", "--config.teacher.widths=(1.0,)")
    settings, _ = config.load(["--config=configs/digits.py", f"--config.student.distiller.name={name}", *options])
    facts = {"image_shape": (32, 32, 3), "num_classes": 10, "train_images": 100}
    nets, pupil = definition.networks(settings, facts)
    return definition.fit_distiller(settings, facts, nets["slimmable"], pupil, (1.0,))


@pytest.mark.parametrize("name", sorted(distillers.BUILTIN))
def test_methods_that_read_labels_refuse_mixed_images_by_name(name):
    reads = {"crd": "dataset_label", **dict.fromkeys(("crld", "dkd", "nkd", "ofa", "rld", "sdd", "sdd_dkd", "wkd_l"), "label")}
    options = ["--config.student.mix.cutmix=1.0"]
    if name in reads:
        sentence = rf"student\.distiller: \w+ reads batch\['{reads[name]}'\].*leave student\.mix\.mixup and student\.mix"
        with pytest.raises(UserError, match=sentence):
            fitted(name, *options)
        fitted(name, "--config.student.mix.smoothing=0.1")
    else:
        fitted(name, *options)


def test_an_experiment_mixes_and_is_another_one_for_it(tmp_path):
    options = [*TINY, "--config.arms=pwkd", "--config.student.mix.mixup=0.5", "--config.teacher.mix.cutmix=1.0",
               "--config.teacher.mix.smoothing=0.1"]  # fmt: skip
    assert train.main([*options, f"--workdir={tmp_path / 'w'}"]) == 0
    assert train.main([*options, "--config.student.mix.mixup=0.4", f"--workdir={tmp_path / 'w'}"]) == 2  # another experiment


# Weights of classes.


def test_balanced_weights_give_every_class_its_part():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    for strength in (0.5, 1.0):
        w = np.array(data.balanced(labels, 4, strength))
        raw = (100 / (4 * np.array([60, 30, 10]))) ** strength
        np.testing.assert_allclose(w[:3] / w[0], raw / raw[0])
        assert np.mean(w[labels]) == pytest.approx(1.0)
    sums = np.bincount(labels, np.array(data.balanced(labels, 3, 1.0))[labels])
    np.testing.assert_allclose(sums, 100 / 3)


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1}])
def test_a_student_s_cross_entropy_is_weighed_and_its_teacher_s_word_is_not(options):
    weights = (0.5, 1.0, 3.0)
    bench, mixing = Bench([stages.Stage("slimmable", (1.0,), 0, 8)]), data.Mixing(CLASSES, weights=weights, **options)
    values = []
    for mix in (mixing, data.Mixing(CLASSES, **options) if options else None):
        step = student.make_step(
            bench.model, bench.net.members, (1.0,), bench.distillation, bench.plan, bench.tx, bench.schedule, preprocess,
            images=40, mix=mix,
        )  # fmt: skip
        found = step(bench.fresh(), bench.pipeline(0), teacher={1.0: bench.frozen[1.0]})[1]
        values.append({name: float(average.compute()) for name, average in found.items()})
    batch, state = bench.pipeline(0), bench.fresh()
    out, _ = models.apply(bench.model, student.variables(state), preprocess(None, batch["image"]), train=True)
    s, labels = options.get("smoothing", 0.0), np.asarray(batch["label"])
    targets = ((1 - s) * np.eye(CLASSES)[labels] + s / CLASSES) * np.array(weights)
    expected = -np.mean(np.sum(targets * log_softmax(out.logits), -1))
    assert values[0]["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert values[0]["distillation"] == pytest.approx(values[1]["distillation"], rel=1e-6)
    assert values[0]["train_top1"] == values[1]["train_top1"]


def test_a_config_weighs_classes_of_both(tmp_path):
    options = [*TINY, "--config.arms=alone,pwkd", "--config.student.mix.balance=1.0", "--config.teacher.mix.balance=0.5"]
    assert train.main([*options, f"--workdir={tmp_path / 'w'}"]) == 0
    loaded = definition.prepare(config.load(options)[0])
    labels = loaded.dataset.train.labels
    mix = definition.mixing(loaded.config, "student", 10, loaded.dataset.train)
    assert mix.weights == data.balanced(labels, 10, 1.0) and not mix.mixes
    assert train.main([*options, "--config.student.distiller.name=dkd", f"--workdir={tmp_path / 'v'}"]) == 0  # labels stay hard
    for option, sentence in (("class_weights=(1,2)", r"student.mix.class_weights: has 2 numbers, and these data have 10"),
                             ("class_weights=(1,0)", r"student.mix.class_weights: \(1, 0\) is not possible"),
                             ("balance=2", r"student.mix.balance: 2")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            definition.prepare(config.load([*TINY, f"--config.student.mix.{option}"])[0])
