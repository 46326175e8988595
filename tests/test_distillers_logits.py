"""The logit distillers: losses against reference values and independent float64 formulas, modules under the staging."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, network_outputs
from scipy.special import expit, logsumexp
from test_distillers import BATCH

from pwkd_jax import distillers, models
from pwkd_jax.distillers.ctkd import curriculum, reverse
from pwkd_jax.distillers.dist import dist_losses
from pwkd_jax.distillers.dkd import dkd_losses
from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.logits import ramp
from pwkd_jax.distillers.mlkd import batch_loss, class_loss
from pwkd_jax.distillers.nkd import nkd_loss
from pwkd_jax.distillers.ofa import Halve, ofa_loss
from pwkd_jax.distillers.rld import rld_losses
from pwkd_jax.distillers.standardise import standardise
from pwkd_jax.distillers.student_friendly import simplify
from pwkd_jax.errors import UserError

MODULES = {
    "dkd": "pwkd_jax.distillers.dkd:DKD",
    "dist": "pwkd_jax.distillers.dist:DIST",
    "nkd": "pwkd_jax.distillers.nkd:NKD",
    "rld": "pwkd_jax.distillers.rld:RLD",
    "mlkd": "pwkd_jax.distillers.mlkd:MLKD",
    "ctkd": "pwkd_jax.distillers.ctkd:CTKD",
    "ofa": "pwkd_jax.distillers.ofa:OFA",
    "student_friendly": "pwkd_jax.distillers.student_friendly:StudentFriendly",
}

# Every loss as a function of (student logits, teacher logits, labels), at its golden or default setting.
LOSSES = {
    "DKD_a1_b8_T4": lambda s, t, y: jnp.dot(jnp.stack(dkd_losses(s, t, y, 4.0)), jnp.array([1.0, 8.0])),
    "DKD_TCKD_T4": lambda s, t, y: dkd_losses(s, t, y, 4.0)[0],
    "DKD_NCKD_T4": lambda s, t, y: dkd_losses(s, t, y, 4.0)[1],
    "DIST_tau4": lambda s, t, y: sum(dist_losses(s, t, 4.0)),
    "LSKD_T2": lambda s, t, y: kd_loss(standardise(s), standardise(t), 2.0),
    "MLKD_cc_T4": lambda s, t, y: class_loss(s, t, 4.0),
    "MLKD_bc_T4": lambda s, t, y: batch_loss(s, t, 4.0),
    "OFA_eps1.5_T1": lambda s, t, y: ofa_loss(s, t, y, 1.5, 1.0),
    "NKD": lambda s, t, y: nkd_loss(s, t, y, 1.5, 2.0),
    "RLD_SCD": lambda s, t, y: rld_losses(s, t, y, 1.0, 4.0)[0],
    "RLD_MCD": lambda s, t, y: rld_losses(s, t, y, 1.0, 4.0)[1],
}
GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_logit_losses.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden_logits):
    return tuple(golden_logits[k] for k in ("logits_s", "logits_t", "labels"))


def log_softmax(z):
    return z - logsumexp(z, axis=-1, keepdims=True)


def loops_nkd(s, t, labels, gamma, temperature):
    total = 0.0
    for zs, zt, y in zip(s, t, labels, strict=True):
        rest = np.arange(len(zs)) != y
        target = -np.exp(log_softmax(zt))[y] * log_softmax(zs)[y]
        others = -np.sum(np.exp(log_softmax(zt[rest] / temperature)) * log_softmax(zs[rest] / temperature))
        total += target + gamma * temperature**2 * others
    return total / len(s)


def loops_rld(s, t, labels, confidence_temperature, temperature):
    scd, mcd = 0.0, 0.0
    for zs, zt, y in zip(s, t, labels, strict=True):
        qs, qt = (np.exp(log_softmax(z / confidence_temperature)) for z in (zs, zt))
        for a, b in ((qt.max(), qs[y]), (1 - qt.max(), 1 - qs[y])):
            scd += confidence_temperature**2 * a * np.log(a / b)
        below = zt < zt[y]
        if below.any():
            ls, lt = (log_softmax(z[below] / temperature) for z in (zs, zt))
            mcd += temperature**2 * np.sum(np.exp(lt) * (lt - ls))
    return scd / len(s), mcd / len(s)


def as64(arrays):
    return tuple(np.asarray(x, np.float64) if x.dtype.kind == "f" else x for x in arrays)


def independent(name, arrays):
    s, t, labels = as64(arrays)
    if name == "NKD":
        return loops_nkd(s, t, labels, 1.5, 2.0)
    return loops_rld(s, t, labels, 1.0, 4.0)[name == "RLD_MCD"]


@pytest.mark.parametrize("name", [k for k in LOSSES if k in GOLDEN])
def test_losses_equal_the_reference(name, arrays):
    expected = GOLDEN[name]
    value, grad = jax.jit(jax.value_and_grad(LOSSES[name]))(*arrays)
    np.testing.assert_allclose(value, expected["value"], rtol=2e-5)
    np.testing.assert_allclose(jnp.linalg.norm(grad), expected["grad_l2_total"], rtol=1e-4)
    with jax.enable_x64(True):
        value, grad = jax.jit(jax.value_and_grad(LOSSES[name]))(*as64(arrays))
        assert value.dtype == grad.dtype == jnp.float64
        np.testing.assert_allclose(value, expected["value_float64"], rtol=1e-7)
        np.testing.assert_allclose(jnp.linalg.norm(grad), expected["grad_l2_total"], rtol=1e-5)


@pytest.mark.parametrize("name", [k for k in LOSSES if k not in GOLDEN])
def test_losses_equal_independent_formulas(name, arrays):
    value, grad = jax.jit(jax.value_and_grad(LOSSES[name]))(*arrays)
    np.testing.assert_allclose(value, independent(name, arrays), rtol=2e-5)
    with jax.enable_x64(True):
        s, t, labels = as64(arrays)
        value, grad64 = jax.jit(jax.value_and_grad(LOSSES[name]))(s, t, labels)
        np.testing.assert_allclose(value, independent(name, arrays), rtol=1e-10)
        # The gradient along a random direction against a central difference of the independent formula.
        step = 1e-5 * np.random.default_rng(0).standard_normal(s.shape)
        difference = (independent(name, (s + step, t, labels)) - independent(name, (s - step, t, labels))) / 2
        np.testing.assert_allclose(np.sum(np.asarray(grad64) * step), difference, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(grad), np.linalg.norm(grad64), rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_bfloat16(name, arrays):
    """Rounding the inputs moves a loss by little, and the arithmetic after them is float32."""
    s, t, labels = arrays
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (s, t)]
    loss = jax.jit(jax.value_and_grad(LOSSES[name]))
    value, grad = loss(*rounded, labels)
    assert value.dtype == jnp.float32 and grad.dtype == jnp.bfloat16 and np.all(np.isfinite(grad.astype(jnp.float32)))
    np.testing.assert_allclose(value, loss(s, t, labels)[0], rtol=0.02)
    np.testing.assert_allclose(value, loss(*(x.astype(jnp.float32) for x in rounded), labels)[0], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_survive_extreme_logits(name):
    """A saturated student and teacher, equal logits in a row, a label that the teacher ranks last."""
    s = jnp.array([[1e4, 0.0, -1e4, 5.0], [0.0, 0.0, 0.0, 0.0], [-300.0, 90.0, 0.0, 1.0], [60.0, -60.0, 0.0, 1.0]])
    t = jnp.array([[-1e4, 0.0, 1e4, 5.0], [2.0, 2.0, 2.0, 2.0], [1e3, -1e3, 0.0, 1.0], [60.0, -60.0, 0.0, 1.0]])
    labels = jnp.array([2, 0, 1, 0])
    value, grad = jax.jit(jax.value_and_grad(LOSSES[name]))(s, t, labels)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    if name.startswith(("DKD", "LSKD", "MLKD", "RLD_MCD")):  # divergences: nothing is left to learn of oneself
        assert abs(LOSSES[name](t, t, labels)) < 1e-6


def test_standardised_rows(arrays):
    z = np.asarray(arrays[0], np.float64)
    expected = (z - z.mean(-1, keepdims=True)) / (z.std(-1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(standardise(arrays[0]), expected, atol=1e-5)
    np.testing.assert_allclose(standardise(3 * arrays[0] + 7), expected, atol=1e-4)
    flat = jnp.ones((2, 5))
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda z: jnp.sum(standardise(z) ** 2)))(flat)))
    assert not np.any(standardise(flat))


def test_dist_of_linear_relations():
    """Two classes: a row correlates by its sign, a column as numpy has it, and a constant student not at all."""
    s, t = jnp.array([[1.0, 0.0], [3.0, 0.0], [-2.0, 0.0]]), jnp.array([[2.0, 0.0], [5.0, 0.0], [-1.0, 0.0]])
    inter, intra = jax.jit(lambda s, t: dist_losses(s, t, 1.0))(s, t)
    assert abs(inter) < 1e-5
    qs, qt = expit(np.array([1.0, 3.0, -2.0])), expit(np.array([2.0, 5.0, -1.0]))
    np.testing.assert_allclose(intra, 1 - np.corrcoef(qs, qt)[0, 1], rtol=1e-4)
    one, grad = jax.value_and_grad(lambda s: sum(dist_losses(s, t, 1.0)))(jnp.zeros((3, 2)))
    assert abs(one - 2) < 1e-5 and np.all(np.isfinite(grad))


def test_gradient_reversal_and_curriculum():
    value, grad = jax.value_and_grad(lambda x: reverse(x, 0.25) ** 2)(jnp.float32(0.1))
    assert value == np.float32(0.1) ** 2
    np.testing.assert_allclose(grad, -0.25 * 2 * 0.1, rtol=1e-6)
    strengths = [float(curriculum(jnp.float32(e), 10.0)) for e in (0, 5, 10, 30)]
    np.testing.assert_allclose(strengths, [0, 0.5, 1, 1], atol=1e-6)
    assert curriculum(jnp.float32(0), 0.0) == 1
    assert [float(ramp(jnp.float32(e), 20.0)) for e in (0, 5, 20, 70)] == [0, 0.25, 1, 1]
    assert ramp(jnp.float32(0), 0.0) == 1


def random_outputs(width: int, seed: int, maps=(), dtype=np.float32) -> models.Outputs:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    return models.Outputs(draw(4, 10), tuple(draw(4, *m) for m in maps), (), draw(4, width))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


SMALL_MAPS = ((8, 8, 4), (4, 4, 6))


@pytest.fixture(scope="module")
def pairs():
    """{name: (student's outputs, the teacher's at each width)}: invented ones and those of real networks."""
    images = np.random.default_rng(1).standard_normal((4, 8, 8, 3)).astype(np.float32)
    resnet14 = {w: network_outputs("resnet14", w, images) for w in (0.5, 1.0)}
    return {
        "same": (random_outputs(16, 0, SMALL_MAPS), {0.5: random_outputs(8, 1), 1.0: random_outputs(16, 2)}),
        "cross": (random_outputs(12, 0, SMALL_MAPS), {0.5: random_outputs(20, 1), 1.0: random_outputs(40, 2)}),
        "resnet": (network_outputs("resnet8", 1.0, images), resnet14),
    }


def started(name, pair, **options):
    """(fitted distiller, params and state, none of them at its initial value)."""
    student, teachers = pair
    fitted = distillers.build(distillers.create(MODULES[name], **options), *abstract((student, teachers)), BATCH)
    return fitted, *fitted.init(jax.random.key(0))


LABELS = jnp.array([0, 1, 2, 3])
MIDWAY = distillers.Progress(jnp.int32(1), jnp.int32(100), jnp.float32(5.0))


@pytest.mark.parametrize("name, pair", [
    *((n, "cross") for n in MODULES),
    *(pytest.param(n, p, marks=pytest.mark.slow) for n, p in [*((n, "same") for n in MODULES), ("ofa", "resnet")]),
])  # fmt: skip
def test_modules_follow_the_widths(name, pair, pairs):
    student, teachers = pairs[pair]
    fitted, params, state = started(name, pairs[pair])

    def total(variables, student, teacher, width, epoch):
        progress = MIDWAY._replace(epoch=epoch)
        return fitted(*variables, width, student, teacher, {"label": LABELS}, progress, jax.random.key(0))

    def loss(params, student, teacher, width):
        value, new, metrics = total((params, state), student, teacher, width, jnp.float32(5.0))
        return metrics["distillation"], (value, new, metrics)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    for width in [w for w in teachers if w < 1 or pair != "cross"]:  # the whole width only once
        teacher = teachers[width]
        (value, (weighed, new, metrics)), (g_params, g_student, g_teacher) = run(params, student, teacher, width)
        assert np.isfinite(value) and value.shape == () and all(np.all(np.isfinite(m)) for m in metrics.values())
        options = distillers.fields(MODULES[name])
        expected = options["ce_weight"] * metrics["cross_entropy"] + options["weight"] * value
        np.testing.assert_allclose(weighed, expected, rtol=1e-5)
        assert np.any(g_student.logits) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(g_student))
        close(g_teacher, jax.tree.map(jnp.zeros_like, teacher), 0)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        like = fitted.likes[width].get("params", {})
        paths = jax.tree_util.tree_flatten_with_path(g_params)[0]
        for (path, g), block in zip(paths, jax.tree.leaves(like), strict=True):
            active = np.zeros(g.shape, bool)
            active[tuple(slice(0, d) for d in block.shape)] = True
            assert np.any(np.asarray(g)[active]), path
            assert not np.any(np.asarray(g)[~active]), path
    if name == "ofa":
        # A narrow stage of a teacher that is wider than the student has fewer features to train.
        narrow, full = (fitted.likes[w]["params"]["head1"]["Dense_0"]["kernel"].shape[0] for w in (0.5, 1.0))
        assert (narrow, full) == {"same": (16, 16), "cross": (20, 40), "resnet": (64, 64)}[pair]
        assert all(np.any(g) for g in g_student.stages)


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_bfloat16(name, pairs):
    student, teachers = pairs["cross"]
    fitted, params, state = started(name, pairs["cross"])

    @jax.jit
    def loss(student, teacher):
        out = fitted(params, state, 1.0, student, teacher, {"label": LABELS}, MIDWAY, jax.random.key(0))
        return out[2]["distillation"]

    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student, teachers[1.0]))
    value = loss(*rounded)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(student, teachers[1.0]), rtol=0.02)


@pytest.mark.parametrize("name", ["dkd", "rld"])
def test_warm_up_restarts_with_the_stage(name, pairs):
    student, teachers = pairs["same"]
    fitted, params, state = started(name, pairs["same"])
    losses = []
    for epoch in (0.0, 5.0, 20.0, 45.0):
        progress = MIDWAY._replace(epoch=jnp.float32(epoch))
        out = fitted(params, state, 1.0, student, teachers[1.0], {"label": LABELS}, progress, jax.random.key(0))
        losses.append(float(out[2]["distillation"]))
    np.testing.assert_allclose(losses, [0, 0.25 * losses[2], losses[2], losses[2]], rtol=1e-6)
    first, second = {"dkd": ("target_class", "other_classes"), "rld": ("sample_confidence", "masked_correlation")}[name]
    np.testing.assert_allclose(losses[2], out[2][first] + 8 * out[2][second], rtol=1e-6)


def test_weights_of_the_terms(pairs):
    """alpha, beta, gamma, stages_weight and the temperatures reach the loss they name."""
    student, teachers = pairs["same"]

    def value(name, **options):
        fitted, params, state = started(name, pairs["same"], **options)
        progress = MIDWAY._replace(epoch=jnp.float32(99))
        out = fitted(params, state, 1.0, student, teachers[1.0], {"label": LABELS}, progress, jax.random.key(0))
        return float(out[2]["distillation"])

    s, t = student.logits, teachers[1.0].logits
    inter, intra = dist_losses(s, t, 2.0)
    np.testing.assert_allclose(value("dist", beta=3.0, gamma=0.5, temperature=2.0), 3 * inter + 0.5 * intra, rtol=1e-5)
    target, others = dkd_losses(s, t, LABELS, 2.0)
    np.testing.assert_allclose(value("dkd", alpha=3.0, beta=0.5, temperature=2.0), 3 * target + 0.5 * others, rtol=1e-5)
    scd, mcd = rld_losses(s, t, LABELS, 3.0, 2.0)
    rld = value("rld", alpha=3.0, beta=0.5, confidence_temperature=3.0, temperature=2.0)
    np.testing.assert_allclose(rld, 3 * scd + 0.5 * mcd, rtol=1e-5)
    np.testing.assert_allclose(value("nkd", gamma=2.0, temperature=3.0), nkd_loss(s, t, LABELS, 2.0, 3.0), rtol=1e-5)
    mlkd = sum(f(s, t, u) for f in (kd_loss, batch_loss, class_loss) for u in (1.0, 3.0))
    np.testing.assert_allclose(value("mlkd", temperatures=(1.0, 3.0)), mlkd, rtol=1e-5)
    np.testing.assert_allclose(value("ofa", stages_weight=0.0, eps=1.4), ofa_loss(s, t, LABELS, 1.4, 1.0), rtol=1e-5)


def test_ctkd_raises_its_loss_once_the_curriculum_lets_it(pairs):
    # Confident logits: at T = 15.6 those of the other tests would hardly differ, nor would their loss lean on T.
    student, teacher = (x._replace(logits=20 * x.logits) for x in (pairs["same"][0], pairs["same"][1][1.0]))
    fitted, params, state = started("ctkd", (student, {1.0: teacher}))

    @jax.jit
    def run(params, epoch):
        progress = MIDWAY._replace(epoch=epoch)
        out = fitted(params, state, 1.0, student, teacher, {"label": LABELS}, progress, jax.random.key(0))
        return out[2]["distillation"], out[2]["temperature"]

    def at(raw):
        temperature = 1 + 20 * expit(raw)
        ls, lt = (log_softmax(np.asarray(x.logits, np.float64) / temperature) for x in (student, teacher))
        return temperature**2 * np.mean(np.sum(np.exp(lt) * (lt - ls), -1))

    value, temperature = run(params, jnp.float32(5))
    np.testing.assert_allclose(temperature, 15.62, rtol=1e-6)
    raw = float(params["raw"])
    np.testing.assert_allclose(value, at(raw), rtol=1e-5)
    assert raw == pytest.approx(1.0, abs=1e-3)
    slope = (at(raw + 1e-4) - at(raw - 1e-4)) / 2e-4
    slope_of = jax.grad(lambda p, e: run(p, e)[0])
    for epoch, strength in ((0.0, 0.0), (5.0, 0.5), (10.0, 1.0), (50.0, 1.0)):
        grad = slope_of(params, jnp.float32(epoch))["raw"]
        np.testing.assert_allclose(grad, -strength * slope, rtol=2e-3, atol=1e-6)
    descended = {"raw": params["raw"] - 0.5 * grad / jnp.abs(grad)}
    assert run(descended, jnp.float32(50))[0] > value
    assert run(descended, jnp.float32(50))[1] > 1


def test_ofa_heads(pairs):
    """The last stage's head by hand, the blocks' sizes, and a student or a teacher without features."""
    student, teachers = pairs["same"]
    fitted, params, state = started("ofa", pairs["same"], eps=1.3)
    run = jax.jit(lambda s: fitted(params, state, 1.0, s, teachers[1.0], {"label": LABELS}, MIDWAY, jax.random.key(0)))
    one = student._replace(stages=student.stages[1:])
    alone = distillers.build(fitted.distiller, *abstract((one, teachers)), BATCH)
    renamed, none = {"head1": params["head2"]}, {}
    metrics = alone(renamed, none, 1.0, one, teachers[1.0], {"label": LABELS}, MIDWAY, jax.random.key(0))[2]
    p = jax.tree.map(np.asarray, params["head2"])
    x = np.asarray(student.stages[1]) @ p["Conv_0"]["kernel"][0, 0] + p["Conv_0"]["bias"]
    logits = x.mean((1, 2)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    expected = ofa_loss(jnp.asarray(logits), teachers[1.0].logits, LABELS, 1.3, 1.0)
    np.testing.assert_allclose(metrics["stage_level"], expected, rtol=1e-5)
    both = run(student)[2]["stage_level"]
    np.testing.assert_allclose(both - expected, run_head1(fitted, params, student, teachers[1.0]), rtol=1e-4)
    resnet = started("ofa", pairs["resnet"])[1]
    assert [sum("Halve" in k for k in resnet[f"head{i}"]) for i in (1, 2, 3)] == [2, 1, 0]
    assert resnet["head1"]["Halve_0"]["Conv_3"]["kernel"].shape == (1, 1, 16, 32)

    bare = models.Outputs(student.logits)
    with pytest.raises(UserError, match=r"student.distiller: OFA needs 'stages', which the student's model does not"):
        distillers.build(fitted.distiller, *abstract((bare, teachers)), BATCH)
    fitted = distillers.build(fitted.distiller, *abstract((student, {1.0: bare})), BATCH)
    assert fitted.likes[1.0]["params"]["head1"]["Dense_0"]["kernel"].shape == (16, 10)


def run_head1(fitted, params, student, teacher):
    """The first stage's share: its block of separable convolutions, pooled and projected."""
    p = params["head1"]
    x, _ = Halve(16).apply({"params": p["Halve_0"]}, student.stages[0], mutable=["batch_stats"])
    assert x.shape == (4, 4, 4, 16)
    logits = jnp.mean(x, axis=(1, 2)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    return ofa_loss(logits, teacher.logits, LABELS, 1.3, 1.0)


def test_separable_block_by_hand():
    """Symmetric padding at stride 2 and statistics of the batch, from sums over shifted windows."""
    x = np.random.default_rng(0).standard_normal((3, 6, 6, 2))
    block = Halve(5)
    params = block.init(jax.random.key(0), jnp.asarray(x, jnp.float32))["params"]
    y = jax.jit(lambda x: block.apply({"params": params}, x, mutable=["batch_stats"])[0])(jnp.asarray(x, jnp.float32))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for i, stride in enumerate((2, 1)):
        size = x.shape[1] // stride
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = p[f"Conv_{2 * i}"]["kernel"][:, :, 0]
        x = np.zeros((3, size, size, 2))
        for a in range(3):
            for b in range(3):
                x += padded[:, a : a + stride * size : stride, b : b + stride * size : stride] * kernel[a, b]
        x = x @ p[f"Conv_{2 * i + 1}"]["kernel"][0, 0]
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        norm = p[f"BatchNorm_{i}"]
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"], 0)
    np.testing.assert_allclose(y, x, atol=2e-5)


def test_student_friendly_simplifies_within_bounds(pairs):
    student, teachers = pairs["same"]
    fitted, params, state = started("student_friendly", pairs["same"], features=6)
    t = np.asarray(teachers[1.0].logits, np.float64) / 4
    t -= t.mean(-1, keepdims=True)
    q, k = (t @ np.asarray(params[n]["kernel"]) + np.asarray(params[n]["bias"]) for n in ("queries", "keys"))
    a = np.exp(log_softmax(q @ k.T / np.sqrt(6)))
    lt, ls = log_softmax((t + a @ t) / 2), log_softmax(np.asarray(student.logits, np.float64) / 4)
    expected = 16 * np.mean(np.sum(np.exp(lt) * (lt - ls), -1))
    rest = (state, 1.0, student, teachers[1.0], {"label": LABELS}, MIDWAY, jax.random.key(0))
    run = jax.jit(lambda p: fitted(p, *rest)[2])
    metrics = run(params)
    np.testing.assert_allclose(metrics["distillation"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["target_entropy"], -np.mean(np.sum(np.exp(lt) * lt, -1)), rtol=1e-5)
    # Jointly trained: a step down its own gradient makes the target easier for this student.
    grads = jax.grad(lambda p: run(p)["distillation"])(params)
    easier = jax.tree.map(lambda x, g: x - 0.05 * g, params, grads)
    assert run(easier)["distillation"] < metrics["distillation"]
    # Attention that sees no difference mixes in the batch's mean; attention to oneself alone changes nothing.
    x = jnp.asarray(t, jnp.float32)
    np.testing.assert_allclose(simplify(x, jnp.zeros((4, 3)), jnp.zeros((4, 3))), (t + t.mean(0)) / 2, atol=1e-6)
    np.testing.assert_allclose(simplify(x, 100 * jnp.eye(4), 100 * jnp.eye(4)), t, atol=1e-6)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dkd", {"temperature": 0.0}, "temperature: 0 is not possible; it should be above 0"),
        ("dist", {"temperature": -1.0}, "temperature: -1 is not"),
        ("nkd", {"temperature": 0.0}, "temperature: 0 is not"),
        ("rld", {"confidence_temperature": 0.0}, "confidence_temperature: 0 is not"),
        ("rld", {"temperature": 0.0}, "temperature: 0 is not"),
        ("mlkd", {"temperatures": (4.0, 0.0)}, "temperatures: 0 is not"),
        ("mlkd", {"temperatures": ()}, "temperatures: there are none"),
        ("ctkd", {"lowest": 0.0}, "lowest: 0 is not"),
        ("ctkd", {"span": 0.0}, "span: 0 is not"),
        ("ctkd", {"start": 1.0}, "start: 1 is not possible; it should lie between lowest = 1 and lowest \\+ span = 21"),
        ("ofa", {"eps": 0.0}, "eps: 0 is not"),
        ("ofa", {"temperature": float("nan")}, "temperature: nan is not"),
        ("student_friendly", {"temperature": 0.0}, "temperature: 0 is not"),
        ("student_friendly", {"features": 0}, "features: 0 is not"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        distillers.create(MODULES[name], **options)


@pytest.mark.parametrize("name", MODULES)
def test_every_option_is_a_config_key(name):
    fields = distillers.fields(MODULES[name])
    assert {"ce_weight", "weight"} <= fields.keys()
    assert all(isinstance(v, float | int | bool | str | tuple) for v in fields.values())
    assert issubclass(type(distillers.create(MODULES[name], **fields)), nn.Module)
