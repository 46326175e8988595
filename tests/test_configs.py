"""The benchmark's configs: the references' numbers, every pair, and what is refused."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pwkd_jax import config, data, models, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition
from pwkd_jax.training import dispatch, sharding, student

CONFIGS = Path(__file__).parents[1] / "configs"
# Dark Knowledge's thirteen pairs of the CRD benchmark: (DKD's beta, ReviewKD's weight or None where none is published).
PAIRS = {
    "wrn_40_2-wrn_16_2": (6, 5), "wrn_40_2-wrn_40_1": (6, 5), "resnet56-resnet20": (2, 0.6), "resnet110-resnet20": (None, None),
    "resnet110-resnet32": (2, 1), "resnet32x4-resnet8x4": (8, 5), "vgg13-vgg8": (6, 5), "vgg13-MobileNetV2": (6, None),
    "ResNet50-MobileNetV2": (8, 30), "ResNet50-vgg8": (None, None), "resnet32x4-ShuffleV1": (8, 5),
    "resnet32x4-ShuffleV2": (8, 8), "wrn_40_2-ShuffleV1": (8, 5),
}  # fmt: skip
IMAGENET = {"resnet34-resnet18": (0.5, 1), "resnet50-mobilenetv1": (2, 8), "vit_base-vit_tiny": (None, None)}


def one(fast: str):
    """All pairs, of which one compiles fast enough for every run; the others are the same test, with --all."""
    return pytest.mark.parametrize("pair", [pytest.param(p, marks=[pytest.mark.slow] * (p != fast)) for p in PAIRS])


def load(spec: str, *overrides: str):
    return config.load([f"--config={CONFIGS}/{spec}", *overrides])[0]


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_have_the_references_recipe(pair):
    c = load(f"cifar100.py:{pair}")
    assert (c.teacher.model, c.student.model) == tuple(pair.split("-"))
    small = c.student.model in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
    assert (c.teacher.schedule.peak, c.student.schedule.peak) == (0.05, 0.01 if small else 0.05)
    for who in (c.teacher, c.student):
        o = who.optimizer
        assert (who.duration, who.batch_size) == ("240 epochs", 64)
        assert (o.name, o.momentum, o.nesterov, o.weight_decay, o.decay) == ("sgd", 0.9, False, 5e-4, "all")
        assert [m * 240 for m in who.schedule.milestones] == [150, 180, 210] and who.schedule.factor == 0.1
    assert (c.teacher.schedule.form, c.student.schedule.single_form, c.student.schedule.form) == ("step", "step", "cosine")
    assert (c.data.crop_padding, c.data.flip, c.data.num_classes) == (4, True, 100)
    assert c.data.mean == (0.5071, 0.4867, 0.4408) and c.data.std == (0.2675, 0.2565, 0.2761)
    d = c.student.distiller
    assert (d.name, d.ce_weight, d.weight, d.temperature) == ("kd", 0.1, 0.9, 4.0)
    dkd, review = (load(f"cifar100.py:{pair},{name}").student.distiller for name in ("dkd", "reviewkd"))
    assert (dkd.ce_weight, dkd.alpha, dkd.temperature, dkd.warmup_epochs) == (1, 1, 4, 20)
    assert dkd.beta == (PAIRS[pair][0] or dkd.beta) and review.weight == (PAIRS[pair][1] or review.weight)


@one("vgg13-vgg8")
def test_pairs_fit_at_every_width(pair):
    c = load(f"cifar100.py:{pair}")
    facts = {"image_shape": (32, 32, 3), "num_classes": 100, "train_images": 50_000}
    nets, pupil = definition.networks(c, facts)
    assert nets["slimmable"].widths == (1.0, 0.75, 0.5, 0.25)
    assert models.abstract(pupil, (32, 32, 3))["params"]["classifier"]["bias"].shape == (100,)
    for name in ("kd", "at", "reviewkd", "crd", "simkd", "catkd"):
        c = load(f"cifar100.py:{pair},{name}")
        definition.fit_distiller(c, facts, nets["slimmable"], pupil, (0.25, 1.0))


def test_words_after_the_pair():
    both = load("cifar100.py:vgg13-vgg8,kd+crd").student.distiller
    assert (both.ce_weight, both.kd.weight, both.crd.weight) == (1.0, 1.0, 0.8)
    standardised = load("cifar100.py:resnet110-resnet20,kd,standardised")
    assert standardised.student.standardise_logits
    assert (standardised.student.distiller.temperature, standardised.student.distiller.weight) == (4.0, 12.0)
    assert load("cifar100.py").name == "cifar100-resnet32x4-resnet8x4-kd"
    assert load("cifar100.py:vgg13-vgg8,dkd", "--config.student.distiller.name=at").student.distiller.weight == 1000


def test_tiny_imagenet_is_the_same_recipe_on_other_data():
    a, b = (load(f"{name}.py:vgg13-MobileNetV2,dkd") for name in ("cifar100", "tiny_imagenet100"))
    differ = {key for key, value in config.leaves(a) if dict(config.leaves(b))[key] != value}
    assert differ == {"name", "data.name", "data.test_split", "data.mean", "data.std"}
    small = load("tiny_imagenet100.py:vgg13-MobileNetV2,dkd,small")
    assert (small.data.train_split, small.student.duration, small.seeds) == ("train[:2000]", "4 epochs", 1)


@pytest.mark.parametrize("pair", IMAGENET)
def test_imagenet_pairs(pair):
    c = load(f"imagenet.py:{pair}")
    facts = {"image_shape": (64, 64, 3), "num_classes": 1000, "train_images": 1_281_167}
    nets, pupil = definition.networks(c, facts)
    definition.fit_distiller(c, facts, nets["slimmable"], pupil, (0.25, 1.0))
    assert (c.data.num_classes, c.data.mean, c.data.std) == (1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    d = c.student.distiller
    assert (d.ce_weight, d.weight, d.temperature) == (0.5, 0.5, 1.0)
    if pair.startswith("vit"):
        o = c.student.optimizer
        assert (o.name, o.momentum, o.weight_decay, o.decay, o.clip_norm) == ("adamw", 0.9, 0.05, "kernels", 1.0)
        assert (c.student.batch_size, c.student.schedule.peak, c.student.duration) == (1024, 1e-3, "300 epochs")
        return
    assert (c.student.batch_size, c.student.schedule.peak, c.student.optimizer.weight_decay) == (256, 0.1, 1e-4)
    assert [round(m * 100) for m in c.student.schedule.milestones] == [30, 60, 90] and c.student.duration == "100 epochs"
    dkd, review = (load(f"imagenet.py:{pair},{name}").student.distiller for name in ("dkd", "reviewkd"))
    assert (dkd.beta, dkd.temperature, dkd.warmup_epochs) == (IMAGENET[pair][0], 1.0, 1.0)
    assert (review.weight, review.warmup_epochs) == (IMAGENET[pair][1], 1.0)


def test_imagenets_small_twin_is_the_recipe():
    """But for the images, their size and how long: networks, method, augmentation and optimiser, its rate by the batch."""
    may = {"name", "seeds", "data.name", "data.num_classes", "data.image_size", "data.train_split", "data.test_split",
           "evaluation.every"}  # fmt: skip
    may |= {f"{w}.{key}" for w in ("teacher", "student") for key in ("duration", "batch_size", "schedule.per_batch",
                                                                       "schedule.warmup")}  # fmt: skip
    for pair in IMAGENET:
        full, small = (dict(config.leaves(load(f"imagenet.py:{pair},kd{word}"))) for word in ("", ",small"))
        assert {key for key in full if full[key] != small[key]} <= may
        assert full["student.schedule.peak"] == small["student.schedule.peak"]
        assert small["student.schedule.per_batch"] == full["student.batch_size"]


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("cifar100.py:resnet20-resnet8", r"--config: there is no pair 'resnet20-resnet8'; known are wrn_40_2-wrn_16_2, "),
        ("cifar100.py:vgg13", r"there is no pair 'vgg13'"),
        ("cifar100.py:vgg13-vgg8,nope", r"there is no distiller 'nope'"),
        ("cifar100.py:vgg13-vgg8,", r"'vgg13-vgg8,' has an empty word"),
        ("cifar100.py:vgg13-vgg8,dkd,standardised", r"after vgg13-vgg8,kd the word 'standardised' may follow"),
        ("tiny_imagenet100.py:vgg13,small", r"there is no pair 'vgg13'"),
        ("imagenet.py:resnet34-resnet18,kd,big", r"is too long; write a pair and a distiller"),
        ("imagenet.py:vgg13-vgg8", r"there is no pair 'vgg13-vgg8'; known are resnet34-resnet18"),
    ],
)
def test_arguments_that_are_not_possible(spec, sentence, capsys):
    assert train.main([f"--config={CONFIGS}/{spec}", "--workdir=nowhere"]) == 2
    text = capsys.readouterr().err
    assert re.search(sentence, text) and text.count("\n") == 1 and text.startswith("error: ")


def test_configs_import_their_neighbours_and_no_others(tmp_path, monkeypatch):
    """From any directory; of two folders with modules of one name each sees its own; nothing stays behind."""
    body = "from pwkd_jax.config import default\ndef get_config(arg=''):\n    c = default().unlock()\n    c.name = near.NAME\n"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "near.py").write_text(f"NAME = '{name}'\n")
        (tmp_path / name / "main.py").write_text(f"import near\n{body}    return c.lock()\n")
    monkeypatch.chdir(tmp_path)
    path, loaded = list(sys.path), set(sys.modules)
    for name in ("one", "two", "one"):
        assert config.load([f"--config={tmp_path / name / 'main.py'}"])[0].name == name
    assert load("tiny_imagenet100.py").data.name == "tiny_imagenet100_32"
    assert sys.path == path and not {"near", "cifar100"} & (set(sys.modules) - loaded)


@one("vgg13-vgg8")
def test_every_pair_takes_a_step_of_distillation(pair, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    split = data.Split(images, rng.integers(0, 100, 8).astype(np.int32))
    monkeypatch.setattr(data, "load", lambda *_: data.Dataset("cifar100", split, split, 100))
    c = load(f"cifar100.py:{pair}", "--config.student.batch_size=4", "--config.teacher.batch_size=4")
    made = definition.prepare(c)
    net, plan = made.teachers["slimmable"], made.plan("pwkd")
    tx, schedule = made.rule("student", *made.spans(plan))
    width = plan[0].widths[0]
    assert width == 0.25
    distillation = made.distillation("slimmable", [width])
    step = student.make_step(
        made.student, net.members, plan[0].widths, distillation, plan, tx, schedule,
        made.task.preprocess, images=8,
    )  # fmt: skip
    teacher = jax.jit(lambda key: net.extract(*net.init(key, (32, 32, 3)), width))(jax.random.key(1))
    state = jax.jit(lambda: student.init(made.student, (32, 32, 3), distillation, tx, 0))()
    before = jax.device_get(state.params["student"])
    step = sharding.jit_step(made.mesh, dispatch.many(step, (32, 32, 3)))
    state, metrics = step(state, made.batches(4, 0)(0), teacher={width: teacher})
    assert np.isfinite(float(metrics["train_loss"].total)) and int(state.step) == 1
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params["student"]))
    assert all(jax.tree.leaves(changed)), changed


def test_an_unknown_pair_is_a_users_error():
    with pytest.raises(UserError):
        load("cifar100.py:nothing")


def test_photos_need_weights_alone_and_fit_their_networks():
    """configs/folder.py as the README has it: the normalisation is that of the weights."""
    c = load("folder.py", "--config.teacher.weights=resnet18.safetensors", "--config.teacher.head=new")
    assert (c.data.name, c.data.image_size, c.data.mean, c.data.crop_padding) == ("folder", 224, (), 0)
    nets, pupil = definition.networks(c, {"image_shape": (224, 224, 3), "num_classes": 5, "train_images": 100})
    assert nets["slimmable"].widths == (1.0, 0.75, 0.5, 0.25)
    assert models.abstract(pupil, (224, 224, 3))["params"]["classifier"]["kernel"].shape == (128, 5)
    with pytest.raises(UserError, match=r"data\.mean: \(\) is not possible; it should be given"):
        load("folder.py")
