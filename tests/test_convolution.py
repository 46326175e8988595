"""Kernel gradients as products: equal to a float64 reference, whatever the layer, and no change for other devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pwkd_jax import models
from pwkd_jax.cost import compiler
from pwkd_jax.experiment.programs import Program
from pwkd_jax.models import convolution

# (images, kernel, strides, padding), with chunks of all images, of some, and of one.
CASES = {
    "3x3": ((6, 8, 8, 5), (3, 3, 5, 7), (1, 1), ((1, 1), (1, 1))),
    "strided": ((6, 9, 8, 5), (3, 3, 5, 4), (2, 2), ((1, 1), (1, 1))),
    "leftover": ((3, 8, 8, 2), (2, 2, 2, 3), (3, 3), ((0, 0), (0, 0))),  # two rows that no patch reads
    "1x1": ((4, 7, 7, 3), (1, 1, 3, 6), (2, 2), ((0, 0), (0, 0))),
    "uneven": ((5, 8, 6, 3), (5, 1, 3, 2), (1, 2), ((2, 1), (0, 0))),
    "cropped": ((2, 8, 8, 3), (3, 3, 3, 2), (1, 1), ((-1, 0), (0, -2))),
}


def reference(images, cotangent, size, strides, padding):
    """The definition, pixel by pixel, in float64."""
    images, cotangent = images.astype(np.float64), cotangent.astype(np.float64)
    images = np.pad(images, ((0, 0), *(tuple(max(0, p) for p in side) for side in padding), (0, 0)))
    cut = [slice(max(0, -low), images.shape[i + 1] - max(0, -high)) for i, (low, high) in enumerate(padding)]
    images = images[:, cut[0], cut[1]]
    result = np.zeros((*size, images.shape[-1], cotangent.shape[-1]))
    for y in range(cotangent.shape[1]):
        for x in range(cotangent.shape[2]):
            top, left = y * strides[0], x * strides[1]
            patch = images[:, top : top + size[0], left : left + size[1]]
            result += np.einsum("bhwc,bd->hwcd", patch, cotangent[:, y, x])
    return result


@pytest.mark.parametrize("patch_bytes", (1 << 30, 16_000, 1))
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_definition(case, patch_bytes, monkeypatch):
    monkeypatch.setattr(convolution, "PATCH_BYTES", patch_bytes)
    monkeypatch.setattr(convolution, "PIXELS", 0)
    image_shape, kernel_shape, strides, padding = CASES[case]
    rng = np.random.default_rng(0)
    images, kernel = (rng.standard_normal(s).astype(np.float32) for s in (image_shape, kernel_shape))

    def plain(images, kernel):
        return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=convolution.NUMBERS)

    def ours(images, kernel):
        return convolution.convolve(images, kernel, strides, padding, dimension_numbers=convolution.NUMBERS)

    out, back = jax.vjp(ours, images, kernel)
    same, theirs = jax.vjp(plain, images, kernel)
    cotangent = rng.standard_normal(out.shape).astype(np.float32)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(back(cotangent)[0], theirs(cotangent)[0])
    expected = reference(images, cotangent, kernel_shape[:2], strides, padding)
    for found in (back(cotangent)[1], theirs(cotangent)[1]):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "dot_general" in str(jax.make_jaxpr(lambda *a: jax.vjp(ours, *a)[1](cotangent))(images, kernel))


class Odd(nn.Module):
    """Layers that have no such gradient, and one that has: a user's model, of Flax's own layers."""

    def setup(self):
        self.first = nn.Conv(4, (3, 3), padding="SAME", strides=2)
        self.depthwise = nn.Conv(4, (3, 3), feature_group_count=4)
        self.dilated = nn.Conv(4, (3, 3), kernel_dilation=2)
        self.circular = nn.Conv(4, (3, 3), padding="CIRCULAR")
        self.up = nn.ConvTranspose(4, (2, 2), strides=(2, 2))

    def __call__(self, x, train=False):
        x = self.up(self.circular(self.dilated(self.depthwise(self.first(x)))))
        return models.Outputs(x.mean((1, 2)))


@pytest.mark.parametrize("name", ("odd", "resnet8"))
def test_models_gradients_are_the_same(name, batch, monkeypatch):
    monkeypatch.setattr(convolution, "PATCH_BYTES", 16_000)
    monkeypatch.setattr(convolution, "PIXELS", 0)
    model = Odd() if name == "odd" else models.create("resnet8", num_classes=4)
    variables = model.init(jax.random.key(0), batch[0], train=False)
    variables = {"batch_stats": {}, **variables}

    def gradient(apply):
        def loss(params):
            return jnp.sum(apply({**variables, "params": params}) ** 2)

        return jax.jit(jax.grad(loss)), str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))

    ours, program = gradient(lambda v: models.apply(model, v, batch[0], train=True)[0].logits)
    plain, without = gradient(lambda v: model.apply(v, batch[0], train=True, mutable=["batch_stats"])[0].logits)
    assert "platform_index" in program and "platform_index" not in without
    for a, b in zip(jax.tree.leaves(ours(variables["params"])), jax.tree.leaves(plain(variables["params"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


def test_layers_are_left_as_they_were():
    layer = nn.Conv(2, (3, 3))
    before = hash(layer)
    with convolution.products():
        layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    assert layer.conv_general_dilated is None and hash(layer) == before


def test_other_devices_keep_their_convolutions():
    """A program for a TPU, compiled on a CPU box as pre-flight does, has a convolution and no loop in it."""
    images, kernel = jnp.zeros((4, 16, 16, 2)), jnp.zeros((3, 3, 2, 2))

    def loss(kernel):
        out = convolution.convolve(images, kernel, (1, 1), "SAME", dimension_numbers=convolution.NUMBERS)
        return jnp.sum(out**2)

    traced = jax.jit(jax.grad(loss)).trace(kernel)
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert "dot_general" in text["cpu"]
    for platform in ("tpu", "cuda"):
        assert "dot_general" not in text[platform] and text[platform].count("stablehlo.convolution") == 2


def test_preflight_reckons_with_convolutions():
    """What it says of a card comes from a program for the CPU, whose loops XLA's count takes once."""
    images, kernel = jnp.ones((64, 32, 32, 4)), jnp.ones((3, 3, 4, 8))

    def loss(kernel):
        out = convolution.convolve(images, kernel, (1, 1), ((0, 0), (0, 0)), dimension_numbers=convolution.NUMBERS)
        return jnp.sum(out * jnp.arange(8.0))

    program = Program("kernel", jax.jit(lambda k: jax.grad(loss)(k)), (kernel,), {}, 64, "", 1)
    count = 2 * 64 * 30 * 30 * 9 * 4 * 8  # of the gradient alone; the output itself is not asked for
    flops = compiler.outline(program, 1, None).flops
    assert count <= flops < 2.5 * count
