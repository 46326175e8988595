"""One result on any mesh: placement, batch norm in groups, bfloat16, resume elsewhere. Eight devices are one process's."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_SHAPE, close, family, varied

from pwkd_jax import config, models, slimmable
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition
from pwkd_jax.models import precision
from pwkd_jax.training import device_gradients, sharding

ROOT = Path(__file__).parents[1]

DEVICES = '''
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, "tests")
import jax, numpy as np
import jax.numpy as jnp
import flax.linen as nn
from conftest import IMAGE_SHAPE
from pwkd_jax import data, distillers, models, slimmable, stages
from pwkd_jax.models import precision
from pwkd_jax.training import optimizers, sharding, state as states, student, teacher
from pwkd_jax.training.checkpoints import Checkpoints
jax.config.update("jax_default_matmul_precision", "highest")
out = Path(sys.argv[1])
count = jax.device_count()
BATCH = 32
rng = np.random.default_rng(0)
labels = rng.integers(0, 10, 96).astype(np.int32)
raw = {"image": rng.integers(0, 256, (BATCH, *IMAGE_SHAPE)).astype(np.uint8), "label": labels[:BATCH],
       "index": np.arange(BATCH, dtype=np.int32)}

class OwnNorm(nn.Module):
    """Batch norm that nobody else knows to be one."""
    use_running_average: bool
    momentum: float

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if self.use_running_average:
            return scale * (x - mean.value)
        found = x.mean((0, 1, 2))
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * found
        return scale * (x - found)

class Pair(nn.Module):
    """Two convolutions with batch norm; the second is just large enough to be split."""
    width: float = 1.0
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = nn.Conv(models.channels(48, self.width), (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train, momentum=0.9)(x))
        return models.Outputs(nn.Dense(10, name="classifier")(x.mean((1, 2))), (x,), (x,), x.mean((1, 2)))

tx = optimizers.optimizer("sgd", momentum=0.9, nesterov=False, weight_decay=5e-4, decay="all", clip_norm=0.0)
preprocess = lambda key, images: data.normalise(images, (0.5,) * 3, (0.25,) * 3)
pair = slimmable.build(lambda w: Pair(width=w), (0.5, 1.0), IMAGE_SHAPE)
drawing = slimmable.build(lambda w: Pair(width=w), (0.5, 1.0), IMAGE_SHAPE, pool=(0.75, 0.875), batch_norm="private_stats")
strange = slimmable.build(lambda w: Pair(width=w, norm=OwnNorm), (0.5, 1.0), IMAGE_SHAPE)
pupil = Pair()
like = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32 if k == "image" else jnp.int32) for k, v in raw.items()}
like["dataset_label"] = jax.ShapeDtypeStruct(labels.shape, jnp.int32)
outputs = lambda m: jax.eval_shape(lambda v, x: models.apply(m, v, x, train=False)[0],
                                   models.abstract(m, IMAGE_SHAPE), like["image"])
# SP compares every image of the batch with every other one.
fitted = distillers.build(distillers.create("kd+sp"), outputs(pupil), {1.0: outputs(pair.members[1.0])}, like)

def steps(model, how, group=0, learns=True, net=pair, **sandwich):
    """Losses and states after two steps of teacher and student, the teacher's state, and what of it taught."""
    mesh = sharding.make_mesh(model)
    net = dataclasses.replace(net, members={w: precision.wrap(m, group=group) for w, m in net.members.items()})
    batch = sharding.put_batch(mesh, raw)
    make = sharding.creator(
        mesh, lambda seed: states.create(seed, *net.init(jax.random.key(seed), IMAGE_SHAPE), tx), how, 0)
    state = make(0)
    own = mesh if how == "replicated" else None
    step = sharding.jit_step(mesh, teacher.make_step(net, tx, lambda s: 0.1, preprocess, own, loss="inplace_mix", **sandwich),
                             make.layout)
    losses = []
    for _ in range(2):
        before, (state, metrics) = state, step(state, batch)
        losses.append(metrics["train_loss"].compute())
    assert before.params["shared"]["classifier"]["kernel"].is_deleted(), "not donated"
    assert jax.tree.map(lambda x: x.sharding, state) == make.layout, "not left in its layout"
    make_pupil = sharding.creator(mesh, lambda seed: student.init(pupil, IMAGE_SHAPE, fitted, tx, seed), how, 0)
    learner = make_pupil(1)
    taught = sharding.place(mesh, {1.0: teacher.freeze(net, state.params, state.collections)[1.0]}, how)
    plan = [stages.Stage("slimmable", (1.0,), 0, 4)]
    one = student.make_step(precision.wrap(pupil, group=group), net.members, (1.0,), fitted, plan, tx, lambda s: 0.1,
                            preprocess, images=40)
    one = sharding.jit_step(mesh, one, make_pupil.layout)
    for _ in range(2 * learns):
        learner, metrics = one(learner, batch | {"dataset_label": sharding.place(mesh, labels)}, teacher=taught)
        losses.append(metrics["train_loss"].compute())
    leaves = [np.asarray(x) for tree in (losses, state, learner) for x in jax.tree.leaves(tree)]
    return leaves, state, taught

def save(name, leaves):
    np.savez(out / f"{name}.npz", *leaves)

drawn = {"net": drawing, "sampling": "sandwich", "subnetworks": 3, "learns": False}
save(f"{count} drawn", steps(1, "replicated", **drawn)[0])
save(f"{count} strange", steps(1, "replicated", net=strange, learns=False)[0])
save(f"{count} parts", steps(1, "replicated", accumulate=2, learns=False)[0])
if count == 1:
    save("one", steps(1, "replicated")[0])
    save("one groups", steps(1, "replicated", 4)[0])
    save("one wide groups", steps(1, "replicated", 16, learns=False)[0])
else:
    for model, how in ((1, "replicated"), (2, "replicated"), (1, "fsdp"), (2, "fsdp")):
        leaves, state, taught = steps(model, how)
        save(f"{count // model}x{model} {how}", leaves)
        parts = [(x.size, x.addressable_shards[0].data.size) for x in jax.tree.leaves((state.params, state.opt_state, taught))]
        for whole, part in parts:
            expected = whole // ((count // model if how == "fsdp" else 1) * model) if whole >= sharding.SMALL else whole
            assert part == expected, (model, how, whole, part)
        assert any(whole >= sharding.SMALL for whole, _ in parts)
        if (model, how) == (1, "fsdp"):
            Checkpoints(out / "saved").save(7, state)
            saved = jax.tree.map(np.asarray, state)
    save("8x1 groups", steps(1, "replicated", 4)[0])
    save("8x1 wide groups", steps(1, "fsdp", 16, learns=False)[0])

# What eight devices saved split, others load: one, and a 2 x 4 mesh of the other layout.
if count == 8:
    checkpoints = Checkpoints(out / "saved")
    checkpoints.close()
    checkpoints = Checkpoints(out / "saved")
    mesh = sharding.make_mesh(4)
    fresh = sharding.creator(mesh, lambda s: states.create(s, *pair.init(jax.random.key(s), IMAGE_SHAPE), tx), "fsdp", 0)
    restored = checkpoints.restore(fresh(5))
    assert jax.tree.map(lambda x: x.sharding, restored) == fresh.layout
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored)))
    save("saved", jax.tree.leaves(saved))
    for bad in (3, 16):
        try:
            sharding.make_mesh(bad)
            raise SystemExit(f"mesh.model {bad} was accepted")
        except Exception as e:
            assert type(e).__name__ == "UserError", e
            assert f"mesh.model: {bad} does not divide the number of devices, 8" in str(e), e
else:
    mesh = sharding.make_mesh()
    fresh = sharding.creator(mesh, lambda s: states.create(s, *pair.init(jax.random.key(s), IMAGE_SHAPE), tx), "fsdp", 0)
    save("restored", jax.tree.leaves(Checkpoints(out / "saved").restore(fresh(5))))
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("devices")
    script = directory / "devices.py"
    script.write_text(DEVICES)
    for count in (8, 1):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        line = [sys.executable, str(script), str(directory)]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: list(np.load(directory / f"{name}.npz").values())


@pytest.mark.parametrize(
    ("eight", "one"),
    [
        ("8x1 replicated", "one"), ("4x2 replicated", "one"), ("8x1 fsdp", "one"), ("4x2 fsdp", "one"),
        ("8x1 groups", "one groups"), ("8x1 wide groups", "one wide groups"), ("8 drawn", "1 drawn"),
        ("8 strange", "1 strange"), ("8 parts", "1 parts"),
    ],
)  # fmt: skip
def test_eight_devices_equal_one(runs, eight, one):
    for x, y in zip(runs(eight), runs(one), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("devices", "batch", "group", "own"),
    [(8, 32, 0, True), (1, 32, 0, False), (8, 32, 4, True), (8, 32, 2, True), (8, 32, 8, False), (3, 32, 0, False)],
)
def test_devices_take_their_own_gradient_where_batch_norm_allows(devices, batch, group, own):
    net = slimmable.build(lambda w: family(w), (0.5, 1.0), IMAGE_SHAPE)
    net = dataclasses.replace(net, members={w: precision.wrap(m, group=group) for w, m in net.members.items()})
    mesh = jax.sharding.AbstractMesh((devices, 1), ("data", "model"))
    assert device_gradients.possible(net, mesh, (batch, *IMAGE_SHAPE)) is own


def test_groups_of_other_sizes_are_other_numbers(runs):
    whole, small, wide = (runs(name)[0] for name in ("one", "one groups", "one wide groups"))
    assert min(abs(small - whole), abs(wide - whole), abs(wide - small)) > 1e-4


def test_a_checkpoint_of_eight_devices_loads_on_one(runs):
    for x, y in zip(runs("saved"), runs("restored"), strict=True):
        np.testing.assert_array_equal(x, y)


# The rule, on a mesh that no machine here has: it asks for shapes alone.


@pytest.mark.parametrize(
    ("shape", "how", "data", "model", "spec"),
    [
        ((3, 3, 64, 64), "replicated", 8, 1, (None,) * 4),
        ((3, 3, 64, 64), "fsdp", 8, 1, (None, None, "data", None)),
        ((3, 3, 64, 128), "fsdp", 8, 1, (None, None, None, "data")),
        ((3, 3, 64, 64), "fsdp", 4, 2, (None, None, "data", "model")),
        ((3, 3, 63, 128), "fsdp", 4, 2, (None, None, None, ("data", "model"))),
        ((3, 3, 64, 64), "replicated", 4, 2, (None, None, None, "model")),
        ((130, 127), "fsdp", 4, 2, (None, None)),
        ((127, 127), "fsdp", 1, 1, ()),
        ((64,), "fsdp", 8, 1, ()),
        ((50_000,), "fsdp", 8, 1, ("data",)),
    ],
)
def test_the_rule(shape, how, data, model, spec):
    mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"))
    found = sharding.shardings(mesh, {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, how)["x"].spec
    assert tuple(found) == spec or (not any(found) and not any(spec))


# Batch norm in groups.


class Norm(nn.Module):
    """Batch norm alone, returned as a map."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        return models.Outputs(x.mean((1, 2)), (x,))


def test_grouped_batch_norm_is_each_groups_in_float64(batch):
    images = batch[0] + np.arange(16, dtype=np.float32)[:, None, None, None]
    model = precision.wrap(Norm(), group=4)
    variables = varied(model.init(jax.random.key(0), images))
    out, stats = models.apply(model, variables, images, train=True)
    norm = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    scale, bias = (norm["params"]["BatchNorm_0"][key] for key in ("scale", "bias"))
    groups = images.astype(np.float64).reshape(4, -1, *images.shape[1:])
    mean, var = groups.mean((1, 2, 3), keepdims=True), groups.var((1, 2, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5) * scale + bias).reshape(images.shape)
    np.testing.assert_allclose(out.stages[0], expected, atol=2e-4)
    for key, found in (("mean", mean), ("var", var)):
        old = norm["batch_stats"]["BatchNorm_0"][key]
        np.testing.assert_allclose(stats["BatchNorm_0"][key], 0.9 * old + 0.1 * found.mean((0, 1, 2, 3)), rtol=1e-4)


class Depthwise(nn.Module):
    """One channel a group, as in the mobile networks, and bare logits."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), feature_group_count=3)(x)
        return nn.Dense(10)(nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2)))


@pytest.mark.parametrize("model", [family(1.0), Depthwise()], ids=["resnet", "depthwise"])
def test_outputs_of_groups_are_those_of_each_group_alone(batch, model):
    images = batch[0][:8]
    variables = varied(jax.jit(model.init)(jax.random.key(0), images[:1]))
    run = jax.jit(lambda m, v, x: models.apply(m, v, x, train=True), static_argnums=0)
    whole, stats = run(precision.wrap(model, group=4), variables, images)
    parts = [run(model, variables, x) for x in (images[:4], images[4:])]
    assert (whole.head is None) == (parts[0][0].head is None)
    fixed = {"head": whole.head, "norms": whole.norms}
    close(fixed, {key: getattr(parts[0][0], key) for key in fixed}, 0)
    merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *(out._replace(head=None, norms=()) for out, _ in parts))
    close(whole._replace(head=None, norms=()), merged, 2e-4)
    close(stats, jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1]), 1e-4)


def test_evaluation_knows_no_groups_and_a_group_must_divide(batch):
    model, grouped = Norm(), precision.wrap(Norm(), group=3)
    variables = varied(model.init(jax.random.key(0), batch[0][:1]))
    same = [models.apply(m, variables, batch[0], train=False)[0].logits for m in (model, grouped)]
    np.testing.assert_array_equal(*same)
    with pytest.raises(UserError, match="batch_norm_group: a batch of 16 images does not divide into groups of 3"):
        models.apply(grouped, variables, batch[0], train=True)


# bfloat16.


seen = {}


class Watched(nn.Module):
    """Notes in `seen` the type of what passes through its layers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3))(x)
        seen["conv"] = x.dtype
        x = nn.BatchNorm(use_running_average=not train)(x)
        seen["norm"] = x.dtype
        return models.Outputs(nn.Dense(10)(x.mean((1, 2))), (x,))


@pytest.mark.parametrize("train", [True, False])
def test_bfloat16_computes_in_it_and_keeps_the_rest(batch, train):
    model = precision.wrap(Watched(), "bfloat16")
    variables = jax.eval_shape(model.init, jax.random.key(0), batch[0])
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out, stats = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=train), variables, batch[0])
    assert seen == {"conv": jnp.bfloat16, "norm": jnp.bfloat16}
    assert {x.dtype for x in jax.tree.leaves((out, stats))} == {jnp.dtype("float32")}
    assert bool(stats) == train


def test_bfloat16_is_near_float32_in_loss_gradient_and_statistics(batch):
    plain = family(1.0)
    variables = varied(jax.jit(plain.init)(jax.random.key(0), batch[0][:1]))

    def run(model):
        def loss(params):
            out, stats = models.apply(model, {**variables, "params": params}, batch[0], train=True)
            return -jax.nn.log_softmax(out.logits)[np.arange(16), batch[1]].mean(), stats

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    (exact, stats), grads = run(plain)
    (near, rough_stats), rough = run(precision.wrap(plain, "bfloat16"))
    assert 0 < abs(near - exact) < 0.02 * exact
    assert {x.dtype for x in jax.tree.leaves((rough, rough_stats))} == {jnp.dtype("float32")}
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (grads, rough)]
    assert flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]) > 0.99
    close(rough_stats, stats, 0.02)


def test_a_wrapped_model_is_its_own_key_and_passes_its_family_on():
    wrapped = precision.wrap(family(1.0), "bfloat16", 4)
    assert hash(wrapped) == hash(precision.wrap(family(1.0), "bfloat16", 4)) and precision.plain(wrapped) == family(1.0)
    assert wrapped.full_channels == (16, 32) and not hasattr(wrapped, "nothing")
    assert dataclasses.is_dataclass(wrapped) and precision.wrap(family(1.0)) == family(1.0)


# The config.


def test_networks_are_computed_as_the_config_says():
    made = config.default().unlock()
    made.dtype, made.batch_norm_group = "bfloat16", 8
    facts = {"image_shape": list(IMAGE_SHAPE), "num_classes": 10}
    nets, pupil = definition.networks(made, facts)
    for model in (pupil, *nets["slimmable"].members.values(), *nets["standard"].members.values()):
        assert (model.dtype, model.group) == ("bfloat16", 8)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"dtype": "float16"}, "dtype: 'float16' is not possible; it should be one of float32, bfloat16"),
        ({"batch_norm_group": -1}, "batch_norm_group: -1 is not possible"),
        ({"batch_norm_group": 24}, "teacher.batch_size: 64 is not possible; it should be a multiple of batch_norm_group"),
        ({"batch_norm_group": 64, "student.batch_size": 96}, "student.batch_size: 96 is not possible"),
        (
            {"batch_norm_group": 64, "teacher.calibration.images": 90, "teacher.calibration.batch_size": 90},
            "teacher.calibration.batch_size: 90 is not possible; it should be a multiple of batch_norm_group, which is 64",
        ),
        ({"mesh.model": 0}, "mesh.model: 0 is not possible"),
        ({"teacher.sharding": "zero"}, "teacher.sharding: 'zero' is not possible; it should be one of replicated, fsdp"),
        ({"student.sharding": "zero"}, "student.sharding: 'zero'"),
        ({"student.teacher_sharding": "zero"}, "student.teacher_sharding: 'zero'"),
    ],
)
def test_the_config_refuses(keys, sentence):
    made = config.default().unlock()
    made.update_from_flattened_dict(keys)
    with pytest.raises(UserError) as error:
        config.check(made)
    assert str(error.value).startswith(sentence)
