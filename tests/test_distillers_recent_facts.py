"""Distillers of 2023 and 2024 where their authors' code has no number to give: limits, identities, extremes and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import close, network_outputs
from scipy.optimize import linprog
from scipy.special import softmax
from test_distillers import BATCH
from test_distillers_recent import FIVE, LABELS, PAST, of_dkd, of_kd

from pwkd_jax import distillers
from pwkd_jax.distillers import diffkd, norm, sdd, vkd, wkd
from pwkd_jax.errors import UserError
from pwkd_jax.models import Outputs

IMAGES = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)


def test_transport_is_about_the_cheapest():
    """Long enough at the authors' regularisation: a little above the cost of linear programming's best plan."""
    rng = np.random.default_rng(0)
    s, t = softmax(rng.standard_normal((2, 3, 8)), axis=-1)
    kernel = rng.standard_normal((5, 8))
    sums = np.concatenate([np.kron(np.eye(8), np.ones(8)), np.kron(np.ones(8), np.eye(8))])
    with jax.enable_x64(True):
        costs = np.asarray(wkd.category_costs(kernel, 1.0))
        best = [linprog(costs.ravel(), A_eq=sums, b_eq=np.concatenate([a, b])).fun for a, b in zip(s, t, strict=True)]
        every = np.ones_like(s, bool)
        found = np.asarray(wkd.transport_cost(s, t, every, costs, 0.05, 1000))
        assert np.all((found > best) & (found < 1.03 * np.asarray(best))), (found, best)
        assert np.all(wkd.transport_cost(t, t, every, costs, 0.05, 1000) < 0.02 * min(best))


def test_the_label_does_not_move(golden_logits):
    """Sinkhorn over the other classes alone, row by row in NumPy, with the label's row and column cut out."""
    s, t = (golden_logits[k].astype(np.float64)[:, :12] * 2 for k in ("logits_s", "logits_t"))
    labels, kernel = LABELS % 12, np.random.default_rng(0).standard_normal((5, 12))
    u = kernel / np.linalg.norm(kernel, axis=0)
    costs = 1 - np.exp(-0.7 * (1 - u.T @ u)) + 1e-8
    total = 0.0
    for a, b, y in zip(s, t, labels, strict=True):
        a, b = (softmax(np.delete(x, y) / 3) for x in (a, b))
        c = np.delete(np.delete(costs, y, 0), y, 1)
        k, row = np.exp(-c / 0.1), np.full(11, 1 / 11)
        for _ in range(4):
            column = b / (k.T @ row + 1e-8)
            row = a / (k @ column + 1e-8)
        total += np.sum(row[:, None] * k * column * c) / len(s)
    with jax.enable_x64(True):
        made = wkd.category_costs(jnp.asarray(kernel), 0.7)
        np.testing.assert_allclose(made, costs, atol=1e-12)
        found = wkd.wkd_logit_losses(s, t, labels, made, 3.0, 0.1, 4)[1]
    np.testing.assert_allclose(found, total, rtol=1e-9)


def test_gaussian_distance_is_that_of_diagonal_covariances():
    """|m - n|^2 + trace(S + T - 2 (S^1/2 T S^1/2)^1/2) of the pixels' diagonal covariances; one map, one cell."""
    s, t = np.random.default_rng(0).standard_normal((2, 1, 3, 5, 4)) * [1, 2, 0.5, 3]
    flat = [x.reshape(-1, 4) for x in (s, t)]
    means, (a, b) = [x.mean(0) for x in flat], [np.diag(np.diag(np.cov(x.T))) for x in flat]
    root = scipy.linalg.sqrtm(a)
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(a + b - 2 * scipy.linalg.sqrtm(root @ b @ root))
    with jax.enable_x64(True):
        np.testing.assert_allclose(sum(wkd.gaussian_losses(s, t, 1, eps=0.0)), expected, rtol=1e-12)


def test_the_fade_is_half_a_cosine():
    epochs = jnp.array([0.0, 150.0, 172.5, 195.0, 240.0, 500.0])
    expected = [1, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0, 0]
    np.testing.assert_allclose(wkd.fade(epochs, 150.0, 240.0), expected, atol=1e-6)


@pytest.mark.parametrize("students", [8, 24])
def test_the_projection_is_orthogonal_at_every_width(students):
    free = np.random.default_rng(0).standard_normal((students, 32)).astype(np.float32) * students**-0.5
    for width in (4, 8, 16, 24, 32):
        p = np.asarray(vkd.orthogonal(free[:, :width]), np.float64)
        product = p @ p.T if students <= width else p.T @ p
        np.testing.assert_allclose(product, np.eye(min(students, width)), atol=2e-6)
        # Far from the identity, where it would copy the student's channels to the teacher's first ones.
        assert np.abs(np.diagonal(p)).mean() < 0.9
    with jax.enable_x64(True):
        tall = np.tril(free.T.astype(np.float64)) if students <= 32 else None
        skew = np.zeros((32, 32))
        skew[:, :students] = tall
        np.testing.assert_allclose(vkd.orthogonal(free.astype(np.float64)).T, scipy.linalg.expm(skew - skew.T)[:, :students])


def test_regions_weigh_where_the_teacher_is_of_two_minds():
    logits = np.zeros((3, 4, 2), np.float32)
    # Region by region, which of 4 images the teacher gets right; all labels are 1.
    logits[:, :, 1] = [[1, 1, -1, -1], [1, -1, 1, -1], [-1, -1, -1, -1]]
    expected = [[1, 1, 1, 1], [1, 3, 3, 1], [3, 3, 1, 1]]
    np.testing.assert_array_equal(sdd.region_weights(logits, np.ones(4, int), 3.0), expected)
    maps = np.random.default_rng(0).standard_normal((2, 6, 6, 3))
    head = (np.random.default_rng(1).standard_normal((3, 2)), np.array([1.0, -1.0]))
    cells = [maps, *(maps[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3] for i in (0, 1) for j in (0, 1))]
    with jax.enable_x64(True):
        found = sdd.region_logits(maps, head, (2,))
    np.testing.assert_allclose(found, np.stack([c.mean((1, 2)) @ head[0] + head[1] for c in cells]), rtol=1e-12)


def test_norm_predicts_what_a_merged_classifier_would():
    """By running statistics the transform is linear: one kernel and one bias do what it and the classifier do."""
    student, teacher = (network_outputs(model, 1.0, IMAGES) for model in ("resnet8", "resnet14"))
    module = distillers.create("norm", parts=3)
    batch = BATCH | {"label": FIVE[:4]}
    variables = module.init({"params": jax.random.key(0)}, student, teacher, batch, PAST)
    _, new = module.apply(variables, student, teacher, batch, PAST, mutable=["batch_stats"])
    variables = jax.tree.map(np.float64, {**variables, **new})
    p, stats = (variables[k]["transform"] for k in ("params", "batch_stats"))
    assert np.any(stats["expand_norm"]["mean"])

    def affine(name, kernel):
        factor = p[name]["scale"] / np.sqrt(stats[name]["var"] + 1e-5)
        return kernel * factor.ravel(), (p[name]["bias"] - stats[name]["mean"] * factor).ravel()

    width = student.final.shape[-1]
    (up, rise), (down, fall) = (
        affine(f"{k}_norm", p[k]["kernel"].reshape(shape))
        for k, shape in (("expand", (width, -1)), ("contract", (-1, width)))
    )
    kernel, bias = np.float64(student.head[0]), np.float64(student.head[1])
    merged = (np.eye(width) + up @ down) @ kernel
    logits = np.float64(student.final).mean((1, 2)) @ merged + (rise @ down + fall) @ kernel + bias
    expected = 2.5 * (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
    np.testing.assert_allclose(module.apply(variables, student, teacher, method="predict"), expected, rtol=1e-3, atol=1e-4)


def test_norm_takes_the_larger_map_at_its_largest():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 5, 3))
    expected = [[x[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].max((1, 2)) for j in (0, 1)] for i in (0, 1)]
    with jax.enable_x64(True):
        found = norm.max_pool(x, (2, 2))
    np.testing.assert_array_equal(found, np.array(expected).transpose(2, 0, 1, 3, 4))
    assert norm.norm_loss(np.ones((2, 2, 2, 5, 3)), np.full((2, 2, 2, 3), 3.0)) == 5 * 4


@pytest.mark.parametrize("steps", [1, 3, 5, 500])
def test_known_noise_is_taken_out_whole(steps):
    """Of a map with noise of the first step, whose every later guess is that noise, the map is left."""
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(diffkd.SIGNAL, signal, rtol=1e-5)
    clean, noise = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 4))
    asked = []

    def find(x, times):
        asked.append(int(times[0]))
        return noise

    with jax.enable_x64(True):
        first = diffkd.descent(steps)[0][0]
        x = diffkd.noisy(clean, noise, np.full(3, first))
        np.testing.assert_allclose(x, signal[first] ** 0.5 * clean + (1 - signal[first]) ** 0.5 * noise, atol=1e-5)
        np.testing.assert_allclose(diffkd.cleaned(x, find, steps), clean, atol=1e-5)
    assert asked == [i * (500 // steps) for i in range(steps)][::-1]


def test_diffusion_draws_anew_and_encodes_the_teacher_by_half():
    student, teacher = (network_outputs(model, 1.0, IMAGES) for model in ("resnet8", "resnet14"))
    keys = jax.random.split(jax.random.key(0), 3)
    module = distillers.create("diffkd")
    variables = module.init({"params": keys[0], "distiller": keys[0]}, student, teacher, BATCH, PAST)
    (a, metrics), (b, _), (again, _) = (
        module.apply(variables, student, teacher, BATCH, PAST, rngs={"distiller": key}, mutable=["batch_stats"])[0]
        for key in (keys[1], keys[2], keys[1])
    )
    assert a == again and a != b
    close(a, sum(metrics.values()), 1e-6)
    half = teacher.stages[-1].shape[-1] // 2
    assert variables["params"]["map"]["encoder"]["kernel"].shape[-1] == half
    assert variables["params"]["map"]["noise"]["time"].shape == (1280, half)


NAMES = ("sdd", "sdd_dkd", "wkd_l", "wkd_f", "norm", "vkd")


@pytest.mark.parametrize("name", [*NAMES, "diffkd"])
def test_extremes_are_finite(name):
    """Dead features, equal images, logits far apart, a batch of two: where a root or a quotient has no slope."""
    rng = np.random.default_rng(0)
    module = distillers.create(name)
    head = tuple(jnp.asarray(x, jnp.float32) for x in (rng.standard_normal((8, 5)), np.zeros(5)))

    def outputs(x, logits):
        return Outputs(logits, stages=(x,), final=x, pooled=jnp.mean(x, axis=(1, 2)), head=head)

    far = jnp.array([[1e4, 0, -1e4, 5, 0], [-300.0, 300, 0, 0, 1]])
    random = jnp.asarray(rng.standard_normal((2, 4, 4, 8)), jnp.float32)
    same = jnp.broadcast_to(random[:1], random.shape)
    cases = {"zero": 0 * random, "equal": same, "large": 1e4 * random, "flat": 0 * random + 1}
    batch = {"label": jnp.array([0, 3])}
    key = {"distiller": jax.random.key(0)}
    variables = module.init({"params": jax.random.key(0), **key}, outputs(random, far), outputs(random, far), batch, PAST)

    def loss(x, logits, teacher):
        return module.apply(variables, outputs(x, logits), teacher, batch, PAST, rngs=key, mutable=["batch_stats"])[0][0]

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for case, x in cases.items():
        for logits in (far, -far, 0 * far):
            for taught in (random, x):
                value, grads = both(x, logits, outputs(taught, far))
                assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads), (case, value)


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_their_formulas(name):
    student, teacher = (network_outputs(model, 1.0, np.tile(IMAGES, (1, 2, 2, 1))) for model in ("resnet8", "resnet14"))
    batch = BATCH | {"label": FIVE[:4]}
    options = {"grid": 2} if name == "wkd_f" else {}
    module = distillers.create(name, **options)
    half = PAST._replace(epoch=np.float32(5 if name in ("sdd_dkd", "norm") else 195))
    variables = module.init({"params": jax.random.key(0)}, student, teacher, batch, half)
    (loss, metrics), _ = module.apply(variables, student, teacher, batch, half, mutable=["batch_stats"])
    own, taught = (sdd.region_logits(x.final, x.head, (2,)) for x in (student, teacher))
    close(own[0], student.logits, 1e-4)  # the whole's are the network's own
    expected = {
        "sdd": lambda: sdd.sdd_loss(of_kd, own, taught, FIVE[:4], 2.0),
        "sdd_dkd": lambda: 0.25 * sdd.sdd_loss(of_dkd, own, taught, FIVE[:4], 2.0),
        "wkd_l": lambda: metrics["target"] + 300 * metrics["transport"],
        "wkd_f": lambda: 0.5 * (4 * metrics["means"] + metrics["spreads"]),
        "norm": lambda: 0.1 * metrics["feature"] + 0.1 * metrics["predicted_cross_entropy"],
        "vkd": lambda: vkd.smooth_l1(
            student.pooled @ vkd.orthogonal(variables["params"]["projection"]), vkd.standardised(teacher.pooled)
        ),
    }
    close(loss, expected[name](), 1e-5)


def test_what_they_cannot_do_is_refused():
    for name, options, said in (
        ("sdd", {"scales": ()}, "scales: .* sides of grids"),
        ("sdd_dkd", {"scales": (1, 2)}, "scales: .* sides of grids"),
        ("sdd", {"temperature": 0.0}, "temperature: 0 is not possible"),
        ("wkd_l", {"iterations": 0}, "iterations: 0 is not possible"),
        ("wkd_l", {"fade_end": 100.0}, "fade_end: 100 is not possible; it should be above fade_start, which is 150"),
        ("wkd_f", {"grid": 0}, "grid: 0 is not possible"),
        ("norm", {"parts": 0}, "parts: 0 is not possible"),
        ("diffkd", {"latent": -1}, "latent: -1 is not possible"),
        ("diffkd", {"steps": 501}, "steps: 501 is not possible; it should be from 1 to 500"),
    ):
        with pytest.raises(UserError, match=said):
            distillers.create(name, **options)
    small = network_outputs("resnet8", 1.0, IMAGES)  # last maps of 2x2
    odd = small._replace(final=jnp.zeros((4, 3, 3, small.final.shape[-1])))
    for name, options, teacher, said in (
        ("sdd", {"scales": (2, 4)}, small, "grids of 4 cells a side, and the student's last map is 2x2"),
        ("wkd_f", {"grid": 2}, small, "a grid of 2 leaves cells of one in the teacher's last map of 2x2"),
        ("norm", {}, odd, "are no multiples"),
        ("wkd_l", {}, small._replace(head=None), "needs 'head', which the teacher's model does not return"),
    ):
        with pytest.raises(UserError, match=said):
            distillers.create(name, **options).init({"params": jax.random.key(0)}, small, teacher, BATCH, PAST)
