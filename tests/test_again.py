"""A network run once more: from any of its stages on it is what it was, with its gradient, or without where it is frozen."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import made_up

from pwkd_jax import distillers, models
from pwkd_jax.errors import UserError
from pwkd_jax.models import again, contract, precision, sight, vit

# The smallest of each family, and how large its images have to be.
FAMILIES = {
    "resnet8": 8, "wrn_10_1": 8, "vgg8": 8, "MobileNetV2": 16, "imagenet_MobileNetV1": 32, "ShuffleV1": 8, "ShuffleV2": 8,
}  # fmt: skip


def images(size: int, count: int = 2):
    return np.random.default_rng(0).standard_normal((count, size, size, 3)).astype(np.float32)


def run(name: str, size: int, train: bool = False):
    model = models.create(name, width=0.5, divisor=0 if name.startswith(("resnet", "wrn", "vgg")) else 4)
    x = images(size)
    variables = made_up(model, x.shape[1:])
    return again.attach(models.forward(model, variables, x, train=train)[0], model, variables, train)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n[0] in "iS")) for n in FAMILIES])
def test_from_every_stage_on_a_network_is_what_it_was(name):
    out = run(name, FAMILIES[name])
    for i, x in enumerate(out.stages, start=1):
        rest = out.again(x, start=i)
        for field in ("logits", "pooled", "final"):
            np.testing.assert_allclose(getattr(rest, field), getattr(out, field), rtol=1e-5, atol=1e-5, err_msg=field)
        for field in ("stages", "preact", "norms"):
            later = getattr(out, field)[i:]
            assert len(getattr(rest, field)) == len(later), field
            for a, b in zip(jax.tree.leaves(getattr(rest, field)), jax.tree.leaves(later), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=field)
    # The stages that pass no ReLU are those of a network that says so.
    assert any(bool(jnp.any(x < 0)) for x in out.stages) == out.again.signed


def test_large_images_are_pooled_once_more_in_vgg():
    model, x = models.create("vgg8", width=0.125), images(64, 1)
    variables = made_up(model, x.shape[1:])
    out = again.attach(models.apply(model, variables, x, train=False)[0], model, variables, train=False)
    for i in (1, 3, 4):
        np.testing.assert_allclose(out.again(out.stages[i - 1], start=i).logits, out.logits, rtol=1e-5, atol=1e-5)


def test_a_transformer_goes_on_with_a_class_token_of_its_own():
    """What the blocks after the stage make of the map and of a token that begins there, block by block."""
    model = models.create("vit_tiny_patch4", width=1 / 3)
    out = run_vit(model)
    p, x = out.again.variables["params"], out.stages[2]
    token = p["class_token"][:, 0] + p["position"][:, 0]
    tokens = jnp.concatenate([jnp.broadcast_to(token[:, None], (2, 1, 192)), x.reshape(2, -1, 192)], axis=1)
    for b in (10, 11, 12):
        tokens = vit.Block(1, 64, 256, 0.0).apply({"params": p[f"block{b}"]}, tokens)
    rest = out.again(x, start=3)
    np.testing.assert_allclose(rest.stages[0], tokens[:, 1:].reshape(x.shape), rtol=1e-4, atol=1e-4)
    assert rest.logits.shape == out.logits.shape and out.again.signed


def run_vit(model):
    x = images(8)
    variables = made_up(model, x.shape[1:])
    return again.attach(models.apply(model, variables, x, train=False)[0], model, variables, train=False)


def test_a_student_runs_again_by_the_batch_and_with_its_gradient():
    out = run("resnet8", 8, train=True)
    rest = out.again(out.stages[0], start=1)
    np.testing.assert_allclose(rest.logits, out.logits, rtol=1e-4, atol=1e-4)
    grads = jax.grad(lambda o: jnp.sum(o.again(o.stages[0], start=1).logits ** 2))(out).again.variables["params"]
    assert np.any(grads["stage2_block1"]["conv1"]["kernel"]) and not np.any(grads["stage1_block1"]["conv1"]["kernel"])
    still = jax.grad(lambda o: jnp.sum(jax.lax.stop_gradient(o).again(o.stages[0], start=1).logits ** 2))(out)
    assert np.any(still.stages[0]) and not any(map(np.any, jax.tree.leaves(still.again)))


def test_it_runs_through_what_is_put_around_a_model():
    plain = run("resnet8", 8)
    model, variables = plain.again.model, plain.again.variables
    for wrapped in (precision.wrap(model, "bfloat16"), sight.Sight(model, 16)):
        out = models.apply(wrapped, variables, images(8), train=False)[0]
        out = again.attach(out, wrapped, variables, train=False)
        assert out.again.resumes and not out.again.signed
        rest = out.again(out.stages[1], start=2)
        assert rest.logits.dtype == jnp.float32
        np.testing.assert_allclose(rest.logits, out.logits, rtol=3e-2, atol=3e-2)
    grouped = precision.wrap(model, "float32", 1)
    both = images(8)
    out = again.attach(models.forward(grouped, variables, both, train=True)[0], grouped, variables, train=True)
    np.testing.assert_allclose(out.again(out.stages[0], start=1).logits, out.logits, rtol=1e-4, atol=1e-4)


class Own(nn.Module):
    """A user's model; wrong: whether it fails from a stage on."""

    width: float = 1.0
    num_classes: int = 5
    wrong: bool = False

    @nn.compact
    def __call__(self, x, train=False, start=0):
        stages = []
        for i in range(start, 2):
            x = nn.relu(nn.Conv(8, (3, 3), name=f"conv{i}")(x))
            stages.append(x)
        pooled = x.mean((1, 2))
        if self.wrong and start:
            raise ValueError("no such place")
        return models.Outputs(nn.Dense(self.num_classes)(pooled), tuple(stages), pooled=pooled, final=x)


class Whole(Own):
    def __call__(self, x, train=False):
        return super().__call__(x, train)


def test_a_model_of_your_own_is_tried_from_each_stage():
    contract.check(Own(), (8, 8, 3), "student.model")
    with pytest.raises(UserError, match=r"student.model: Own fails from the map of its stage 1 on \(start=1\) .*no such place"):
        contract.check(Own(wrong=True), (8, 8, 3), "student.model")

    class Other(Own):
        @nn.compact
        def __call__(self, x, train=False, start=0):
            x = nn.relu(nn.Conv(3, (3, 3))(x))
            return models.Outputs(nn.Dense(5)(x.mean((1, 2))), (x, x))

    with pytest.raises(UserError, match="Other returns other shapes with start=1 than from images of 8x8x3"):
        contract.check(Other(), (8, 8, 3), "student.model")


def test_who_cannot_run_again_is_refused():
    make = functools.partial(distillers.fit, distillers.create("fcfd"), image_shape=(8, 8, 3), batch_size=2)
    resnet = models.create("resnet8", num_classes=5)
    for student, teacher, said in (
        (Whole(), resnet, "FCFD compares stages one to one"),
        (Whole(), Own(), "runs the student from the map of a stage on, and its model has no argument 'start'"),
        (Own(), Whole(), "runs the teacher from the map of a stage on, and its model has no argument 'start'"),
        (models.create("vit_tiny_patch4"), resnet, "FCFD needs 'final', which the student's model does not return"),
    ):
        with pytest.raises(UserError, match=said):
            make(student, {1.0: teacher})
    out = run("resnet8", 8)._replace(again=None)
    with pytest.raises(UserError, match="runs the student once more, and was given its outputs alone"):
        distillers.create("fcfd").init(jax.random.key(0), out, out, {}, distillers.START)
