"""FCFD, ScaleKD, CRLD, ABKD and WKD-F's full covariance where official code has no number to give: facts, staging, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
import scipy.linalg
from conftest import close, made_up, network
from scipy.special import log_softmax, softmax
from test_distiller_grid import SHAPE, Net, setup
from test_distillers import BATCH

from pwkd_jax import distillers, models, stages
from pwkd_jax.data import policies, views
from pwkd_jax.distillers import abkd, crld, fcfd, scalekd, wkd
from pwkd_jax.errors import UserError
from pwkd_jax.models import again
from pwkd_jax.training import metrics, student

IMAGES = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
PAST = distillers.Progress(np.int32(0), np.int32(1000), np.float32(100))


def pair(own: str = "resnet8", taught: str = "resnet14"):
    made = []
    for name, train in ((own, True), (taught, False)):
        model = models.create(name, num_classes=5)
        variables = made_up(model, IMAGES.shape[1:], seed=len(made))
        made.append(again.attach(models.forward(model, variables, IMAGES, train=train)[0], model, variables, train))
    return made


def cells(x, grid):
    side = x.shape[1] // grid
    return [x[i * side : (i + 1) * side, j * side : (j + 1) * side].reshape(-1, x.shape[-1])
            for i, j in itertools.product(range(grid), repeat=2)]  # fmt: skip


@pytest.mark.parametrize("grid, channels", [(1, 5), (2, 3), (2, 9)])  # more pixels than channels, and fewer
def test_full_covariances_are_as_far_apart_as_their_matrices(grid, channels):
    """|m - n|^2 and tr(S + T - 2 (S^1/2 T S^1/2)^1/2) by SciPy's roots of matrices, image by image and cell by cell."""
    s, t = np.random.default_rng(0).standard_normal((2, 2, 4, 4, channels)) * np.linspace(1, 2, channels)
    expected = np.zeros(2)
    for a, b in ((a, b) for x, y in zip(s, t, strict=True) for a, b in zip(cells(x, grid), cells(y, grid), strict=True)):
        one, other = (np.cov(x.T) + 1e-13 * np.eye(channels) for x in (a, b))
        root = scipy.linalg.sqrtm(one)
        cross = np.trace(scipy.linalg.sqrtm(root @ other @ root)).real
        expected += [np.sum((a.mean(0) - b.mean(0)) ** 2), np.trace(one + other) - 2 * cross]
    with jax.enable_x64(True):
        found = wkd.full_losses(s, t, grid)
        np.testing.assert_allclose(found, expected / (2 * grid**2), rtol=1e-4)
        slope, way = jax.grad(lambda x: wkd.full_losses(x, t, grid)[1])(s), np.random.default_rng(1).standard_normal(s.shape)
        step = [float(wkd.full_losses(s + h * way, t, grid)[1]) for h in (1e-6, -1e-6)]
        np.testing.assert_allclose(np.sum(slope * way), (step[0] - step[1]) / 2e-6, rtol=1e-6)
        # What is the same is at no distance.
        np.testing.assert_allclose(wkd.full_losses(t, t, grid), 0, atol=1e-12)


def test_full_covariance_is_finite_at_the_extremes():
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((2, 2, 3, 3, 4)).astype(np.float32)
    run = jax.jit(jax.value_and_grad(lambda s, t: sum(wkd.full_losses(s, t, 1))))
    for change in (np.zeros_like, lambda x: x[:1] + 0 * x, lambda x: 1e4 * x, lambda x: x[:, :1] + 0 * x):
        for taught in (t, change(t), change(x)):
            value, grad = run(change(x), taught)
            assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("count, paths", [(4, 2), (6, 2), (4, 0), (2, 5)])
def test_mixed_networks_are_drawn_evenly_and_never_twice(count, paths):
    drawn = np.stack([fcfd.drawn_paths(key, count, paths) for key in jax.random.split(jax.random.key(0), 200)])
    assert np.all(drawn.sum(1) == min(paths, count))
    np.testing.assert_allclose(drawn.mean(0), min(paths, count) / count, atol=0.12)


def test_fcfd_without_paths_is_kd_and_a_bridge():
    """And its every part is the sum that its formula says, of networks that are run here."""
    student, teacher = pair()
    module = distillers.create("fcfd", paths=0, feature_weight=3.0)
    variables = module.init({"params": jax.random.key(0), "distiller": jax.random.key(0)}, student, teacher, BATCH, PAST)
    half = PAST._replace(epoch=np.float32(10))
    (loss, found), _ = module.apply(variables, student, teacher, BATCH, half, rngs={"distiller": jax.random.key(0)},
                                      mutable=["batch_stats"])  # fmt: skip
    assert found["mixed"] == 0
    close(loss, found["logits"] + 0.5 * 3.0 * found["features"], 1e-6)
    expected = 0.0
    for i, (s, t) in enumerate(zip(fcfd.maps(student), fcfd.maps(teacher), strict=True), start=1):
        bridge = fcfd.Bridge(t.shape[-1], t.shape[1:3], False)
        own = {k: variables[k][f"to_teacher{i}"] for k in ("params", "batch_stats")}
        x = np.asarray(bridge.apply(own, s, mutable=["batch_stats"])[0])
        expected += np.mean((x - t) ** 2)
    pooled = [np.maximum(y, 0).mean((1, 2)) for y in (x, np.asarray(t))]
    close(found["features"], jnp.float32(expected + np.mean((pooled[0] - pooled[1]) ** 2)), 1e-5)


def test_the_lowest_frequency_is_the_mean():
    x = np.random.default_rng(0).standard_normal((2, 6, 4, 3))
    cosines = scipy.fft.dctn(x, axes=(1, 2))
    cosines[:, 0, 0] = 0
    with jax.enable_x64(True):
        np.testing.assert_allclose(scalekd.without_mean(x), scipy.fft.idctn(cosines, axes=(1, 2)), atol=1e-12)


def test_heads_divide_the_channels():
    for features in (1, 16, 63, 64, 128, 192, 464, 512, 768, 997):
        count = scalekd.heads(features, 64)
        assert features % count == 0 and (count == 1 or features // count >= 64)
    assert [scalekd.heads(n, 64) for n in (64, 128, 192, 256, 768)] == [1, 2, 3, 4, 12]


def test_crld_is_its_formula_and_counts_the_sure_alone():
    weak, strong, t_weak, t_strong = np.random.default_rng(0).standard_normal((4, 16, 5)) * 2
    expected = np.zeros(2)
    for a, b, p, q in zip(weak, strong, t_weak, t_strong, strict=True):
        off = lambda s, t: np.sum(softmax(t / 3) * (log_softmax(t / 3) - log_softmax(s / 3))) * 9  # noqa: E731
        expected += [(off(a, p) + off(b, q)) * (softmax(p).max() >= 0.6), (off(b, p) + off(a, q)) * (softmax(q).max() >= 0.5)]
    with jax.enable_x64(True):
        found = crld.crld_losses(weak, strong, t_weak, t_strong, 3.0, 0.6, 0.5)
        np.testing.assert_allclose(found, expected / 16, rtol=1e-12)
        assert crld.crld_losses(weak, strong, t_weak, t_strong, 3.0, 1.1, 1.1) == (0, 0)


def test_a_strong_view_is_within_its_ranges_and_each_image_of_its_own():
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 12, 3)).astype(np.uint8)
    one, other = (np.asarray(views.strong(jax.random.key(k), images)) for k in (0, 1))
    assert one.dtype == np.uint8 and one.shape == images.shape and np.any(one != other)
    np.testing.assert_array_equal(views.strong(jax.random.key(0), images[:7]), one[:7])
    made = jax.vmap(views.box, (0, None))(jax.random.split(jax.random.key(0), 1000), 0 * images[0])
    boxes = np.all(np.asarray(made) == np.array(views.GREY), axis=-1)
    for found in boxes:
        rows, columns = np.nonzero(found)
        tall, broad = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert found.sum() == tall * broad and max(tall, broad) <= views.MOST * 12 + 1
    assert not np.any(np.all(boxes, axis=0)) and np.all(np.any(boxes, axis=0))
    grey = np.asarray(views.strong(jax.random.key(0), images[..., :1]))
    assert grey.shape == (64, 16, 12, 1)
    assert views.RANGES.keys() < {*policies.OPERATIONS}
    with pytest.raises(UserError, match="changes uint8 images, and these are float32"):
        views.strong(jax.random.key(0), images.astype(np.float32))


@pytest.mark.parametrize("name, own", [("fcfd", "resnet8"), ("scalekd", "resnet8"), ("crld", "resnet8")])
def test_each_width_of_a_teacher_runs_by_its_own_later_stages(name, own):
    """A gradient reaches the student, none the teacher; and what a narrow one says differs from what the whole one says."""
    net = network(make=lambda w: models.create("resnet8", width=w, num_classes=5), widths=(0.5, 1.0))
    params, statistics = net.init(jax.random.key(0), (8, 8, 3))
    student = pair(own)[0]
    method = distillers.create(name, **({"paths": 4} if name == "fcfd" else {}))
    fitted = distillers.fit(method, student.again.model, net.members, (8, 8, 3), batch_size=4, images=40)
    trained, state = fitted.init(jax.random.key(1))
    batch, values = {"label": np.arange(4) % 5, "strong": IMAGES[::-1]}, []
    for width in (0.5, 1.0):
        variables = net.extract(params, statistics, width)
        taught = models.apply(net.members[width], variables, IMAGES, train=False)[0]
        taught = again.attach(taught, net.members[width], variables, train=False)

        def loss(s, t, width=width):
            return fitted(trained, state, width, s, t, batch, PAST, jax.random.key(2))[0]

        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(student, taught)
        values.append(float(value))
        assert np.any(grads[0].again.variables["params"]["stage3_block1"]["conv1"]["kernel"]) == (name != "scalekd")
        assert np.any(grads[0].logits) and not any(map(np.any, jax.tree.leaves(grads[1])))
    assert np.all(np.isfinite(values)) and values[0] != values[1]


def stepped(name: str, view=None, **options):
    """(state before, after, metrics) of one step of `Net`s, its images as they are."""
    batch, taught = setup()
    model, schedule, tx = Net(width=0.5), lambda step: 0.1, optax.sgd(1.0)
    members, plan = {1.0: Net()}, [stages.Stage("slimmable", (1.0,), 0, 8)]
    distillation = distillers.fit(distillers.create(name), model, members, SHAPE, batch_size=len(batch["label"]))
    step = student.make_step(
        model, members, (1.0,), distillation, plan, tx, schedule, lambda key, x: x, images=40,
        strong=view or (lambda key, x: x), **options,
    )  # fmt: skip
    before = student.init(model, SHAPE, distillation, tx, 3)
    after, values = jax.jit(step)(before, batch, teacher={1.0: taught[1.0].again.variables})
    return before, after, metrics.mean([values])


@pytest.mark.parametrize("name", ["fcfd", "crld"])
def test_what_runs_again_leaves_no_statistics(name):
    own, plain = (stepped(method)[1].collections["batch_stats"] for method in (name, "kd"))
    close(own, plain, 1e-6)


def test_a_view_like_the_first_one_is_told_the_same():
    """Where parts of the student are fixed too, whose batch norm then goes by its own statistics in both."""
    for fixed in ((), ("Conv_1", "BatchNorm_1")):
        values = stepped("crld", fixed=fixed)[2]
        assert values["strong_cross_entropy"] == pytest.approx(values["cross_entropy"], rel=1e-5)
    values = stepped("crld", lambda key, x: x[:, ::-1] + jax.random.normal(key, x.shape))[2]
    assert values["strong_cross_entropy"] != pytest.approx(values["cross_entropy"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcfd", "scalekd", "crld"])
def test_half_a_batch_at_a_time(name):
    before, after, values = stepped(name, accumulate=2)
    assert all(map(np.isfinite, values.values()))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.params["student"], after.params["student"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("alpha, beta", [(0.8, 0.3), (0.5, 0.5), (1.0, 1e-6)])
def test_the_alpha_beta_divergence_is_its_formula_and_its_limits(alpha, beta):
    s, t = np.random.default_rng(0).standard_normal((2, 6, 5)) * 3
    p, q = (softmax(z / 2, axis=-1) for z in (t, s))
    both = p**alpha * q**beta - (alpha * p ** (alpha + beta) + beta * q ** (alpha + beta)) / (alpha + beta)
    with jax.enable_x64(True):
        found = float(abkd.ab_divergence(s, t, alpha, beta, 2.0))
        assert abkd.ab_divergence(t, t, alpha, beta, 2.0) == pytest.approx(0, abs=1e-9)
    assert found == pytest.approx(-np.sum(both) / (6 * alpha * beta), rel=1e-8)
    if alpha == beta:
        assert found == pytest.approx(2 * np.mean(np.sum((p**0.5 - q**0.5) ** 2, axis=-1)))
    if beta < 1e-3:
        assert found == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=-1)), rel=1e-4)


def test_what_they_cannot_do_is_refused():
    for name, options, said in (
        ("fcfd", {"paths": -1}, "paths: -1 is not possible; it should be 0 or more"),
        ("fcfd", {"temperature": 0.0}, "temperature: 0 is not possible"),
        ("scalekd", {"head_features": 0}, "head_features: 0 is not possible"),
        ("abkd", {"beta": 0.0}, "beta: 0 is not possible"),
        ("crld", {"temperature": -1.0}, "temperature: -1 is not possible"),
        ("wkd_f", {"covariance": "some"}, "covariance: 'some' is not possible; it should be diagonal or full"),
    ):
        with pytest.raises(UserError, match=said):
            distillers.create(name, **options)
    student, teacher = pair()
    for name, left, said in (
        ("crld", {}, r"CRLD reads batch\['strong'\], which this one lacks"),
        ("scalekd", {"stages": ()}, "ScaleKD needs 'stages'"),
        ("crld", {"again": None}, "CRLD runs the teacher once more, and was given its outputs alone"),
    ):
        with pytest.raises(UserError, match=said):
            distillers.create(name).init({"params": jax.random.key(0), "distiller": jax.random.key(0)}, student,
                                         teacher._replace(**left), BATCH, PAST)  # fmt: skip
