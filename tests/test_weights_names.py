"""Weights in the names of transformers and timm: what they compute, against networks written in NumPy, and what is refused."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import close, made_up
from flax.traverse_util import flatten_dict
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import erf

from pwkd_jax import convert, models, weights
from pwkd_jax.models.resnet import ResNet
from pwkd_jax.models.vit import ViT
from pwkd_jax.weights import names, pytorch

NORMALISED = ["--mean=0.5,0.5,0.5", "--std=0.5,0.5,0.5"]

# Our families by name, of few layers.
HERE = "test_weights_names"
BLOCKS, CHANNELS = (2, 1), (8, 4, 8)
tiny_vit = partial(ViT, patch=4, features=24, heads=3, depth=4)
tiny_basic = partial(ResNet, blocks=BLOCKS, full_channels=CHANNELS, large_stem=True)
tiny_bottleneck = partial(ResNet, blocks=BLOCKS, full_channels=CHANNELS, large_stem=True, bottleneck=True)
VIT = [f"--model={HERE}:tiny_vit", "--image-size=8"]


def refused(capsys, *arguments) -> str:
    assert convert.main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    assert re.search(r"(^|\n)error: [^\n]+\n$", text), text
    return text


def read_back(path, tmp_path, *options) -> dict:
    assert convert.main([str(path), f"--out={tmp_path / 'out.safetensors'}", *options]) == 0
    name = next(option.partition("=")[2] for option in options if option.startswith("--model="))
    return weights.read(tmp_path / "out.safetensors", name)[0]


def logits(path, tmp_path, images, *options) -> np.ndarray:
    variables, card = read_back(path, tmp_path, *options), json.loads((tmp_path / "out.json").read_text())
    return np.asarray(jax.jit(partial(weights.build(card).apply, train=False))(variables, images).logits)


class Drawn(dict):
    """Tensors of a network, each drawn by NumPy when it is asked for first, so that the network's own code says their names."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def tensor(self, name: str, *shape: int) -> np.ndarray:
        if name not in self:
            scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
            drawn = self.rng.standard_normal(shape) * scale
            self[name] = (1 + np.abs(drawn) if name.endswith("running_var") else drawn).astype(np.float32)
        return self[name].astype(np.float64)

    def linear(self, x, name, features):
        return x @ self.tensor(f"{name}.weight", features, x.shape[-1]).T + self.tensor(f"{name}.bias", features)

    def convolution(self, x, name, features, size, stride, padding):
        """x [C, H, W], as PyTorch convolves it."""
        kernel = self.tensor(f"{name}.weight", features, x.shape[0], size, size)
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        windows = sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
        return np.einsum("chwij,ocij->ohw", windows, kernel, optimize=True)

    def batch_norm(self, x, name):
        weight, bias, mean, var = (
            self.tensor(f"{name}.{leaf}", len(x)) for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        self[f"{name}.num_batches_tracked"] = np.int64(7)
        scaled = (x - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
        return scaled * (1 + weight)[:, None, None] + bias[:, None, None]

    def save(self, path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        # Norms were computed with 1 + weight, so that a small draw is a scale that keeps the network's size.
        norms = [n for n in self if n.endswith("weight") and self[n].ndim == 1]
        stored = dict(self) | {n: 1 + self[n] for n in norms}
        safetensors.numpy.save_file({name: np.asarray(x) for name, x in stored.items()}, path)
        return path


# transformers.

LAYER = {
    "files": ("encoder.layer.{}.attention.attention.{}", ("query", "key", "value"), "encoder.layer.{}.attention.output.dense",
              "encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense", "encoder.layer.{}"),
    "modules": ("layers.{}.attention.{}_proj", ("q", "k", "v"), "layers.{}.attention.o_proj", "layers.{}.mlp.fc1",
                "layers.{}.mlp.fc2", "layers.{}"),
}  # fmt: skip


def vit(image, names: str, heads: int = 3, features: int = 24, depth: int = 4) -> tuple[Drawn, np.ndarray]:
    """(tensors, logits) of ViTForImageClassification with 5 classes for an image [C, H, W], patches of 4 pixels."""
    drawn, (projection, parts, out, first, second, layer) = Drawn(), LAYER[names]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * (1 + drawn.tensor(f"{name}.weight", features)) + drawn.tensor(f"{name}.bias", features)

    def split(x):
        return x.reshape(len(x), heads, -1).transpose(1, 0, 2)

    patches = drawn.convolution(image, "vit.embeddings.patch_embeddings.projection", features, 4, 4, 0)
    patches = patches + drawn.tensor("vit.embeddings.patch_embeddings.projection.bias", features)[:, None, None]
    x = patches.reshape(features, -1).T
    x = np.concatenate([drawn.tensor("vit.embeddings.cls_token", 1, 1, features)[0], x])
    x = x + drawn.tensor("vit.embeddings.position_embeddings", 1, len(x), features)[0]
    for i in range(depth):
        y = norm(x, f"vit.{layer.format(i)}.layernorm_before")
        q, k, v = (split(drawn.linear(y, "vit." + projection.format(i, part), features)) for part in parts)
        weight = np.exp(q @ k.transpose(0, 2, 1) / (features // heads) ** 0.5)
        y = (weight / weight.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), features)
        x = x + drawn.linear(y, "vit." + out.format(i), features)
        y = drawn.linear(norm(x, f"vit.{layer.format(i)}.layernorm_after"), "vit." + first.format(i), 4 * features)
        x = x + drawn.linear(y * (1 + erf(y / 2**0.5)) / 2, "vit." + second.format(i), features)
    return drawn, drawn.linear(norm(x, "vit.layernorm")[0], "classifier", 5)


def resnet(image, bottleneck: bool) -> tuple[Drawn, np.ndarray]:
    """(tensors, logits) of ResNetForImageClassification with 5 classes for an image [C, H, W], strides in 3x3 convolutions."""
    drawn = Drawn()

    def layer(x, name, features, size, stride):
        x = drawn.convolution(x, f"resnet.{name}.convolution", features, size, stride, size // 2)
        return drawn.batch_norm(x, f"resnet.{name}.normalization")

    x = np.maximum(layer(image, "embedder.embedder", CHANNELS[0], 7, 2), 0)
    x = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))
    for s, (count, inner) in enumerate(zip(BLOCKS, CHANNELS[1:], strict=True)):
        features = 4 * inner if bottleneck else inner
        for b in range(count):
            name, stride, y = f"encoder.stages.{s}.layers.{b}", 2 if s and not b else 1, x
            sizes = [(inner, 1, 1), (inner, 3, stride), (features, 1, 1)] if bottleneck else [(inner, 3, stride), (inner, 3, 1)]
            for i, one in enumerate(sizes):
                y = layer(y, f"{name}.layer.{i}", *one)
                y = y if i == len(sizes) - 1 else np.maximum(y, 0)
            if stride > 1 or len(x) != features:
                x = layer(x, f"{name}.shortcut", features, 1, stride)
            x = np.maximum(x + y, 0)
    return drawn, drawn.linear(x.mean((1, 2)), "classifier.1", 5)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).standard_normal((1, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("names", ["files", "modules"])
def test_a_vision_transformer_of_transformers_is_the_same_function(names, image, tmp_path, capsys):
    tensors, expected = vit(image[0].transpose(2, 0, 1).astype(np.float64), names)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "vit", "hidden_act": "gelu", "num_attention_heads": 3, "layer_norm_eps": 1e-12, "image_size": 8}
        )
    )
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}')
    tensors["vit.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    path = tensors.save(tmp_path / "model.safetensors")
    found = logits(path, tmp_path, image, VIT[0])
    np.testing.assert_allclose(found[0], expected, atol=1e-4 * np.abs(expected).max())
    card = json.loads((tmp_path / "out.json").read_text())
    assert (card["mean"], card["std"], card["image_shape"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1], [8, 8, 3])
    said = capsys.readouterr().err
    assert "holds vit.pooler.dense.weight, which is left out: its classifier reads the class token before" in said
    assert "layer_norm_eps 1e-12" in said and "preprocessor_config.json says" in said


@pytest.mark.parametrize("kind", ["tiny_basic", "tiny_bottleneck"])
def test_a_residual_network_of_transformers_is_the_same_function(kind, tmp_path, capsys):
    image = np.random.default_rng(2).standard_normal((1, 33, 33, 3)).astype(np.float32)
    tensors, expected = resnet(image[0].transpose(2, 0, 1).astype(np.float64), kind == "tiny_bottleneck")
    path, options = tensors.save(tmp_path / "model.safetensors"), [f"--model={HERE}:{kind}", "--image-size=33", *NORMALISED]
    found = logits(path, tmp_path, image, *options)
    np.testing.assert_allclose(found[0], expected, atol=1e-4 * np.abs(expected).max())
    assert "no config.json of transformers' 'resnet'; taken for granted are hidden_act=relu" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "downsample_in_bottleneck": true}')
    if kind == "tiny_bottleneck":
        sentence = refused(capsys, path, *options, f"--out={tmp_path / 'o.safetensors'}")
        assert f"config.json: downsample_in_bottleneck is True, and '{HERE}:tiny_bottleneck' has False" in sentence
    else:  # of basic blocks it says nothing
        assert convert.main([str(path), *options, f"--out={tmp_path / 'o.safetensors'}"]) == 0


def test_names_of_transformers_for_the_networks_of_this_zoo():
    """As its own files of these networks have them."""
    wide, deep = (models.create(name) for name in ("imagenet_ResNet50", "vit_base_patch16"))
    assert names.transformers(wide, "stage3_block6/conv3") == ("encoder.stages.2.layers.5.layer.2.convolution",)
    assert names.transformers(wide, "stage1_block1/shortcut_bn") == ("encoder.stages.0.layers.0.shortcut.normalization",)
    assert names.transformers(deep, "block12/attention/query") == ("encoder.layer.11.attention.attention.query",)
    assert names.transformers5(deep, "block12/attention/value") == ("layers.11.attention.v_proj",)


def test_a_namesake_is_named_by_the_names_of_transformers_too(tmp_path, capsys):
    model = models.create("imagenet_ResNet18", num_classes=5)
    like = flatten_dict(models.abstract(model, (64, 64, 3)))
    shapes = {names.keys(names.transformers, model, path)[0]: x.shape for path, x in like.items()}
    tensors = {name: np.zeros(shape if len(shape) < 4 else np.array(shape)[[3, 2, 0, 1]]) for name, shape in shapes.items()}
    tensors["classifier.1.weight"] = np.zeros((5, 512))
    safetensors.numpy.save_file(tensors, tmp_path / "net.safetensors")
    command = [tmp_path / "net.safetensors", "--model=ResNet18", f"--out={tmp_path / 'o.safetensors'}", *NORMALISED]
    assert "does not fit 'ResNet18', but 'imagenet_ResNet18': use --model=imagenet_ResNet18" in refused(capsys, *command)


@pytest.fixture(scope="module")
def hugging():
    return dict(vit(np.zeros((3, 8, 8)), "files")[0])


@pytest.mark.parametrize(
    "config, spoil, sentence",
    [
        ({"num_attention_heads": 12}, {}, r"config\.json: num_attention_heads is 12, and 'VIT' has 3"),
        ({"hidden_act": "gelu_new"}, {}, r"hidden_act is gelu_new, and 'VIT' has gelu"),
        ({"layer_norm_eps": 0.001}, {}, r"layer_norm_eps is 0\.001, and 'VIT' has 1e-06; up to 1e-5 would fit"),
        ({}, {"vit.encoder.layer.3.attention.attention.key.bias": None},
         r"vit\.encoder\.layer\.3\.attention\.attention\.key\.bias is not in it$"),
        ({}, {"vit.encoder.layer.0.attention.attention.query.weight": (24, 12)}, r"\.weight is \[24, 12\], not \[24, 24\]$"),
        ({}, {"vit.encoder.layer.0.extra.weight": (3,)}, r"'VIT': vit\.encoder\.layer\.0\.extra\.weight is not wanted$"),
        ({}, {"vit.embeddings.distillation_token": (1, 1, 24)},
         r"vit\.embeddings\.distillation_token is the second token of a distilled transformer; those without"),
        ({}, {"classifier.weight": None, "classifier.bias": None}, r"there is no classifier among its"),
    ],
)  # fmt: skip
def test_what_no_family_here_is_is_refused_by_name(config, spoil, sentence, hugging, tmp_path, capsys):
    tensors = hugging | {name: np.zeros(shape, np.float32) for name, shape in spoil.items() if shape}
    tensors = {name: x for name, x in tensors.items() if spoil.get(name, True)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **config}))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    command = [*VIT, *NORMALISED, f"--out={tmp_path / 'o.safetensors'}"]
    found = refused(capsys, tmp_path / "model.safetensors", *command).strip()
    assert re.search(sentence.replace("VIT", f"{HERE}:tiny_vit"), found), found
    assert not (tmp_path / "o.safetensors").exists()


# timm.


def test_timms_mobile_network_is_torchvisions_by_other_names():
    model, layers = models.create("imagenet_MobileNetV2", num_classes=5), ["conv_stem", "bn1"]
    variables = made_up(model, (64, 64, 3))
    for group, count in enumerate((1, 2, 3, 4, 3, 3, 1)):
        plain = ("conv_dw", "bn1", "conv_pw", "bn2")
        inner = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3") if group else plain
        layers += [f"blocks.{group}.{block}.{layer}" for block in range(count) for layer in inner]
    layers += ["conv_head", "bn2", "classifier"]
    # Both list their layers in the order in which they run.
    theirs = pytorch.to_torch(model, variables)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in theirs)
    ordered = sorted(modules, key=lambda name: (name.startswith("classifier"), [int(n) for n in re.findall(r"\d+", name)]))
    called = dict(zip(ordered, layers, strict=True))
    tensors = {f"{called[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": x for name, x in theirs.items()}
    close(pytorch.to_flax("file", "imagenet_MobileNetV2", model, (64, 64, 3), tensors), variables, 0)


def test_timms_residual_networks_that_are_others_are_refused(tmp_path, capsys):
    path, kind = tmp_path / "timm.safetensors", f"{HERE}:tiny_basic"
    variables = made_up(tiny_basic(num_classes=5), (32, 32, 3))
    tensors = pytorch.to_torch(tiny_basic(num_classes=5), variables)
    command = [path, f"--model={kind}", "--image-size=32", f"--out={tmp_path / 'o.safetensors'}", *NORMALISED]
    for name, sentence in (
        ("conv1.6.weight", "conv1.6.weight is a stem of three convolutions"),
        ("layer2.0.downsample.2.weight", "layer2.0.downsample.2.weight is a shortcut that pools first"),
        ("layer2.0.se.fc1.weight", "layer2.0.se.fc1.weight is attention over channels"),
    ):
        safetensors.numpy.save_file(tensors | {name: np.zeros(3, np.float32)}, path)
        assert f"does not fit '{kind}': {sentence}" in refused(capsys, *command)
    safetensors.numpy.save_file(tensors, path)
    images = {"mean": [0.4] * 3, "std": [0.3] * 3, "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetaa18", "pretrained_cfg": images}))
    assert "architecture is resnetaa18, which blurs before its strides" in refused(capsys, *command)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": images}))
    close(read_back(path, tmp_path, f"--model={kind}"), variables, 0)
    card = json.loads((tmp_path / "out.json").read_text())
    assert (card["mean"], card["std"], card["image_shape"]) == ([0.4] * 3, [0.3] * 3, [32, 32, 3])
