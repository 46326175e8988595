"""Weights in and out: convert, export, evaluate, and what training starts from and leaves."""

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import close, identical, made_up, varied
from flax.traverse_util import flatten_dict
from scipy.special import log_softmax, rel_entr
from sklearn.metrics import log_loss, top_k_accuracy_score
from test_commands import TINY

from pwkd_jax import config, convert, data, evaluate, export, models, train, weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition, loading
from pwkd_jax.experiment.run import run as run_experiment
from pwkd_jax.training import scores
from pwkd_jax.weights import convert as convert_module
from pwkd_jax.weights import pytorch

TORCH = importlib.util.find_spec("torch") is not None
SHAPE, MEAN, STD = (8, 8, 1), "0.3", "0.4"
GREY_TO = ["{source}", "--model=resnet8", "--out=x.safetensors"]
AS_DIGITS = ["--image-size=8", "--channels=1", f"--mean={MEAN}", f"--std={STD}"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a safetensors file as PyTorch users write it, the same network's variables here) of a resnet8 for the digits."""
    model = models.create("resnet8")
    variables = varied(jax.jit(lambda key: model.init(key, jnp.zeros((1, *SHAPE))))(jax.random.key(0)))
    tensors = {"module." + key: x for key, x in pytorch.to_torch(model, variables).items()}
    # Counters of batches come with every batch norm; they are the one thing that may be left out in silence.
    counters = {key.replace("running_mean", "num_batches_tracked"): np.int64(7) for key in tensors if "running_mean" in key}
    path = tmp_path_factory.mktemp("source") / "resnet8.safetensors"
    safetensors.numpy.save_file(tensors | {key: np.asarray(x) for key, x in counters.items()}, path)
    return path, variables


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "resnet8.safetensors"
    assert convert.main([str(source[0]), "--model=resnet8", f"--out={out}", *AS_DIGITS]) == 0
    return out


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    assert export.main([str(converted), f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").test


@pytest.fixture(scope="module")
def logits(source, digits):
    """Of the network itself on the digits, without anything of the road that is tested."""
    images = (digits.images.astype(np.float32) / 255 - float(MEAN)) / float(STD)
    model = models.create("resnet8")
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x).logits)(source[1], images), np.float64)


def error(main, *arguments, capsys) -> str:
    assert main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


# The round trip.


def test_convert_keeps_every_number_and_says_what_it_read(source, converted):
    variables, card = weights.read(converted)
    close(variables, jax.device_get(source[1]), 0)
    assert card == json.loads(converted.with_suffix(".json").read_text())
    assert card["source"]["file"] == "resnet8.safetensors" and len(card["source"]["sha256"]) == 64
    assert {k: card[k] for k in ("model", "width", "num_classes", "image_shape", "mean", "std")} == {
        "model": "resnet8", "width": 1.0, "num_classes": 10, "image_shape": [8, 8, 1], "mean": [0.3], "std": [0.4]
    }  # fmt: skip


def test_the_program_and_the_weights_give_the_same_probabilities(exported, digits, logits):
    """In a process that has jax and the file, and nothing of this project."""
    script = (
        "import sys, numpy as np, jax, jax.export\n"
        "program = jax.export.deserialize(bytearray(open('model.stablehlo', 'rb').read()))\n"
        "images = np.load('images.npy')\n"
        "np.savez('out.npz', one=program.call(images[:1]), seven=program.call(images[:7]))\n"
        "assert not any(name.startswith('pwkd_jax') for name in sys.modules)\n"
        "print(program.platforms)\n"
    )
    np.save(exported / "images.npy", digits.images)
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=exported, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('cpu', 'cuda', 'tpu')"
    out = np.load(exported / "out.npz")
    expected = np.exp(log_softmax(logits, axis=1))
    np.testing.assert_allclose(out["seven"], expected[:7], atol=1e-5)
    np.testing.assert_allclose(out["one"], expected[:1], atol=1e-5)


@pytest.mark.parametrize("kind", ["converted", "weights", "program"])
def test_evaluate_scores_every_kind_alike(kind, converted, exported, digits, logits, capsys):
    target = {"converted": converted, "weights": exported / "model.safetensors", "program": exported / "model.stablehlo"}[kind]
    assert evaluate.main([str(target), "--data=digits", "--json", "--batch-size=100", "--teacher", str(converted)]) == 0
    result = json.loads(capsys.readouterr().out)
    p = np.exp(log_softmax(logits, axis=1))
    # An untrained network may give two classes one score to the last bit or nearly: allow for one image.
    np.testing.assert_allclose(result["top1"], 100 * np.mean(p.argmax(1) == digits.labels), atol=0.2)
    np.testing.assert_allclose(result["top5"], 100 * top_k_accuracy_score(digits.labels, p, k=5), atol=0.2)
    np.testing.assert_allclose(result["nll"], log_loss(digits.labels, p), rtol=1e-4)
    assert result["images"] == len(digits) == 599 and result["images_per_second"] > 0
    assert result["agreement"] > 99.5 and abs(result["divergence"]) < 1e-5
    assert evaluate.main([str(target), "--data=digits", "--split=test[:50]"]) == 0
    assert "test[:50]: 50 images" in capsys.readouterr().out


def test_two_exports_are_the_same_bytes(converted, exported, tmp_path):
    """Whoever exports: here, deeper in a call, in PyTorch's names, and in another process with another seed of hashes."""

    def deeper(*options: str) -> int:
        return export.main([str(converted), *options])

    assert deeper(f"--out={tmp_path / 'again'}") == 0
    command = [sys.executable, "-m", "pwkd_jax.export", str(converted), f"--out={tmp_path / 'other'}"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(export.__file__).parents[1])}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    for name in ("model.safetensors", "model.json", "model.stablehlo"):
        assert len({(folder / name).read_bytes() for folder in (exported, tmp_path / "again", tmp_path / "other")}) == 1, name
    torch = []
    for folder in ("one", "two"):
        assert deeper(f"--out={tmp_path / folder}", "--names=torch", "--platforms=cpu") == 0
        torch.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert torch[0] == torch[1]
    program = (exported / "model.stablehlo").read_bytes()
    assert str(Path(export.__file__).parent).encode() not in program and b".py" not in program


def test_export_in_pytorch_names_is_the_file_it_came_from(source, converted, tmp_path):
    assert export.main([str(converted), f"--out={tmp_path}", "--names=torch"]) == 0
    original = safetensors.numpy.load_file(source[0])
    back = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {f"module.{key}" for key in back} == {key for key in original if "num_batches" not in key}
    assert all(np.array_equal(x, original[f"module.{key}"]) for key, x in back.items())


PREFIXES = ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "net.", "model._orig_mod.",
            "model.module.", "my.own.wrapper."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_whatever_wrappers_put_before_names_is_found(prefix, source, tmp_path):
    plain = {key.removeprefix("module."): x for key, x in safetensors.numpy.load_file(source[0]).items()}
    path, out = tmp_path / "wrapped.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file({prefix + key: x for key, x in plain.items()} | {"n_averaged": np.asarray(5)}, path)
    assert convert.main([str(path), "--model=resnet8", f"--out={out}", *AS_DIGITS]) == 0
    close(weights.read(out)[0], jax.device_get(source[1]), 0)


def test_a_head_under_another_prefix_is_found(source, tmp_path):
    """As mmpretrain writes a classifier: backbone.* and head.fc.*."""
    plain = {key.removeprefix("module."): x for key, x in safetensors.numpy.load_file(source[0]).items()}
    named = {("head." if key.startswith("fc.") else "backbone.") + key: x for key, x in plain.items()}
    path, out = tmp_path / "mm.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file(named, path)
    assert convert.main([str(path), "--model=resnet8", f"--out={out}", *AS_DIGITS]) == 0
    close(weights.read(out)[0], jax.device_get(source[1]), 0)


@pytest.mark.parametrize(
    ("first", "second"), [("student.", "teacher."), ("teacher.", "student."), ("module.teacher.", "module.student.")]
)
def test_of_a_pair_the_student_is_taken_and_said(first, second, source, tmp_path, capsys):
    plain = {key.removeprefix("module."): x for key, x in safetensors.numpy.load_file(source[0]).items()}
    zeros = {key: np.zeros_like(x) for key, x in plain.items()}
    pair = {prefix: plain if "student" in prefix else zeros for prefix in (first, second)}
    path, out = tmp_path / "pair.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file({p + key: x for p, tensors in pair.items() for key, x in tensors.items()}, path)
    assert convert.main([str(path), "--model=resnet8", f"--out={out}", *AS_DIGITS]) == 0
    close(weights.read(out)[0], jax.device_get(source[1]), 0)
    assert "the student was taken, the other is --key=" in capsys.readouterr().err
    head = next(p for p in pair if "teacher" in p)[:-1]
    assert convert.main([str(path), "--model=resnet8", f"--out={out}", f"--key={head}", *AS_DIGITS]) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(weights.read(out)[0]))
    assert "holds no 'techer'" in error(convert.main, path, "--model=resnet8", f"--out={out}", "--key=techer", capsys=capsys)


def test_averaged_weights_are_taken_before_raw_ones_and_said(capsys):
    """As training scripts nest them; arrays stand for tensors."""
    raw, averaged = ({"fc.weight": np.int64(n), "conv.weight": np.int64(n)} for n in (0, 1))
    optimizer = {"state": {0: {"exp_avg.x": np.int64(2)}}, "param_groups": []}
    for content, meant, other in [
        ({"epoch": 9, "state_dict": raw, "state_dict_ema": averaged, "optimizer": optimizer}, "state_dict_ema", "state_dict"),
        ({"model": raw, "model_ema": averaged}, "model_ema", "model"),
        ({"model": raw, "ema": {"module": averaged}}, "ema.module", "model"),
        ({"schema": raw, "ema": averaged}, "ema", "schema"),
        ({"teacher": raw, "student": averaged}, "student", "teacher"),
    ]:
        networks = pytorch.state_dicts(content, np.int64)
        assert len(networks) == 2 and pytorch.choose(Path("x.pth"), networks) == networks[meant]
        assert f"others are --key={other}\n" in capsys.readouterr().err
        assert pytorch.choose(Path("x.pth"), networks, other) == networks[other] != networks[meant]
        assert not capsys.readouterr().err
    assert pytorch.state_dicts({"weights": raw, "acc": 0.9}, np.int64) == {"weights": raw}
    assert pytorch.state_dicts({"epoch": 3, "args": "x"}, np.ndarray) == {}


# What a run leaves.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "work"
    arms = ["--config.arms=pwkd", "--config.student.distiller.name=simkd", "--config.teacher.calibration.images=32"]
    assert train.main([*TINY, *arms, f"--workdir={workdir}"]) == 0
    return workdir


def test_runs_checkpoints_and_exports_of_them_score_alike(run, tmp_path, capsys):
    """A student that predicts by its teacher's classifier, and a calibrated teacher: what is scored is what was reported."""
    summary = json.loads((run / "summary.json").read_text())
    student, teacher = run / "students/pwkd/seed0", run / "teacher/slimmable"
    assert evaluate.evaluate(str(student))["top1"] == pytest.approx(summary["runs"][0]["top1_last"])
    # The checkpoint at the end of the first stage is another, taught by the narrower teacher.
    found, _ = loading.load(str(student / "checkpoints/12"))
    assert found.card["assisted"] == {"distiller": "simkd", "teacher": "test_training:Tiny", "width": 0.5}
    first = evaluate.evaluate(str(student / "checkpoints/12"), teacher=str(teacher), teacher_width=0.5)
    assert first["top1"] == pytest.approx(summary["runs"][0]["stage_ends"][0])
    rows = summary["teachers"]["slimmable"]["widths"]
    assert first["teacher"]["top1"] == pytest.approx(rows[0]["top1_last"])
    for row in rows:
        assert evaluate.evaluate(str(teacher), row["width"])["top1"] == pytest.approx(row["top1_last"])
    assert evaluate.evaluate(str(teacher))["top1"] == pytest.approx(rows[-1]["top1_last"])
    # Of the assisted student, the program is whole; its weights alone are not a model of this zoo.
    assert export.main([str(student), f"--out={tmp_path / 's'}", "--platforms=cpu"]) == 0
    program = evaluate.evaluate(str(tmp_path / "s/model.stablehlo"), split="test[:50]")
    assert program["top1"] == pytest.approx(summary["runs"][0]["top1_last"]) and program["data"] == "digits"
    assert "predicts through its distiller (simkd)" in error(
        evaluate.main, tmp_path / "s/model.safetensors", "--data=digits", capsys=capsys
    )
    # A file may not import a model of its own choosing, unless it is named.
    assert export.main([str(teacher), "--width=0.5", f"--out={tmp_path / 't'}", "--platforms=cpu"]) == 0
    capsys.readouterr()
    assert "not built in" in error(evaluate.main, tmp_path / "t/model.safetensors", capsys=capsys)
    own = evaluate.evaluate(str(tmp_path / "t/model.safetensors"), split="test[:50]", model="test_training:Tiny")
    assert own["top1"] == pytest.approx(rows[0]["top1_last"])


def test_training_starts_from_given_weights_in_order(run, tmp_path):
    """kd_standard's teacher is the given one as it is; the slimmable one is the same function with its channels in order."""
    given, card = weights.read(run / "teacher/slimmable/width_1.safetensors", "test_training:Tiny")
    mean, std = card["mean"][0], card["std"][0]
    narrow = run / "teacher/slimmable/width_0.5.safetensors"
    whole = run / "teacher/slimmable/width_1.safetensors"
    options = [f"--config.teacher.weights={whole}", f"--config.student.weights={narrow}",
               "--config.arms=kd_standard,pwkd", f"--config.data.mean=({mean},)", f"--config.data.std=({std},)"]  # fmt: skip
    loaded = definition.prepare(config.load([*TINY, *options])[0])
    net, image = loaded.teachers["slimmable"], np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    params, statistics = net.spread(loaded.start["slimmable"])
    start = net.forward(params, statistics, 1.0, image, train=False)[0]
    np.testing.assert_allclose(start.logits, models.apply(net.members[1.0], given, image, train=False)[0].logits, atol=1e-5)
    for width in (0.5, 1.0):
        scale = np.abs(net.extract(params, statistics, width)["params"]["bn"]["scale"])
        expected = np.sort(np.abs(given["params"]["bn"]["scale"]))[::-1]
        np.testing.assert_array_equal(scale, expected[: len(scale)])
    result = run_experiment(config.load([*TINY, *options])[0], tmp_path / "w")
    standard = result["teachers"]["standard"]
    assert standard["steps"] == 0 and standard["curve"] == []
    kept, _ = weights.read(tmp_path / "w/teacher/standard/width_1.safetensors", "test_training:Tiny")
    close(kept, given, 0)
    assert "<svg" in (tmp_path / "w/report.html").read_text()


def test_a_classifier_is_begun_anew_for_other_classes(run, tmp_path, capsys):
    """Weights of three classes begin a teacher and a student of ten: all else as it was, the classifier as from scratch."""
    given, card = weights.read(run / "teacher/slimmable/width_1.safetensors", "test_training:Tiny")
    three = {**given, "params": {**given["params"], "head": jax.tree.map(lambda x: x[..., :3], given["params"]["head"])}}
    theirs = {**card, "num_classes": 3, "classes": ["ant", "bee", "cat"]}
    for name, arrays, known in (("three", three, theirs), ("ten", given, card)):
        weights.write(tmp_path / f"{name}.safetensors", arrays, known)
    options = [*TINY, f"--config.data.mean=({card['mean'][0]},)", f"--config.data.std=({card['std'][0]},)", "--config.seeds=1"]
    options += ["--config.arms=kd_standard,pwkd", f"--config.teacher.weights={tmp_path / 'three.safetensors'}"]
    sentence = error(train.main, *options, f"--workdir={tmp_path / 'w'}", capsys=capsys)
    assert "knows 3 classes, and these data have 10; teacher.head=new begins the classifier anew" in sentence
    options += ["--config.teacher.head=new"]
    for name in ("three", "ten"):
        for seed in (0, 1):
            settings = config.load([*options, f"--config.teacher.weights={tmp_path / f'{name}.safetensors'}",
                                    f"--config.seed={seed}"])[0]  # fmt: skip
            start = definition.prepare(settings).start["standard"]
            fresh = models.create("test_training:Tiny").init(jax.random.key(seed), np.zeros((1, *SHAPE), np.float32))
            close(start["params"]["head"], fresh["params"]["head"], 0)
            close({k: v for k, v in start["params"].items() if k != "head"}, {k: given["params"][k] for k in ("bn", "conv")}, 0)
            close(start["batch_stats"], given["batch_stats"], 0)
    assert train.main([*options, "--config.student.width=1.0", "--config.student.head=new",
                       f"--config.student.weights={tmp_path}/three.safetensors", f"--workdir={tmp_path}/w"]) == 0  # fmt: skip
    summary = json.loads((tmp_path / "w/summary.json").read_text())
    assert summary["teachers"]["standard"]["steps"] > 0  # what was given could not teach these classes
    assert weights.read(tmp_path / "w/teacher/standard/width_1.safetensors", "test_training:Tiny")[1]["num_classes"] == 10


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["teacher.head=new"], r"teacher\.head: 'new' is not possible; it should be keep unless teacher\.weights are given"),
        (["teacher.weights=nowhere.safetensors"], r"teacher\.weights: nowhere\.safetensors: there is no such file"),
        (["student.weights=x"], r"student\.weights: x: is no \.safetensors file"),
        (["teacher.divisor=8"], r"teacher\.model: the model 'test_training:Tiny' has no 'divisor'"),
        (["teacher.weights={width_1}", "data.mean=(0.9,)", "data.std=(0.2,)"],
         r"by another mean or std; set data\.mean=\(0\..* and data\.std=\(0\..*or leave both away"),
        (["student.weights={width_1}"], r"student\.weights: .*width_1.* does not fit .*Tiny': batch_stats/bn/mean is \[8\]"),
        (["teacher.weights={width_1}", "teacher.widths=(0.25,0.5)"], r"those of width 1, which should then be one of teacher"),
        (["teacher.order=size"], r"teacher\.order: 'size' is not possible; it should be one of bn_scale, l1, none"),
    ],
)
def test_weights_that_do_not_fit_an_experiment(options, sentence, run, tmp_path, capsys):
    where = {"width_1": run / "teacher/slimmable/width_1.safetensors"}
    arguments = [f"--config.{option.format(**where)}" for option in options]
    assert re.search(sentence, error(train.main, *TINY, *arguments, f"--workdir={tmp_path / 'w'}", capsys=capsys))
    assert not (tmp_path / "w").exists()


def test_images_are_normalised_as_those_of_the_weights_unless_the_config_says(run, capsys):
    given = run / "teacher/slimmable/width_1.safetensors"
    options = ["--config.arms=pwkd", "--config.data.train_split=train[:90]"]
    card = weights.read(given, "test_training:Tiny")[1]
    for who in ("teacher", "student"):
        more = ["--config.student.width=1.0"] if who == "student" else []
        made = definition.prepare(config.load([*TINY, *options, *more, f"--config.{who}.weights={given}"])[0])
        assert (list(made.task.mean), list(made.task.std)) == (card["mean"], card["std"])
        assert "images are normalised as those of" in capsys.readouterr().out
    measured = definition.prepare(config.load([*TINY, *options])[0])
    assert list(measured.task.mean) != card["mean"] and not capsys.readouterr().out


def test_a_folder_that_a_file_does_not_name_is_asked_for(run, tmp_path, capsys):
    variables, card = weights.read(run / "teacher/slimmable/width_1.safetensors", "test_training:Tiny")
    path = tmp_path / "photos.safetensors"
    weights.write(path, variables, card | {"source": card["source"] | {"data": "folder"}})
    sentence = error(evaluate.main, path, "--model=test_training:Tiny", capsys=capsys)
    assert sentence.endswith("does not say where its folder of images lies; add --data-dir=DIR\n")


def test_a_namesake_that_fits_is_named(tmp_path, capsys):
    """torchvision's resnet18 is imagenet_ResNet18 here, and the other way round."""
    for model, wrong, size in (("imagenet_ResNet18", "ResNet18", 224), ("ResNet18", "imagenet_ResNet18", 32)):
        network, path = models.create(model, num_classes=7), tmp_path / f"{model}.safetensors"
        safetensors.numpy.save_file(pytorch.to_torch(network, made_up(network, (size, size, 3))), path)
        command = [str(path), f"--model={wrong}", f"--out={tmp_path}/o.safetensors", "--mean=0.5,0.5,0.5", "--std=0.3,0.3,0.3"]
        assert f"does not fit '{wrong}', but '{model}': use --model={model}" in error(convert.main, *command, capsys=capsys)


@pytest.mark.parametrize(
    "model, classes, options, expected",
    [
        ("resnet8", 10, [], None),  # CIFAR-10
        ("resnet8", 200, [], None),  # Tiny-ImageNet
        ("resnet8", 100, ["--image-size=64"], None),
        ("imagenet_MobileNetV2", 10, [], None),
        ("vit_tiny_patch16", 1000, [], None),
        ("resnet8", 100, [], convert_module.CIFAR100),
        ("vgg8", 100, [], convert_module.CIFAR100),
        ("imagenet_MobileNetV2", 1000, [], convert_module.IMAGENET),
        ("resnet8", 10, ["--mean=0.5,0.5,0.5", "--std=0.25,0.25,0.25"], ((0.5,) * 3, (0.25,) * 3)),
    ],
)
def test_a_normalisation_that_nobody_knows_is_asked_for(model, classes, options, expected, tmp_path, capsys):
    network = models.create(model, num_classes=classes)
    size = 32 if model in ("resnet8", "vgg8") else 224
    path, out = tmp_path / "w.safetensors", tmp_path / "o.safetensors"
    safetensors.numpy.save_file(pytorch.to_torch(network, made_up(network, (size, size, 3))), path)
    command = [str(path), f"--model={model}", f"--out={out}", *options]
    if expected is None:
        assert "--mean, --std: give those that these weights were trained with" in error(convert.main, *command, capsys=capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    else:
        assert convert.main(command) == 0
        card = json.loads(out.with_suffix(".json").read_text())
        assert (tuple(card["mean"]), tuple(card["std"])) == expected


# Files that are refused.


def flipped(path: Path, bit: int) -> Path:
    """The file with one bit changed, in place; negative bits count from its end."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return path


def test_a_flipped_bit_of_a_finished_teacher_is_named(run, tmp_path, capsys):
    work = shutil.copytree(run, tmp_path / "work")
    file, student = work / "teacher/slimmable/width_1.safetensors", work / "students/pwkd/seed0"
    whole = file.read_bytes()
    for bit in (-1, -99, 8 * 40 + 2):
        flipped(file, bit)
        for main, arguments in (
            (evaluate.main, [work / "teacher/slimmable"]),
            (evaluate.main, [student]),  # it predicts by its teacher's classifier
            (export.main, [work / "teacher/slimmable", f"--out={tmp_path / 'o'}"]),
            (train.main, [*TINY, f"--workdir={tmp_path / 'w'}", f"--config.teacher.weights={file}"]),
        ):
            assert re.search(r"width_1\.safetensors: is not ", error(main, *arguments, capsys=capsys))
        assert not (tmp_path / "o").exists() and not (tmp_path / "w").exists()
        file.write_bytes(whole)
    assert evaluate.main([str(work / "teacher/slimmable"), "--split=test[:50]"]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "model.stablehlo"])
@pytest.mark.parametrize("names", ["flax", "torch"])
def test_a_flipped_bit_of_an_export_is_named(name, names, converted, exported, tmp_path, capsys):
    if names == "flax":
        shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    else:
        assert export.main([str(converted), f"--out={tmp_path}", "--platforms=cpu", "--names=torch"]) == 0
        capsys.readouterr()
    whole = (tmp_path / name).read_bytes()
    for bit in (3, 8 * 100, 4 * len(whole), -7):
        flipped(tmp_path / name, bit)
        if name == "model.safetensors" and names == "torch":
            arguments = (convert.main, tmp_path / name, "--model=resnet8", f"--out={tmp_path / 'o.safetensors'}", *AS_DIGITS)
        else:
            arguments = (evaluate.main, tmp_path / name, "--data=digits")
        assert re.search(rf"{name}: is not ", error(*arguments, capsys=capsys))
        (tmp_path / name).write_bytes(whole)
    assert not (tmp_path / "o.safetensors").exists()


def test_files_of_before_checksums_are_read(converted, tmp_path):
    """As versions before wrote them: the same two texts, and safetensors' own bytes."""
    arrays = safetensors.numpy.load_file(converted)
    card = converted.with_suffix(".json").read_text()
    safetensors.numpy.save_file(arrays, tmp_path / "old.safetensors", {"format": "pwkd_jax", "card": card})
    variables, found = weights.read(tmp_path / "old.safetensors")
    assert identical(variables, weights.read(converted)[0]) and found == json.loads(card)


def spoiled(tmp_path, source, how: str) -> Path:
    path = tmp_path / "file.safetensors"
    whole, tensors = source[0].read_bytes(), safetensors.numpy.load_file(source[0])
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "garbage":
        path.write_bytes(b"not weights at all" * 10)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        if how == "lacks":
            del tensors["module.layer2.0.bn1.weight"]
        elif how == "too much":
            tensors["module.extra.weight"] = np.zeros(3, np.float32)
        elif how == "shape":
            tensors["module.conv1.weight"] = np.zeros((16, 3, 3, 3), np.float32)
        safetensors.numpy.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "how, model, sentence",
    [
        ("cut", "resnet8", r"is not a whole safetensors file"),
        ("garbage", "resnet8", r"is not a whole safetensors file"),
        ("empty", "resnet8", r"is not a whole safetensors file"),
        ("lacks", "resnet8", r"does not fit 'resnet8': module\.layer2\.0\.bn1\.weight is not in it$"),
        ("too much", "resnet8", r"does not fit 'resnet8': module\.extra\.weight is not wanted$"),
        ("shape", "resnet8", r"module\.conv1\.weight is \[16, 3, 3, 3\], not \[16, 1, 3, 3\]$"),
        ("whole", "resnet14", r"does not fit 'resnet14': module\.layer1\.1\.bn1\S+ is not in it; .*; and \d+ more$"),
        ("whole", "vgg8", r"does not fit 'vgg8': there is no classifier among its"),
        ("whole", "nothing", r"there is no model 'nothing'"),
    ],
)
def test_files_that_are_no_such_network(how, model, sentence, source, tmp_path, capsys):
    path, out = spoiled(tmp_path, source, how), tmp_path / "out.safetensors"
    assert re.search(sentence, error(convert.main, path, f"--model={model}", f"--out={out}", *AS_DIGITS, capsys=capsys).strip())
    assert not out.exists() and not out.with_suffix(".json").exists()


def test_what_is_left_out_has_to_be_named(source, tmp_path, capsys):
    path = spoiled(tmp_path, source, "too much")
    command = [str(path), "--model=resnet8", f"--out={tmp_path / 'o.safetensors'}", *AS_DIGITS]
    assert "--ignore: 'teacher.*' is the name of nothing" in error(convert.main, *command, "--ignore=teacher.*", capsys=capsys)
    assert convert.main([*command, "--ignore=module.extra.*"]) == 0
    close(weights.read(tmp_path / "o.safetensors")[0], jax.device_get(source[1]), 0)


class Code:
    """What unpickles into a call."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_never_run(tmp_path, capsys):
    for name in ("evil.pth", "evil.pt", "evil.tar"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Code(tmp_path / "touched")}))
        text = error(convert.main, tmp_path / name, "--model=resnet8", f"--out={tmp_path / 'o.safetensors'}", capsys=capsys)
        assert ("which could run code; it was not loaded" if TORCH else "needs PyTorch") in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pt", "evil.pth", "evil.tar"]


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed; it is needed to read its checkpoints only")
def test_pytorch_checkpoints(source, tmp_path, capsys):
    import torch

    tensors = {key: torch.from_numpy(np.array(x)) for key, x in safetensors.numpy.load_file(source[0]).items()}
    out = tmp_path / "out.safetensors"
    command = ["--model=resnet8", f"--out={out}", *AS_DIGITS]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], 0.1, momentum=0.9).state_dict()
    for n, content in enumerate((tensors, {"epoch": 240, "state_dict": tensors, "optimizer": optimizer}, {"model": tensors})):
        for new in (True, False):
            path = tmp_path / f"{n}{new}.pth"
            torch.save(content, path, _use_new_zipfile_serialization=new)
            out.unlink(missing_ok=True)
            assert convert.main([str(path), *command]) == 0
            close(weights.read(out)[0], jax.device_get(source[1]), 0)
    out.unlink()
    whole = (tmp_path / "0True.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    assert "is not a whole PyTorch checkpoint" in error(convert.main, tmp_path / "cut.pth", *command, capsys=capsys)
    torch.save({"model": tensors, "evil": Code(tmp_path / "touched")}, tmp_path / "evil.pth")
    assert "which could run code; it was not loaded" in error(convert.main, tmp_path / "evil.pth", *command, capsys=capsys)
    for best in (np.float64(72.3), np.float32(72.3), torch.tensor(72.3)):
        torch.save({"model": tensors, "best_acc": best}, tmp_path / "best.pth")
        assert convert.main([str(tmp_path / "best.pth"), *command]) == 0
        out.unlink()
    compiled = {"_orig_mod." + key.removeprefix("module."): x for key, x in tensors.items()} | {"epoch": 3}
    torch.save(compiled, tmp_path / "compiled.pth")
    assert convert.main([str(tmp_path / "compiled.pth"), *command]) == 0
    out.unlink()
    torch.save(tensors | {"module.quant": torch.zeros(3, dtype=torch.int8)}, tmp_path / "more.pth")
    assert "module.quant is not wanted" in error(convert.main, tmp_path / "more.pth", *command, capsys=capsys)
    torch.save({**tensors, "module.fc.bias": torch.zeros(10).to_sparse()}, tmp_path / "sparse.pth")
    assert "not plain arrays" in error(convert.main, tmp_path / "sparse.pth", *command, capsys=capsys)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    assert "holds no state dict" in error(convert.main, tmp_path / "none.pth", *command, capsys=capsys)
    assert not (tmp_path / "touched").exists() and not out.exists()


@pytest.mark.parametrize(
    "main, arguments, sentence",
    [
        (evaluate.main, ["nowhere"], r"nowhere: there is no such file or directory; give a run"),
        (evaluate.main, ["{work}"], r"no run of an experiment; there are students/pwkd/seed0, teacher/slimmable in it"),
        (evaluate.main, ["{work}/teacher/slimmable", "--width=0.3"], r"--width: .* has the widths 0\.5, 1, not 0\.3"),
        (evaluate.main, ["{work}/teacher/slimmable/checkpoints/24"], r"is calibrated when training ends; name the"),
        (evaluate.main, ["{work}/students/pwkd/seed0", "--width=0.3"], r"--width: .* is a student, of one width"),
        (evaluate.main, ["{converted}"], r"--data: .* does not say what it was trained on; name a data set"),
        (evaluate.main, ["{converted}", "--data=digits", "--split=tset"], r"--split: data set 'digits' has no split 'tset'"),
        (evaluate.main, ["{converted}", "--data=digits", "--width=0.5"], r"--width: .* holds width 1 alone"),
        (evaluate.main, ["{converted}", "--data=digits", "--batch-size=0"], r"--batch-size: 0 is not possible"),
        (evaluate.main, ["{converted}", "--data=digits", "--teacher-width=1"], r"--teacher-width: needs --teacher"),
        (evaluate.main, ["{garbage}/model.stablehlo"], r"is not a whole exported program"),
        (evaluate.main, ["{garbage}/none.stablehlo"], r"there is no such file"),
        (evaluate.main, ["{source}", "--data=digits"], r"has no card of this project; python -m pwkd_jax\.convert makes"),
        (export.main, ["{converted}", "--out={garbage}/o", "--platforms=cpu,gpu"], r"--platforms: 'cpu,gpu' should be some of"),
        (export.main, ["{converted}", "--out={garbage}/model.stablehlo"], r"--out: .* cannot be written"),
        (export.main, ["{work}/students/pwkd/seed0", "--out={garbage}/o", "--names=torch"], r"--names: .* no PyTorch original"),
        (convert.main, ["{source}", "--model=resnet8", "--out=x.pth"], r"--out: 'x\.pth' should be a name ending in"),
        (convert.main, [*GREY_TO, "--channels=1"], r"--mean, --std: give those that"),
        (convert.main, [*GREY_TO, "--std=0.3"], r"--mean, --std: each should be 3"),
        (convert.main, [*GREY_TO, "--mean=nan,0,0"], r"--mean, --std: each should"),
        (convert.main, [*GREY_TO, "--mean=nan,0,0", "--std=1,1,1"], r"--mean: nan,0,0 is not possible"),
        (convert.main, [*GREY_TO, "--mean=123.675,116.28,103.53", "--std=1,1,1"],
         r"--mean: 123\.675,116\.28,103\.53 is in units of .* divided by 255: 0\.485,0\.456,0\.406$"),
        (convert.main, [*GREY_TO, "--channels=1", "--mean=0.5", "--std=0"], r"--std: 0 is not possible"),
        (convert.main, [*GREY_TO, "--channels=1", "--mean=0.5", "--std=63.75"], r"--std: 63\.75 is in units .* by 255: 0\.25$"),
        (convert.main, ["{source}", "--model=vit_tiny_patch16", "--out=x.safetensors"], r"--mean, --std: give those that"),
        (convert.main, ["{converted}", "--model=resnet8", "--out=x.safetensors"], r"a file of this project already"),
        (convert.main, ["{garbage}", "--model=resnet8", "--out=x.safetensors"], r"is a directory"),
        (evaluate.main, ["{garbage}/model.stablehlo", "--model=a:B"], r"--model: .* is a program, of one model and width"),
        (evaluate.main, ["{work}/students"], r"no run of an experiment; there are pwkd/seed0 in it"),
        (evaluate.main, ["{work}/config.json"], r"is no \.safetensors file; make one of PyTorch weights with"),
    ],
)
def test_mistakes_are_one_sentence(main, arguments, sentence, run, converted, source, tmp_path, capsys):
    (tmp_path / "model.stablehlo").write_bytes(b"nothing" * 9)
    where = {"work": run, "converted": converted, "source": source[0], "garbage": tmp_path}
    assert re.search(sentence, error(main, *(a.format(**where) for a in arguments), capsys=capsys))
    assert [p.name for p in tmp_path.iterdir()] == ["model.stablehlo"]


def test_runs_that_were_moved_or_torn(run, tmp_path, capsys):
    work = shutil.copytree(run, tmp_path / "work")
    student = work / "students/pwkd/seed0"
    assert loading.load(str(student / ".." / "seed0"))[0].card["model"] == "test_training:Tiny"
    for moved in ("students/pwkd/seed0_old", "students/mine/seed0"):
        shutil.copytree(student, work / moved)
        assert "is no run of an experiment" in error(evaluate.main, work / moved, capsys=capsys)
    # A config of a time when a key was not there yet, then one cut off in the middle.
    kept = json.loads((work / "config.json").read_text())
    del kept["teacher"]["divisor"]
    (work / "config.json").write_text(json.dumps(kept))
    assert loading.load(str(student))[0].card["model"] == "test_training:Tiny"
    (work / "config.json").write_text(json.dumps(kept)[:99])
    assert "config.json' is not whole (" in error(evaluate.main, student, capsys=capsys)


@pytest.mark.parametrize("card", ["{", "[]", '{"source": null}'])
def test_cards_that_are_none(card, exported, converted, tmp_path, capsys):
    shutil.copy(exported / "model.stablehlo", tmp_path)
    (tmp_path / "model.json").write_text(card)
    assert "is no card of this project" in error(evaluate.main, tmp_path / "model.stablehlo", capsys=capsys)
    variables, whole = weights.read(converted)
    weights.write(tmp_path / "w.safetensors", variables, whole | {"mean": [0.5] * 3})
    assert "has no card of this project" in error(evaluate.main, tmp_path / "w.safetensors", "--data=digits", capsys=capsys)


def test_values_that_are_no_numbers_are_refused(source, converted, tmp_path, capsys):
    tensors = safetensors.numpy.load_file(source[0])
    for name, value, phrase in (
        ("nan", np.full(16, np.nan, np.float32), "holds values that are not finite"),
        ("int", np.zeros(16, np.int32), "is int32, not a floating-point array"),
    ):
        path = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file(tensors | {"module.bn1.weight": value}, path)
        text = error(convert.main, path, "--model=resnet8", f"--out={tmp_path / 'o.safetensors'}", *AS_DIGITS, capsys=capsys)
        assert f"module.bn1.weight {phrase}" in text
    halved = {key: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x for key, x in tensors.items()}
    safetensors.numpy.save_file(halved, tmp_path / "half.safetensors")
    command = [str(tmp_path / "half.safetensors"), "--model=resnet8", f"--out={tmp_path / 'half_out.safetensors'}"]
    assert convert.main([*command, *AS_DIGITS]) == 0
    half, whole = weights.read(tmp_path / "half_out.safetensors")[0], weights.read(converted)[0]
    close(half, jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), whole), 0)


def test_a_certain_program_scores_like_its_weights(converted, tmp_path):
    variables, card = weights.read(converted)
    variables["params"]["classifier"]["kernel"] = variables["params"]["classifier"]["kernel"] * 30_000
    weights.write(tmp_path / "sure.safetensors", variables, card)
    assert export.main([str(tmp_path / "sure.safetensors"), f"--out={tmp_path}", "--platforms=cpu"]) == 0
    ours, program = (evaluate.evaluate(str(tmp_path / f), data="digits") for f in ("sure.safetensors", "model.stablehlo"))
    assert ours["nll"] > 90 and program["top1"] == ours["top1"]
    # What a program cannot tell from 0 counts as the smallest number of float32, exp(-87.3).
    assert 40 < program["nll"] < 87.4
    assert evaluate.evaluate(str(tmp_path), data="digits") | {"target": "", "images_per_second": 0} == ours | {
        "target": "", "images_per_second": 0
    }  # fmt: skip


def test_images_and_classes_that_a_model_does_not_know(source, tmp_path, capsys):
    out = tmp_path / "o.safetensors"
    assert convert.main([str(source[0]), "--model=resnet8", f"--out={out}", "--image-size=16", *AS_DIGITS[1:]]) == 0
    assert "'digits' has 8x8x1 images in 10 classes, but" in error(evaluate.main, out, "--data=digits", capsys=capsys)


# Scores.


def test_scores_equal_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    z, t, labels = rng.standard_normal((200, 10)), rng.standard_normal((200, 10)), rng.integers(0, 10, 200)
    z, t = log_softmax(3 * z, axis=1), log_softmax(3 * t, axis=1)
    found = scores.summary(scores.per_image(z, labels, t))
    p = np.exp(z)
    np.testing.assert_allclose(found["top1"], 100 * np.mean(z.argmax(1) == labels))
    np.testing.assert_allclose(found["top5"], 100 * top_k_accuracy_score(labels, p, k=5))
    np.testing.assert_allclose(found["nll"], log_loss(labels, p), rtol=1e-12)
    np.testing.assert_allclose(found["divergence"], rel_entr(np.exp(t), p).sum(1).mean(), rtol=1e-12)
    np.testing.assert_allclose(found["agreement"], 100 * np.mean(z.argmax(1) == t.argmax(1)))
    confidence, correct, total = p.max(1), z.argmax(1) == labels, 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    np.testing.assert_allclose(found["calibration_error"], 100 * total, rtol=1e-9)


def test_scores_of_ties_certainty_and_few_classes():
    even = scores.per_image(np.log(np.full((3, 3), 1 / 3)), np.array([0, 1, 2]))
    assert even["top1"].tolist() == [1, 0, 0] and even["top5"].tolist() == [1, 1, 1]
    with np.errstate(divide="ignore"):
        sure = np.log(np.array([[1.0, 0.0], [0.5, 0.5]]))
    found = scores.summary(scores.per_image(sure, np.array([0, 1]), sure))
    assert found["divergence"] == 0 and found["calibration_error"] == pytest.approx(25)
    assert found["nll"] == pytest.approx(np.log(2) / 2)
    none = scores.per_image(np.array([[np.nan] * 3, [0.0, np.nan, -1.0]]), np.array([0, 1]))
    assert none["top1"].tolist() == [0, 0]


def test_the_normalisation_of_ones_own_model_is_asked_for():
    with pytest.raises(UserError, match=r"--mean, --std: give those .*'my_model:Net' for 100 classes of 32x32x3 images is"):
        convert_module.normalisation("my_model:Net", 100, (32, 32, 3))


def test_own_models_convert_under_their_own_names(tmp_path):
    model = models.create("test_training:Tiny", num_classes=3)
    variables = jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, *SHAPE))))
    names = {f"{layer}.{leaf}" for layer in ("conv", "bn", "head") for leaf in ("weight", "bias")}
    names |= {"bn.running_mean", "bn.running_var"}
    found = pytorch.to_torch(model, variables)
    assert found.keys() == names and found["conv.weight"].shape == (8, 1, 3, 3) and found["head.weight"].shape == (3, 8)
    close(pytorch.to_flax("file", "Tiny", model, SHAPE, found), variables, 0)
    with pytest.raises(UserError, match=r"Tiny': conv\.weight is \[8, 1, 3, 3\], not \[8, 3, 3, 3\]"):
        pytorch.to_flax("file", "Tiny", model, (8, 8, 3), found)


def test_interrupted_writes_leave_the_old_file(converted, tmp_path, monkeypatch):
    variables, card = weights.read(converted)
    path = tmp_path / "w.safetensors"
    weights.write(path, variables, card)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        weights.write(path, jax.tree.map(np.zeros_like, variables), card)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "w.json"}
    assert len(flatten_dict(variables)) == len(safetensors.numpy.load(before))
