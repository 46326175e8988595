"""Convolutions in the forms of a CPU: equal to a float64 reference, whatever the layer, and no change for other devices."""

import contextlib
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pwkd_jax import models
from pwkd_jax.cost import compiler
from pwkd_jax.experiment.programs import Program
from pwkd_jax.models import compute, convolution
from pwkd_jax.training import sharding

# (images, kernel, strides, padding)
CASES = {
    "3x3": ((6, 8, 8, 5), (3, 3, 5, 7), (1, 1), ((1, 1), (1, 1))),
    "strided": ((6, 9, 8, 5), (3, 3, 5, 4), (2, 2), ((1, 1), (1, 1))),
    "leftover": ((3, 8, 8, 2), (2, 2, 2, 3), (3, 3), ((0, 0), (0, 0))),  # two rows that no patch reads
    "1x1": ((4, 7, 7, 3), (1, 1, 3, 6), (2, 2), ((0, 0), (0, 0))),
    "uneven": ((5, 8, 6, 3), (5, 1, 3, 2), (1, 2), ((2, 1), (0, 0))),
    "cropped": ((2, 8, 8, 3), (3, 3, 3, 2), (1, 1), ((-1, 0), (0, -2))),
    "padded 1x1": ((2, 5, 6, 3), (1, 1, 3, 2), (2, 1), ((1, 2), (0, 1))),
    "small": ((6, 2, 2, 5), (3, 3, 5, 7), (1, 1), ((1, 1), (1, 1))),
    "small strided": ((4, 2, 3, 3), (3, 3, 3, 4), (2, 1), ((1, 2), (1, 1))),
    "small after": ((4, 4, 5, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (0, 1))),  # of which the gradient's images are
    "small widened": ((3, 2, 2, 3), (2, 2, 3, 4), (1, 1), ((1, 1), (1, 1))),  # to more pixels than it has
    "of one patch": ((4, 5, 4, 3), (5, 4, 3, 6), (1, 1), ((0, 0), (0, 0))),
    "one pixel": ((5, 1, 1, 3), (3, 3, 3, 2), (1, 1), ((1, 1), (1, 1))),
    "small cropped": ((2, 4, 2, 3), (3, 3, 3, 2), (1, 1), ((-1, 0), (2, 1))),
    "depthwise": ((3, 8, 7, 5), (3, 3, 1, 5), (1, 1), ((1, 1), (1, 1))),
    "depthwise strided": ((2, 9, 8, 3), (3, 3, 1, 3), (2, 2), ((1, 1), (1, 1))),
    "depthwise leftover": ((3, 8, 8, 2), (2, 2, 1, 2), (3, 3), ((0, 0), (0, 0))),
    "depthwise uneven": ((1, 8, 6, 3), (5, 1, 1, 3), (1, 2), ((2, 1), (0, 3))),
    "depthwise cropped": ((2, 8, 8, 3), (3, 3, 1, 3), (1, 1), ((-1, 0), (0, -2))),
}


def reference(images, kernel, cotangent, strides, padding):
    """(output, gradient of the images, gradient of the kernel) by the definition, pixel by pixel, in float64."""
    images, kernel, cotangent = (x.astype(np.float64) for x in (images, kernel, cotangent))
    if kernel.shape[2] != images.shape[-1]:  # depthwise: as a dense kernel, zero between different channels
        found = reference(images, np.eye(images.shape[-1]) * kernel, cotangent, strides, padding)
        return *found[:2], np.einsum("hwcc->hwc", found[2])[:, :, None]
    outside = [tuple(max(0, p) for p in side) for side in padding]
    images = np.pad(images, ((0, 0), *outside, (0, 0)))
    cut = [slice(max(0, -low), images.shape[i + 1] - max(0, -high)) for i, (low, high) in enumerate(padding)]
    out, by_images, by_kernel = np.zeros(cotangent.shape), np.zeros(images.shape), np.zeros(kernel.shape)
    for y in range(cotangent.shape[1]):
        for x in range(cotangent.shape[2]):
            rows, columns = (slice(i * s, i * s + k) for i, s, k in zip((y, x), strides, kernel.shape, strict=False))
            patch = images[:, cut[0], cut[1]][:, rows, columns]
            out[:, y, x] = np.einsum("bhwc,hwcd->bd", patch, kernel)
            by_images[:, cut[0], cut[1]][:, rows, columns] += np.einsum("hwcd,bd->bhwc", kernel, cotangent[:, y, x])
            by_kernel += np.einsum("bhwc,bd->hwcd", patch, cotangent[:, y, x])
    (top, bottom), (left, right) = outside
    return out, by_images[:, top : by_images.shape[1] - bottom, left : by_images.shape[2] - right], by_kernel


@pytest.mark.parametrize("large", (0, convolution.LARGE), ids=("held apart", "as it comes"))
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_definition(case, large, monkeypatch):
    monkeypatch.setattr(convolution, "LARGE", large)
    image_shape, kernel_shape, strides, padding = CASES[case]
    rng = np.random.default_rng(0)
    images, kernel = (rng.standard_normal(s).astype(np.float32) for s in (image_shape, kernel_shape))
    groups = image_shape[-1] // kernel_shape[2]

    def convolve(function, images, kernel):
        options = {"dimension_numbers": convolution.NUMBERS, "feature_group_count": groups}
        return function(images, kernel, strides, padding, **options)

    ours, plain = (partial(convolve, f) for f in (convolution.convolve, lax.conv_general_dilated))
    out, back = jax.vjp(ours, images, kernel)
    same, theirs = jax.vjp(plain, images, kernel)
    cotangent = rng.standard_normal(out.shape).astype(np.float32)
    expected = reference(images, kernel, cotangent, strides, padding)
    for found in ((out, *back(cotangent)), (same, *theirs(cotangent))):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max() * 3)
    program = jax.jit(lambda *a: jax.vjp(ours, *a)[1](cotangent)).lower(images, kernel).compile().as_text()
    slid = max(np.prod(kernel_shape[:2]), np.prod(out.shape[1:3]))
    moved = groups == 1 and images.shape[1] * images.shape[2] >= slid and "1x1" not in case
    assert ("conditional(" in program) == (large == 0 and moved)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_loops_have_no_convolution_that_is_slow_there(dtype):
    """What XLA gives to its library: images first and channels last; and depthwise ones are no convolutions at all."""
    images, kernel, each = jnp.ones((8, 9, 9, 4), dtype), jnp.ones((3, 3, 4, 4), dtype), jnp.ones((3, 3, 1, 4), dtype)

    def loss(kernels, images):
        for kernel, groups, strides in zip(kernels, (1, 4, 1), ((1, 1), (2, 2), (2, 2)), strict=True):
            options = {"dimension_numbers": convolution.NUMBERS, "feature_group_count": groups}
            images = jnp.sin(convolution.convolve(images, kernel, strides, "SAME", **options))
        return jnp.sum(images.astype(jnp.float32) ** 2)

    def descend(_, kernels):
        return jax.tree.map(lambda k, g: k - g, kernels, jax.grad(loss)(kernels, images))

    program = jax.jit(lambda k: lax.fori_loop(0, 3, descend, k)).lower([kernel, each, kernel]).compile().as_text()
    assert "while(" in program
    assert set(re.findall(r"dim_labels=(\S+?),? ", program)) == {"b01f_01io->b01f"}
    assert "feature_group_count" not in program


@pytest.mark.parametrize(("size", "strides", "pad"), ((2, 1, 1), (1, 1, 1), (4, 2, 1), (4, 1, 2)))
def test_maps_smaller_than_the_kernel_are_not_exchanged_for_it(size, strides, pad):
    """Of which XLA's CPU compiler makes kernels of its own, twenty times slower and more, and slow to compile."""
    images, kernel = jnp.ones((8, size, size, 4)), jnp.ones((3, 3, 4, 4))

    def loss(convolve, images, kernel):
        options = {"dimension_numbers": convolution.NUMBERS}
        return jnp.sum(jnp.sin(convolve(images, kernel, (strides, strides), ((pad, pad), (pad, pad)), **options)))

    texts = [jax.jit(jax.value_and_grad(partial(loss, f), (0, 1))).lower(images, kernel).compile().as_text()
             for f in (convolution.convolve, lax.conv_general_dilated)]  # fmt: skip
    assert "rhs_reversal" in texts[1] and "rhs_reversal" not in texts[0]


def _bare(function, images, kernel, strides, padding):
    return function(images, kernel, (strides, strides), padding, dimension_numbers=convolution.NUMBERS)


NOTHING = (((0, 2, 2, 3), 1, "SAME"), ((0, 4, 4, 3), 2, "SAME"), ((2, 2, 2, 3), 1, "VALID"), ((2, 1, 1, 3), 2, "VALID"))


@pytest.mark.parametrize(("images", "strides", "padding"), NOTHING)
def test_nothing_is_left_as_xla_has_it(images, strides, padding):
    """No images, or no pixel that a kernel fits over."""
    images, kernel, how = jnp.ones(images), jnp.ones((3, 3, 3, 4)), {"strides": strides, "padding": padding}
    ours, plain = (partial(_bare, f, **how) for f in (convolution.convolve, lax.conv_general_dilated))
    out = plain(images, kernel)
    assert ours(images, kernel).shape == out.shape and out.size == 0
    for found, wanted in zip(*(jax.vjp(f, images, kernel)[1](out) for f in (ours, plain)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ("int32", "complex64", "bfloat16", "float16"))
def test_small_maps_of_other_types_are_as_xla_has_them(dtype):
    rng = np.random.default_rng(0)
    images, kernel = (rng.integers(-9, 9, s).astype(np.float32) for s in ((2, 2, 2, 3), (3, 3, 3, 4)))
    if dtype == "complex64":
        images = images + 1j * images
    elif dtype == "int32":
        images = images + 2**20 + 1  # whose sums float32 does not hold
    images, kernel = jnp.asarray(images, dtype), jnp.asarray(kernel, dtype)
    found, wanted = (_bare(f, images, kernel, 1, ((1, 1), (1, 1))) for f in (convolution.convolve, lax.conv_general_dilated))
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(found, np.complex128), np.asarray(wanted, np.complex128))


def test_steps_are_compiled_for_the_faster_library():
    """Neither library is named in a program but YNNPACK, whose name stands with sums and may not stand with convolutions."""
    images, kernel = jnp.zeros((64, 32, 32, 64)), jnp.zeros((3, 3, 64, 64))

    def step(state, images):
        return lax.conv_general_dilated(images, state, (1, 1), "SAME", dimension_numbers=convolution.NUMBERS), {}

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    compiled = sharding.jit_step(mesh, step).lower(kernel, images).compile()
    assert "convolution" in compiled.as_text() and "ynn" not in compiled.as_text()
    summed = sharding.jit_step(mesh, lambda state, images: (state, jnp.sum(images, (0, 1, 2)))).lower(kernel, images).compile()
    assert "ynn" in summed.as_text()


def test_a_compiler_without_the_option_is_not_told(monkeypatch):
    asked = compute.compiler_options.__wrapped__
    assert asked("tpu") == {}
    monkeypatch.setattr(compute, "SUMS_ALONE", {"xla_cpu_never_heard_of": ""})
    assert asked("cpu") == {}


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
    monkeypatch.setattr(convolution, "LARGE", 0)
    model = Odd() if name == "odd" else models.create(name, num_classes=4)
    variables = model.init(jax.random.key(0), batch[0], train=False)
    variables = {"batch_stats": {}, **variables}

    def gradient(apply):
        def loss(params):
            return jnp.sum(apply({**variables, "params": params}) ** 2)

        return jax.jit(jax.grad(loss)), str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))

    ours, program = gradient(lambda v: models.apply(model, v, batch[0], train=True)[0].logits)
    plain, without = gradient(lambda v: model.apply(v, batch[0], train=True, mutable=["batch_stats"])[0].logits)
    assert "cond[" in program and "cond[" not in without
    for a, b in zip(jax.tree.leaves(ours(variables["params"])), jax.tree.leaves(plain(variables["params"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5 * max(1, np.abs(b).max()))


def test_layers_are_left_as_they_were():
    layer = nn.Conv(2, (3, 3))
    before = hash(layer)
    with compute.layers():
        layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    assert layer.conv_general_dilated is None and hash(layer) == before


@pytest.mark.parametrize("groups", (1, 2))
def test_other_devices_keep_their_convolutions(groups):
    """A program for a TPU, compiled on a CPU box as pre-flight does, has JAX's own gradient in it."""
    images, layer = jnp.zeros((4, 16, 16, 2)), nn.Conv(2, (3, 3), feature_group_count=groups, use_bias=False)
    variables = layer.init(jax.random.key(0), images)

    def gradient(within):
        def loss(variables):
            with within():
                return jnp.sum(layer.apply(variables, images) ** 2)

        traced = jax.jit(jax.grad(loss)).trace(variables)
        texts = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda"))
        return [re.findall(r"stablehlo.convolution.*?dim_numbers = (.*?), window", text) for text in texts]

    ours, plain = gradient(compute.layers), gradient(contextlib.nullcontext)
    assert set(ours[0]) == ({"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"} if groups == 1 else set())
    with compute.left_to_xla():
        assert gradient(compute.layers) == plain and len(plain[1]) == 2


def test_preflight_reckons_with_convolutions():
    """What it says of a card comes from a program for the CPU."""
    images, layer = jnp.ones((64, 32, 32, 4)), nn.Conv(8, (3, 3), padding="VALID", use_bias=False)
    variables = layer.init(jax.random.key(0), images)

    def loss(variables):
        with compute.layers():
            return jnp.sum(layer.apply(variables, images) * jnp.arange(8.0))

    program = Program("kernel", jax.jit(lambda v: jax.grad(loss)(v)), (variables,), {}, 64, "", 1)
    count = 2 * 64 * 30 * 30 * 9 * 4 * 8  # of the gradient alone; the output itself is not asked for
    flops = compiler.outline(program, 1, None).flops
    assert count <= flops < 2.5 * count
    with compute.left_to_xla():
        assert "cond[" not in str(jax.make_jaxpr(jax.grad(loss))(variables))
    assert "cond[" in str(jax.make_jaxpr(jax.grad(loss))(variables))
