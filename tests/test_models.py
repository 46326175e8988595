"""Models: the reference architectures, their costs, and how a width makes channels."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import made_up
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import models, slimmable
from pwkd_jax.errors import UserError
from pwkd_jax.models import costs
from pwkd_jax.weights import pytorch

ZOO = json.loads((Path(__file__).parent / "data" / "golden_zoo.json").read_text())
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def outputs(model, variables, images):
    return jax.jit(lambda v, x: models.apply(model, v, x, train=False)[0])(variables, images)


# Others are the same code, deeper or wider.
SLOW_FACTS = (
    "resnet32", "resnet44", "resnet56", "resnet110", "wrn_40_1", "wrn_40_2", "imagenet_ResNet34", "imagenet_ResNet101",
    "vgg11", "vgg16", "vgg19", "vit_small_patch16",
)  # fmt: skip
SLOW_FORWARD = ("resnet32x4", "ResNet18", "imagenet_ResNet50", "imagenet_MobileNetV2")


def mostly(names, slow):
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in slow)) for n in names])


@mostly(ZOO["facts"], SLOW_FACTS)
def test_costs_and_taps_equal_the_reference(name):
    facts = ZOO["facts"][name]
    model, shape = models.create(name, num_classes=facts["classes"]), (facts["size"], facts["size"], 3)
    assert costs.parameters(model, shape) == facts["params"]
    if "macs" not in facts:
        return
    assert costs.macs(model, shape) == facts["macs"]
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    out = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], models.abstract(model, shape), images)
    assert [list(s.shape[1:]) for s in out.stages] == facts["stages"]
    assert [p.shape for p in out.preact] == [s.shape for s in out.stages]
    assert out.final.shape[-1:] == out.pooled.shape[1:] == out.head[0].shape[:1]
    assert [s.shape for s, _ in out.norms] in ([], [p.shape[-1:] for p in out.preact])


@pytest.mark.parametrize("width, params, macs_m", [(0.25, 471_532, 67.9), (0.5, 1_867_636, 271.0), (0.75, 4_188_412, 609.4)])
def test_narrow_costs_of_resnet32x4(width, params, macs_m):
    model = models.create("resnet32x4", width=width, num_classes=100)
    assert costs.parameters(model, (32, 32, 3)) == params
    assert round(costs.macs(model, (32, 32, 3)) / 1e6, 1) == macs_m


def state_dict(layout) -> dict[str, np.ndarray]:
    """The deterministic weights of golden_zoo.json under their PyTorch names."""
    found = {}
    for k, (key, shape) in enumerate(layout):
        a = np.random.RandomState(k).standard_normal(shape)
        if key.endswith("running_mean"):
            a = 0.1 * a
        elif key.endswith("running_var"):
            a = 1 + 0.1 * np.abs(a)
        elif len(shape) >= 2:
            a = a * np.sqrt(2 / np.prod(shape[1:]))
        else:
            a = 1 + 0.1 * a if key.endswith("weight") else 0.1 * a
        found[key] = a.astype(np.float32)
    return found


@mostly(ZOO["forward"], SLOW_FORWARD)
def test_forward_equals_the_reference_network_through_the_converter(name):
    facts, size = ZOO["forward"][name], ZOO["forward"][name]["size"]
    model = models.create(name.split()[0], num_classes=facts["classes"])
    found = state_dict(facts["state_layout"])
    variables = pytorch.to_flax("file", name, model, (size, size, 3), found)
    image = np.random.RandomState(1234).standard_normal((1, 3, size, size)).astype(np.float32).transpose(0, 2, 3, 1)
    out = outputs(model, variables, image)
    np.testing.assert_allclose(out.logits[0, :8], facts["logits_first8"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(out.logits), facts["logits_l2"], rtol=1e-3)
    for key, ours in (("taps", out.stages), ("preact_taps", out.preact)):
        for expected, tap in zip(facts.get(key, facts["taps"]), (out.stem, *ours, out.pooled), strict=True):
            # torchvision shows its residual networks after their ReLU alone.
            if key in facts or out.preact is out.stages:
                np.testing.assert_allclose([np.mean(tap), np.std(tap), np.abs(tap).max()], expected, rtol=1e-3, atol=1e-5)
    if out.final is not None:
        np.testing.assert_allclose(out.final.mean((1, 2)), out.pooled, rtol=1e-5, atol=1e-5)
    # And back: the same arrays under the names of the model's first reference project.
    back = pytorch.to_torch(model, variables)
    assert len(back) == len(found) and all(np.array_equal(back[key], found[key]) for key in back.keys() & found.keys())
    assert back.keys() == found.keys() or name in ("ResNet18", "vit_tiny_patch16 torchvision")


# Teachers of every kind, and the size of images small enough to run here; SLOW_FAMILIES take long, or share their code with
# another.
FAMILIES = {
    "resnet8": 8, "ResNet18": 8, "ResNet50": 8, "imagenet_ResNet18": 32, "wrn_16_1": 8, "wrn_16_2": 8, "vgg8": 8,
    "MobileNetV2": 8, "imagenet_MobileNetV1": 32, "imagenet_MobileNetV2": 16, "ShuffleV1": 8, "ShuffleV2": 8,
    "vit_tiny_patch4": 8,
}  # fmt: skip
SLOW_FAMILIES = (
    "ResNet18", "ResNet50", "imagenet_ResNet18", "wrn_16_2", "MobileNetV2", "imagenet_MobileNetV2", "imagenet_MobileNetV1",
    "ShuffleV1",
)  # fmt: skip
# With fewer blocks than they have; the forward passes above have them all.
SHALLOW = {"wrn_16_1": {"blocks": 1}, "ShuffleV2": {"blocks": (1, 1, 1)}, "vit_tiny_patch4": {"depth": 2}}
MASKLESS = ("ShuffleV1", "ShuffleV2")


@pytest.mark.parametrize(
    "name, width",
    [
        pytest.param(name, width, marks=[pytest.mark.slow] * (width > 0.25 or name in SLOW_FAMILIES))
        for name in FAMILIES
        for width in WIDTHS
    ],
)
def test_every_family_at_every_width(name, width):
    """take equals the standalone narrow model, by slices written out; mask equals take, or is refused with its reason."""
    shape = (FAMILIES[name], FAMILIES[name], 3)

    def family(w):
        return models.create(name, width=w, num_classes=10).clone(**SHALLOW.get(name, {}))

    net = slimmable.build(family, sorted({width, 1.0}), shape, batch_norm="private_stats")
    full = made_up(family(1.0), shape)
    params, statistics = net.spread(full)
    narrow = models.abstract(family(width), shape)
    blocks = {
        path: np.asarray(x)[tuple(slice(n) for n in flatten_dict(narrow)[path].shape)] for path, x in flatten_dict(full).items()
    }
    assert blocks.keys() == flatten_dict(narrow).keys()
    images = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    alone = outputs(family(width), unflatten_dict(blocks), images)
    masked = dataclasses.replace(net, masked=True)
    both = jax.jit(lambda p, s: [n.forward(p, s, width, images, train=False)[0].logits for n in (net, masked)])
    taken, full_shape = both(params, statistics)
    scale = np.abs(alone.logits).max()
    np.testing.assert_allclose(taken, alone.logits, rtol=0, atol=1e-5 * scale)
    if width == 1 or name not in MASKLESS:
        np.testing.assert_allclose(full_shape, alone.logits, rtol=0, atol=1e-5 * scale)
    if width == 0.25:
        if name in MASKLESS:
            with pytest.raises(UserError, match=r"teacher.execution: 'mask' at width 0.25 .* shuffle or a concatenation"):
                slimmable.refuse_masking(masked, shape)
        else:
            slimmable.refuse_masking(masked, shape)


def test_transformers_slice_heads_and_hidden_layers_and_leave_the_stream():
    full, narrow = (flatten_dict(models.abstract(models.create("vit_small_patch4", width=w), (8, 8, 3))) for w in (1.0, 0.5))
    sliced = {"/".join(path[2:]) for path in full if full[path].shape != narrow[path].shape}
    attention = {f"attention/{part}/{leaf}" for part in ("query", "key", "value") for leaf in ("kernel", "bias")}
    assert sliced == attention | {"attention/out/kernel", "mlp1/kernel", "mlp1/bias", "mlp2/kernel"}
    assert narrow["params", "block1", "attention", "query", "kernel"].shape == (384, 3, 64)
    assert narrow["params", "block1", "mlp1", "kernel"].shape == (384, 768)
    # Three heads: 0.75, 1.5 and 2.25 of them become 1, 2 and 3, for 2 would be under 90 % of 2.25.
    assert [models.channels(3, w, 1) for w in WIDTHS] == [1, 2, 3, 3]


def test_initialisers_are_those_of_the_references():
    """Standard deviations over whole layers, against the references' formulas."""

    def std(name, *path):
        model = models.create(name, num_classes=100)
        # Compiled for one array, so that the rest of the network is left out.
        run = jax.jit(lambda key: flatten_dict(model.init(key, jnp.zeros((1, 32, 32, 3))))["params", *path])
        return np.std(run(jax.random.key(0)))

    for name, layer in (("resnet20", "stage3_block1/conv1"), ("wrn_16_2", "stage3_block1/conv1"), ("vgg8", "block3_conv0")):
        features = {"resnet20": 64, "wrn_16_2": 128, "vgg8": 512}[name]
        np.testing.assert_allclose(std(name, *layer.split("/"), "kernel"), np.sqrt(2 / (9 * features)), rtol=0.02)
    # Depthwise kernels count all the channels out, as PyTorch does.
    depthwise = std("MobileNetV2", "group6_block2", "depthwise_conv", "kernel")
    np.testing.assert_allclose(depthwise, np.sqrt(2 / (9 * 480)), rtol=0.05)
    # PyTorch's default: uniform within 1 / sqrt(fan in); a grouped kernel sees a third of the channels.
    np.testing.assert_allclose(std("ShuffleV1", "stage3_block2", "conv1", "kernel"), 1 / np.sqrt(3 * 960 / 3), rtol=0.02)
    np.testing.assert_allclose(std("resnet20", "classifier", "kernel"), 1 / np.sqrt(3 * 64), rtol=0.05)
    np.testing.assert_allclose(std("resnet20", "classifier", "bias"), 1 / np.sqrt(3 * 64), rtol=0.25)
    np.testing.assert_allclose([std("vgg8", "classifier", "kernel"), std("vgg8", "classifier", "bias")], [0.01, 0], rtol=0.05)
    np.testing.assert_allclose(std("vit_tiny_patch4", "block1", "mlp1", "kernel"), 0.02, rtol=0.05)
    np.testing.assert_allclose(std("vit_tiny_patch4", "patch_conv", "kernel"), 1 / np.sqrt(3 * 48), rtol=0.05)
    np.testing.assert_allclose(std("vit_tiny_patch4", "class_token"), 1e-6, rtol=0.25)


def test_channels_are_exact_or_refused():
    assert [models.channels(16, w) for w in (0.25, 0.5, 0.75, 1.0)] == [4, 8, 12, 16]
    assert models.channels(30, 0.1) == 3  # 0.1 * 30 is not 3 in floating point
    with pytest.raises(models.WidthError, match=r"width 0.3 makes 4.8 of 16 channels.*divisor"):
        models.channels(16, 0.3)
    with pytest.raises(models.WidthError):
        models.channels(2, 0.25)


def test_divisor_rounds_as_the_mobile_networks_do():
    # The collapse of small networks that makes exact channels the default here.
    assert [models.channels(c, 0.25, 8) for c in (16, 16, 32, 64)] == [8, 8, 8, 16]
    assert [models.channels(c, 0.75, 8) for c in (16, 16, 32, 64)] == [16, 16, 24, 48]
    assert models.channels(100, 0.11, 8) == 16  # 8 would be under 90 % of 11


def test_unknown_models_and_options_are_refused():
    for name in ("resnet9", "resnet7", "resnet50", "vgg", "wrn_15_2", "wrn_16_0", "vit_huge_patch16", ""):
        with pytest.raises(UserError, match="there is no model"):
            models.create(name)
    with pytest.raises(UserError, match=r"'resnet50': known are ResNet50 \(the nearest\), resnet8, resnet14"):
        models.create("resnet50")
    with pytest.raises(UserError, match="cannot be imported"):
        models.create("pwkd_jax.models:Nothing")
    with pytest.raises(UserError, match="has no 'zero_gamma'"):
        models.create("test_slimmable:Depthwise", zero_gamma=True)


def test_zero_gamma_makes_every_block_the_identity_branch():
    model = models.create("resnet8", zero_gamma=True)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    assert all(not np.any(variables["params"][f"stage{s}_block1"]["bn2"]["scale"]) for s in (1, 2, 3))


def test_shapes_are_found_once_and_are_the_askers_own():
    runs = []

    class Watched(type(models.create("resnet8"))):
        def __call__(self, x, train=False, start=0):
            runs.append(self)
            return super().__call__(x, train, start)

    model = Watched((1, 1, 1), num_classes=4)
    first = models.abstract(model, (8, 8, 3))
    count = len(runs)
    first["params"].clear()
    second = models.abstract(model, [8, 8, 3])
    assert count and len(runs) == count and second["params"]
    assert models.abstract(model, (16, 16, 3)) and len(runs) > count
    listed = Watched((1, 1, 1), num_classes=4)
    object.__setattr__(listed, "blocks", [1, 1, 1])
    with pytest.raises(TypeError):
        hash(listed)
    assert jax.tree.map(jnp.shape, models.abstract(listed, (8, 8, 3))) == jax.tree.map(jnp.shape, second)


@pytest.mark.parametrize("name", ("resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "vit_small_patch4"))
def test_outputs_of_many_images_have_the_shapes_of_one(name):
    model, images = models.create(name, width=0.5, num_classes=7), jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)
    out = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], models.abstract(model, (32, 32, 3)), images)
    found = costs.outputs(model, (32, 32, 3), 3)
    assert jax.tree.structure(found) == jax.tree.structure(out)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [(x.shape, x.dtype) for x in jax.tree.leaves(out)]
