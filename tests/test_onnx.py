"""ONNX models: the numbers of their network, the same bytes each time, or one sentence that says what is missing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import made_up
from jax import lax

from pwkd_jax import evaluate, export, models, predict, weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import exporting, onnx_operators, onnx_program

onnx = pytest.importorskip("onnx", reason="onnx is not installed; launch/test.sh installs it")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; launch/test.sh installs it")

SMALL = (8, 8, 3)
# One of each block that the families have, at narrow widths, and those that pool on their way in.
NETWORKS = [("resnet8", 0.25, SMALL), ("resnet8x4", 0.125, (8, 8, 1)), ("wrn_10_1", 0.5, SMALL), ("vgg8", 0.125, SMALL),
            ("ShuffleV1", 0.25, SMALL), ("ShuffleV2", 0.25, SMALL), ("vit_tiny_patch4", 1 / 3, SMALL),
            ("MobileNetV2", 0.25, SMALL), ("imagenet_ResNet18", 0.125, (32, 32, 3)), ("ResNet50", 0.125, SMALL),
            ("imagenet_MobileNetV1", 0.25, (32, 32, 3)), ("imagenet_MobileNetV2", 0.25, (32, 32, 3))]  # fmt: skip
QUICK = ("resnet8", "vgg8", "imagenet_ResNet18")


def network(model: nn.Module, shape=SMALL, name: str = "tests:Own") -> weights.Network:
    channels = shape[-1]
    card = {"model": name, "mean": [0.4] * channels, "std": [0.25] * channels, "image_shape": list(shape), "num_classes": 10}
    return weights.Network(model, made_up(model, shape), card)


def written(found: weights.Network) -> bytes:
    return onnx_program.write(exporting._probabilities(found), found.card["image_shape"], found.card["model"])


def run(content: bytes, images: np.ndarray) -> np.ndarray:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"images": images})[0]


def pictures(count: int, shape=SMALL) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


def same(found: weights.Network) -> None:
    """The model in onnxruntime gives what the Flax module gives of pixels that are normalised here, at several batch sizes."""
    content, shape = written(found), tuple(found.card["image_shape"])
    images = pictures(8, shape)
    pixels = (images / np.float32(255) - 0.4) / 0.25
    logits = models.as_outputs(found.model.apply(found.variables, pixels, train=False)).logits
    for count in (1, 3, 8):  # of the network at once: each operation is compiled for one shape
        np.testing.assert_allclose(run(content, images[:count]), jax.nn.softmax(logits)[:count], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "width", "shape"),
    [pytest.param(*n, marks=() if n[0] in QUICK else pytest.mark.slow, id=n[0]) for n in NETWORKS],
)
def test_every_family_gives_the_numbers_of_its_network(name, width, shape):
    divisor = 8 if name.startswith(("MobileNet", "imagenet_MobileNet")) else 0
    same(network(models.create(name, width=width, divisor=divisor), shape, name))


class Own(nn.Module):
    """Operations that no family has, and what another reader of Flax may trip over: arguments by position."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), strides=2, kernel_dilation=(2, 1), feature_group_count=3, padding="SAME")(x)
        x = nn.silu(nn.GroupNorm(2)(x)) + nn.hard_swish(x) * jax.nn.softplus(x)
        x = jnp.where(x > 0.5, x**3, nn.elu(-x)) + jnp.minimum(jnp.abs(x), jnp.clip(x, -0.2, 0.7))
        x = jnp.concatenate([x, nn.max_pool(x, (2, 2), (1, 1), "SAME"), nn.avg_pool(x, (3, 3), (1, 1), "SAME", False)], -1)
        left, right = jnp.split(jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=0.5), 2, -1)
        mixed = left * jnp.tanh(right[..., jnp.array([2, 0, 1, 5, 8, 3, 4, 6, 7])]) / (1 + jnp.exp(-right)) ** 2
        rows = jnp.max(mixed, 2) - jnp.min(mixed, 2) + jnp.einsum("bhwc,bhvc->bhwv", mixed, mixed).sum(2)[..., :1]
        kept = nn.SelfAttention(3, qkv_features=6)(rows[:, 1:4])
        pooled = jnp.concatenate([kept.reshape(x.shape[0], -1), nn.relu6(rows[:, -1]), nn.gelu(rows[:, 0])], 1)
        return nn.Dense(10)(jnp.log1p(pooled**2) ** 0.5 + jnp.broadcast_to(jnp.arange(3.0)[:1], (x.shape[0], 1)))


class Rest(nn.Module):
    """The operations that are left."""

    @nn.compact
    def __call__(self, x, train=False):
        low, high = lax.slice_in_dim(x, 0, 4, axis=1), lax.slice_in_dim(x, 1, 8, 2, axis=1)
        x = lax.clamp(-0.5, low, 1.0) + nn.gelu(high, approximate=False) + jnp.sign(low) * jnp.sin(high) - jnp.cos(low)
        x = jnp.where((x > 0) & (low < 1) | ~(high >= 0) & (x <= 2), jnp.sqrt(jnp.abs(x)), jnp.log(1 + x**2))
        x = x + (jnp.floor(x) == jnp.ceil(x)) + lax.erf(x) + lax.dynamic_slice_in_dim(x, 2, 1, axis=2)
        return nn.Dense(10)(jnp.concatenate([jnp.prod(x, 1), jnp.squeeze(lax.slice_in_dim(x, 3, 4, axis=1), 1)], 1).sum(1))


@pytest.mark.parametrize("make", [Own, Rest])
def test_a_model_of_ones_own_gives_its_numbers(make):
    same(network(make()))


def test_every_operation_that_is_written_is_compared_above(monkeypatch):
    seen, one = set(), onnx_operators.write
    monkeypatch.setattr(onnx_operators, "write", lambda graph, eqn, x: seen.add(eqn.primitive.name) or one(graph, eqn, x))
    for make in (Own, Rest):
        written(network(make()))
    known = {*onnx_operators.RULES, *onnx_operators.UNARY, *onnx_operators.BINARY, *onnx_operators.REDUCTIONS}
    assert known - seen == set()


def test_two_writings_are_the_same_bytes_and_hold_nothing_of_this_machine():
    found = network(models.create("resnet8", width=0.25))
    content = written(found)
    assert content == written(found) and b".py" not in content
    made = onnx.load_from_string(content)
    assert made.opset_import[0].version == onnx_program.OPSET == 18
    used = {name for node in made.graph.node for name in node.input}
    assert {x.name for x in made.graph.initializer} <= used


REFUSED = {
    "the operation 'cumsum'": lambda x: jnp.cumsum(x, 1),
    "the operation 'sort'": lambda x: jnp.sort(x, 1),
    "the operation 'while'": lambda x: lax.while_loop(lambda s: jnp.sum(s) < 9, lambda s: s + 1, x),
    "computes in bfloat16": lambda x: x.astype(jnp.bfloat16) * 2,
    "takes some images of a batch": lambda x: jnp.concatenate([x[:1], x[1:]]),
    "at places that depend on its images": lambda x: jnp.take(jnp.arange(3.0), x[:, :1].astype(int)),
    "computes with the number of images": lambda x: x / x.shape[0],
    "multiplies matrices of whole numbers": lambda x: (x.astype(jnp.int32) @ jnp.ones((3, 3), jnp.int32)).astype(jnp.float32),
    "is transposed": lambda x: nn.ConvTranspose(2, (2,), (2,))(x[..., None]).sum((1,)),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_form_in_onnx_is_named(what):
    class Refused(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(10)(REFUSED[what](x.mean((1, 2))))

    with pytest.raises(UserError) as error:
        written(network(Refused(), name="mine:Net"))
    text = str(error.value)
    assert text.startswith("--onnx: 'mine:Net' ") and what in text and "\n" not in text


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of a resnet8 for the digits, and its export with an ONNX model."""
    folder = tmp_path_factory.mktemp("onnx")
    model = models.create("resnet8", width=0.25)
    card = weights.card("resnet8", 0.25, 0, 10, (8, 8, 1), [0.3], [0.4], {"data": "digits", "test_split": "test"})
    weights.write(folder / "net.safetensors", made_up(model, (8, 8, 1)), card)
    assert export.main([str(folder / "net.safetensors"), f"--out={folder}", "--platforms=cpu", "--onnx"]) == 0
    return folder


def sentence(capsys, *arguments) -> str:
    assert evaluate.main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


def test_the_command_writes_it_with_a_checksum_and_scores_it(saved, tmp_path, capsys):
    card = json.loads((saved / "model.json").read_text())["onnx"]
    assert card["file"] == "model.onnx" and card["input"] == "uint8 [batch, 8, 8, 1]" and len(card["sha256"]) == 64
    capsys.readouterr()
    scores = []
    for kind in ("onnx", "stablehlo", "safetensors"):
        assert evaluate.main([str(saved / f"model.{kind}"), "--data=digits", "--split=test[:60]", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0]["images"] == 60 and scores[0]["model"] == "a program for onnxruntime"
    for other in scores[1:]:
        np.testing.assert_allclose([scores[0][k] for k in ("top1", "nll")], [other[k] for k in ("top1", "nll")], rtol=1e-4)
    images = tmp_path / "one.png"
    PIL.Image.fromarray(pictures(1, (8, 8))[0]).save(images)
    said = []
    for kind in ("onnx", "stablehlo"):
        assert predict.main([str(saved / f"model.{kind}"), str(images)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_another_process_writes_the_same_files(saved, tmp_path):
    command = [sys.executable, "-m", "pwkd_jax.export", str(saved / "net.safetensors"), f"--out={tmp_path}", "--platforms=cpu"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(export.__file__).parents[1])}
    subprocess.run([*command, "--onnx"], env=environment, check=True, capture_output=True, timeout=300)
    for name in ("model.onnx", "model.json", "model.stablehlo"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes(), name


def test_what_is_no_onnx_of_this_project_is_a_sentence(saved, tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing")
    assert "is not a whole ONNX model for onnxruntime" in sentence(capsys, path, "--data=digits")
    path.write_bytes((saved / "model.onnx").read_bytes())
    card = json.loads((saved / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**card, "onnx": {**card["onnx"], "sha256": "0" * 64}}))
    assert "is not the onnx of " in sentence(capsys, path)
    del card["onnx"]
    (tmp_path / "model.json").write_text(json.dumps(card))
    assert "is of an export without --onnx" in sentence(capsys, path)
    (tmp_path / "model.json").unlink()
    graph = onnx.load_from_string(path.read_bytes())
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    path.write_bytes(graph.SerializeToString())
    assert "an ONNX model of this project takes uint8 [batch, H, W, C]" in sentence(capsys, path, "--data=digits")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing_is_named_and_nothing_is_written(package, saved, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    if package == "onnx":
        assert export.main([str(saved / "net.safetensors"), f"--out={tmp_path / 'out'}", "--onnx"]) == 2
        assert capsys.readouterr().err == "error: --onnx: needs the package onnx, which is not installed: pip install onnx\n"
        assert not (tmp_path / "out").exists()
    else:
        assert "needs the package onnxruntime, which is not installed" in sentence(capsys, saved / "model.onnx")


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, saved, capsys):
    monkeypatch.setattr("pwkd_jax.experiment.onnx_operators.RULES", {})
    assert export.main([str(saved / "net.safetensors"), f"--out={tmp_path / 'out'}", "--platforms=cpu", "--onnx"]) == 2
    text = capsys.readouterr().err
    assert "--onnx: 'resnet8' uses the operation" in text and text.count("\n") == 1
    assert not (tmp_path / "out").exists()
