"""The newest distillers (2021 to 2026) against their authors' code, and where that code has no number to give."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, network_outputs
from scipy.special import logsumexp
from test_distillers import BATCH

from pwkd_jax import config, distillers, train
from pwkd_jax.distillers.ickd import ickd_loss
from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.srd import normed, srd_loss
from pwkd_jax.distillers.streamlined import direction_loss
from pwkd_jax.distillers.ttm import ttm_losses
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition

DATA = Path(__file__).parent / "data"
IMAGES = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
GOLDEN = json.loads((DATA / "golden_newer.json").read_text())
# {name: (loss of the student's arrays and the teacher's, names of either)}
LOGITS, POOLED = (("logits_s",), ("logits_t",)), (("pooled_s",), ("pooled_t_same",))
LOSSES = {
    **{f"TTM_{x}": (lambda s, t, x=x: ttm_losses(s, t, x)[0], LOGITS) for x in (0.1, 0.2, 1.0)},
    **{f"WTTM_{x}": (lambda s, t, x=x: ttm_losses(s, t, x)[1], LOGITS) for x in (0.1, 0.2, 1.0)},
    "ICKD": (ickd_loss, (("fmap_s",), ("fmap_t_same",))),
    "SRD_normed": (lambda s, t: srd_loss(normed(s), normed(t), 4.0), POOLED),
    "SRD_exp4_T1": (
        lambda s, p, t, q: 2 * srd_loss(p, q, 4.0) + kd_loss(s, t, 1.0),
        (("logits_s", "pooled_s"), ("logits_t", "pooled_t_same")),
    ),
    "SKD2026_instance_T4": (lambda s, t: kd_loss(s, t, 4.0) / 16, LOGITS),
    "SKD2026_direction_l0.1": (lambda s, t: direction_loss(s, t, 0.1), LOGITS),
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays(golden_logits):
    stream = np.random.RandomState(0).randn(450_000)
    made = {key: golden_logits[key] for key in ("logits_s", "logits_t")}
    for name, a in json.loads((DATA / "golden_features.json").read_text())["arrays"].items():
        if name.startswith(("fmap", "pooled")):
            x = stream[a["offset"] : a["offset"] + np.prod(a["shape"])].reshape(a["shape"]).astype(np.float32)
            made[name] = (x * np.float32(a["scale"])).transpose((0, 2, 3, 1) if x.ndim == 4 else (0, 1))
    return made


def test_every_number_of_the_authors_is_compared():
    assert LOSSES.keys() == GOLDEN.keys() - {"about"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_authors(name, arrays):
    (loss, (own, taught)), expected = LOSSES[name], GOLDEN[name]
    for dtype, value_at, rtol, grad_rtol in ((np.float32, "value", 2e-5, 1e-4), (np.float64, "value_float64", 1e-7, 1e-4)):
        with jax.enable_x64(dtype == np.float64):
            inputs = [[arrays[k].astype(dtype) for k in keys] for keys in (own, taught)]
            argnums = tuple(range(len(own)))
            value, grads = jax.jit(jax.value_and_grad(loss, argnums))(*inputs[0], *inputs[1])
            assert value.dtype == dtype
            np.testing.assert_allclose(value, expected[value_at], rtol=rtol)
            norms = expected.get("grad_l2", {own[0]: expected.get("grad_l2_total")})
            for key, grad in zip(own, grads, strict=True):
                np.testing.assert_allclose(jnp.linalg.norm(grad), norms[key], rtol=grad_rtol)


def test_the_weight_of_a_doubtful_teacher():
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 5, 10)) * 3
    total = plain = 0.0
    for a, b in zip(s, t, strict=True):
        p = np.exp(b - logsumexp(b)) ** 0.3
        q = p / p.sum()
        off = np.sum(q * (np.log(q) - (a - logsumexp(a))))
        plain, total = plain + off / 5, total + p.sum() * off / 5
    with jax.enable_x64(True):
        np.testing.assert_allclose(ttm_losses(s, t, 0.3), (plain, total), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_bfloat16(name, arrays):
    loss, (own, taught) = LOSSES[name]
    rounded = [jnp.asarray(arrays[k], jnp.bfloat16) for k in (*own, *taught)]
    value, grads = jax.jit(jax.value_and_grad(loss))(*rounded)
    assert value.dtype == jnp.float32 and np.all(np.isfinite(grads.astype(jnp.float32)))
    np.testing.assert_allclose(value, loss(*(x.astype(jnp.float32) for x in rounded)), rtol=1e-5)


def test_extremes_are_finite():
    """Networks that agree, a sure teacher, dead channels, equal images: where a root or a logarithm has no slope."""
    s = jnp.array([[50.0, 0.0, -50.0], [0.0, 0.0, 0.0], [50.0, 0.0, -50.0], [-1e4, 1e4, 5.0]])
    maps = jnp.zeros((4, 2, 2, 3)).at[:, :, :, 0].set(1.0)
    losses = {
        "ttm": lambda x: sum(ttm_losses(x, s, 0.1)), "direction": lambda x: direction_loss(x, s, 0.1),
        "ickd": lambda x: ickd_loss(maps * x[:, None, None], maps), "srd": lambda x: srd_loss(normed(x), normed(s), 4.0),
    }  # fmt: skip
    for name, loss in losses.items():
        for x in (s, -s, jnp.zeros_like(s)):
            value, grad = jax.jit(jax.value_and_grad(loss))(x)
            assert np.isfinite(value) and np.all(np.isfinite(grad)), name
    assert losses["direction"](s) == 0 and abs(losses["ttm"](s)) > 0


@pytest.mark.parametrize("name", ["ttm", "wttm", "streamlined", "srd", "ickd"])
def test_modules_are_their_formulas(name):
    student, teacher = (network_outputs(model, 1.0, IMAGES) for model in ("resnet8", "resnet14"))
    module = distillers.create(name)
    key = jax.random.key(0)
    variables = module.init({"params": key}, student, teacher, BATCH, distillers.START)
    (loss, metrics), _ = module.apply(variables, student, teacher, BATCH, distillers.START, mutable=["batch_stats"])
    assert np.isfinite(loss)
    if name in ("ttm", "wttm"):
        close(loss, ttm_losses(student.logits, teacher.logits, module.exponent)[name == "wttm"], 1e-5)
    if name == "streamlined":
        close(loss, metrics["instance"] + direction_loss(student.logits, teacher.logits, 0.1), 1e-5)
    if name == "srd":
        kernel = np.asarray(variables["params"]["linear"]["kernel"], np.float64)
        s, t = (np.asarray(x, np.float64) for x in (student.pooled @ kernel, teacher.pooled))
        s, t = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4) for x in (s, t))
        close(loss, 2 * np.log(np.sum(np.abs(s - t) ** 4)) + metrics["logits"], 1e-4)
    if name == "ickd":
        assert variables["params"]["conv"]["kernel"].shape == (1, 1, student.stages[-1].shape[-1], teacher.stages[-1].shape[-1])


def test_parts_of_a_batch_are_what_a_method_is_fitted_to(tmp_path, capsys):
    tiny = ["--config=configs/digits.py", "--config.data.train_split=train[:64]", "--config.data.test_split=test[:32]",
            "--config.teacher.model=resnet8", "--config.teacher.widths=(0.5,1.0)", "--config.student.batch_size=8",
            "--config.arms=pwkd", "--config.student.accumulate=8"]  # fmt: skip
    # Before a teacher is trained for a student that could not learn from it.
    assert train.main([*tiny, "--config.student.distiller.name=streamlined", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "streamlined compares images of a batch, and there is one" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
    settings, _ = config.load([*tiny[:-1], "--config.student.accumulate=2", "--config.student.distiller.name=semckd"])
    made = definition.prepare(settings).distillation("slimmable", [0.5])
    assert made.batch["image"].shape[0] == 4


def test_what_they_cannot_do_is_refused():
    with pytest.raises(UserError, match="exponent: 0 is not possible"):
        distillers.create("ttm", exponent=0.0)
    with pytest.raises(UserError, match="tikhonov: -1 is not possible"):
        distillers.create("streamlined", tikhonov=-1.0)
    one = jax.tree.map(lambda x: x[:1], network_outputs("resnet8", 1.0, IMAGES))
    with pytest.raises(UserError, match="streamlined compares images of a batch"):
        distillers.create("streamlined").apply({}, one, one, BATCH, distillers.START)
