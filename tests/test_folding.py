"""Batch norm folded into convolutions: the same network, its own variables, and only where nobody else looks between."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_commands import TINY, rows
from test_slimmable import from_nnx

from pwkd_jax import models, train
from pwkd_jax.models import batch_norm_folding, compute, precision
from pwkd_jax.models.ensemble import Ensemble, gather
from pwkd_jax.training import dispatch

SHAPE = (8, 8, 3)


class Mixed(nn.Module):
    """A convolution with a bias, a depthwise one, one whose output is read twice, and a norm before a convolution."""

    between: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda: nn.BatchNorm(use_running_average=not train, epsilon=1e-3)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        x = norm()(nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False)(x))
        read = nn.Conv(8, (1, 1), use_bias=False)(nn.relu(norm()(nn.relu(x))))
        x = norm()(read) + (read if self.between else 0)
        return models.Outputs(nn.Dense(10)(x.mean((1, 2))), (x,), (read,))


def drawn(model, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Variables far from their first values, and images."""
    rng, like = np.random.default_rng(seed), models.abstract(model, SHAPE)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), like["params"])
    stats = jax.tree.map(lambda x: 0.5 + np.abs(rng.standard_normal(x.shape, np.float32)), like["batch_stats"])
    return {"params": params, "batch_stats": stats}, rng.standard_normal((4, *SHAPE), np.float32)


def outputs(model, variables, images):
    return jax.jit(lambda v, x: models.apply(model, v, x, train=False)[0])(variables, images)


def alike(a, b, tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.abs(x - y).max() <= tolerance * jnp.abs(x).max()


@pytest.mark.parametrize("model", [
    Mixed(), models.create("resnet8", width=0.25, num_classes=10), models.create("wrn_10_1", width=0.25, num_classes=10),
], ids=["mixed", "resnet8", "wrn"])  # fmt: skip
def test_every_output_stays(model):
    variables, images = drawn(model)
    found = outputs(batch_norm_folding.Folded(model), variables, images)
    alike(outputs(model, variables, images), found, 1e-5)


def test_it_folds_what_it_may_and_no_more():
    """Not the norm whose input is no convolution's output, nor the convolution that is read twice."""
    model = Mixed()
    variables, images = drawn(model)
    convs = {conv[0]: norm.path[0] for conv, norm in batch_norm_folding.pairs(model, variables, images).items()}
    assert convs == {"Conv_0": "BatchNorm_0", "Conv_1": "BatchNorm_1"}
    whole = models.create("resnet8", width=0.25, num_classes=10)
    assert len(batch_norm_folding.pairs(whole, *drawn(whole))) == 9
    norms = jax.jit(lambda v, x: batch_norm_folding.Folded(whole).apply(v, x)).lower(*drawn(whole)).as_text().count("rsqrt")
    assert norms == 9  # one a norm, of its channels; none of a map


def test_it_folds_in_the_forms_that_a_cpu_has_in_training():
    model = Mixed()
    variables, images = drawn(model)

    def run(model):
        with compute.layers():
            return outputs(model, variables, images)

    with compute.layers():
        assert batch_norm_folding.pairs(model, variables, images).keys() == {("Conv_0",), ("Conv_1",)}
    found, plain = run(batch_norm_folding.Folded(model)), run(model)
    alike(found, plain, 1e-5)
    assert any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (found, plain)), strict=True))


def test_the_affine_map_in_float64():
    variables, _ = drawn(Mixed())
    scale, shift = batch_norm_folding.affine(variables, ("Conv_0",), batch_norm_folding.Norm(("BatchNorm_0",), 1e-3, True))
    p, s = variables["params"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"]
    x, own = np.float64(0.7), np.float64(variables["params"]["Conv_0"]["bias"])
    expected = (x + own - s["mean"]) / np.sqrt(np.float64(s["var"]) + 1e-3) * p["scale"] + p["bias"]
    np.testing.assert_allclose(x * np.float64(scale) + np.float64(shift) + own, expected, rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """A kernel made of the one that is stored, a boxed one, and layers that are called twice."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, name=name)  # noqa: E731
        x = norm("a")(nn.WeightNorm(nn.Conv(6, (3, 3), use_bias=False))(x))
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
        x = nn.relu(norm("b")(nn.Conv(6, (3, 3), kernel_init=boxed)(nn.relu(x))))
        twice, shared = nn.Conv(6, (1, 1), name="twice"), norm("c")
        x = nn.relu(shared(twice(x)))
        return models.Outputs(nn.Dense(4)(shared(nn.relu(twice(x))).mean((1, 2))))


def test_kernels_that_are_made_and_layers_that_are_shared_stay_right():
    model, images = Odd(), np.random.default_rng(0).standard_normal((4, *SHAPE), np.float32)
    variables = model.init(jax.random.key(0), images)
    variables = jax.tree.map(lambda x: x + 0.3 * jax.random.uniform(jax.random.key(x.size), x.shape), variables)
    found = batch_norm_folding.pairs(model, variables, images)
    assert {norm.path[0]: norm.stored for norm in found.values()} == {"a": False, "b": True}
    folded = batch_norm_folding.Folded(model)
    ready = folded.prepare(variables, SHAPE)
    assert len(ready["folded"]) == 1
    for given in (variables, ready):
        alike(outputs(model, variables, images), outputs(folded, given, images), 1e-5)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_prepared_variables_give_the_same(dtype):
    """Of one network and of an ensemble; and the convolutions then are given kernels that nobody multiplies any more."""
    variables, images = drawn(Mixed())
    one, pair = precision.inference(Mixed(), dtype, True), Ensemble((Mixed(), Mixed()), (0.25, 0.75))
    two = gather([variables, drawn(Mixed(), 1)[0]])
    for model, own in ((one, variables), (precision.inference(pair, dtype, True), two)):
        ready = jax.jit(lambda v, model=model: precision.prepared(model, v, SHAPE))(own)
        alike(outputs(model, own, images), outputs(model, ready, images), 1e-6 if dtype == "float32" else 2e-2)
    ready = jax.eval_shape(lambda: precision.prepared(one, variables, SHAPE))
    text = jax.jit(lambda v: models.apply(one, v, images, train=False)[0]).lower(ready).as_text()
    assert text.count("rsqrt") == 2  # of the norms that are not folded


def test_a_step_folds_before_its_loop():
    """The kernels of a teacher that only predicts are multiplied once a dispatch, whatever its steps."""
    calls = []

    def prepare(frozen):
        calls.append(1)
        return {"teacher": 2 * frozen["teacher"]}

    def step(state, batch, teacher):
        return state + teacher, {"seen": teacher}

    run = jax.jit(dispatch.many(step, (1,), prepare))
    stored = {"image": jnp.zeros((4, 1), jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    batch = {"stored": stored, "rows": jnp.zeros((5, 2), jnp.int32), "count": np.int32(3)}
    state, metrics = run(1.0, batch, teacher=jnp.float32(10))
    assert state == 61 and list(metrics["seen"]) == [20, 20, 20, 0, 0] and len(calls) == 1


def test_training_and_strangers_are_left_alone():
    model = Mixed()
    variables, images = drawn(model)
    kept = [models.apply(m, variables, images, train=True) for m in (model, batch_norm_folding.Folded(model))]
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, kept), strict=True))
    stranger = from_nnx(num_classes=10)
    variables = jax.tree.map(jnp.asarray, stranger.init(jax.random.key(0), images))
    alike(outputs(stranger, variables, images), outputs(batch_norm_folding.Folded(stranger), variables, images), 0)


def test_in_bfloat16_it_is_as_near_to_float32_as_without():
    model = models.create("resnet8", width=0.25, num_classes=10)
    variables, images = drawn(model)
    exact = outputs(model, variables, images).logits
    plain, folded = (outputs(precision.inference(model, "bfloat16", on), variables, images).logits for on in (False, True))
    assert folded.dtype == jnp.float32 and not np.array_equal(folded, exact)
    assert jnp.abs(folded - exact).max() <= 2 * jnp.abs(plain - exact).max() + 1e-3 * jnp.abs(exact).max()


@pytest.mark.slow
def test_it_teaches_the_same(tmp_path):
    line = [*TINY, "--config.arms=pwkd", "--config.log.tensorboard=false"]
    assert train.main([*line, f"--workdir={tmp_path / 'a'}"]) == 0
    line.append(f"--config.teacher.run={tmp_path / 'a'}")
    exact, half = [*line, "--config.student.teacher_folded=true"], [*line, "--config.student.teacher_dtype=bfloat16"]
    assert train.main([*exact, f"--workdir={tmp_path / 'b'}"]) == 0
    assert train.main([*half, f"--workdir={tmp_path / 'c'}"]) == 0
    for workdir, tolerance in (("b", 1e-5), ("c", 2e-2)):
        for ours, theirs in zip(*(rows(tmp_path / w, "students/pwkd/seed0") for w in ("a", workdir)), strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=tolerance)
        assert rows(tmp_path / "a", "students/pwkd/seed0") != rows(tmp_path / workdir, "students/pwkd/seed0")
