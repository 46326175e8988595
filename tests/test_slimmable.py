"""The leading block: sliced equals masked equals standalone, in every family, and batch norm per width."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_SHAPE, WIDTHS, close, family, network, perturbed
from flax import nnx
from flax.nnx import bridge

from pwkd_jax import models, slimmable
from pwkd_jax.errors import UserError
from pwkd_jax.slimmable import embed, mask, put, take
from pwkd_jax.training import calibration, sandwich


class Depthwise(nn.Module):
    """A separable network of one's own: a depthwise convolution and a bare logits return."""

    width: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        c = models.channels(16, self.width)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(c, (3, 3))(x)))
        x = nn.Conv(c, (3, 3), feature_group_count=c, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Grouped(Depthwise):
    """Two groups: the leading block of a grouped kernel is not the leading channels of each group."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(models.channels(16, self.width), (3, 3))(x)
        x = nn.Conv(models.channels(16, self.width), (3, 3), feature_group_count=2)(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Concat(Depthwise):
    """A dense block: its concatenation interleaves two leading blocks."""

    @nn.compact
    def __call__(self, x, train=False):
        c = models.channels(8, self.width)
        a = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(c, (3, 3))(x)))
        b = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(c, (3, 3))(a)))
        return nn.Dense(self.num_classes)(jnp.concatenate([a, b], -1).mean((1, 2)))


class LayerNormed(Depthwise):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.LayerNorm()(nn.Conv(models.channels(16, self.width), (3, 3))(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


@pytest.fixture(scope="module", params=slimmable.BATCH_NORMS)
def pair(request):
    """(sliced, masked, params, statistics) of one network, with every leaf away from its initial value."""
    sliced, masked = (network(batch_norm=request.param, execution=e) for e in ("take", "mask"))
    params, statistics = sliced.init(jax.random.key(0), IMAGE_SHAPE)
    return sliced, masked, perturbed(params), perturbed(statistics, 1)


def test_take_mask_embed_and_put_on_arrays():
    full = {"a": jnp.arange(12.0).reshape(3, 4)}
    like = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    block = np.arange(12.0).reshape(3, 4)[:2, :3]
    np.testing.assert_array_equal(take(full, like)["a"], block)
    np.testing.assert_array_equal(mask(full, like)["a"], np.pad(block, ((0, 1), (0, 1))))
    np.testing.assert_array_equal(embed(take(full, like), full, fill=1.0)["a"][2], np.ones(4))
    np.testing.assert_array_equal(put(full, {"a": -block})["a"][:2, :3], -block)
    assert put(full, {"a": -block})["a"][2, 3] == 11


@pytest.mark.parametrize("width", [0.25, *(pytest.param(w, marks=pytest.mark.slow) for w in WIDTHS[1:])])
@pytest.mark.parametrize("train", [True, False])
def test_sliced_equals_masked_equals_standalone(pair, batch, width, train):
    sliced, masked, params, statistics = pair
    images, labels = batch
    narrow = family(width)

    def loss_of(forward):
        def loss(params):
            out, stats = forward(params)
            return slimmable.cross_entropy(out.logits, labels).mean(), (out.logits, stats)

        (value, (logits, stats)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return value, logits, stats, grads

    a = loss_of(lambda p: sliced.forward(p, statistics, width, images, train=train))
    b = loss_of(lambda p: masked.forward(p, statistics, width, images, train=train))
    close(a, b, 2e-6)

    # A narrow model that knows nothing of the full one, with the extracted variables: exactly the same numbers.
    variables = sliced.extract(params, statistics, width)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, models.abstract(narrow, IMAGE_SHAPE))

    def narrow_loss(p):
        out, stats = models.apply(narrow, {**variables, "params": p}, images, train=train)
        return slimmable.cross_entropy(out.logits, labels).mean(), (out.logits, stats)

    grads, (logits, stats) = jax.jit(jax.grad(narrow_loss, has_aux=True))(variables["params"])
    close(a[1], logits, 2e-6)
    if train:
        kept = sliced.extract(params, a[2], width)["batch_stats"]
        close(kept, stats, 2e-6)

    # Its gradient is the leading block of the full one, and everything else of the full one is zero.
    close(sliced.extract(a[3], statistics, width)["params"], grads, 2e-6)
    total = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(a[3]))
    inside = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(grads))
    np.testing.assert_allclose(total, inside, rtol=1e-5)


def test_full_width_is_the_plain_model_exactly(batch):
    net = network()
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    plain = family(1.0)
    variables = plain.init(jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)), train=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(variables), net.extract(params, statistics, 1.0)))
    expected = jax.jit(lambda v: models.apply(plain, v, batch[0], train=True)[0].logits)(variables)
    found = jax.jit(lambda p, s: net.forward(p, s, 1.0, batch[0], train=True)[0].logits)(params, statistics)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("width", [0.25, *(pytest.param(w, marks=pytest.mark.slow) for w in WIDTHS[1:])])
@pytest.mark.parametrize("module", [Depthwise, Concat])
def test_other_families_slice_to_the_narrow_member(module, width, batch):
    net = network(make=lambda w: module(width=w))
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    params = perturbed(params)
    variables = net.extract(params, statistics, width)
    for train in (True, False):
        found = jax.jit(lambda p, t=train: net.forward(p, statistics, width, batch[0], train=t)[0].logits)(params)
        alone = jax.jit(lambda v, t=train: models.apply(module(width=width), v, batch[0], train=t)[0].logits)(variables)
        close(found, alone, 2e-6)
    grads = jax.jit(jax.grad(lambda p: net.forward(p, statistics, width, batch[0], train=True)[0].logits.std()))(params)
    assert any(np.any(g) for g in jax.tree.leaves(net.extract(grads, statistics, width)["params"]))


class NNXNet(nnx.Module):
    """A network in Flax's other API, brought in through its bridge."""

    def __init__(self, width: float, num_classes: int, rngs: nnx.Rngs):
        c = models.channels(16, width)
        self.conv = nnx.Conv(3, c, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(c, rngs=rngs)
        self.head = nnx.Linear(c, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.head(x.mean((1, 2)))


def from_nnx(width=1.0, num_classes=10):
    return bridge.to_linen(NNXNet, width=width, num_classes=num_classes)


def test_an_nnx_model_is_slimmable_through_the_bridge(batch):
    sliced, masked = (
        network(make=lambda w: models.create("test_slimmable:from_nnx", width=w), batch_norm="shared", execution=e)
        for e in ("take", "mask")
    )
    params, statistics = sliced.init(jax.random.key(0), IMAGE_SHAPE)
    params = perturbed(params)
    for net in (sliced, masked):
        logits = jax.jit(lambda p, n=net: n.forward(p, statistics, 0.5, batch[0], train=True)[0].logits)(params)
        z = nn.Conv(8, (3, 3)).apply({"params": sliced.extract(params, statistics, 0.5)["params"]["conv"]}, batch[0])
        scale, bias = (params["shared"]["norm"][k][:8] for k in ("scale", "bias"))
        x = nn.relu((z - z.mean((0, 1, 2))) / jnp.sqrt(z.var((0, 1, 2)) + 1e-5) * scale + bias).mean((1, 2))
        close(logits, x @ params["shared"]["head"]["kernel"][:8] + params["shared"]["head"]["bias"], 1e-5)
    stats = calibration.batch_statistics(sliced.members[0.5], sliced.extract(params, statistics, 0.5), batch[0])
    close(stats["norm"], {"mean": z.mean((0, 1, 2)), "var": z.var((0, 1, 2))}, 1e-5)


def test_masking_is_refused_where_it_is_not_slicing():
    network(make=lambda w: Depthwise(width=w), execution="mask")
    for module in (Grouped, LayerNormed, Concat):
        with pytest.raises(UserError, match=r"teacher.execution: 'mask' at width 0.25 is off .*use 'take'"):
            network(make=lambda w, module=module: module(width=w), execution="mask")


def test_a_family_that_does_not_nest_is_refused():
    class Deeper(nn.Module):
        width: float = 1.0

        @nn.compact
        def __call__(self, x, train=False):
            x = x.mean((1, 2))
            for _ in range(2 if self.width < 1 else 1):
                x = nn.Dense(10)(x)
            return x

    with pytest.raises(UserError, match=r"at width 0.5 '.*Dense_1.*' is not a leading block"):
        network(make=lambda w: Deeper(width=w), widths=(0.5, 1.0))
    with pytest.raises(UserError, match=r"teacher.widths: width 0.3 makes 4.8 of 16 channels.*teacher.divisor"):
        network(widths=(0.3, 1.0))


def trained_on(net, params, statistics, width, batch):
    """The statistics after one training pass at `width`."""
    return jax.jit(lambda p, s: net.forward(p, s, width, batch[0], train=True)[1])(params, statistics)


def test_switchable_norm_keeps_widths_apart(batch):
    net = network()
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    after = trained_on(net, params, statistics, 0.5, batch)
    for key in statistics:
        changed = not jax.tree.all(jax.tree.map(np.array_equal, after[key], statistics[key]))
        assert changed == (key == "0.5"), key
    grads = jax.jit(jax.grad(lambda p: net.forward(p, statistics, 0.5, batch[0], train=True)[0].logits.std()))(params)
    moved = {key for key, g in grads["batch_norm"].items() if any(np.any(x) for x in jax.tree.leaves(g))}
    assert moved == {"0.5"}


def test_widths_that_round_to_the_same_channels_still_own_their_norm():
    net = network(make=lambda w: models.create("resnet8", width=w, divisor=16), widths=(0.25, 0.5, 1.0))
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    assert set(params["batch_norm"]) == set(statistics) == {"0.25", "0.5", "1"}


def test_shared_norm_is_one_set_for_all(batch):
    net = network(batch_norm="shared")
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    assert set(statistics) == {"shared"} and not params["batch_norm"]
    after = trained_on(net, params, statistics, 0.5, batch)
    mean = after["shared"]["stem_bn"]["mean"]
    assert np.all(mean[:8] != 0) and np.all(mean[8:] == 0)


# The sandwich rule.


def losses(net, params, statistics, batch, **options):
    def loss(params):
        return sandwich.sandwich_loss(net, params, statistics, *batch, **options)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def single(net, statistics, batch, width):
    """(params, target) -> ((loss, logits), gradient) of one width by itself: cross entropy against a constant target."""

    def loss(params, target):
        logits = net.forward(params, statistics, width, batch[0], train=True)[0].logits
        return -(target * jax.nn.log_softmax(logits)).sum(-1).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def added(*parts):
    """Losses and gradients of `single`, added up."""
    return jax.tree.map(lambda *x: sum(x), *((value, grads) for (value, _), grads in parts))


@pytest.fixture(scope="module")
def trio(batch):
    """(network of three widths, params, statistics, each width by itself), compiled once."""
    net = network(widths=(0.25, 0.5, 1.0))
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    return net, perturbed(params), statistics, {w: single(net, statistics, batch, w) for w in net.widths}


@pytest.mark.parametrize("loss", ["hard", "inplace", "inplace_mix"])
def test_joint_loss_and_gradient_are_the_sums_over_widths(loss, trio, batch):
    net, params, statistics, alone = trio
    labels = np.eye(10, dtype=np.float32)[batch[1]]
    parts = [alone[1.0](params, labels)]
    # The target is a number here: if it carried gradient in the joint loss, the sums would differ.
    target = np.asarray(jax.nn.softmax(parts[0][0][1]))
    for width in (0.5, 0.25):
        if loss != "inplace":
            parts.append(alone[width](params, labels))
        if loss != "hard":
            parts.append(alone[width](params, target))
    value, grads = added(*parts)
    (found, (stats, metrics)), found_grads = losses(net, params, statistics, batch, loss=loss)
    close(found, value, 3e-6)
    close(found_grads, grads, 3e-6)
    if loss == "inplace_mix":
        (mean, _), mean_grads = losses(net, params, statistics, batch, loss=loss, reduction="mean")
        close(mean, value / 3, 3e-6)
        close(mean_grads, jax.tree.map(lambda g: g / 3, grads), 3e-6)
    assert set(stats) == set(statistics) and metrics["train_loss_0.5"].shape == (16,)


def test_masked_and_sliced_sandwich_steps_agree(batch):
    sliced, masked = (network(make=Depthwise, widths=(0.25, 0.5, 1.0), execution=e) for e in ("take", "mask"))
    params, statistics = sliced.init(jax.random.key(0), IMAGE_SHAPE)
    for options in ({"loss": "inplace_mix"}, {"sampling": "sandwich", "subnetworks": 3, "key": jax.random.key(4)}):
        a = losses(sliced, params, statistics, batch, **options)
        close(a, losses(masked, params, statistics, batch, **options), 3e-6)


def test_sandwich_takes_both_ends_and_what_was_drawn(batch):
    net = network(make=Depthwise, widths=(0.25, 0.5, 1.0), batch_norm="shared", pool=(0.375, 0.625))
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    key = jax.random.key(7)
    drawn = [net.widths[1:-1][int(i)] for i in sandwich.draws(net, 4, key)]
    assert len(drawn) == 2 and len(set(drawn)) == 2 and set(drawn) < {0.625, 0.5, 0.375}
    (value, _), grads = losses(net, params, statistics, batch, sampling="sandwich", key=key)
    labels = np.eye(10, dtype=np.float32)[batch[1]]
    close((value, grads), added(*(single(net, statistics, batch, w)(params, labels) for w in (1.0, 0.25, *drawn))), 3e-6)
    seen = {tuple(int(i) for i in sandwich.draws(net, 4, jax.random.key(k))) for k in range(40)}
    assert {i for pair in seen for i in pair} == {0, 1, 2}


def test_drawn_widths_without_private_statistics_update_nothing(batch):
    net = network(widths=(0.25, 1.0), batch_norm="private_stats", pool=(0.5,))
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    assert set(statistics) == {"0.25", "1"}
    after = trained_on(net, params, statistics, 0.5, batch)
    assert jax.tree.all(jax.tree.map(np.array_equal, after, statistics))


# Calibration.


def test_calibration_is_the_mean_of_batch_statistics_in_any_order():
    net = network(batch_norm="shared")
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    params = perturbed(params)
    variables = net.extract(params, statistics, 0.5)
    images = np.random.default_rng(3).standard_normal((4, 16, *IMAGE_SHAPE)).astype(np.float32)

    statistics_of = jax.jit(lambda v, x: calibration.batch_statistics(net.members[0.5], v, x))

    def run(order):
        return calibration.calibrate(lambda i: statistics_of(variables, images[order[i]]), len(order))

    found = run([0, 1, 2, 3])
    close(found, run([2, 0, 3, 1]), 1e-7)
    # The stem by hand in float64: its statistics depend on its kernel and the images only.
    kernel = np.asarray(variables["params"]["stem_conv"]["kernel"], np.float64)
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    z = sum(
        np.einsum("nbhwc,cd->nbhwd", padded[:, :, i : i + 8, j : j + 8], kernel[i, j]) for i in range(3) for j in range(3)
    )
    np.testing.assert_allclose(found["stem_bn"]["mean"], z.mean((1, 2, 3)).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["stem_bn"]["var"], z.var((1, 2, 3)).mean(0), rtol=1e-5)


def test_calibration_rescues_shared_norm(batch):
    """What eval sees after calibration is close to what training saw; with one shared running average it is not."""
    net = network(widths=(0.25, 1.0), batch_norm="shared")
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    params = perturbed(params)

    def pass_over_all(statistics):
        for width in net.widths:
            statistics = net.forward(params, statistics, width, batch[0], train=True)[1]
        return statistics

    pass_over_all = jax.jit(pass_over_all)
    for _ in range(40):
        statistics = pass_over_all(statistics)
    variables, narrow = net.extract(params, statistics, 0.25), net.members[0.25]
    wanted = jax.jit(lambda v: models.apply(narrow, v, batch[0], train=True)[0].logits)(variables)
    evaluate = jax.jit(lambda v: models.apply(narrow, v, batch[0], train=False)[0].logits)
    stats = jax.jit(lambda v: calibration.batch_statistics(narrow, v, batch[0]))(variables)
    calibrated, shared = evaluate({**variables, "batch_stats": stats}), evaluate(variables)
    close(calibrated, wanted, 1e-4)
    assert np.abs(shared - wanted).max() > 100 * np.abs(calibrated - wanted).max()
