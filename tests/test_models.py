"""Models: the reference architectures, their costs, and how a width makes channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models import costs

RESNETS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4")


@pytest.mark.parametrize("name", RESNETS)
def test_costs_and_taps_equal_the_reference(name, golden):
    facts, model = golden["facts"][name], models.create(name, num_classes=100)
    assert costs.parameters(model, (32, 32, 3)) == facts["params"]
    assert costs.macs(model, (32, 32, 3)) == facts["macs"]
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    out = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], models.abstract(model, (32, 32, 3)), images)
    taps = [(n, c, *rest) for n, *rest, c in (s.shape for s in out.stages)]
    assert [list(t) for t in taps] == facts["taps"][1:-1]
    assert [p.shape for p in out.preact] == [s.shape for s in out.stages]
    assert list(out.pooled.shape) == facts["taps"][-1]


@pytest.mark.parametrize("width, params, macs_m", [(0.25, 471_532, 67.9), (0.5, 1_867_636, 271.0), (0.75, 4_188_412, 609.4)])
def test_narrow_costs_of_resnet32x4(width, params, macs_m):
    model = models.create("resnet32x4", width=width, num_classes=100)
    assert costs.parameters(model, (32, 32, 3)) == params
    assert round(costs.macs(model, (32, 32, 3)) / 1e6, 1) == macs_m


def torch_path(name: str) -> tuple[str, tuple[str, ...]]:
    """(collection, path) here of a reference weight such as layer1.0.downsample.1.running_var."""
    *layer, leaf = name.split(".")
    if layer[0].startswith("layer"):
        block = f"stage{layer[0][5:]}_block{int(layer[1]) + 1}"
        module = {"downsample.0": "shortcut_conv", "downsample.1": "shortcut_bn"}.get(".".join(layer[2:]), layer[-1])
        path = (block, module)
    else:
        path = ({"conv1": "stem_conv", "bn1": "stem_bn", "fc": "classifier"}[layer[0]],)
    if leaf.startswith("running"):
        return "batch_stats", (*path, leaf.removeprefix("running_"))
    kernel = "conv" in path[-1] or path[-1] == "classifier"
    return "params", (*path, {"weight": "kernel" if kernel else "scale", "bias": "bias"}[leaf])


@pytest.mark.parametrize("name", ["resnet8x4", "resnet20"])
def test_forward_equals_the_reference_network(name, golden):
    facts, model = golden["models"][name], models.create(name, num_classes=100)
    variables = jax.tree.map(lambda s: None, models.abstract(model, (32, 32, 3)), is_leaf=lambda x: hasattr(x, "shape"))
    for k, (key, shape) in enumerate(e for e in facts["state_layout"] if "num_batches" not in e[0]):
        a = np.random.RandomState(k).standard_normal(shape)
        if key.endswith("running_mean"):
            a = 0.1 * a
        elif key.endswith("running_var"):
            a = 1 + 0.1 * np.abs(a)
        elif len(shape) >= 2:
            a = a * np.sqrt(2 / np.prod(shape[1:]))
        else:
            a = 1 + 0.1 * a if key.endswith("weight") else 0.1 * a
        collection, path = torch_path(key)
        node = variables[collection]
        for part in path[:-1]:
            node = node[part]
        order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[len(shape)]
        node[path[-1]] = jnp.asarray(a.transpose(order), jnp.float32)
    image = np.random.RandomState(1234).standard_normal((1, 3, 32, 32)).astype(np.float32).transpose(0, 2, 3, 1)
    out, _ = models.apply(model, variables, image, train=False)
    np.testing.assert_allclose(out.logits[0, :8], facts["logits_first8"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(out.logits), facts["logits_l2"], rtol=1e-3)
    for taps, ours in ((facts["taps"], out.stages), (facts["preact_taps"], out.preact)):
        for expected, tap in zip(taps[1:], (*ours, out.pooled), strict=True):
            found = [np.mean(tap), np.std(tap), np.abs(tap).max()]
            np.testing.assert_allclose(found, [expected[k] for k in ("mean", "std", "absmax")], rtol=1e-3)


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
    for name in ("resnet9", "resnet7", "vgg", ""):
        with pytest.raises(UserError, match="there is no model"):
            models.create(name)
    with pytest.raises(UserError, match="cannot be imported"):
        models.create("pwkd_jax.models:Nothing")
    with pytest.raises(UserError, match="has no 'zero_gamma'"):
        models.create("test_slimmable:Depthwise", zero_gamma=True)


def test_zero_gamma_makes_every_block_the_identity_branch():
    model = models.create("resnet8", zero_gamma=True)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    assert all(not np.any(variables["params"][f"stage{s}_block1"]["bn2"]["scale"]) for s in (1, 2, 3))
