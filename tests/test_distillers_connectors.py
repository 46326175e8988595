"""AB, FT, OFD, ReviewKD, SRRL, SimKD: losses against reference values and independent formulas, modules under staging."""

import contextlib
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, network_outputs
from scipy import integrate, stats
from test_distillers import BATCH

from pwkd_jax import distillers, models, slimmable
from pwkd_jax.distillers.ab import ab_loss
from pwkd_jax.distillers.ft import FT, Paraphraser, Translator, ft_loss
from pwkd_jax.distillers.ofd import margins, ofd_loss
from pwkd_jax.distillers.reviewkd import ABF, hcl_loss, nearest
from pwkd_jax.distillers.simkd import Projector, simkd_loss
from pwkd_jax.distillers.srrl import srrl_losses
from pwkd_jax.errors import UserError

MODULES = {
    "ab": "pwkd_jax.distillers.ab:AB",
    "ft": "pwkd_jax.distillers.ft:FT",
    "ofd": "pwkd_jax.distillers.ofd:OFD",
    "reviewkd": "pwkd_jax.distillers.reviewkd:ReviewKD",
    "srrl": "pwkd_jax.distillers.srrl:SRRL",
    "simkd": "pwkd_jax.distillers.simkd:SimKD",
}
GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_connectors.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    """The reference's inputs: maps as NHWC, kernels as HWIO."""
    stream = np.random.RandomState(0).randn(454_416)
    made = {}
    for name, a in GOLDEN["arrays"].items():
        x = stream[a["offset"] : a["offset"] + math.prod(a["shape"])].reshape(a["shape"]).astype(np.float32)
        x = x * np.float32(a["scale"])
        if x.ndim == 4:
            x = x.transpose(2, 3, 1, 0) if name.endswith("weight") else x.transpose(0, 2, 3, 1)
        made[name] = x
    return made


NEVER = np.full(16, -1e9)  # a margin that no activation is below: OFD's simple form
LOSSES = {
    "AB_3stage": lambda a: 0.003 * sum(2.0 ** (i - 2) * ab_loss(a[f"stage{i}_s"], a[f"stage{i}_t"], 1.0) for i in range(3)),
    "HCL": lambda a: hcl_loss(a["fmap_s"], a["fmap_t_same"]),
    "OFDsimple_mmrazor": lambda a: ofd_loss(a["fmap_s"], a["fmap_t_same"], jnp.asarray(NEVER, a["fmap_s"].dtype)) / 1000,
    "OFD": lambda a: ofd_loss(a["fmap_s"], a["fmap_t_same"], margins(a["ofd_bn_weight"], a["ofd_bn_bias"])),
    "FT": lambda a: ft_loss(a["fmap_s"], a["fmap_t_same"]),
    "SRRL": lambda a: sum(srrl_losses(a["fmap_s"][:, 0, 0], a["fmap_t_same"][:, 0, 0], a["abf_conv1_0_weight"][0, 0])),
    "SimKD": lambda a: simkd_loss(a["fmap_s"], a["fmap_t_same"]),
}


def reads(name):
    return list(GOLDEN["losses"].get(name, {"grad_l2": {"fmap_s": None}})["grad_l2"])


def valued(name, arrays, dtype):
    """(value, {student input: gradient}) of a loss, all arrays in `dtype`."""
    a = {k: jnp.asarray(x, dtype) for k, x in arrays.items()}
    return jax.jit(jax.value_and_grad(lambda w: LOSSES[name](a | w)))({k: a[k] for k in reads(name)})


@pytest.mark.parametrize("name", [n for n in GOLDEN["losses"] if n in LOSSES])
def test_losses_equal_the_reference(name, arrays):
    expected = GOLDEN["losses"][name]
    value, grads = valued(name, arrays, jnp.float32)
    np.testing.assert_allclose(value, expected["value"], rtol=2e-5)
    for key, norm in expected["grad_l2"].items():
        np.testing.assert_allclose(jnp.linalg.norm(grads[key]), norm, rtol=1e-4, err_msg=key)
    with jax.enable_x64(True):
        value, grads = valued(name, arrays, jnp.float64)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected["value_float64"], rtol=2e-7)
        for key, norm in expected["grad_l2"].items():
            np.testing.assert_allclose(jnp.linalg.norm(grads[key]), norm, rtol=1e-5, err_msg=key)


def test_margins_equal_the_reference_and_the_integral(arrays):
    scale, bias = arrays["ofd_bn_weight"], arrays["ofd_bn_bias"]
    np.testing.assert_allclose(jax.jit(margins)(scale, bias), GOLDEN["ofd_margin"], rtol=2e-5)
    with jax.enable_x64(True):
        found = margins(jnp.float64(scale), jnp.float64(bias))
    for s, b, m in zip(np.abs(scale.astype(float)), bias.astype(float), found, strict=True):
        normal = stats.norm(b, s)
        whole = integrate.quad(lambda x, n=normal: x * n.pdf(x), min(b, 0) - 12 * s, 0, points=[min(b, 0)])[0]
        expected = whole / normal.cdf(0) if normal.cdf(0) > 1e-3 else -3 * s
        np.testing.assert_allclose(m, expected, rtol=1e-6)
    # Constant channels, and those that are always or never positive.
    scale, bias = jnp.array([0.0, 0.0, 0.0, 1e-20, 1.0, -1.0, 2.0]), jnp.array([0.0, -2.0, 2.0, 1.0, 50.0, -50.0, 1e4])
    expected = [0, -2, 0, 0, -3, -50, -6]
    with jax.debug_nans(True):
        np.testing.assert_allclose(margins(scale, bias), expected, atol=1e-6)
    np.testing.assert_allclose(margins(*(x.astype(jnp.bfloat16) for x in (scale, bias))), expected, atol=1e-6, rtol=0.02)


def fusion(arrays, dtype):
    kernels = {"middle_conv": "abf_conv1_0_weight", "conv": "abf_conv2_0_weight", "attention": "abf_att_conv_0_weight"}
    a = {k: jnp.asarray(x, dtype) for k, x in arrays.items()}
    params = {name: {"kernel": a[key]} for name, key in kernels.items()}
    params["attention"]["bias"] = a["abf_att_conv_0_bias"]
    for name, channels in (("middle_norm", 32), ("norm", 24)):
        params[name] = {"scale": jnp.ones(channels, dtype), "bias": jnp.zeros(channels, dtype)}
    blank = {k: {"mean": jnp.zeros_like(v["bias"]), "var": v["scale"]} for k, v in params.items() if "scale" in v}
    variables, module = {"params": params, "batch_stats": blank}, ABF(32, 24, (8, 8))
    return jax.jit(lambda x, y: module.apply(variables, x, y, mutable=["batch_stats"])[0])(a["abf_x"], a["abf_y"])


def test_fusion_equals_the_reference(arrays):
    expected = GOLDEN["losses"]["ReviewKD_ABF"]
    guess, rest = fusion(arrays, jnp.float32)
    np.testing.assert_allclose(jnp.mean(guess**2), expected["value"], rtol=2e-5)
    np.testing.assert_allclose(jnp.sum(guess), expected["output_sum"], atol=2e-3)
    np.testing.assert_allclose(jnp.mean(rest**2), expected["residual_sq_mean"], rtol=2e-5)
    np.testing.assert_allclose(jnp.sum(rest), expected["residual_sum"], rtol=2e-5)
    # The same by hand: the sums above say nothing of where a value stands.
    a = {k: x.astype(np.float64) for k, x in arrays.items()}

    def normalised(x):
        return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)

    def by_hand(size):
        x = normalised(a["abf_x"] @ a["abf_conv1_0_weight"][0, 0])
        y = loops_nearest(a["abf_y"], (8, 8))
        z = np.concatenate([x, y], -1) @ a["abf_att_conv_0_weight"][0, 0] + a["abf_att_conv_0_bias"]
        z = 1 / (1 + np.exp(-z))
        rest = loops_nearest(x * z[..., :1] + y * z[..., 1:], size)
        padded = np.pad(rest, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        return normalised(np.einsum("bhwcij,ijcd->bhwd", windows, a["abf_conv2_0_weight"])), rest

    for found, wanted in zip((guess, rest), by_hand((8, 8)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=3e-5)
    with jax.enable_x64(True):
        for found, wanted in zip(fusion(arrays, jnp.float64), by_hand((8, 8)), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-11)


# Independent formulas, in double precision.


def loops_nearest(x, size):
    rows, columns = ([math.floor(i * n / m) for i in range(m)] for n, m in zip(x.shape[1:3], size, strict=True))
    return np.stack([np.stack([x[:, r, c] for c in columns], 1) for r in rows], 1)


def loops_pool(x, size):
    out = np.zeros((len(x), *size, x.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            (a, b), (c, d) = ((n * k // m, -(-(n + 1) * k // m)) for n, k, m in zip((i, j), x.shape[1:3], size, strict=True))
            out[:, i, j] = x[:, a:b, c:d].mean((1, 2))
    return out


def loops_match(s, t):
    size = tuple(np.minimum(s.shape[1:3], t.shape[1:3]))
    return loops_pool(s, size), loops_pool(t, size)


def loops_ab(s, t, margin):
    wrong_on, wrong_off = (s > -margin) & (t <= 0), (s <= margin) & (t > 0)
    return (np.sum((s[wrong_on] + margin) ** 2) + np.sum((s[wrong_off] - margin) ** 2)) / len(s)


def loops_ofd(s, t, m):
    m = np.broadcast_to(m, s.shape)
    low, between, high = (s > m) & (t <= m), (s > t) & (m < t) & (t <= 0), t > 0
    return (np.sum((s - m)[low] ** 2) + np.sum((s - t)[between] ** 2) + np.sum((s - t)[high] ** 2)) / len(s)


def loops_hcl(s, t):
    parts, weights = [np.mean((s - t) ** 2)], [1.0]
    for bins in (4, 2, 1):
        if bins < min(s.shape[1:3]):
            parts.append(np.mean((loops_pool(s, (bins, bins)) - loops_pool(t, (bins, bins))) ** 2))
            weights.append(weights[-1] / 2)
    return np.dot(parts, weights) / sum(weights)


def loops_ft(s, t):
    total = 0.0
    for a, b in zip(*loops_match(s, t), strict=True):
        a, b = ((x**2).mean(-1) / np.sqrt(np.sum((x**2).mean(-1) ** 2)) for x in (a, b))
        total += np.mean(np.abs(a - b))
    return total / len(s)


def same_by_loops(loss, by_loops, s, t):
    """Value and directional derivative in double precision; the student's map comes first."""
    with jax.enable_x64(True):
        value, grad = jax.jit(jax.value_and_grad(loss))(s, t)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, by_loops(s, t), rtol=1e-9)
        step = 1e-6 * np.random.default_rng(0).standard_normal(s.shape)
        difference = (by_loops(s + step, t) - by_loops(s - step, t)) / 2
        np.testing.assert_allclose(np.sum(np.asarray(grad) * step), difference, rtol=1e-5)


def test_losses_equal_independent_formulas(arrays):
    s, t = (arrays[k].astype(np.float64)[:6] for k in ("fmap_s", "fmap_t_same"))
    for margin in (0.5, 2.0):
        same_by_loops(functools.partial(ab_loss, margin=margin), functools.partial(loops_ab, margin=margin), s, t)
    m = np.linspace(-2, 0, 16)
    same_by_loops(functools.partial(ofd_loss, margin=m), functools.partial(loops_ofd, m=m), s, t)
    rng = np.random.default_rng(0)
    for shape in ((3, 7, 7, 5), (3, 14, 14, 2), (3, 6, 9, 2), (3, 4, 4, 3), (3, 3, 2, 3), (5, 1, 1, 4)):
        same_by_loops(hcl_loss, loops_hcl, *rng.standard_normal((2, *shape)))
    same_by_loops(ft_loss, loops_ft, s, rng.standard_normal((6, 4, 4, 7)))
    same_by_loops(ft_loss, loops_ft, s, rng.standard_normal((6, 11, 11, 3)))
    same_by_loops(simkd_loss, lambda s, t: np.mean((s - t) ** 2), s, t)
    kernel, bias = rng.standard_normal((16, 5)), rng.standard_normal(5)

    def regression(s, t):
        return np.mean(((s @ kernel + bias) - (t @ kernel + bias)) ** 2)

    same_by_loops(lambda s, t: srrl_losses(s, t, kernel)[1], regression, s[:, 0, 0], t[:, 0, 0])
    same_by_loops(lambda s, t: srrl_losses(s, t, kernel)[0], lambda s, t: np.mean((s - t) ** 2), s[:, 0, 0], t[:, 0, 0])


def test_nearest_as_the_reference_has_it():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3))
    for size in ((8, 12), (4, 6), (2, 3), (1, 1), (7, 5), (3, 9)):
        np.testing.assert_array_equal(nearest(jnp.asarray(x), size), loops_nearest(x, size).astype(np.float32))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_bfloat16(name, arrays):
    """Rounding the inputs moves a loss by little, and the arithmetic after them is float32."""
    value, grads = valued(name, arrays, jnp.bfloat16)
    for g in grads.values():
        assert g.dtype == jnp.bfloat16 and np.all(np.isfinite(g.astype(jnp.float32))) and np.any(g)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, valued(name, arrays, jnp.float32)[0], rtol=0.02)
    rounded = {k: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for k, x in arrays.items()}
    np.testing.assert_allclose(value, valued(name, rounded, jnp.float32)[0], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_survive_dead_channels(name, arrays):
    """Zero images, zero channels and zero batch norms in the student, the teacher or both."""
    for which in (("_s",), ("_t", "_same", "weight"), ("_s", "_t", "_same", "weight", "bias")):
        for cut in (slice(0, 2), slice(None)):
            hurt = {k: x.copy() for k, x in arrays.items()}
            for k in hurt:
                if k.endswith(which):
                    hurt[k][cut] = 0
                    hurt[k][..., cut] = 0
            value, grads = valued(name, hurt, jnp.float32)
            assert np.isfinite(value)
            assert all(np.all(np.isfinite(g)) and np.max(np.abs(g)) < 1e3 for g in grads.values())


# Modules.


def random_outputs(maps, pooled, seed, classes=10) -> models.Outputs:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    preact = tuple(draw(4, *m) for m in maps)
    norms = tuple((draw(m[-1]), draw(m[-1])) for m in maps)
    stages = tuple(jax.nn.relu(x) for x in preact)
    head = (draw(pooled, classes), draw(classes))
    return models.Outputs(draw(4, classes), stages, preact, draw(4, pooled), head, norms, final=stages[-1])


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


SAME = ((8, 8, 6), (4, 4, 8), (2, 2, 10))
CROSS = ((16, 16, 8), (4, 4, 12), (1, 1, 20))


@pytest.fixture(scope="module")
def pairs():
    """{name: (student's outputs, the teacher's at each width)}: invented ones and those of real networks."""
    images = np.random.default_rng(1).standard_normal((4, 8, 8, 3)).astype(np.float32)
    at = lambda maps, w: tuple((*m[:2], int(m[2] * w)) for m in maps)  # noqa: E731
    return {
        "same": (random_outputs(SAME, 10, 0), {w: random_outputs(at(SAME, w), int(10 * w), 1) for w in (0.5, 1.0)}),
        "cross": (random_outputs(SAME, 10, 0), {w: random_outputs(at(CROSS, w), int(20 * w), 2) for w in (0.5, 1.0)}),
        "resnet": (
            network_outputs("resnet8", 1.0, images),
            {w: network_outputs("resnet14", w, images) for w in (0.5, 1.0)},
        ),
    }


def started(name, pair, **options):
    """(Distillation, params, state) of a pair."""
    distillation = fitted(name, pair, **options)
    return distillation, *jax.jit(distillation.init)(jax.random.key(0))


def fitted(name, pair, **options):
    return distillers.build(distillers.create(MODULES[name], **options), *abstract(pair), BATCH)


LABELS = jnp.array([0, 1, 2, 3])
LATE = distillers.Progress(jnp.int32(1), jnp.int32(100), jnp.float32(40.0))
FIRST = distillers.Progress(jnp.int32(0), jnp.int32(0), jnp.float32(0.0))
STILL = {"ft": "paraphraser"}  # what trains in the initial phase alone


def inside(grads, like):
    """[(path, gradient inside the block shaped as `like`, outside it)]."""
    result = []
    for (path, g), block in zip(jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(like), strict=True):
        active = np.zeros(g.shape, bool)
        active[tuple(slice(0, d) for d in block.shape)] = True
        result.append((jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(g)[active], np.asarray(g)[~active]))
    return result


@pytest.mark.parametrize("pair, widths", [
    ("cross", (0.5,)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("same", (1.0,)), ("cross", (1.0,)), ("resnet", (0.5,)))),
])  # fmt: skip
@pytest.mark.parametrize("name", MODULES)
def test_modules_follow_the_widths(name, pair, widths, pairs):
    """Finite, weighed as declared, gradients to the student and to the active block alone, none to the teacher."""
    student, teachers = pairs[pair]
    distillation, params, state = started(name, (student, teachers))
    options = distillers.fields(MODULES[name])

    def loss(params, student, teacher, width):
        inputs = (student, teacher, {"label": LABELS}, LATE, jax.random.key(0))
        value, new, metrics = distillation(params, state, width, *inputs)
        return metrics["distillation"], (value, new, metrics)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    for width in widths:
        teacher = teachers[width]
        (value, (weighed, new, metrics)), (g_params, g_student, g_teacher) = run(params, student, teacher, width)
        assert np.isfinite(value) and value.shape == () and value > 0
        assert all(np.all(np.isfinite(m)) for m in metrics.values())
        expected = options["ce_weight"] * metrics["cross_entropy"] + options["weight"] * value
        np.testing.assert_allclose(weighed, expected, rtol=1e-5)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(g_student))
        taps = {
            "ab": g_student.preact,
            "ft": g_student.stages[-1:],
            "ofd": g_student.preact,
            "reviewkd": (*g_student.stages, g_student.pooled),
            "srrl": (g_student.pooled,),
            "simkd": (g_student.final,),
        }
        if (name, pair) == ("ft", "cross"):
            continue  # at a single pixel attention is 1 whatever the features are, and gradients nothing but rounding
        assert all(np.any(g) for g in taps[name]), name
        close(g_teacher, jax.tree.map(jnp.zeros_like, teacher), 0)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        like = distillation.likes[width]["params"]
        for path, active, rest in inside(g_params, like):
            assert np.all(np.isfinite(active)) and not np.any(rest), path
            assert np.any(active) != path.startswith(STILL.get(name, "none")), path


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_bfloat16(name, pairs):
    student, teachers = pairs["same"]
    distillation, params, state = started(name, (student, teachers))

    @jax.jit
    def loss(student, teacher):
        inputs = (student, teacher, {"label": LABELS}, LATE, jax.random.key(0))
        return distillation(params, state, 1.0, *inputs)[2]["distillation"]

    value = loss(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student, teachers[1.0])))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(student, teachers[1.0]), rtol=0.02)


def run(name, pair, width=1.0, progress=LATE, **options):
    """(total, metrics, params, new state) of a pair."""
    distillation, params, state = started(name, pair, **options)
    inputs = (pair[0], pair[1][width], {"label": LABELS}, progress, jax.random.key(0))
    total, new, metrics = jax.jit(lambda *a: distillation(params, state, width, *a))(*inputs)
    return total, metrics, params, new


def normalised(x):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5)


def test_ab_and_ofd_are_their_losses_after_their_connectors(pairs):
    s, t = pairs["same"][0], pairs["same"][1][1.0]
    whole = (s, {1.0: t})
    value = run("ab", whole, connectors=False, margin=0.7)[1]["distillation"]
    parts = [ab_loss(a, b, 0.7) for a, b in zip(s.preact, t.preact, strict=True)]
    np.testing.assert_allclose(value, 0.003 * np.dot([0.25, 0.5, 1], parts), rtol=1e-5)
    assert not fitted("ab", whole, connectors=False).likes[1.0].get("params")

    _, metrics, params, _ = run("ab", pairs["same"])
    guesses = [normalised(a @ params[f"stage{i}"]["conv"]["kernel"][0, 0]) for i, a in enumerate(s.preact, start=1)]
    assert np.any(guesses[0] < 0)
    parts = [ab_loss(a, b, 1.0) for a, b in zip(guesses, t.preact, strict=True)]
    np.testing.assert_allclose(metrics["distillation"], 0.003 * np.dot([0.25, 0.5, 1], parts), rtol=1e-4)

    _, metrics, params, _ = run("ofd", pairs["same"])
    parts = [
        ofd_loss(normalised(a @ params[f"stage{i}_conv"]["kernel"][0, 0]), b, margins(*n))
        for i, (a, b, n) in enumerate(zip(s.preact, t.preact, t.norms, strict=True), start=1)
    ]
    np.testing.assert_allclose(metrics["distillation"], np.dot([0.25, 0.5, 1], parts), rtol=1e-4)


def test_ofd_of_unequal_stages_compares_the_last_with_the_margins_of_the_width(pairs):
    s, teachers = pairs["cross"]
    fewer = s._replace(preact=s.preact[1:], stages=s.stages[1:])
    _, metrics, params, _ = run("ofd", (fewer, teachers), 0.5)
    assert set(params) == {"stage1_conv", "stage1_norm", "stage2_conv", "stage2_norm"}
    assert params["stage1_conv"]["kernel"].shape == (1, 1, 8, 12)
    t, total = teachers[0.5], 0.0
    for i, (a, b, n) in enumerate(zip(fewer.preact, t.preact[1:], t.norms[1:], strict=True), start=1):
        a = jnp.asarray(loops_pool(np.asarray(a), b.shape[1:3]), jnp.float32)
        guess = normalised(a @ params[f"stage{i}_conv"]["kernel"][0, 0][:, : b.shape[-1]])
        total += 2.0 ** (i - 2) * ofd_loss(guess, b, margins(*n))
    np.testing.assert_allclose(metrics["distillation"], total, rtol=1e-4)
    # Less positive channels have lower margins, and other losses.
    shifted = t._replace(norms=tuple((w, b - 1) for w, b in t.norms))
    assert run("ofd", (fewer, teachers | {0.5: shifted}), 0.5)[1]["distillation"] != metrics["distillation"]


def test_review_runs_from_the_deepest_down_and_warms_up(pairs):
    s, teachers = pairs["cross"]
    t = teachers[1.0]
    distillation, params, state = started("reviewkd", pairs["cross"])
    assert set(params) == {"pooled", "stage1", "stage2", "stage3"} and "attention" not in params["pooled"]
    assert params["stage1"]["attention"]["kernel"].shape == (1, 1, 20, 2)
    order = [("pooled", s.pooled[:, None, None], t.pooled[:, None, None])]
    order += [(f"stage{i}", s.stages[i - 1], t.preact[i - 1]) for i in (3, 2, 1)]

    def by_hand():
        total, rest = 0.0, None
        for level, a, b in order:
            variables = {"params": params[level], "batch_stats": state["batch_stats"][level]}
            fuse = ABF(10, b.shape[-1], b.shape[1:3])
            (guess, rest), _ = fuse.apply(variables, a, rest, mutable=["batch_stats"])
            assert guess.shape == b.shape and rest.shape == (*b.shape[:3], 10)
            total += hcl_loss(guess, b)
        return total

    expected = by_hand()

    @jax.jit
    def at(epoch):
        inputs = (s, t, {"label": LABELS}, LATE._replace(epoch=epoch), jax.random.key(0))
        return distillation(params, state, 1.0, *inputs)[2]["distillation"]

    for epoch, factor in ((0.0, 0.0), (5.0, 0.25), (20.0, 1.0), (500.0, 1.0)):
        np.testing.assert_allclose(at(epoch), factor * expected, rtol=1e-5)
    value = run("reviewkd", pairs["cross"], progress=FIRST, warmup_epochs=0.0)[1]["distillation"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    narrow = fitted("reviewkd", pairs["cross"], middle=4).likes[1.0]["params"]
    assert narrow["stage2"]["middle_conv"]["kernel"].shape == (1, 1, 8, 4)
    assert narrow["stage2"]["conv"]["kernel"].shape == (3, 3, 4, 12)
    signed = (s._replace(stages=s.preact), teachers)
    value = run("reviewkd", pairs["cross"], student_preact=True)[1]["distillation"]
    np.testing.assert_allclose(value, run("reviewkd", signed)[1]["distillation"], rtol=1e-6)
    assert abs(value - expected) > 1e-3


def test_srrl_sees_through_the_head_of_the_width(pairs):
    s, teachers = pairs["cross"]
    for width, t in teachers.items():
        _, metrics, params, _ = run("srrl", pairs["cross"], width, regression_weight=3.0)
        guess = jax.nn.relu(normalised(s.pooled @ params["linear"]["kernel"][:, : t.pooled.shape[-1]]))
        logits = [x @ t.head[0] + t.head[1] for x in (guess, t.pooled)]
        feature, regression = jnp.mean((guess - t.pooled) ** 2), jnp.mean((logits[0] - logits[1]) ** 2)
        np.testing.assert_allclose(metrics["feature"], feature, rtol=1e-4)
        np.testing.assert_allclose(metrics["regression"], regression, rtol=1e-4)
        np.testing.assert_allclose(metrics["distillation"], feature + 3 * regression, rtol=1e-4)


def test_srrl_on_maps_pools_after_its_layer(pairs):
    s, teachers = pairs["cross"]
    for width, t in teachers.items():
        _, metrics, params, _ = run("srrl", pairs["cross"], width, on_map=True)
        made = jnp.einsum("bhwc,cd->bhwd", s.final, params["linear"]["kernel"][:, : t.pooled.shape[-1]])
        centred = made - made.mean((0, 1, 2))
        guess = jax.nn.relu(centred / jnp.sqrt((centred**2).mean((0, 1, 2)) + 1e-5)).mean((1, 2))
        np.testing.assert_allclose(metrics["feature"], jnp.mean((guess - t.pooled) ** 2), rtol=1e-4)
        np.testing.assert_allclose(metrics["regression"], jnp.mean(((guess - t.pooled) @ t.head[0]) ** 2), rtol=1e-4)
    with pytest.raises(UserError, match="SRRL with on_map needs 'final', which the student's model does not return"):
        fitted("srrl", (s._replace(final=None), teachers), on_map=True)


def test_simkd_predicts_by_the_teachers_head_and_its_running_statistics(pairs):
    student, teachers = pairs["resnet"]
    distillation, params, state = started("simkd", pairs["resnet"])
    assert distillation.predicts
    inputs = (student, teachers[0.5], {"label": LABELS}, LATE, jax.random.key(0))

    @jax.jit
    def step(state):
        return distillation(params, state, 0.5, *inputs)[1:]

    new, metrics = step(state)
    # The narrow stage keeps its own block of the statistics and leaves the rest as it was.
    for old, now in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        half = len(old) // 2
        assert np.all(old[:half] != now[:half]) and np.all(old[half:] == now[half:])
    for _ in range(150):
        new, metrics = step(new)
    predict = jax.jit(lambda s: distillation.predict(params, new, 0.5, s, teachers[0.5]))
    logits = predict(student)
    assert logits.shape == (4, 10)
    # The statistics of this one batch, by now: the same logits as in training.
    ce = slimmable.cross_entropy(logits, LABELS)
    np.testing.assert_allclose(ce, metrics["predicted_cross_entropy"], rtol=1e-3)
    # An image's prediction is its own.
    alone = predict(jax.tree.map(lambda x: x[:1] if x.shape[0] == 4 else x, student))
    np.testing.assert_allclose(alone[0], logits[0], rtol=1e-4, atol=1e-5)
    block = slimmable.take({"params": params, **new}, distillation.likes[0.5])
    block = {k: v["projector"] for k, v in block.items()}
    projected = Projector(32, 2).apply(block, student.stages[-1], False)
    assert block["params"]["conv2"]["kernel"].shape == (3, 3, 16, 16) and np.all(projected >= 0)
    by_hand = projected.mean((1, 2)) @ teachers[0.5].head[0] + teachers[0.5].head[1]
    np.testing.assert_allclose(logits, by_hand, rtol=1e-5, atol=1e-5)
    # Larger maps are pooled to the teacher's, which are compared as they are.
    s, teachers = pairs["cross"]
    _, metrics, params, state = run("simkd", pairs["cross"])
    variables = {"params": params["projector"], "batch_stats": state["batch_stats"]["projector"]}
    pooled = s.stages[-1].mean((1, 2), keepdims=True)
    guess, _ = Projector(20, 2).apply(variables, pooled, True, mutable=["batch_stats"])
    np.testing.assert_allclose(metrics["distillation"], jnp.mean((guess - teachers[1.0].stages[-1]) ** 2), rtol=1e-4)
    assert Projector(3, 8).init(jax.random.key(0), pooled, True)["params"]["conv2"]["kernel"].shape == (3, 3, 1, 1)


def test_ab_alone_first_then_cross_entropy_alone(pairs):
    student, teachers = pairs["cross"]
    distillation, params, state = started("ab", pairs["cross"])

    def total(params, student, progress):
        inputs = (student, teachers[0.5], {"label": LABELS}, progress, jax.random.key(0))
        value, _, metrics = distillation(params, state, 0.5, *inputs)
        return value, metrics

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (value, metrics), (g_params, g_student) = step(params, student, FIRST)
    np.testing.assert_allclose(value, metrics["distillation"], rtol=1e-6)
    assert not np.any(g_student.logits) and all(np.any(g) for g in g_student.preact)
    for path, active, rest in inside(g_params, distillation.likes[0.5]["params"]):
        assert np.any(active) and not np.any(rest), path
    (value, metrics), (g_params, g_student) = step(params, student, LATE)
    np.testing.assert_allclose(value, metrics["cross_entropy"], rtol=1e-6)
    assert np.any(g_student.logits) and not any(np.any(g) for g in jax.tree.leaves((g_params, g_student.preact)))
    beside = run("ab", pairs["cross"], 0.5, weight=2.0)
    np.testing.assert_allclose(beside[0], beside[1]["cross_entropy"] + 2 * beside[1]["distillation"], rtol=1e-5)
    each = run("ab", pairs["cross"], progress=FIRST._replace(stage=jnp.int32(2)), initial_each_stage=True)
    np.testing.assert_allclose(each[0], each[1]["distillation"], rtol=1e-6)


def test_ft_trains_its_paraphraser_first_and_alone_and_then_freezes_it(pairs):
    student, teachers = pairs["resnet"]
    distillation, params, state = started("ft", pairs["resnet"], initial_epochs=2.0)
    close(state["frozen"]["weights"], params["paraphraser"], 0)

    @jax.jit
    def step(params, state, epoch):
        def total(params, student):
            progress = LATE._replace(stage=jnp.int32(0), epoch=epoch)
            inputs = (student, teachers[0.5], {"label": LABELS}, progress, jax.random.key(0))
            value, new, metrics = distillation(params, state, 0.5, *inputs)
            return value, (new, metrics)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, student)

    errors = []
    for _ in range(30):
        before = params
        (value, (state, metrics)), (g_params, g_student) = step(params, state, jnp.float32(1.5))
        errors.append(float(value))
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, g_params)
        assert not any(np.any(g) for g in jax.tree.leaves(g_student))
    assert errors[-1] < 0.9 * errors[0]
    for path, active, rest in inside(g_params, distillation.likes[0.5]["params"]):
        assert np.any(active) == path.startswith("paraphraser") and not np.any(rest), path
    # The copy is of the step's own weights, inside the block, and the rest of it is as it was.
    close(state["frozen"]["weights"], before["paraphraser"], 0)

    # Afterwards whatever happens to the parameters, weight decay above all, the factor stays.
    after = jnp.float32(2.0)
    decayed = params | {"paraphraser": jax.tree.map(jnp.zeros_like, params["paraphraser"])}
    results = [step(p, state, after) for p in (params, decayed)]
    np.testing.assert_array_equal(results[0][0][0], results[1][0][0])
    (value, (new, metrics)), (g_params, g_student) = results[0]
    close(new["frozen"], state["frozen"], 0)
    np.testing.assert_allclose(value, metrics["cross_entropy"] + 200 * metrics["distillation"], rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction"], errors[-1], rtol=1e-5)
    assert np.any(g_student.stages[-1]) and not any(np.any(g) for g in jax.tree.leaves(g_params["paraphraser"]))
    # By hand: both factors of the narrow stage.
    block = slimmable.take({"params": params, **state}, distillation.likes[0.5])
    teacher = teachers[0.5].stages[-1]
    factor, rebuilt = Paraphraser(16).apply({"params": block["frozen"]["weights"]}, teacher)
    translator = {k: block[k]["translator"] for k in ("params", "batch_stats")}
    translated, _ = Translator(16).apply(translator, student.stages[-1], mutable=["batch_stats"])
    assert factor.shape == translated.shape == (4, 2, 2, 16) and rebuilt.shape == teacher.shape
    np.testing.assert_allclose(metrics["distillation"], ft_loss(translated, factor), rtol=1e-5)
    assert fitted("ft", pairs["resnet"], ratio=0.25).likes[1.0]["params"]["translator"]["conv3"]["kernel"].shape[-1] == 16


def test_ft_of_whole_factors_at_a_width(pairs):
    student, teachers = pairs["resnet"]
    _, metrics, params, state = run("ft", pairs["resnet"], 0.5, whole_factors=True)
    like = fitted("ft", pairs["resnet"], whole_factors=True).likes[0.5]
    block = slimmable.take({"params": params, **state}, like)
    teacher = teachers[0.5].stages[-1]
    factor, rebuilt = Paraphraser(16).apply({"params": block["frozen"]["weights"]}, teacher)
    translated = Translator(16, False).apply({"params": block["params"]["translator"]}, student.stages[-1])
    s, t = (np.asarray(x, np.float64).reshape(4, -1) for x in (translated, factor))
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    np.testing.assert_allclose(metrics["distillation"], np.mean(np.abs(s - t)), rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction"], np.mean(np.abs(rebuilt - teacher)), rtol=1e-5)


@pytest.mark.parametrize(
    ("each", "epochs", "said"),
    [
        (False, [30.0], "30 epochs in which no label is seen fill the run, of 30 epochs; give fewer, such as 3.8"),
        (True, [10.0, 12.0], "30 epochs in which no label is seen fill each stage, of 12 epochs; give fewer, such as 1.5"),
        (False, [30.1], ""),
        (False, [10.0, 12.0], ""),  # the second stage has labels
        (True, [10.0, 31.0], ""),
    ],
)
def test_an_initial_phase_leaves_something_of_the_run(each, epochs, said):
    method = distillers.create("ab", initial_each_stage=each)
    with pytest.raises(UserError, match=f"^student.distiller.initial_epochs: {said}$") if said else contextlib.nullcontext():
        distillers.check_initial(method, epochs)
    distillers.check_initial(distillers.create("ab", initial_epochs=0.0), epochs)
    distillers.check_initial(distillers.create("kd"), epochs)


def test_a_run_without_an_initial_phase_of_ft_is_refused_but_ab_is_cross_entropy(pairs):
    with pytest.raises(UserError, match=r"^initial_epochs: 0 is not possible; it should be above 0, for an untrained"):
        FT(initial_epochs=0.0)
    total, metrics, _, _ = run("ab", pairs["cross"], progress=FIRST, initial_epochs=0.0)
    np.testing.assert_allclose(total, metrics["cross_entropy"], rtol=1e-6)


REFUSED = r"^student.distiller: {} needs '{}', which the {}'s model does not return"
NEEDS = {  # {method: (what it asks of the student, of the teacher)}
    "AB": (("preact",), ("preact",)),
    "FT": (("stages",), ("stages",)),
    "OFD": (("preact",), ("preact",)),
    "ReviewKD": (("stages", "pooled"), ("preact", "pooled")),
    "SRRL": (("pooled",), ("pooled", "head")),
    "SimKD": (("final",), ("final", "head")),
}


@pytest.mark.parametrize("method", NEEDS)
def test_models_without_the_taps_are_refused(method, pairs):
    student, teachers = pairs["cross"]
    for who, fields in zip(("student", "teacher"), NEEDS[method], strict=True):
        for field in models.Outputs._fields[1:]:
            blank = {field: () if field in ("stages", "preact", "norms") else None}
            own, taught = student, teachers[1.0]
            own, taught = (own._replace(**blank), taught) if who == "student" else (own, taught._replace(**blank))
            if field in fields:
                with pytest.raises(UserError, match=REFUSED.format(method, field, who)):
                    fitted(method.lower(), (own, {1.0: taught}))
            elif (method, who, field) != ("OFD", "teacher", "norms"):
                fitted(method.lower(), (own, {1.0: taught}))


def test_pairs_that_cannot_be_served_are_refused(pairs):
    same, cross = pairs["same"], pairs["cross"]
    fewer = same[0]._replace(stages=same[0].stages[1:], preact=same[0].preact[1:])
    for name, method in (("ab", "AB"), ("reviewkd", "ReviewKD")):
        sentence = rf"^student.distiller: {method} compares stages one to one, and the student has 2, the teacher 3: choose"
        with pytest.raises(UserError, match=sentence):
            fitted(name, (fewer, same[1]))
    with pytest.raises(UserError, match=r"^student.distiller: AB takes the student's map of 4 pixels a side .* of 16"):
        fitted("ab", (same[0]._replace(preact=(same[0].preact[1],) * 3), cross[1]))
    match = r"^student.distiller: AB without connectors .* stage 1 is \(8, 8, 6\) in the student but \(8, 8, 3\) in the .* true"
    with pytest.raises(UserError, match=match):
        fitted("ab", same, connectors=False)
    t = same[1][1.0]
    sentence = r"^student.distiller: OFD needs 'norms', the scale and bias .* which the teacher's model does not return"
    for norms in ((), t.norms[:2], t.norms[::-1]):
        with pytest.raises(UserError, match=sentence):
            fitted("ofd", (same[0], {1.0: t._replace(norms=norms)}))
    sentence = r"^student.distiller: {} puts features like {} through .* reads 7 where .* 10 channels: choose a teacher whose"
    odd = (same[0], {1.0: t._replace(head=(jnp.zeros((7, 10)), jnp.zeros(10)))})
    for name, method, what in (("srrl", "SRRL", "its pooled vector"), ("simkd", "SimKD", "its last map")):
        with pytest.raises(UserError, match=sentence.format(method, what)):
            fitted(name, odd)


@pytest.mark.parametrize(
    "name, options",
    [
        ("ab", {"margin": 0.0}),
        ("ab", {"initial_epochs": -1.0}),
        ("ft", {"ratio": 0.0}),
        ("ft", {"initial_epochs": -1.0}),
        ("reviewkd", {"warmup_epochs": -1.0}),
        ("reviewkd", {"middle": 0}),
        ("simkd", {"factor": 0}),
    ],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(UserError, match=rf"^{next(iter(options))}: .* is not possible"):
        distillers.create(MODULES[name], **options)
