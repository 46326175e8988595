"""Stochastic depth and dropout in the families: what is left out, how often, and never where a network predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pwkd_jax import models, slimmable
from pwkd_jax.errors import UserError
from pwkd_jax.models.layers import drop_path, drop_rates
from pwkd_jax.training import sandwich

RESIDUAL = {"resnet8": (8, 8, 3), "wrn_10_1": (8, 8, 3), "MobileNetV2": (16, 16, 3), "vit_tiny_patch4": (8, 8, 3)}
OTHERS = {"vgg8": (16, 16, 3), "ShuffleV1": (16, 16, 3), "ShuffleV2": (16, 16, 3), "imagenet_MobileNetV1": (32, 32, 3)}
# Of every run: one network of convolutions, and one of attention.
QUICK = ("resnet8", "vit_tiny_patch4")


def test_a_branch_is_left_out_of_whole_images_and_its_mean_stays():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x):
            return drop_path(x, 0.25)

    x = np.random.default_rng(0).standard_normal((4000, 2, 3, 1)).astype(np.float32)
    out = np.asarray(Branch().apply({}, x, rngs={"dropout": jax.random.key(0)}))
    gone = (out == 0).all((1, 2, 3))
    np.testing.assert_allclose(out[~gone], x[~gone] / 0.75, rtol=1e-6)
    assert abs(gone.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    assert drop_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3]) and drop_rates(0.3, 1) == [0]


def _outputs(model, variables, shape, train, key=None):
    x = np.random.default_rng(1).standard_normal((6, *shape)).astype(np.float32)
    return models.apply(model, variables, jnp.asarray(x), train=train, key=key)[0]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in (*RESIDUAL, *OTHERS)])
def test_training_draws_and_prediction_does_not(name):
    shape = {**RESIDUAL, **OTHERS}[name]
    plain = models.create(name, num_classes=5)
    rates = {"dropout": 0.5} | ({"drop_path": 0.5} if name in RESIDUAL else {})
    model = models.create(name, num_classes=5, **rates)
    assert models.draws(model, shape) and not models.draws(plain, shape) and models.name_of(model) == models.name_of(plain)
    variables = plain.init(jax.random.key(0), jnp.zeros((1, *shape)))
    assert jax.tree.structure(variables) == jax.tree.structure(models.abstract(model, shape))
    calm = [_outputs(m, variables, shape, False) for m in (plain, model)]
    assert np.array_equal(calm[0].logits, calm[1].logits)
    one, same, other = (_outputs(model, variables, shape, True, jax.random.key(k)) for k in (1, 1, 2))
    assert np.array_equal(one.logits, same.logits) and not np.allclose(one.logits, other.logits)
    if name in OTHERS:
        # Dropout is before the classifier alone: all else is as without it.
        assert np.allclose(one.pooled, _outputs(plain, variables, shape, True).pooled)
        with pytest.raises(UserError, match=f"the model '{name}' has no 'drop_path'"):
            models.create(name, drop_path=0.1)


def test_a_residual_branch_that_is_left_out_leaves_the_shortcut():
    model, shape = models.create("wrn_16_1", drop_path=0.999999), (8, 8, 3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)))
    (_, _, gone), (_, _, whole) = (
        _outputs(m, variables, shape, True, jax.random.key(0)).stages for m in (model, models.create("wrn_16_1"))
    )
    block = variables["params"]["stage3_block2"]
    assert gone.shape == whole.shape and not np.allclose(gone, whole) and "conv1" in block
    # Of the two blocks of the last stage the second is all but certainly left out: the map is that of the first.
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, *shape)), jnp.float32)
    options = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["intermediates", "batch_stats"]}
    _, kept = model.apply(variables, x, train=True, capture_intermediates=lambda m, _: m.name == "stage3_block1", **options)
    first = kept["intermediates"]["stage3_block1"]["__call__"][0][0]
    np.testing.assert_allclose(gone, first, rtol=1e-4, atol=1e-4)  # whose batch norm Flax sums


def test_a_slimmable_teacher_drops_paths_by_its_key():
    net = slimmable.build(lambda w: models.create("resnet8", width=w, num_classes=5, drop_path=0.5), (0.5, 1.0), (8, 8, 3))
    params, statistics = net.init(jax.random.key(0), (8, 8, 3))
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((6, 8, 8, 3)).astype(np.float32), rng.integers(0, 5, 6)
    with pytest.raises(UserError, match="key: this network draws random numbers"):
        sandwich.sandwich_loss(net, params, statistics, images, labels)
    one, same, other = (
        sandwich.sandwich_loss(net, params, statistics, images, labels, key=jax.random.key(k))[0] for k in (1, 1, 2)
    )
    assert one == same and one != other
    with pytest.raises(UserError, match=r"teacher\.execution: 'mask' is not possible for a model that draws"):
        slimmable.refuse_masking(net, (8, 8, 3))
