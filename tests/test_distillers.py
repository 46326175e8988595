"""Distillers: KD against reference values, and the plug-in protocol with one written outside the package."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close

from pwkd_jax import distillers, models, slimmable
from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.errors import UserError


class Hint(nn.Module):
    """FitNet's idea in a few lines: a trained connector from the student's pooled features to the teacher's."""

    ce_weight: float = 1.0
    weight: float = 0.5

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            calls.value += 1
        noise = 0 * jax.random.normal(self.make_rng("distiller"))
        guess = nn.Dense(teacher.pooled.shape[-1])(student.pooled)
        return jnp.mean((guess - teacher.pooled) ** 2) + noise, {"stage_step": progress.step.astype(jnp.float32)}


class Unnested(nn.Module):
    """A parameter that shrinks where the teacher grows."""

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        size = 100 - teacher.pooled.shape[-1]
        return jnp.sum(self.param("w", nn.initializers.ones, (size,))), {}


def outputs(width: int, rng=None):
    shapes = {"logits": (4, 10), "pooled": (4, width)}
    if rng is None:
        return models.Outputs(**{k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})
    return models.Outputs(**{k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()})


BATCH = {
    "image": jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32),
    "label": jax.ShapeDtypeStruct((4,), jnp.int32),
    "index": jax.ShapeDtypeStruct((4,), jnp.int32),
    "dataset_label": jax.ShapeDtypeStruct((50,), jnp.int32),
}


def test_kd_and_cross_entropy_equal_the_reference(golden, golden_logits):
    s, t, labels = (golden_logits[k] for k in ("logits_s", "logits_t", "labels"))
    kd, ce = golden["losses"]["KD_T4"], golden["losses"]["CE"]
    for loss, expected in (
        (lambda s: kd_loss(s, t, 4.0), kd),
        (lambda s: slimmable.cross_entropy(s, labels).mean(), ce),
    ):
        value, grad = jax.value_and_grad(loss)(jnp.asarray(s))
        np.testing.assert_allclose(value, expected["value"], rtol=2e-5)
        np.testing.assert_allclose(jnp.linalg.norm(grad), expected["grad_l2_total"], rtol=1e-4)
        with jax.enable_x64(True):
            np.testing.assert_allclose(loss(jnp.asarray(s, jnp.float64)), expected["value_float64"], rtol=1e-6)


def test_kd_survives_extreme_logits():
    logits = jnp.array([[1e4, 0.0, -1e4]])
    value, grad = jax.value_and_grad(lambda s: kd_loss(s, -logits, 4.0))(logits)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    assert kd_loss(logits, logits, 4.0) == 0


def test_kd_refuses_a_temperature_of_zero():
    with pytest.raises(UserError, match="temperature: 0 is not possible"):
        distillers.create("kd", temperature=0.0)


def test_total_loss_weighs_both_terms():
    rng = np.random.default_rng(0)
    s, t, labels = outputs(16, rng), outputs(8, rng), jnp.array([0, 1, 2, 3])
    fitted = distillers.build(distillers.create("kd", ce_weight=0.3, weight=2.0), outputs(16), {1.0: outputs(8)}, BATCH)
    params, state = fitted.init(jax.random.key(0))
    total, state, metrics = fitted(params, state, 1.0, s, t, {"label": labels}, distillers.START, jax.random.key(0))
    expected = 0.3 * slimmable.cross_entropy(s.logits, labels).mean() + 2.0 * kd_loss(s.logits, t.logits, 4.0)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert not params and not state and set(metrics) == {"cross_entropy", "distillation"}


def test_own_distiller_follows_the_widths():
    """Its connector is a leading block: narrow stages train only theirs, and state is carried through."""
    rng = np.random.default_rng(0)
    widths = {0.5: outputs(8), 1.0: outputs(16)}
    fitted = distillers.build(distillers.create("test_distillers:Hint"), outputs(12), widths, BATCH)
    params, state = fitted.init(jax.random.key(0))
    assert params["Dense_0"]["kernel"].shape == (12, 16) and state == {"counts": {"calls": 0}}
    s, labels = outputs(12, rng), jnp.array([0, 1, 2, 3])
    progress = distillers.Progress(jnp.int32(1), jnp.int32(7), jnp.float32(0.5))

    def loss(params, width, teacher):
        total, new, metrics = fitted(params, state, width, s, teacher, {"label": labels}, progress, jax.random.key(0))
        return total, (new, metrics)

    for width, t in ((0.5, outputs(8, rng)), (1.0, outputs(16, rng))):
        active = t.pooled.shape[-1]
        (value, (new, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params, width, t)
        kernel, bias = (np.asarray(params["Dense_0"][k])[..., :active] for k in ("kernel", "bias"))
        mse = np.mean((np.asarray(s.pooled) @ kernel + bias - np.asarray(t.pooled)) ** 2)
        np.testing.assert_allclose(value, slimmable.cross_entropy(s.logits, labels).mean() + 0.5 * mse, rtol=1e-5)
        assert np.any(grads["Dense_0"]["kernel"][:, :active]) and not np.any(grads["Dense_0"]["kernel"][:, active:])
        assert new == {"counts": {"calls": 1}} and metrics["stage_step"] == 7
        teacher_grad = jax.grad(lambda t, w=width: loss(params, w, t)[0])(t)
        close(teacher_grad, jax.tree.map(jnp.zeros_like, t), 0)


def test_distillers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"student.distiller.name: there is no distiller 'nope': known are .*kd"):
        distillers.fields("nope")
    with pytest.raises(UserError, match=r"student.distiller.name: 'os:path' is not a Flax module"):
        distillers.fields("os:path")
    with pytest.raises(UserError, match=r"at teacher width 0.5 'params/w' is not a leading block"):
        distillers.build(Unnested(), outputs(12), {0.5: outputs(8), 1.0: outputs(16)}, BATCH)
    assert distillers.fields("kd") == {"ce_weight": 0.1, "weight": 0.9, "temperature": 4.0}


class Phased(nn.Module):
    """An initial phase that fits a connector, then a loss that uses it; and a say in the predictions."""

    ce_weight: float = 0.0
    weight: float = 1.0
    initial_epochs: float = 2.0
    initial_each_stage: bool = False

    def setup(self):
        self.connector = nn.Dense(10)

    def __call__(self, student, teacher, batch, progress):
        return jnp.mean((self.connector(student.pooled) - teacher.logits) ** 2), {}

    def initial(self, student, teacher, batch, progress):
        return 7.0 + jnp.mean(self.connector(student.pooled) ** 2), {}

    def predict(self, student, teacher):
        return self.connector(student.pooled)


def fit(distiller, **options):
    widths = {0.5: outputs(8), 1.0: outputs(16)}
    return distillers.build(distiller, outputs(12), widths, BATCH, **options)


@pytest.mark.parametrize("each, stage, epoch, first", [
    (False, 0, 0.0, True), (False, 0, 1.9, True), (False, 0, 2.0, False), (False, 1, 0.0, False), (True, 1, 0.0, True),
])  # fmt: skip
def test_an_initial_phase_has_its_own_loss_and_time(each, stage, epoch, first):
    rng = np.random.default_rng(1)
    s, t, batch = outputs(12, rng), outputs(16, rng), {"label": jnp.array([0, 1, 2, 3])}
    fitted = fit(Phased(initial_each_stage=each))
    params, state = fitted.init(jax.random.key(0))
    progress = distillers.Progress(jnp.int32(stage), jnp.int32(5), jnp.float32(epoch))
    total = jax.jit(lambda p: fitted(p, state, 1.0, s, t, batch, progress, jax.random.key(0))[0])(params)
    guess = s.pooled @ params["connector"]["kernel"] + params["connector"]["bias"]
    expected = 7.0 + np.mean(guess**2) if first else np.mean((guess - t.logits) ** 2)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(fitted.predict(params, state, 1.0, s, t), guess, rtol=1e-5, atol=1e-6)
    assert fitted.predicts and not fit(distillers.create("kd")).predicts


def test_a_sum_adds_weighted_methods_and_one_cross_entropy():
    rng = np.random.default_rng(1)
    s, batch = outputs(12, rng), {"label": jnp.array([0, 1, 2, 3])}
    fields = distillers.fields("kd+cc")
    assert fields["ce_weight"] == 0.1 and fields["kd"] == {"weight": 0.9, "temperature": 4.0}
    fitted = fit(distillers.create("kd+cc", ce_weight=0.5, kd={"weight": 2.0}, cc={"weight": 3.0}))
    params, state = fitted.init(jax.random.key(0))

    def value(which, params):
        return which(params, state, 0.5, s, outputs(8, np.random.default_rng(2)), batch, distillers.START, jax.random.key(0))

    total, _, metrics = value(fitted, params)
    alone = fit(distillers.create("cc", ce_weight=0.0, weight=1.0))
    cc, _, _ = value(alone, params["parts_1"])
    taught = outputs(8, np.random.default_rng(2))
    expected = 0.5 * metrics["cross_entropy"] + 2.0 * kd_loss(s.logits, taught.logits, 4.0) + 3.0 * cc
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    with pytest.raises(UserError, match=r"simkd replaces the student's predictions"):
        distillers.create("kd+simkd")
    for name in ("kd+kd", "kd+my:Own", "kd+nope"):
        with pytest.raises(UserError, match=r"student\.distiller\.name"):
            distillers.fields(name)


def test_a_width_has_its_own_temperature():
    rng = np.random.default_rng(2)
    s, t, batch = outputs(12, rng), outputs(16, rng), {"label": jnp.array([0, 1, 2, 3])}
    fitted = fit(distillers.create("kd", temperature=3.0), temperatures={0.5: 2.0})
    summed = fit(distillers.create("kd+rkd", **{"kd.temperature": 3.0}), temperatures={0.5: 2.0})
    values = {}
    for width, temperature in ((0.5, 2.0), (1.0, 3.0)):
        _, _, metrics = fitted({}, {}, width, s, t, batch, distillers.START, jax.random.key(0))
        values[width] = metrics["distillation"]
        np.testing.assert_allclose(metrics["distillation"], kd_loss(s.logits, t.logits, temperature), rtol=1e-5)
    both = [summed({}, {}, w, s, t, batch, distillers.START, jax.random.key(0))[2]["distillation"] for w in (0.5, 1.0)]
    np.testing.assert_allclose(both[1] - both[0], 0.9 * (values[1.0] - values[0.5]), rtol=1e-3)
    with pytest.raises(UserError, match=r"student\.temperatures: AT has no temperature"):
        fit(distillers.create("at"), temperatures={0.5: 2.0})


def test_standardised_logits_reach_the_distiller_and_not_the_cross_entropy():
    rng = np.random.default_rng(1)
    s, t, batch = outputs(12, rng), outputs(16, rng), {"label": jnp.array([0, 1, 2, 3])}
    fitted = fit(distillers.create("kd", temperature=2.0), standardise=True)
    _, _, metrics = fitted({}, {}, 1.0, s, t, batch, distillers.START, jax.random.key(0))
    z, y = ((x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=1, keepdims=True) for x in map(np.asarray, (s.logits, t.logits)))
    np.testing.assert_allclose(metrics["distillation"], kd_loss(z, y, 2.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], slimmable.cross_entropy(s.logits, batch["label"]).mean(), rtol=1e-6)
