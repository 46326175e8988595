"""Channels in order of importance: the function stays, the best come first, in any model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import made_up
from flax.traverse_util import flatten_dict

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models import channel_order


class Separable(nn.Module):
    """Depthwise-separable blocks with a residual, a pooled shortcut and a gate, and no batch norm in one place."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        c, m = models.channels(8, self.width), models.channels(12, self.width)
        norm = nn.BatchNorm(use_running_average=not train)
        x = nn.relu(norm(nn.Conv(c, (3, 3))(x)))
        y = nn.Conv(m, (1, 1), name="expand")(x)
        y = nn.relu6(nn.BatchNorm(use_running_average=not train)(nn.Conv(m, (3, 3), feature_group_count=m, name="depth")(y)))
        gate = nn.sigmoid(nn.Dense(m, name="gate")(y.mean((1, 2))))
        x = x + nn.Conv(c, (1, 1), name="project")(y * gate[:, None, None, :])
        x = nn.max_pool(x, (2, 2), (2, 2)) + nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Cut(nn.Module):
    """Concatenation, shuffle, grouped convolution, flattening: places of their own; only the inner layer is free."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        c = models.channels(8, self.width)
        a, b = (nn.Conv(c, (1, 1), name=name)(x) for name in ("left", "right"))
        x = jnp.concatenate([a, b], -1)
        x = jnp.swapaxes(x.reshape(*x.shape[:-1], 2, c), -1, -2).reshape(*x.shape[:-1], 2 * c)
        x = nn.Conv(2 * c, (1, 1), feature_group_count=2, name="grouped")(x)
        x = nn.relu(nn.Conv(c, (1, 1), name="inner")(x))
        x = jnp.cumsum(nn.Conv(c, (1, 1), name="outer")(x), axis=-1)
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))


class Sorted(nn.Module):
    """A primitive that is not known, over channels."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(models.channels(8, self.width), name="free")(x.mean((1, 2))))
        x = nn.Dense(models.channels(8, self.width), name="placed")(x)
        return nn.Dense(5, name="head")(jnp.sort(x, axis=-1))


# {model: (image size, how many axes that shrink cannot be sorted)}
MODELS = {
    "resnet8": (8, 0),
    "wrn_16_1": (8, 0),
    "vgg8": (8, 0),
    "vit_tiny_patch4": (8, 0),
    "test_ordering:Separable": (8, 0),
    # Of Cut: left, right, grouped and outer, kernels and biases; inner's input; outer's output; the head's input.
    "test_ordering:Cut": (8, 11),
    "test_ordering:Sorted": (8, 3),
    "ShuffleV2": (8, 123),
}


def built(name):
    """(model, varied variables, image shape, narrow abstract variables)."""
    shape = (MODELS[name][0],) * 2 + (3,)

    def make(w):
        if ":" in name:
            return models.from_name(name, None, "", "")[0](width=w)
        return models.create(name, width=w).clone(**({"depth": 2} if name.startswith("vit") else {}))

    model = make(1.0)
    return model, made_up(model, shape), shape, models.abstract(make(0.5), shape)


@pytest.mark.parametrize(
    "name, by",
    [
        pytest.param(name, by, marks=[pytest.mark.slow] * (by == "l1" and name not in ("resnet8", "test_ordering:Separable")))
        for name in MODELS
        for by in ("bn_scale", "l1")
    ],
)
def test_the_function_stays_and_channels_move(name, by):
    model, variables, shape, narrow = built(name)
    ordered = channel_order.order(model, variables, shape, narrow, by)
    images = np.random.default_rng(3).standard_normal((3, *shape)).astype(np.float32)
    before, after = (models.apply(model, v, images, train=False)[0].logits for v in (variables, ordered))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    a, b, small = flatten_dict(variables), flatten_dict(ordered), flatten_dict(narrow)
    assert all(np.array_equal(np.sort(a[path], axis=None), np.sort(b[path], axis=None)) for path in a)
    # Every axis that a narrow member has less of is sorted, but for those that the model gives a place of their own.
    shrinking = {(path, axis) for path in a for axis, n in enumerate(a[path].shape) if n != small[path].shape[axis]}
    found = {axis for axes in channel_order.groups(model, shape)[0] for axis in axes}
    assert len(shrinking - found) == MODELS[name][1]
    moved = [path for path in a if not np.array_equal(a[path], b[path])]
    assert len(moved) >= 0.8 * len({path for path, _ in shrinking & found})


def test_resnets_are_sorted_by_the_batch_norms_of_the_stream():
    model, variables, shape, narrow = built("resnet8")
    sorted_ = flatten_dict(channel_order.order(model, variables, shape, narrow)["params"], sep="/")
    # The stem and the first stage share a stream, whose channels are those of two batch norms.
    stream = np.abs(sorted_["stem_bn/scale"]) + np.abs(sorted_["stage1_block1/bn2/scale"])
    second = np.abs(sorted_["stage2_block1/bn2/scale"]) + np.abs(sorted_["stage2_block1/shortcut_bn/scale"])
    for importance in (stream, second, np.abs(sorted_["stage3_block1/bn1/scale"])):
        assert np.all(np.diff(importance) <= 0) and importance[0] > importance[-1]
    by_norm = flatten_dict(channel_order.order(model, variables, shape, narrow, "l1")["params"], sep="/")
    inner = np.abs(by_norm["stage3_block1/conv1/kernel"]).sum((0, 1, 2), dtype=np.float64)
    makers = ("stem_conv/kernel", "stage1_block1/conv2/kernel")
    stream = sum(np.abs(by_norm[k]).sum((0, 1, 2), dtype=np.float64) for k in makers)
    for importance in (inner, stream):
        assert np.all(np.diff(importance) <= 0)
    assert not np.array_equal(sorted_["stage3_block1/conv1/kernel"], by_norm["stage3_block1/conv1/kernel"])


def test_layers_without_batch_norm_go_by_their_kernels():
    model, variables, shape, narrow = built("vit_tiny_patch4")
    params = flatten_dict(channel_order.order(model, variables, shape, narrow)["params"], sep="/")
    hidden = np.abs(params["block2/mlp1/kernel"]).sum(0, dtype=np.float64)
    heads = sum(np.abs(params[f"block2/attention/{part}/kernel"]).sum((0, 2), dtype=np.float64)
                for part in ("query", "key", "value"))  # fmt: skip
    for importance in (hidden, heads):
        assert np.all(np.diff(importance) <= 0)
    # The stream is not sliced, so nothing of it moves.
    np.testing.assert_array_equal(params["patch_conv/kernel"], variables["params"]["patch_conv"]["kernel"])


def test_planted_channels_come_first_and_make_the_better_half():
    """All that matters of the inner layer planted in half of its channels: the narrow inner layer then loses nothing."""
    model, variables, shape, narrow = built("vgg8")
    important = np.random.default_rng(5).permutation(512)[:256]
    scale = np.zeros(512, np.float32)
    scale[important] = np.linspace(1, 2, 256)
    params = variables["params"]
    params["block4_bn0"]["scale"], params["block4_bn0"]["bias"] = scale, np.zeros(512, np.float32)
    ordered = channel_order.order(model, variables, shape, narrow)
    found = ordered["params"]["block4_bn0"]["scale"]
    np.testing.assert_array_equal(found[:256], np.linspace(1, 2, 256, dtype=np.float32)[::-1])
    assert not found[256:].any()
    ordered["params"]["classifier"]["kernel"][256:] = 0
    images = np.random.default_rng(3).standard_normal((3, *shape)).astype(np.float32)
    before, after = (models.apply(model, v, images, train=False)[0].logits for v in (variables, ordered))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_equal_channels_keep_their_order():
    model, _, shape, narrow = built("resnet8")
    fresh = jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, *shape))))
    ordered = channel_order.order(model, fresh, shape, narrow)  # every scale is 1
    assert all(map(np.array_equal, jax.tree.leaves(fresh), jax.tree.leaves(ordered)))


def test_models_that_cannot_be_sorted_are_refused(monkeypatch):
    model, variables, shape, narrow = built("resnet8")
    wrong = [[(("params", "stem_conv", "kernel"), 3)]]
    monkeypatch.setattr(channel_order, "groups", lambda *_: (wrong, {wrong[0][0]}))
    with pytest.raises(UserError, match=r"^teacher\.order: sorting this model's channels changes its output by \d+%, .* none$"):
        channel_order.order(model, variables, shape, narrow, "l1")
    monkeypatch.undo()
    v1 = models.create("ShuffleV1")
    narrow = models.abstract(models.create("ShuffleV1", width=0.5), shape)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), models.abstract(v1, shape))
    with pytest.raises(UserError, match=r"^teacher\.order: no channels of this model can be sorted, .* set it to none$"):
        channel_order.order(v1, zeros, shape, narrow)
