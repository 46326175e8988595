"""Parts that stay as they were: weights, their decay and batch norm, in a student's and an ordinary teacher's training."""

import jax
import numpy as np
import pytest
from conftest import close, identical
from test_commands import TINY, final
from test_training import SHAPE, Tiny, split
from test_weights import error

import pwkd_jax as pwkd
from pwkd_jax import train, weights
from pwkd_jax.errors import UserError
from pwkd_jax.training import freezing


@pytest.fixture(scope="module")
def task():
    return pwkd.task((split(40).images, split(40).labels), test=(split(20, 1).images, split(20, 1).labels))


@pytest.fixture(scope="module")
def begun(task):
    """A trained student to start from, whose batch norm has seen images."""
    return pwkd.distil(Tiny(width=0.5), None, task, duration=6, batch_size=8, label="").variables


@pytest.mark.parametrize("arm", ["alone", "taught"])
def test_a_frozen_trunk_is_a_classifier_on_fixed_features(arm, begun, task):
    """The same steps of SGD by NumPy, of a linear classifier on what the trunk says in evaluation."""
    net = pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, num_classes=3)
    teacher = None if arm == "alone" else pwkd.train_teacher(net, task, duration=2, batch_size=8, label="")
    options = {"duration": 5, "batch_size": 8, "start": begun, "learning_rate": lambda step: 0.05, "label": ""}
    found = pwkd.distil(Tiny(width=0.5), teacher, task, fixed=("conv", "bn"), **options)
    for part in ("conv", "bn"):
        assert identical(found.variables["params"][part], jax.tree.map(np.asarray, begun["params"][part]))
    assert identical(found.variables["batch_stats"], jax.tree.map(np.asarray, begun["batch_stats"]))
    assert not identical(found.variables["params"]["head"], jax.tree.map(np.asarray, begun["params"]["head"]))
    if arm == "alone":
        kernel, bias = (np.float64(begun["params"]["head"][key]) for key in ("kernel", "bias"))
        speed = [np.zeros_like(kernel), np.zeros_like(bias)]
        batches = task.batches(8, 0)
        for n in range(5):
            batch = batches(n)
            rows = np.asarray(batch["rows"])[0]
            x = task.normalise(split(40).images[rows])
            pooled = np.float64(pwkd.apply_model(Tiny(width=0.5), begun, x, train=False)[0].pooled)
            z = pooled @ kernel + bias
            p = np.exp(z - z.max(1, keepdims=True))
            error = (p / p.sum(1, keepdims=True) - np.eye(3)[split(40).labels[rows]]) / 8
            for i, (array, grad) in enumerate(((kernel, pooled.T @ error), (bias, error.sum(0)))):
                speed[i] = 0.9 * speed[i] + grad + 5e-4 * array
            kernel, bias = kernel - 0.05 * speed[0], bias - 0.05 * speed[1]
        close(found.variables["params"]["head"], {"kernel": kernel, "bias": bias}, 1e-5)


def test_an_ordinary_teacher_keeps_its_trunk(begun, task):
    net = pwkd.make_slimmable(Tiny, (1.0,), SHAPE, num_classes=3)
    first = pwkd.train_teacher(net, task, duration=4, batch_size=8, label="")
    options = {"duration": 4, "batch_size": 8, "start": first.variables[1.0], "label": ""}
    found = pwkd.train_teacher(net, task, fixed=("conv*", "bn"), **options)
    for part in ("conv", "bn"):
        assert identical(found.variables[1.0]["params"][part], first.variables[1.0]["params"][part])
    assert identical(found.variables[1.0]["batch_stats"], first.variables[1.0]["batch_stats"])
    assert not identical(found.variables[1.0]["params"]["head"], first.variables[1.0]["params"]["head"])
    slim = pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, num_classes=3)
    with pytest.raises(UserError, match="fixed: no part of a slimmable network can stay as it is"):
        pwkd.train_teacher(slim, task, duration=2, batch_size=8, fixed=("conv",), label="")


@pytest.mark.parametrize(("names", "sentence"), [
    (("stem",), "fixed: 'stem' is no part of this network; there are conv, bn, head"),
    (("*",), r"fixed: \('\*',\) is all of the network; leave some of it to train"),
])  # fmt: skip
def test_parts_that_are_not_there_are_named(names, sentence, task):
    with pytest.raises(UserError) as caught:
        pwkd.distil(Tiny(width=0.5), None, task, fixed=names, duration=2, batch_size=8, label="")
    assert str(caught.value).replace("bn, conv, head", "conv, bn, head") == sentence.replace("\\", "")


def test_patterns_name_modules_and_paths():
    path = ("stage1_block1", "conv1", "kernel")
    assert freezing.frozen(path, ["stage1_*"]) and freezing.frozen(path, ["*/conv1"])
    assert freezing.frozen(path, ["stage1_block1/conv1/kernel"]) and not freezing.frozen(path, ["stage1", "conv1", "kernel"])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Weights of three classes, as a file, and how their images were normalised."""
    workdir = tmp_path_factory.mktemp("given") / "w"
    assert train.main([*TINY, "--config.arms=pwkd", "--config.seeds=0", f"--workdir={workdir}"]) == 0
    path = workdir / "teacher/slimmable/width_1.safetensors"
    card = weights.read(path, "test_training:Tiny")[1]
    return path, [f"--config.data.mean=({card['mean'][0]},)", f"--config.data.std=({card['std'][0]},)"]


def test_a_config_freezes_all_but_a_new_classifier(given, tmp_path, capsys):
    path, normal = given
    options = [*TINY, *normal, f"--config.student.weights={path}", "--config.student.width=1.0", "--config.student.head=new",
               f"--config.teacher.weights={path}", "--config.teacher.head=new", "--config.student.freeze=trunk",
               "--config.teacher.freeze=trunk", "--config.arms=alone,kd_standard"]  # fmt: skip
    assert train.main([*options, f"--workdir={tmp_path}/w"]) == 0
    known = weights.read(path, "test_training:Tiny")[0]
    ended = final(tmp_path / "w", "students/kd_standard/seed0", 24)
    taught = weights.read(tmp_path / "w/teacher/standard/width_1.safetensors", "test_training:Tiny")[0]
    alone = final(tmp_path / "w", "students/alone/seed0", 24)
    for params in (ended["params"]["student"], taught["params"], alone["params"]["student"]):
        assert all(identical(params[part], known["params"][part]) for part in ("conv", "bn"))
        assert not identical(params["head"], known["params"]["head"])
    assert identical(ended["collections"]["batch_stats"], known["batch_stats"])
    capsys.readouterr()
    slimmed = [o.replace("alone,kd_standard", "pwkd") for o in options]
    assert "teacher.freeze: ('trunk',) is not possible; it should be () where an arm is taught by the slimmable" in error(
        train.main, *slimmed, f"--workdir={tmp_path}/v", capsys=capsys
    )
    assert "student.freeze: ('conv',) is not possible; it should be () unless student.weights are given" in error(
        train.main, *TINY, "--config.student.freeze=conv", f"--workdir={tmp_path}/v", capsys=capsys
    )
