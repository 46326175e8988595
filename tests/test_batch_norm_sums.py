"""Batch norm of a batch: Flax's numbers by the definition in float64, and Flax's own wherever a layer is another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from pwkd_jax.models import compute


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    shapes = {"x": (5, 4, 3, 6), "scale": (6,), "bias": (6,), "cotangent": (5, 4, 3, 6)}
    return {name: rng.standard_normal(shape).astype(np.float32) * 2 + 1 for name, shape in shapes.items()}


def own(layer, variables, x):
    with compute.layers():
        return layer.apply(variables, x, mutable=["batch_stats"])


def variables(drawn, **stats):
    stats = {"mean": jnp.full(6, 0.5), "var": jnp.full(6, 2.0), **stats}
    return {"params": {"scale": drawn["scale"], "bias": drawn["bias"]}, "batch_stats": stats}


def test_values_statistics_and_gradients_equal_the_definition(drawn):
    layer, held = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5), variables(drawn)
    x, cotangent = (drawn[name].astype(np.float64) for name in ("x", "cotangent"))
    scale, bias = (drawn[name].astype(np.float64) for name in ("scale", "bias"))

    def run(params, x):
        return own(layer, {**held, "params": params}, x)

    out, back, updated = jax.vjp(run, held["params"], drawn["x"], has_aux=True)
    by_params, by_x = back(drawn["cotangent"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    unit = (x - mean) / np.sqrt(var + 1e-5)
    product = (cotangent * unit).mean((0, 1, 2))
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(out, unit * scale + bias, **near)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.45 + 0.1 * mean, **near)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 1.8 + 0.1 * var, **near)
    np.testing.assert_allclose(by_params["bias"], cotangent.sum((0, 1, 2)), **near)
    np.testing.assert_allclose(by_params["scale"], product * 60, **near)
    by_unit = cotangent - cotangent.mean((0, 1, 2)) - unit * product
    np.testing.assert_allclose(by_x, by_unit * scale / np.sqrt(var + 1e-5), **near)
    assert "custom_vjp" in str(jax.make_jaxpr(run)(held["params"], drawn["x"]))


@pytest.mark.parametrize("given", ("images", "parameters", "both"))
def test_bfloat16_is_as_near_to_float32_as_flaxs_own(drawn, given):
    """And of the same dtypes: output, gradients and statistics."""
    layer, exact = nn.BatchNorm(use_running_average=False), variables(drawn)
    x = jnp.asarray(drawn["x"], "float32" if given == "parameters" else "bfloat16")
    kind = "float32" if given == "images" else "bfloat16"
    held = exact | {"params": jax.tree.map(lambda p: jnp.asarray(p, kind), exact["params"])}

    def all_of(run):
        out, back, kept = jax.vjp(lambda params, x: run(held | {"params": params}, x), held["params"], x, has_aux=True)
        return out, back(jnp.asarray(drawn["cotangent"], out.dtype)), kept

    ours = all_of(lambda v, x: own(layer, v, x))
    theirs = all_of(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]))
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (a, b)), rtol=2e-2, atol=2e-2 * float(jnp.abs(b).max()))


def test_images_may_be_given_by_name(drawn):
    layer = nn.BatchNorm(use_running_average=False)
    with compute.layers():
        out, _ = layer.apply(variables(drawn), x=jnp.asarray(drawn["x"]), mutable=["batch_stats"])
    np.testing.assert_array_equal(out, own(layer, variables(drawn), jnp.asarray(drawn["x"]))[0])


@pytest.mark.parametrize(
    "layer",
    (
        nn.BatchNorm(use_running_average=True),
        nn.BatchNorm(use_running_average=False, use_fast_variance=False),
        nn.BatchNorm(use_running_average=False, use_scale=False),
        nn.BatchNorm(use_running_average=False, dtype="float16"),
        nn.BatchNorm(use_running_average=False, axis=1),
    ),
    ids=("running", "slow variance", "no scale", "float16", "channels first"),
)
def test_another_layer_is_flaxs_own(layer, drawn):
    x = jnp.asarray(drawn["x"])
    held = layer.init(jax.random.key(0), x)
    program = jax.make_jaxpr(lambda x: own(layer, held, x))
    assert "custom_vjp" not in str(program(x))
    assert "custom_vjp" in str(jax.make_jaxpr(lambda x: own(nn.BatchNorm(False), variables(drawn), x))(x))


def test_what_reads_the_moved_statistics_sends_them_a_gradient(drawn):
    layer = nn.BatchNorm(use_running_average=False, momentum=0.5)

    def loss(run, x):
        kept = run(variables(drawn), x)[1]["batch_stats"]
        return jnp.sum(kept["mean"] * drawn["scale"] + kept["var"] ** 2)

    x = jnp.asarray(drawn["x"])
    ours = jax.grad(lambda x: loss(lambda v, x: own(layer, v, x), x))(x)
    theirs = jax.grad(lambda x: loss(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]), x))(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_flax_refuses_is_refused(drawn):
    x = jnp.asarray(drawn["x"])
    with pytest.raises(ValueError, match="use_running_average"), compute.layers():
        nn.BatchNorm(use_running_average=True).apply(variables(drawn), x, use_running_average=False, mutable=["batch_stats"])
    wrong = variables(drawn) | {"params": {"scale": jnp.ones(1), "bias": jnp.ones(6)}}
    with pytest.raises(errors.ScopeParamShapeError):
        own(nn.BatchNorm(use_running_average=False), wrong, x)
    alone = {"params": variables(drawn)["params"]}  # and statistics that are missing begin as Flax's do
    kept = own(nn.BatchNorm(use_running_average=False), alone, x)[1]["batch_stats"]
    np.testing.assert_allclose(kept["mean"], 0.01 * drawn["x"].mean((0, 1, 2)), rtol=1e-4)


def test_within_a_shard_map_of_ones_own(drawn):
    layer, mesh = nn.BatchNorm(use_running_average=False), jax.sharding.Mesh(jax.devices()[:1], ("data",))

    def gradient(run):
        def one(params, x):
            return jax.grad(lambda p: jnp.sum(run(variables(drawn) | {"params": p}, x)[0] ** 2))(params)

        specs = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
        sharded = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=specs[0])
        return jax.jit(sharded)(variables(drawn)["params"], jnp.asarray(drawn["x"]))

    ours = gradient(lambda v, x: own(layer, v, x))
    theirs = gradient(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]))
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_masked_batch_is_flaxs_own(drawn):
    layer, mask = nn.BatchNorm(use_running_average=False), jnp.arange(5).reshape(5, 1, 1, 1) < 3
    with compute.layers():
        out, _ = layer.apply(variables(drawn), drawn["x"], mask=mask, mutable=["batch_stats"])
    expected, _ = layer.apply(variables(drawn), drawn["x"], mask=mask, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, expected)


def test_statistics_that_may_not_change_are_refused_as_flax_refuses_them(drawn):
    with compute.layers(), pytest.raises(errors.ModifyScopeVariableError):
        nn.BatchNorm(use_running_average=False).apply(variables(drawn), drawn["x"])
