"""The feature and relation distillers: losses against reference values and independent formulas, modules under staging."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, network_outputs
from test_distillers import BATCH

from pwkd_jax import distillers, models, slimmable
from pwkd_jax.distillers.at import at_loss
from pwkd_jax.distillers.cc import cc_loss
from pwkd_jax.distillers.feature_maps import adaptive_pool, normalise
from pwkd_jax.distillers.fitnet import hint_loss
from pwkd_jax.distillers.fsp import fsp_loss
from pwkd_jax.distillers.kdsvd import kdsvd_loss, leading, right_vectors
from pwkd_jax.distillers.nst import nst_loss
from pwkd_jax.distillers.pkt import pkt_loss
from pwkd_jax.distillers.regressors import ConvReg
from pwkd_jax.distillers.rkd import angle_loss, distance_loss
from pwkd_jax.distillers.sp import sp_loss
from pwkd_jax.distillers.vid import Guess, vid_loss
from pwkd_jax.errors import UserError

MODULES = {
    "fitnet": "pwkd_jax.distillers.fitnet:FitNet",
    "at": "pwkd_jax.distillers.at:AT",
    "sp": "pwkd_jax.distillers.sp:SP",
    "cc": "pwkd_jax.distillers.cc:CC",
    "vid": "pwkd_jax.distillers.vid:VID",
    "rkd": "pwkd_jax.distillers.rkd:RKD",
    "pkt": "pwkd_jax.distillers.pkt:PKT",
    "nst": "pwkd_jax.distillers.nst:NST",
    "fsp": "pwkd_jax.distillers.fsp:FSP",
    "kdsvd": "pwkd_jax.distillers.kdsvd:KDSVD",
}
GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_features.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    """The reference's inputs: maps as NHWC, kernels as HWIO."""
    stream = np.random.RandomState(0).randn(450_000)
    made = {}
    for name, a in GOLDEN["arrays"].items():
        x = stream[a["offset"] : a["offset"] + np.prod(a["shape"])].reshape(a["shape"]).astype(np.float32)
        x = x * np.float32(a["scale"])
        if name == "cr_up2_w":  # IOHW there, and a transposed convolution turns its kernel by half
            x = x[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
        elif name.endswith(("_w", "_w0", "_w1", "_w2")):
            x = x.transpose(2, 3, 1, 0)
        elif x.ndim == 4:
            x = x.transpose(0, 2, 3, 1)
        made[name] = x
        if name.startswith("stage"):
            made[name.replace("stage", "relu")] = np.maximum(x, 0)
    return made | {"vid_log_scale": np.array(GOLDEN["vid_log_scale"], np.float32)}


def vid(a):
    params = {f"conv{i + 1}": {"kernel": a[f"vid_w{i}"]} for i in range(3)} | {"scale": a["vid_log_scale"]}
    return vid_loss(*Guess(32, 5.0).apply({"params": params}, a["fmap_s"]), a["fmap_t"])


def regress(form):
    def loss(a):
        x, t = a[f"cr_{form}_x"], a[f"cr_{form}_t"]
        params = {"conv": {"kernel": a[f"cr_{form}_w"]}, "norm": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}
        stats = {"norm": {"mean": jnp.zeros(16), "var": jnp.ones(16)}}
        regressor = ConvReg(16, t.shape[1:3], "FitNet")
        return hint_loss(regressor.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])[0], t)

    return loss


def stages(a, kind):
    return tuple(tuple(a[f"{kind}{i}_{who}"] for i in range(3)) for who in "st")


def zipped(maps):
    return list(zip(*maps, strict=True))


# Every loss of the reference's arrays, by its name there.
LOSSES = {
    "AT_p2": lambda a: at_loss(a["fmap_s"], a["fmap_t"], 2.0),
    "SP": lambda a: sp_loss(a["fmap_s"], a["fmap_t"]),
    "CC_noembed": lambda a: cc_loss(a["pooled_s"], a["pooled_t_same"]),
    "RKD_dist_only": lambda a: distance_loss(a["pooled_s"], a["pooled_t"]),
    "RKD_angle_only": lambda a: angle_loss(a["pooled_s"], a["pooled_t"], 12),
    "PKT": lambda a: pkt_loss(a["pooled_s"], a["pooled_t"]),
    "NST": lambda a: nst_loss(a["fmap_s"], a["fmap_t"]),
    "FSP_3stage": lambda a: fsp_loss(*stages(a, "stage")),
    "KDSVD_k1_signfixed": lambda a: kdsvd_loss(zipped(stages(a, "relu")), 1),
    "VID": vid,
    "Hint_MSE": lambda a: hint_loss(a["fmap_s"], a["fmap_t_same"]),
    **{f"FitNet_ConvReg_{form}": regress(form) for form in ("same", "down2", "up2", "valid")},
}
TRAINED = {"log_scale": "vid_log_scale"}  # names under grad_l2_params that differ


def reads(name) -> dict[str, float | None]:
    """The inputs that a loss is differentiated by, with the reference's gradient norms where it gives them."""
    expected = GOLDEN["losses"].get(name, {"grad_l2": {"pooled_s": None}})
    return expected["grad_l2"] | {TRAINED.get(k, k): v for k, v in expected.get("grad_l2_params", {}).items()}


def valued(name, arrays, dtype):
    """(value, {input: gradient}) of a loss, all arrays in `dtype`."""
    a = {k: jnp.asarray(x, dtype) for k, x in arrays.items()}
    return derivative(name)({k: a[k] for k in reads(name)}, a)


@functools.cache
def derivative(name):
    return jax.jit(jax.value_and_grad(lambda wanted, a: LOSSES[name](a | wanted)))


@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_losses_equal_the_reference(name, arrays):
    expected = GOLDEN["losses"][name]
    value, grads = valued(name, arrays, jnp.float32)
    loose = 1e-3 if "KDSVD" in name else 0
    np.testing.assert_allclose(value, expected["value"], rtol=max(loose, 2e-5))
    for key, norm in reads(name).items():
        np.testing.assert_allclose(jnp.linalg.norm(grads[key]), norm, rtol=max(loose, 1e-4), err_msg=key)
    with jax.enable_x64(True):
        value, grads = valued(name, arrays, jnp.float64)
        assert value.dtype == jnp.float64
        # The ConvReg entries were given in single precision alone.
        np.testing.assert_allclose(value, expected.get("value_float64", expected["value"]), rtol=2e-7)
        for key, norm in reads(name).items():
            np.testing.assert_allclose(jnp.linalg.norm(grads[key]), norm, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_bfloat16(name, arrays):
    """Rounding the inputs moves a loss by little, and the arithmetic after them is float32."""
    value, grads = valued(name, arrays, jnp.bfloat16)
    for g in grads.values():
        assert g.dtype == jnp.bfloat16 and np.all(np.isfinite(g.astype(jnp.float32))) and np.any(g)
    np.testing.assert_allclose(value.astype(jnp.float32), valued(name, arrays, jnp.float32)[0], rtol=0.02)
    if "ConvReg" not in name and name != "VID":  # whose convolutions are called in bfloat16 here, unlike in the modules
        rounded = {k: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for k, x in arrays.items()}
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, valued(name, rounded, jnp.float32)[0], rtol=1e-5)


# Independent formulas: loops over samples in double precision.


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


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


def loops_at(s, t, p):
    maps = [unit((np.abs(x) ** p).mean(-1).reshape(len(x), -1)) for x in loops_match(s, t)]
    return np.mean((maps[0] - maps[1]) ** 2)


def loops_nst(s, t):
    total = 0.0
    for a, b in zip(*loops_match(s, t), strict=True):
        a, b = (unit(x.reshape(-1, x.shape[-1]).T) for x in (a, b))
        total += np.mean((a @ a.T) ** 2) + np.mean((b @ b.T) ** 2) - 2 * np.mean((a @ b.T) ** 2)
    return total / len(s)


def loops_pkt(s, t):
    probabilities = []
    for x in (s, t):
        similarity = (unit(x) @ unit(x).T + 1) / 2
        probabilities.append(similarity / similarity.sum(1, keepdims=True))
    ps, pt = probabilities
    return np.mean(pt * np.log((pt + 1e-7) / (ps + 1e-7)))


def huber(x):
    return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def loops_rkd(s, t):
    n, distances, angles = len(s), [], []
    for x in (s, t):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        distances.append(d / (d.sum() / (n * (n - 1))))
        e = np.array([[(b - a) / max(np.linalg.norm(b - a), 1e-300) for b in x] for a in x])
        angles.append(np.array([[[e[i, j] @ e[i, k] for k in range(n)] for j in range(n)] for i in range(n)]))
    return huber(distances[0] - distances[1]).mean(), huber(angles[0] - angles[1]).mean()


def loops_kdsvd(pairs, k):
    total = 0.0
    for b in range(len(pairs[0][0])):
        before = None
        for s, t in pairs:
            (_, size, vt), (_, _, vs) = (np.linalg.svd(x[b].reshape(-1, x.shape[-1]), full_matrices=False) for x in (t, s))
            size, now = unit(size[:k]), ([], [])
            for j in range(k):
                v = vt[j] * (1 if vt[j].sum() >= 0 else -1)
                u = max(vs[: k + 3], key=lambda u: abs(u @ v))
                now[0].append(np.sign(u @ v) * u * size[j])
                now[1].append(v * size[j])
            if before is not None:
                for j in range(k):
                    rs, rt = (np.exp(-((y[j][:, None] - x[j][None]) ** 2) / 8) for x, y in zip(before, now, strict=True))
                    total += np.sum((rs - rt) ** 2)
            before = now
    return total / len(pairs[0][0])


def test_pkt_equals_an_independent_formula(arrays):
    value, grads = valued("PKT", arrays, jnp.float32)
    s, t = (arrays[k].astype(np.float64) for k in ("pooled_s", "pooled_t"))
    np.testing.assert_allclose(value, loops_pkt(s, t), rtol=2e-5)
    with jax.enable_x64(True):
        value, exact = valued("PKT", arrays, jnp.float64)
        np.testing.assert_allclose(value, loops_pkt(s, t), rtol=1e-10)
        step = 1e-5 * np.random.default_rng(0).standard_normal(s.shape)
        difference = (loops_pkt(s + step, t) - loops_pkt(s - step, t)) / 2
        np.testing.assert_allclose(np.sum(np.asarray(exact["pooled_s"]) * step), difference, rtol=1e-6)
    close(grads["pooled_s"], exact["pooled_s"], 1e-9)


def test_maps_of_unequal_sizes(arrays):
    """Pooled to the smaller, divisible or not, with fewer channels than pixels and with more, and any power of AT."""
    rng = np.random.default_rng(0)
    s, wide, uneven = rng.standard_normal((3, 7, 7, 5)), rng.standard_normal((3, 4, 4, 20)), rng.standard_normal((3, 9, 6, 4))
    with jax.enable_x64(True):
        np.testing.assert_allclose(adaptive_pool(s, (4, 3)), loops_pool(s, (4, 3)), rtol=1e-10)
        for t in (wide, uneven):
            np.testing.assert_allclose(jax.jit(nst_loss)(s, t), loops_nst(s, t), rtol=1e-9)
            for p in (1.0, 2.0, 3.0):
                np.testing.assert_allclose(jax.jit(at_loss, static_argnums=2)(s, t, p), loops_at(s, t, p), rtol=1e-9)
        assert jax.jit(nst_loss)(wide, uneven) == pytest.approx(loops_nst(wide, uneven), rel=1e-9)
    assert adaptive_pool(s, (7, 7)) is s


def test_nst_of_many_channels_never_compares_them_all():
    x = jax.ShapeDtypeStruct((2, 2, 2, 512), jnp.float32)
    compiled = jax.jit(jax.grad(nst_loss)).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * 512**2 / 4


def test_rkd_equals_loops_whatever_the_chunk(arrays):
    s, t = arrays["pooled_s"][:10].astype(np.float64), arrays["pooled_t"][:10].astype(np.float64)
    s[3] = s[7]  # equal samples: no direction between them, and a root without a slope
    distance, angle = loops_rkd(s, t)
    with jax.enable_x64(True):
        assert jax.jit(distance_loss)(s, t) == pytest.approx(distance, rel=1e-9)
        grads = []
        for chunk in (1, 3, 64):
            value, grad = jax.jit(jax.value_and_grad(lambda s, c=chunk: angle_loss(s, t, c)))(s)
            assert value == pytest.approx(angle, rel=1e-9)
            grads.append(grad)
        for grad in grads[1:]:
            close(grad, grads[0], 1e-12)
        step = 1e-6 * np.random.default_rng(0).standard_normal(s.shape)
        step[3] = step[7]
        difference = [(a - b) / 2 for a, b in zip(loops_rkd(s + step, t), loops_rkd(s - step, t), strict=True)]
        assert np.sum(grads[0] * step) == pytest.approx(difference[1], rel=1e-5)
        assert np.sum(jax.jit(jax.grad(distance_loss))(s, t) * step) == pytest.approx(difference[0], rel=1e-5)


def test_rkd_distances_do_not_drown_in_a_common_offset(arrays):
    s, t = arrays["pooled_s"], arrays["pooled_t"]
    np.testing.assert_allclose(distance_loss(s + np.float32(300), t), distance_loss(s, t), rtol=1e-3)


def test_rkd_memory_is_that_of_a_chunk():
    x = jax.ShapeDtypeStruct((96, 8), jnp.float32)
    cube = 4 * 96**3
    use = {}
    for chunk in (4, 96):
        compiled = jax.jit(jax.grad(lambda s, t, c=chunk: angle_loss(s, t, c))).lower(x, x).compile()
        use[chunk] = compiled.memory_analysis().temp_size_in_bytes
    assert use[4] < cube / 2 < cube < use[96]


def test_kdsvd_equals_loops_over_decompositions(arrays):
    pairs = zipped(stages(arrays, "relu"))
    as64 = [tuple(x.astype(np.float64) for x in pair) for pair in pairs]
    with jax.enable_x64(True):
        for k in (1, 2):
            np.testing.assert_allclose(jax.jit(lambda p, k=k: kdsvd_loss(p, k))(as64), loops_kdsvd(as64, k), rtol=1e-8)
        loss = jax.jit(jax.value_and_grad(lambda s: kdsvd_loss(zipped((s, zipped(as64)[1])), 2)))
        grad = loss(zipped(as64)[0])[1]
        rng = np.random.default_rng(0)
        step = tuple(1e-5 * rng.standard_normal(s.shape) for s in zipped(as64)[0])
        moved = [loss(tuple(s + sign * d for s, d in zip(zipped(as64)[0], step, strict=True)))[0] for sign in (1, -1)]
        slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(grad, step, strict=True))
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2, rtol=1e-4)
    # The same images give the same loss whatever the signs: turned maps have turned vectors.
    s, t = zipped(pairs)
    one = jax.jit(lambda p: kdsvd_loss(p, 1))
    np.testing.assert_allclose(one(zipped((s, [-x for x in t]))), one(pairs), rtol=1e-4)
    assert one(zipped((t, t))) < 1e-9


def test_right_vectors_of_deficient_maps():
    """Noise vectors become zero, and the smaller of pixels and channels is what is decomposed."""
    rng = np.random.default_rng(0)
    low, high = rng.standard_normal((2, 3, 3, 1)), rng.standard_normal((1, 6))
    values, vectors = right_vectors(jnp.asarray(low * high, jnp.float32), 3)
    np.testing.assert_allclose(values[:, 0], np.linalg.norm(low.reshape(2, -1), axis=1) * np.linalg.norm(high), rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(vectors[:, :, 0]), np.broadcast_to(np.abs(unit(high)), (2, 6)), rtol=1e-4)
    assert not np.any(vectors[:, :, 1:])
    for shape in ((1, 2, 2, 64), (1, 8, 8, 4)):
        jaxpr = str(jax.make_jaxpr(lambda x: right_vectors(x, 2))(jax.ShapeDtypeStruct(shape, jnp.float32)))
        assert "f32[1,4,4]" in jaxpr and "f32[1,64,64]" not in jaxpr


def test_eigenvectors_of_equal_values_have_finite_gradients():
    flat = jnp.stack([jnp.zeros((4, 4)), jnp.eye(4), jnp.diag(jnp.array([3.0, 2.0, 0.0, 0.0]))])
    grad = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(leading(m, 2)[1]))))(flat)
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad, jnp.swapaxes(grad, 1, 2))


@pytest.mark.parametrize("name", [name for name in LOSSES if "ConvReg" not in name])
def test_losses_survive_dead_channels_and_equal_samples(name, arrays):
    """Zero maps, zero channels and equal samples, in the student's batch, the teacher's or both: finite and no blow-up."""

    def damaged(x):
        x = x.copy()
        x[0] = 0
        x[2] = x[1]
        x[..., :2] = 0
        return x

    student = [k for k in arrays if k.endswith("_s")]
    teacher = [k for k in arrays if k.endswith(("_t", "_t_same"))]
    for which in (student, teacher, student + teacher):
        value, grads = valued(name, arrays | {k: damaged(arrays[k]) for k in which}, jnp.float32)
        assert np.isfinite(value), which
        assert all(np.all(np.isfinite(g)) and np.max(np.abs(g)) < 1e3 for g in grads.values()), which
    zeros = arrays | {k: np.zeros_like(arrays[k]) for k in student}
    value, grads = valued(name, zeros, jnp.float32)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads.values())


def test_normalise_by_hand():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]])
    np.testing.assert_allclose(normalise(x), [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-6)
    assert not np.any(jax.grad(lambda x: jnp.sum(normalise(x)))(x)[1:])


# Modules.


def random_outputs(maps, pooled, seed) -> models.Outputs:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    stages = tuple(draw(4, *m) for m in maps)
    return models.Outputs(draw(4, 10), stages, stages, draw(4, pooled))


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
        "same": (random_outputs(SAME, 16, 0), {w: random_outputs(at(SAME, w), int(16 * w), 1) for w in (0.5, 1.0)}),
        "cross": (random_outputs(SAME, 12, 0), {w: random_outputs(at(CROSS, w), int(40 * w), 2) for w in (0.5, 1.0)}),
        "resnet": (
            network_outputs("resnet8", 1.0, images),
            {w: network_outputs("resnet14", w, images) for w in (0.5, 1.0)},
        ),
    }


def equal(pair):
    """The pair with the teacher's full width alone."""
    return pair[0], {1.0: pair[1][1.0]}


def fitted(name, pair, **options):
    return distillers.build(distillers.create(MODULES[name], **options), *abstract(pair), BATCH)


LABELS = jnp.array([0, 1, 2, 3])
MIDWAY = distillers.Progress(jnp.int32(1), jnp.int32(100), jnp.float32(5.0))
EQUAL_ONLY = ("fsp", "kdsvd")


def with_stem(outputs):
    return (*(() if outputs.stem is None else (outputs.stem,)), *outputs.stages)
CASES = [
    pytest.param(n, p, marks=[pytest.mark.slow] * (p == "resnet" and n not in EQUAL_ONLY))
    for n in MODULES
    for p in ("cross", "resnet")
    if p == "resnet" or n not in EQUAL_ONLY
]


@pytest.mark.parametrize("name, pair", CASES)
def test_modules_follow_the_widths(name, pair, pairs):
    """Finite, weighed as declared, gradients to the student and to the active block alone, none to the teacher."""
    student, teachers = equal(pairs[pair]) if name in EQUAL_ONLY else pairs[pair]
    distillation = fitted(name, (student, teachers))
    params, state = distillation.init(jax.random.key(0))
    assert set(distillers.fields(MODULES[name])) >= {"ce_weight", "weight"}

    def loss(params, student, teacher, width):
        batch = {"label": LABELS}
        value, new, metrics = distillation(params, state, width, student, teacher, batch, MIDWAY, jax.random.key(0))
        return metrics["distillation"], (value, new, metrics)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    for width in [w for w in teachers if w < 1 or pair != "cross"]:  # the whole width only once
        teacher = teachers[width]
        (value, (weighed, new, metrics)), (g_params, g_student, g_teacher) = run(params, student, teacher, width)
        assert np.isfinite(value) and value.shape == () and all(np.all(np.isfinite(m)) for m in metrics.values())
        options = distillers.fields(MODULES[name])
        expected = options["ce_weight"] * metrics["cross_entropy"] + options["weight"] * value
        np.testing.assert_allclose(weighed, expected, rtol=1e-5)
        features = (g_student.stages, g_student.pooled)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(g_student)) and any(map(np.any, jax.tree.leaves(features)))
        if name in ("at", "vid", "nst", "fsp", "kdsvd"):
            # The last stage of the cross pair is compared at a single pixel, which normalises to 1 whatever it holds.
            count = 2 if pair == "cross" and name in ("at", "nst") else 3
            assert all(np.any(g) for g in g_student.stages[:count])
        close(g_teacher, jax.tree.map(jnp.zeros_like, teacher), 0)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        like = distillation.likes[width].get("params", {})
        for (path, g), block in zip(jax.tree_util.tree_flatten_with_path(g_params)[0], jax.tree.leaves(like), strict=True):
            active = np.zeros(g.shape, bool)
            active[tuple(slice(0, d) for d in block.shape)] = True
            assert np.any(np.asarray(g)[active]), path
            assert not np.any(np.asarray(g)[~active]), path
            assert np.all(np.isfinite(g)), path
    assert bool(params) == (name in ("fitnet", "cc", "vid"))


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_bfloat16(name, pairs):
    student, teachers = equal(pairs["same"]) if name in EQUAL_ONLY else pairs["cross"]
    distillation = fitted(name, (student, teachers))
    params, state = distillation.init(jax.random.key(0))

    @jax.jit
    def loss(student, teacher):
        progress, key = MIDWAY, jax.random.key(0)
        return distillation(params, state, 1.0, student, teacher, {"label": LABELS}, progress, key)[2]["distillation"]

    value = loss(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student, teachers[1.0])))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(student, teachers[1.0]), rtol=0.02)


def run(name, pair, width=1.0, progress=MIDWAY, **options):
    """(total, metrics, params, new state) of a pair."""
    distillation = fitted(name, pair, **options)
    params, state = distillation.init(jax.random.key(0))
    inputs = (pair[0], pair[1][width], {"label": LABELS}, progress, jax.random.key(0))
    total, new, metrics = jax.jit(lambda *a: distillation(params, state, width, *a))(*inputs)
    return total, metrics, params, new


def test_modules_are_their_losses_on_the_taps_they_name(pairs):
    """Which stages, which features, and what each option does."""
    pair = pairs["same"]
    s, t = pair[0], pair[1][1.0]
    both = zipped((s.stages, t.stages))
    value = lambda name, **options: run(name, equal(pair), **options)[1]["distillation"]  # noqa: E731
    expected = {
        ("at", ("p", 3.0)): lambda s, t: sum(at_loss(*two, 3.0) for two in zipped((s.stages, t.stages))),
        ("sp",): lambda s, t: sp_loss(s.stages[-1], t.stages[-1]),
        ("pkt",): lambda s, t: pkt_loss(s.pooled, t.pooled),
        ("nst",): lambda s, t: sum(nst_loss(*two) for two in zipped((s.stages, t.stages))),
        ("fsp",): lambda s, t: fsp_loss(with_stem(s), with_stem(t)),
        ("kdsvd", ("k", 2)): lambda s, t: kdsvd_loss(zipped((s.stages, t.stages)), 2),
        ("rkd", ("distance_weight", 2.0), ("angle_weight", 0.0)): lambda s, t: 2 * distance_loss(s.pooled, t.pooled),
        ("rkd", ("distance_weight", 0.0), ("angle_weight", 3.0)): lambda s, t: 3 * angle_loss(s.pooled, t.pooled, 1),
    }
    for (name, *options), loss in expected.items():
        np.testing.assert_allclose(value(name, **dict(options)), jax.jit(loss)(s, t), rtol=1e-5, err_msg=name)
    _, metrics, params, _ = run("cc", pair, features=7)
    e = {k: (x.pooled @ params[k]["kernel"] + params[k]["bias"]) for k, x in (("student", s), ("teacher", t))}
    assert e["teacher"].shape == (4, 7)
    np.testing.assert_allclose(metrics["distillation"], cc_loss(e["student"], e["teacher"]), rtol=1e-5)
    _, metrics, params, _ = run("vid", pair, initial_variance=2.0)
    np.testing.assert_allclose(jax.nn.softplus(params["stage1"]["scale"]), 2.0 - 1e-5, rtol=1e-6)
    total = 0.0
    for i, (a, b) in enumerate(both, start=1):
        p = params[f"stage{i}"]
        kernels = [p[f"conv{j}"]["kernel"][0, 0] for j in (1, 2, 3)]
        guess = jax.nn.relu(jax.nn.relu(a @ kernels[0]) @ kernels[1]) @ kernels[2]
        total += jnp.mean(0.5 * ((guess - b) ** 2 / 2.0 + np.log(2.0)))
    np.testing.assert_allclose(metrics["distillation"], total, rtol=1e-4)


def test_fitnet_takes_the_stage_it_is_given(pairs):
    """Stage 1 is doubled, stage 2 kept, stage 3 halved; its state is that of a narrow stage's own channels."""
    kernels = {1: (4, 4, 6, 8), 2: (1, 1, 8, 12), 3: (3, 3, 10, 20)}
    for stage, shape in kernels.items():
        _, metrics, params, new = run("fitnet", pairs["cross"], 0.5, hint_stage=stage)
        assert params["regressor"]["conv"]["kernel"].shape == shape and "bias" not in params["regressor"]["conv"]
        mean = new["batch_stats"]["regressor"]["norm"]["mean"]
        assert mean.shape == shape[-1:] and np.all(mean[: shape[-1] // 2]) and not np.any(mean[shape[-1] // 2 :])
        assert np.isfinite(metrics["distillation"])
    linear = ConvReg(3, (4, 4), "FitNet", relu=False)
    y, _ = linear.init_with_output(jax.random.key(0), jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 5, 4))))
    assert y.shape == (2, 4, 4, 3) and np.any(y < 0)


def test_fsp_alone_first_then_cross_entropy_alone(pairs):
    pair = equal(pairs["same"])
    loss = jax.jit(fsp_loss)(with_stem(pair[0]), with_stem(pair[1][1.0]))
    ce = slimmable.cross_entropy(pair[0].logits, LABELS).mean()

    def total(stage, epoch, **options):
        return run("fsp", pair, progress=MIDWAY._replace(stage=jnp.int32(stage), epoch=jnp.float32(epoch)), **options)[0]

    for stage, epoch, each, expected in (
        (0, 0.0, False, loss),
        (0, 29.9, False, loss),
        (0, 30.0, False, ce),
        (1, 0.0, False, ce),
        (1, 0.0, True, loss),
        (1, 30.0, True, ce),
    ):
        np.testing.assert_allclose(total(stage, epoch, initial_each_stage=each), expected, rtol=1e-5)
    np.testing.assert_allclose(total(0, 0.0, initial_epochs=0.0, weight=50.0), ce + 50 * loss, rtol=1e-5)


def test_pairs_that_cannot_be_served_are_refused(pairs):
    same, cross = pairs["same"], pairs["cross"]
    bare = models.Outputs(same[0].logits)
    for name in MODULES:
        field = "pooled" if name in ("cc", "rkd", "pkt") else "stages"
        with pytest.raises(UserError, match=rf"^student.distiller: \w+ needs '{field}', which the teacher's model does not"):
            fitted(name, (same[0], {1.0: bare}))
    for name in ("at", "vid", "nst", "fsp", "kdsvd"):
        fewer = same[0]._replace(stages=same[0].stages[:2])
        with pytest.raises(UserError, match=r"^student.distiller: \w+ compares stages one to one, .* has 2, the teacher 3"):
            fitted(name, (fewer, {1.0: same[1][1.0]}))
    for name, what in (("fsp", "FSP compares products"), ("kdsvd", "KDSVD compares singular vectors")):
        with pytest.raises(UserError, match=rf"^student.distiller: {what}.* stage 1 has 6 channels .* but 3 in the teacher"):
            fitted(name, same)
        with pytest.raises(UserError, match=rf"^student.distiller: {what}.* but 8 in .* teaches at its full width alone"):
            fitted(name, equal(cross))
        one = same[0]._replace(stages=same[0].stages[:1])
        with pytest.raises(UserError, match=r"needs 2 maps in 'stages'; the student has fewer"):
            fitted(name, (one, {1.0: one}))
    with pytest.raises(UserError, match=r"^student.distiller: FitNet needs 4 maps in 'stages'; the student has fewer"):
        fitted("fitnet", same, hint_stage=4)
    tall = same[0]._replace(stages=(same[0].stages[2],))
    with pytest.raises(UserError, match=r"^student.distiller: FitNet takes the student's map of 2 pixels a side .* of 16"):
        fitted("fitnet", (tall, cross[1]), hint_stage=1)
    odd = same[0]._replace(stages=(jnp.zeros((4, 8, 32, 6)),))
    with pytest.raises(UserError, match=r"^student.distiller: FitNet cannot double one side of a map alone: .*\(8, 32\)"):
        fitted("fitnet", (odd, cross[1]), hint_stage=1)
    with pytest.raises(UserError, match=r"^student.distiller: KDSVD finds 4 singular vectors in the smallest map: lower k"):
        fitted("kdsvd", equal(same), k=5)
    single = jax.tree.map(lambda x: x[:1], same)
    with pytest.raises(UserError, match=r"^student.distiller: CC compares neighbours in the batch"):
        fitted("cc", single)


@pytest.mark.parametrize(
    "name, options",
    [
        ("fitnet", {"hint_stage": 0}),
        ("at", {"p": 0.5}),
        ("cc", {"features": 0}),
        ("vid", {"initial_variance": 0.0}),
        ("rkd", {"chunk": 0}),
        ("fsp", {"initial_epochs": -1.0}),
        ("kdsvd", {"k": 0}),
    ],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(UserError, match=rf"^{next(iter(options))}: .* is not possible"):
        distillers.create(MODULES[name], **options)
