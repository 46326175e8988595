"""CRD, SemCKD, CAT-KD, MGD and SoKD: losses against reference values and numpy, their state, modules under the staging."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, identical, made_up, perturbed
from scipy import ndimage

from pwkd_jax import distillers, models, slimmable
from pwkd_jax.distillers import crd, sokd
from pwkd_jax.distillers.catkd import activation_maps, cat_loss
from pwkd_jax.distillers.feature_maps import gram, normalise
from pwkd_jax.distillers.mgd import drop_channels, mgd_loss
from pwkd_jax.distillers.semckd import attention, semckd_loss
from pwkd_jax.errors import UserError

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_banks.json").read_text())
MODULES = {
    "crd": "pwkd_jax.distillers.crd:CRD",
    "semckd": "pwkd_jax.distillers.semckd:SemCKD",
    "catkd": "pwkd_jax.distillers.catkd:CATKD",
    "mgd": "pwkd_jax.distillers.mgd:MGD",
    "sokd": "pwkd_jax.distillers.sokd:SoKD",
}
OPTIONS = {"crd": {"negatives": 60, "features": 8}}
B, N, CLASSES, WIDTHS = 8, 40, 10, (1.0, 0.5)
NOW = distillers.Progress(jnp.int32(1), jnp.int32(7), jnp.float32(0.5))


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(DATA / "golden_banks.npz"))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# CRD


def crd_step(weights, pooled_s, pooled_t, banks, contrast, log_z):
    """(sum of both losses, (log Z of the two, banks afterwards)) as the module composes it, with given negatives."""
    (ws, bs), (wt, bt) = weights
    es, et = (normalise(gram(p, w) + b) for p, w, b in ((pooled_s, ws, bs), (pooled_t, wt, bt)))
    index, negatives = contrast[:, 0], contrast.shape[1] - 1
    counts = crd.tally(contrast[:, 1:], banks[0].shape[0])
    scores = [gram(es, banks[1]) / 0.07, gram(et, banks[0]) / 0.07]
    if log_z is None:
        log_z = [crd.log_normaliser(jax.lax.stop_gradient(s), index, counts, negatives) for s in scores]
    loss = sum(crd.crd_loss(s, index, counts, z, negatives) for s, z in zip(scores, log_z, strict=True))
    return loss, (log_z, [crd.remember(bank, index, e, 0.5) for bank, e in zip(banks, (es, et), strict=True)])


def loops_crd(pooled, banks, weights, contrast, z):
    """The same by the defining formula, in float64 and with every negative gathered; also the fresh Z of both."""
    e = [unit(p @ w.T + b) for p, (w, b) in zip(pooled, weights, strict=True)]
    size, batch, negatives = len(banks[0]), len(contrast), contrast.shape[1] - 1
    exps = [np.exp(np.einsum("bkd,bd->bk", banks[1 - i][contrast], e[i]) / 0.07) for i in (0, 1)]
    z = z or [x.mean() * size for x in exps]
    loss, c = 0.0, negatives / size
    for x, norm in zip(exps, z, strict=True):
        p = x / norm
        loss -= np.sum(np.log(p[:, 0] / (p[:, 0] + c + 1e-7))) / batch
        loss -= np.sum(np.log(c / (p[:, 1:] + c + 1e-7))) / batch
    return loss, z


def crd_inputs(arrays, dtype):
    weights = tuple((arrays[f"crd_w{k}"].astype(dtype), arrays[f"crd_b{k}"].astype(dtype)) for k in "st")
    banks = [arrays[f"crd_mem{k}"].astype(dtype) for k in "12"]
    pooled = [arrays[f"pooled_{k}"].astype(dtype) for k in "st"]
    return weights, pooled, banks, arrays["crd_contrast_idx"].astype(np.int32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_crd_equals_the_reference_over_two_steps(arrays, dtype):
    """Z is that of the first batch, and the banks move after they were read."""
    with jax.enable_x64(dtype == np.float64):
        weights, (ps, pt), banks, contrast = crd_inputs(arrays, dtype)
        step = jax.jit(jax.value_and_grad(crd_step, argnums=(0, 1), has_aux=True))
        log_z, z = None, None
        for expected in GOLDEN["CRD"]["steps"]:
            scaled = ps * dtype(expected["student_scale"])
            direct, z = loops_crd((scaled, pt), [np.asarray(b, np.float64) for b in banks], weights, contrast, z)
            (loss, (log_z, banks)), (gw, gp) = step(weights, scaled, pt, banks, contrast, log_z)
            assert loss.dtype == dtype
            np.testing.assert_allclose(loss, expected["loss"], rtol=2e-5 if dtype == np.float32 else 1e-6)
            if dtype == np.float64:
                np.testing.assert_allclose(loss, direct, rtol=1e-10)
            np.testing.assert_allclose(np.exp(log_z), [expected["Z_v1"], expected["Z_v2"]], rtol=2e-5)
            norms = expected["grad_l2"]
            for grad, name in ((gp, "pooled_s"), (gw[0][0], "crd_ws"), (gw[1][0], "crd_wt")):
                np.testing.assert_allclose(jnp.linalg.norm(grad), norms[name], rtol=1e-4)
        for bank, k in zip(banks, "12", strict=True):
            close(np.asarray(bank)[contrast[:, 0]], arrays[f"crd_mem{k}_after2_rows"], 2e-6)
            rest = np.setdiff1d(np.arange(256), contrast[:, 0])
            assert identical(np.asarray(bank, np.float32)[rest], arrays[f"crd_mem{k}"][rest])


def test_crd_in_log_space_survives_saturation():
    """Scores whose exponentials overflow float32 still give the formula's value, and a finite gradient."""
    scores = jnp.array([[400.0, -400.0, 390.0], [-400.0, 400.0, 0.0]])
    index, counts = jnp.array([0, 0]), jnp.array([[0, 1, 1], [0, 2, 0]])
    value, grad = jax.value_and_grad(crd.crd_loss)(scores, index, counts, jnp.float32(395.0), 2)
    s, c = np.asarray(scores, np.float64) - 395, math.log(2 / 3)
    expected = -np.mean(s[:, :1] - np.logaddexp(s[:, :1], c)) - np.sum(counts * (c - np.logaddexp(s, c))) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(grad))
    assert np.isfinite(crd.log_normaliser(scores, index, counts, 2))


def test_negatives_are_uniform_over_the_other_classes():
    rng = np.random.default_rng(0)
    dataset = rng.choice([0, 1, 2, 4], 30, p=[0.5, 0.2, 0.2, 0.1])
    labels, count = np.array([0, 1, 2, 4, 0]), 40_000
    draw = jax.jit(functools.partial(crd.draw_negatives, count=count))
    drawn = draw(jax.random.key(1), jnp.asarray(labels), jnp.asarray(dataset))
    counts = np.asarray(crd.tally(drawn, 30))
    for row, label in zip(counts, labels, strict=True):
        allowed = dataset != label
        assert row.sum() == count and not np.any(row[~allowed])
        expected = count / allowed.sum()
        assert np.sum((row[allowed] - expected) ** 2 / expected) < 3 * allowed.sum()
    assert not np.array_equal(counts[0], counts[4])
    # A data set of one class has no negative: whatever comes is a sample of it.
    alone = draw(jax.random.key(1), jnp.zeros(2, int), jnp.zeros(30, int))
    assert np.all((alone >= 0) & (alone < 30))


def test_a_sample_twice_in_a_batch_is_remembered_once():
    np.testing.assert_array_equal(crd.last_of_each(jnp.array([2, 5, 2, 0, 2]), 6), [6, 5, 6, 0, 2])
    rng = np.random.default_rng(0)
    bank, e = (unit(rng.standard_normal(s)).astype(np.float32) for s in ((6, 4), (3, 4)))
    new = jax.jit(crd.remember)(bank, jnp.array([2, 5, 2]), e, 0.25)
    expected = bank.copy()
    for row, x in ((5, e[1]), (2, e[2])):
        expected[row] = unit(0.25 * bank[row] + 0.75 * x)
    np.testing.assert_allclose(new, expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["reset", "keep"])
def test_the_memory_follows_the_stage_by_its_rule(rule, real):
    fitted, student, teachers, batch = fit("crd", real, on_new_stage=rule)
    params, state = initial("crd", "same shape")
    assert not state["memory"]["started"]
    run = jax.jit(
        lambda state, teacher, step, width: fitted(
            params, state, width, student, teacher, batch, NOW._replace(step=step), jax.random.key(width > 0.5)
        )[1]["memory"],
        static_argnames="width",
    )
    first = run(state, teachers[0.5], 0, 0.5)
    second = run({"memory": first}, teachers[0.5], 1, 0.5)
    assert first["started"] and identical(first["log_z"], second["log_z"])
    later = run({"memory": second}, teachers[1.0], 0, 1.0)
    rest = np.setdiff1d(np.arange(N), batch["index"])
    for name, forgotten in (("student_bank", False), ("teacher_bank", rule == "reset")):
        assert identical(first[name][rest], second[name][rest])
        assert np.all(first[name][batch["index"]] != second[name][batch["index"]])
        assert np.any(later[name][rest] != second[name][rest]) == forgotten, name
    assert np.any(later["log_z"] != second["log_z"]) == (rule == "reset")
    bound = 1 / math.sqrt(8 / 3)
    for bank in (state["memory"]["student_bank"], later["teacher_bank"][rest]):
        assert np.abs(bank).max() <= bound and np.abs(np.std(bank) - bound / math.sqrt(3)) < 0.05


def test_crd_reads_only_the_embeddings_of_its_teachers_channels(real):
    """At half width the teacher's embedding is that of its leading rows, recomputed here from the bank's update."""
    fitted, student, teachers, batch = fit("crd", real, momentum=0.0, on_new_stage="keep")
    params, state = initial("crd", "same shape")
    _, new, metrics = jax.jit(fitted, static_argnums=2)(
        params, state, 0.5, student, teachers[0.5], batch, NOW, jax.random.key(5)
    )
    for name, pooled in (("student", student.pooled), ("teacher", teachers[0.5].pooled)):
        pooled = np.asarray(pooled, np.float64)
        e = unit(pooled @ np.asarray(params[name]["kernel"])[: pooled.shape[1]] + params[name]["bias"])
        np.testing.assert_allclose(new["memory"][f"{name}_bank"][batch["index"]], e, atol=1e-5)
    np.testing.assert_allclose(metrics["distillation"], metrics["contrast_student"] + metrics["contrast_teacher"], rtol=1e-6)


# CAT-KD


def test_cat_equals_the_reference(arrays):
    expected, (s, t) = GOLDEN["CAT_raw_r2"], (arrays["fmap_s"], arrays["fmap_t_same"])
    loss = jax.jit(jax.value_and_grad(lambda s, t: cat_loss(s, t, 2, False)))
    value, grad = loss(s, t)
    np.testing.assert_allclose(value, expected["value"], rtol=2e-5)
    np.testing.assert_allclose(jnp.linalg.norm(grad), expected["grad_l2_total"], rtol=1e-4)
    with jax.enable_x64(True):
        value, grad = loss(s.astype(np.float64), t.astype(np.float64))
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected["value_float64"], rtol=1e-7)


def test_normalised_cat_equals_numpy(arrays):
    s, t = arrays["fmap_s"].astype(np.float64), arrays["fmap_t_same"].astype(np.float64)

    def maps(x):
        small = x.reshape(32, 4, 2, 4, 2, 16).mean((2, 4))
        return small / np.sqrt(np.sum(small**2, axis=(1, 2), keepdims=True))

    expected = np.mean((maps(s) - maps(t)) ** 2)
    np.testing.assert_allclose(cat_loss(arrays["fmap_s"], arrays["fmap_t_same"], 4, True), expected, rtol=2e-5)
    grad = jax.grad(lambda x: cat_loss(x, arrays["fmap_t_same"], 2, True))(jnp.zeros_like(arrays["fmap_s"]))
    assert np.all(np.isfinite(grad))


def test_activation_maps_pool_to_the_logits(real):
    student, teachers, _ = real
    for out in (student, teachers[0.5]):
        cams = activation_maps(out.stages[-1], out.head[0])
        assert cams.shape == (*out.stages[-1].shape[:3], CLASSES)
        np.testing.assert_allclose(cams.mean((1, 2)) + out.head[1], out.logits, atol=1e-5)


# MGD and SemCKD, against numpy


def test_mgd_equals_numpy(real, monkeypatch):
    """The whole method, its convolutions written out, with the channels masked that its key draws."""
    fitted, student, teachers, batch = fit("mgd", real, masked=0.5)
    params = perturbed(fitted.init(jax.random.key(0))[0])
    masks = []

    def watched(key, x, rate):
        masks.append(np.asarray(drop_channels(key, jnp.ones_like(x), rate), np.float64))
        return drop_channels(key, x, rate)

    monkeypatch.setattr("pwkd_jax.distillers.mgd.drop_channels", watched)
    loss = fitted(params, {}, 1.0, student, teachers[1.0], batch, NOW, jax.random.key(5))[2]["distillation"]

    def convolve(x, layer):
        kernel = np.asarray(layer["kernel"], np.float64)
        pad, (h, w) = kernel.shape[0] // 2, x.shape[1:3]
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        parts = (x[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(len(kernel)) for j in range(len(kernel)))
        return sum(parts) + np.asarray(layer["bias"], np.float64)

    aligned = convolve(np.asarray(student.stages[-1], np.float64), params["align"])
    generated = convolve(np.maximum(convolve(aligned * masks[0], params["generate1"]), 0), params["generate2"])
    np.testing.assert_allclose(loss, np.sum((generated - np.asarray(teachers[1.0].stages[-1])) ** 2) / B, rtol=2e-5)
    assert len(masks) == 1 and 0.4 < masks[0].mean() < 0.6


def test_channels_are_dropped_per_image_at_their_rate():
    x = jnp.ones((100, 3, 2, 50)) * 2
    out = np.asarray(drop_channels(jax.random.key(0), x, 0.15))
    kept = out[:, :1, :1] / 2
    assert set(np.unique(kept)) == {0.0, 1.0} and np.array_equal(out, np.broadcast_to(2 * kept, out.shape))
    assert abs(kept.mean() - 0.85) < 0.02 and not np.array_equal(kept[0], kept[1])
    assert mgd_loss(jnp.ones((4, 2, 2, 3)), jnp.zeros((4, 2, 2, 3))) == 12


def test_semckd_equals_numpy():
    rng = np.random.default_rng(0)
    shapes = [[(6, 4, 4, 3), (6, 2, 2, 5)], [(6, 2, 2, 3), (6, 1, 1, 5)], [(6, 2, 2, 3), (6, 2, 2, 5)]]
    guesses, targets = ([[rng.standard_normal(s) for s in row] for row in shapes] for _ in range(2))
    queries, keys = rng.standard_normal((6, 3, 4)), rng.standard_normal((6, 2, 4))
    total = 0.0
    for b in range(6):
        for i in range(3):
            energy = np.exp([queries[b, i] @ keys[b, j] / 0.5 for j in range(2)])
            for j in range(2):
                total += energy[j] / energy.sum() * np.mean((guesses[i][j][b] - targets[i][j][b]) ** 2) / 18
    loss = jax.jit(lambda g, t, q, k: semckd_loss(g, t, attention(q, k, 0.5)))
    single = jax.tree.map(jnp.float32, (guesses, targets, queries, keys))
    np.testing.assert_allclose(loss(*single), total, rtol=2e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(loss(guesses, targets, queries, keys), total, rtol=1e-12)


def test_semckd_belongs_to_its_batch_size(real):
    fitted, student, teachers, batch = fit("semckd", real)
    params, state = jax.eval_shape(fitted.init, jax.random.key(0))
    assert params["query1"]["hidden"]["kernel"].shape == (B, 4) and params["key3"]["out"]["kernel"].shape == (4, 2)
    half = [jax.tree.map(lambda x: x[:4] if x.shape[:1] == (B,) else x, x) for x in (student, teachers[1.0], batch)]
    with pytest.raises(UserError, match=r"student.distiller: SemCKD .* a batch of 8, .* this batch has 4: keep"):
        jax.eval_shape(lambda p, s: fitted(p, s, 1.0, *half, NOW, jax.random.key(0)), params, state)


# SoKD


def strengths(batch=1, **given):
    return jnp.tile(jnp.array([[given.get(name, 0.0) for name in sokd.RANGES]], jnp.float32), (batch, 1))


@pytest.mark.parametrize("given", [{"shear_x": 0.3}, {"shear_y": -0.2}, {"move_x": 0.25}, {"move_y": -0.4}, {"turn": 25.0}])
def test_geometric_operations_equal_scipy(given):
    rng = np.random.default_rng(0)
    height, width = 6, 8
    x = rng.standard_normal((2, height, width, 3)).astype(np.float32)
    out = jax.jit(sokd.augment)(jax.random.key(0), x, strengths(2, **given))
    angle = np.deg2rad(given.get("turn", 0.0))
    # In units of half the map, (u, v) to the right and down: scipy wants (row, column) in pixels.
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = matrix @ np.array([[1, given.get("shear_x", 0.0)], [given.get("shear_y", 0.0), 1]])
    size = np.array([height, width])
    pixels = matrix[::-1, ::-1] * size[:, None] / size
    centre = (size - 1) / 2
    moved = np.array([given.get("move_y", 0.0), given.get("move_x", 0.0)]) * size
    for b in range(2):
        for c in range(3):
            plane = ndimage.affine_transform(
                x[b, :, :, c], pixels, centre + moved - pixels @ centre, order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(out[b, :, :, c], plane, atol=1e-4)


def test_other_operations_do_what_they_say():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 10, 10, 200)).astype(np.float32)
    run = jax.jit(sokd.augment)
    same = run(jax.random.key(0), x, strengths(4))
    np.testing.assert_allclose(same, x, atol=1e-5)
    hole = np.asarray(run(jax.random.key(0), x, strengths(4, hole=0.2)))
    lost = 1 - (hole / x)[..., 0]
    # 2 x 2 pixels of 10 x 10, less what lies over the edge.
    assert np.all(lost.sum((1, 2)) <= 4 + 1e-4) and np.all(lost.sum((1, 2)) >= 1 - 1e-4) and lost.max() <= 1 + 1e-5
    np.testing.assert_allclose(np.std(run(jax.random.key(0), x, strengths(4, noise=0.1)) - x), 0.1, rtol=0.02)
    dropped = np.asarray(run(jax.random.key(0), x, strengths(4, drop=0.5)))
    zero = np.all(dropped == 0, axis=(1, 2))
    assert abs(zero.mean() - 0.5) < 0.06
    np.testing.assert_allclose(dropped, x * ~zero[:, None, None], atol=1e-5)
    shuffled = np.asarray(run(jax.random.key(0), x, strengths(4, shuffle=1.0)))
    source = [int(np.argmin(np.abs(x[0] - shuffled[0, :, :, c : c + 1]).sum((0, 1)))) for c in range(200)]
    assert sorted(source) == list(range(200)) and source != sorted(source)
    np.testing.assert_allclose(shuffled, x[..., source], atol=1e-5)


@pytest.mark.parametrize("name", ["shear_x", "move_y", "turn", "hole", "noise"])
def test_strengths_have_the_derivative_of_what_they_do(name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 5, 2)).astype(np.float32)
    # Generic strengths: off the kinks of bilinear interpolation.
    at, step = {"turn": (17.3, 0.05), "hole": (0.613, 1e-3)}.get(name, (0.137, 1e-3))
    total = jax.jit(lambda v: jnp.sum(sokd.augment(jax.random.key(3), x, strengths(2) + v * strengths(2, **{name: 1.0})) * x))
    difference = (total(at + step) - total(at - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(at), difference, rtol=2e-2, atol=2e-3)


def test_one_sub_policy_is_drawn_by_its_weight():
    weights = jnp.zeros(36).at[jnp.array([0, 35])].set(jnp.array([8.0, 9.0]))
    chances, magnitudes = jnp.full((36, 2), 1.0), jnp.full((36, 2), 2.0)
    draw = jax.jit(jax.vmap(lambda k: sokd.draw_strengths(k, weights, chances, magnitudes, 16)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 400)))
    active = [tuple(np.flatnonzero(np.any(d != 0, axis=0))) for d in drawn]
    first, last = active.count((0, 1)), active.count((7, 8))
    assert first + last > 380 and abs(last / (first + last) - 1 / (1 + math.exp(-1))) < 0.08
    chosen = drawn[[a == (7, 8) for a in active]]
    level = 1 / (1 + math.exp(-2))
    np.testing.assert_allclose(np.unique(chosen[:, :, 7]), [0, level], rtol=1e-5)
    np.testing.assert_allclose(np.unique(chosen[:, :, 8]), [0, 0.5 * level], rtol=1e-5)
    assert abs(np.mean(chosen[:, :, 7] > 0) - 1 / (1 + math.exp(-1))) < 0.03
    low = drawn[[a == (0, 1) for a in active]][:, :, 0]
    np.testing.assert_allclose(np.unique(low), [0, -0.3 + 0.6 * level], rtol=1e-5)
    grads = jax.grad(lambda *p: jnp.sum(sokd.draw_strengths(jax.random.key(1), *p, 16) ** 2), argnums=(0, 1, 2))
    assert all(np.any(g) and np.all(np.isfinite(g)) for g in grads(weights, chances, magnitudes))


def test_areas_equal_loops():
    rng = np.random.default_rng(0)
    heat = rng.uniform(0, 1, (3, 5, 7, 2)).astype(np.float32)
    size, offset = (rng.uniform(0, top, (3, 5, 7, 2)).astype(np.float32) for top in (4, 2))
    expected = np.zeros((3, 5, 7))
    for b in range(3):
        peaks = []
        for y, x, k in np.ndindex(5, 7, 2):
            around = heat[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2, k]
            peaks.append((heat[b, y, x, k] if heat[b, y, x, k] == around.max() else 0.0, y, x))
        for _, y, x in sorted(peaks, key=lambda p: -p[0])[:4]:
            (w, h), (dx, dy) = size[b, y, x], offset[b, y, x]
            x1, y1 = int(max(x + dx - w / 2, 0)), int(max(y + dy - h / 2, 0))
            x2, y2 = int(min(x + dx + w / 2, 6)), int(min(y + dy + h / 2, 4))
            expected[b, y1 : y2 + 1, x1 : x2 + 1] += 1
    assert np.array_equal(jax.jit(sokd.area_weights, static_argnames="areas")(heat, size, offset, areas=4), expected)
    assert sokd.area_weights(heat[:, :2, :2], size[:, :2, :2], offset[:, :2, :2], 50).shape == (3, 2, 2)


def test_sokd_losses_equal_numpy():
    rng = np.random.default_rng(0)
    s, t, a, b = (rng.standard_normal((3, 4, 4, c)) for c in (5, 5, 6, 6))
    w = rng.integers(0, 4, (3, 4, 4)).astype(np.float64)
    expected = [np.mean((s * w[..., None] - t * w[..., None]) ** 2), np.mean((a - b) ** 2)]
    np.testing.assert_allclose(sokd.sokd_losses(*jax.tree.map(jnp.float32, (s, t, a, b, w))), expected, rtol=2e-5)


def test_the_policy_learns_for_its_epochs_only(real):
    """Then its last values serve, whatever the optimiser still does to the parameters."""
    fitted, student, teachers, batch = fit("sokd", real, policy_epochs=2.0)
    params, state = initial("sokd", "same shape")
    names = ("weights", "chances", "magnitudes")

    @jax.jit
    def run(params, state, epoch):
        def loss(params):
            total, new, _ = fitted(params, state, 1.0, student, teachers[1.0], batch, progress, jax.random.key(5))
            return total, new

        progress = NOW._replace(epoch=epoch)
        return jax.value_and_grad(loss, has_aux=True)(params)

    (during, kept), learns = run(params, state, 1.9)
    moved = params | {f"policy_{name}": params[f"policy_{name}"] - 3.0 for name in names}
    (after, same), rests = run(moved, kept, 2.0)
    for name in names:
        assert np.any(learns[f"policy_{name}"]) and not np.any(rests[f"policy_{name}"]), name
        assert identical(kept["policy"][name], params[f"policy_{name}"])
    assert identical(kept["policy"], same["policy"])
    np.testing.assert_allclose(after, during, rtol=1e-6)
    assert run(moved, kept, 1.9)[0][0] != during


# The modules under the staging


@functools.cache
def _real(student: str = "resnet8", student_width: float = 1.0, stride: int = 1):
    """(student's outputs, {width: teacher's outputs}, batch): resnet8 taught by resnet14 on 8x8 images."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((B, 8, 8, 3)), jnp.float32)
    dataset = jnp.asarray(rng.integers(0, CLASSES, N), jnp.int32)
    index = jnp.asarray(rng.permutation(N)[:B], jnp.int32)
    batch = {"image": images, "label": dataset[index], "index": index, "dataset_label": dataset}
    net = slimmable.build(lambda w: models.create("resnet14", width=w), WIDTHS, (8, 8, 3))
    params, statistics = net.spread(made_up(net.members[1.0], (8, 8, 3)))
    taught = {w: net.forward(params, statistics, w, images, train=False)[0] for w in WIDTHS}
    model = models.create(student, width=student_width)
    variables = made_up(model, (8, 8, 3), 1)
    return models.apply(model, variables, images[:, ::stride, ::stride], train=False)[0], taught, batch


@pytest.fixture(scope="module")
def real():
    return _real()


PAIRS = {"same shape": {}, "other channels": {"student_width": 0.5}, "other size": {"stride": 2}}


def fit(name, pair, **options):
    student, teachers, batch = pair
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pair)
    module = distillers.create(MODULES[name], **OPTIONS.get(name, {}) | options)
    return distillers.build(module, *shapes), student, teachers, batch


@functools.cache
def initial(name, pair):
    """(params away from their initial values, state)"""
    params, state = jax.jit(fit(name, _real(**PAIRS[pair]))[0].init)(jax.random.key(0))
    return perturbed(params), state


@pytest.mark.parametrize(
    "name, pair",
    [
        pytest.param(name, pair, marks=[pytest.mark.slow] * (name == "semckd" and pair != "other size"))
        for name in MODULES
        for pair in PAIRS
    ],
)
def test_modules_train_the_active_block(name, pair):
    fitted, student, teachers, batch = fit(name, _real(**PAIRS[pair]))
    params, state = initial(name, pair)

    @functools.partial(jax.jit, static_argnames="width")
    def run(params, student, teacher, key, width):
        def loss(params, student, teacher):
            _, new, metrics = fitted(params, state, width, student, teacher, batch, NOW, key)
            return metrics["distillation"], new

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, student, teacher)

    for width in {"same shape": WIDTHS, "other channels": WIDTHS[1:], "other size": WIDTHS[:1]}[pair]:
        (value, new), (own, to_student, to_teacher) = run(params, student, teachers[width], jax.random.key(5), width)
        assert np.isfinite(value) and value > 0
        assert any(np.any(g) for g in jax.tree.leaves(to_student))
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(to_student))
        close(to_teacher, jax.tree.map(jnp.zeros_like, teachers[width]), 0)
        if params:
            block = slimmable.take(own, fitted.likes[width]["params"])
            outside = jax.tree.map(jnp.subtract, own, slimmable.embed(block, own))
            for (path, g), rest in zip(jax.tree_util.tree_flatten_with_path(block)[0], jax.tree.leaves(outside), strict=True):
                assert np.any(g) and np.all(np.isfinite(g)) and not np.any(rest), (width, path)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        # Random numbers come from the key alone.
        again = run(params, student, teachers[width], jax.random.key(5), width)[0][0]
        other = run(params, student, teachers[width], jax.random.key(6), width)[0][0]
        assert again == value and (other != value) == (name in ("crd", "mgd", "sokd"))


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_bfloat16(name, real):
    """Rounding the features moves a loss by little, and the arithmetic after them is float32."""
    fitted, student, teachers, batch = fit(name, real)
    params, state = initial(name, "same shape")

    @jax.jit
    def value_and_grad(student, teacher):
        def loss(student):
            return fitted(params, state, 1.0, student, teacher, batch, NOW, jax.random.key(5))[2]["distillation"]

        return jax.value_and_grad(loss)(student)

    rounded = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), x) for x in (student, teachers[1.0])]
    value, grads = value_and_grad(*rounded)
    assert value.dtype == jnp.float32 and all(np.all(np.isfinite(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(value, value_and_grad(student, teachers[1.0])[0], rtol=0.02)
    # Models whose features are all zero (dead at the start) still give finite gradients.
    dead = [jax.tree.map(jnp.zeros_like, x) for x in (student, teachers[1.0])]
    value, grads = value_and_grad(*dead)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_pairs_that_cannot_be_are_refused(real):
    student, teachers, batch = real
    bare = models.Outputs(student.logits)
    for name, field in (("crd", "pooled"), ("semckd", "stages"), ("catkd", "final"), ("mgd", "stages"), ("sokd", "stages")):
        with pytest.raises(UserError, match=rf"student.distiller: \S+ needs '{field}', which the student's model"):
            fit(name, (bare, teachers, batch))
        with pytest.raises(UserError, match=rf"student.distiller: \S+ needs '{field}', which the teacher's model"):
            fit(name, (student, {1.0: bare}, batch))
    wide_head = student._replace(head=(jnp.zeros((128, CLASSES)), student.head[1]))
    with pytest.raises(UserError, match=r"CAT-KD .* the student's reads 128 features where that map has 64: 'final'"):
        fit("catkd", (wide_head, teachers, batch))
    with pytest.raises(UserError, match="SoKD needs 4 maps in 'stages'; the student has fewer"):
        fit("sokd", real, hint_stage=4)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("crd", {"temperature": 0.0}, "temperature: 0 is not possible"),
        ("crd", {"negatives": 0}, "negatives: 0 is not possible"),
        ("crd", {"features": 0}, "features: 0 is not possible"),
        ("crd", {"momentum": 1.0}, "momentum: 1 is not possible; it should be from 0 to below 1"),
        ("crd", {"on_new_stage": "forget"}, "on_new_stage: there is no 'forget': it is reset or keep"),
        ("semckd", {"temperature": -1.0}, "temperature: -1 is not possible"),
        ("catkd", {"resolution": 0}, "resolution: 0 is not possible"),
        ("mgd", {"masked": 1.0}, "masked: 1 is not possible"),
        ("sokd", {"areas": 0}, "areas: 0 is not possible"),
        ("sokd", {"kinds": 0}, "kinds: 0 is not possible"),
        ("sokd", {"hint_stage": 0}, "hint_stage: 0 is not possible"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        distillers.create(MODULES[name], **options)


def test_every_option_has_a_plain_default():
    for name in MODULES.values():
        options = distillers.fields(name)
        assert {"ce_weight", "weight"} <= options.keys()
        assert all(isinstance(v, float | int | bool | str) for v in options.values())
