"""Distillers of one's own: mistakes in one sentence, and dropout."""

import re

import jax
import jax.numpy as jnp
import own_modules
import pytest
from test_distillers import BATCH, outputs

from pwkd_jax import distillers
from pwkd_jax.errors import UserError


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("OnlyLoss", r"OnlyLoss returns an array alone; it should return \(loss, metrics\)"),
        ("PerImage", r"the loss of PerImage is float32 \[4\]; it should return \(loss, metrics\): a float scalar"),
        ("ThreeArguments", r"ThreeArguments.__call__ takes student, teacher, batch; it is called as"),
        ("MetricList", r"MetricList returns a list beside its loss"),
        ("MatrixMetric", r"the metric 'gap' of MatrixMetric is float32 \[4, 10\]; it should be a scalar"),
        ("WrongField", r"WrongField fails \(AttributeError: .*features"),
        ("GrowsToo", r"GrowsToo adds to its collection 'history' with every step"),
    ],
)
def test_a_distiller_that_cannot_be_used_is_refused_in_one_sentence(name, sentence):
    with pytest.raises(UserError) as e:
        distillers.build(getattr(own_modules, name)(), outputs(8), {0.5: outputs(8), 1.0: outputs(16)}, BATCH)
    assert str(e.value).startswith("student.distiller: ") and re.search(sentence, str(e.value)), str(e.value)
    assert "\n" not in str(e.value)


def test_a_class_is_not_a_distiller_that_was_made():
    with pytest.raises(UserError, match=r"'OnlyLoss' is no Flax module that was made; give one, as in OnlyLoss\(\)"):
        distillers.build(own_modules.OnlyLoss, outputs(8), {1.0: outputs(8)}, BATCH)


def test_logits_of_other_classes_cannot_be_compared():
    other = outputs(8)._replace(logits=jax.ShapeDtypeStruct((4, 7), jnp.float32))
    with pytest.raises(UserError, match=r"KD compares logits, and the student has 10 classes and the teacher 7"):
        distillers.build(distillers.create("kd"), outputs(8), {1.0: other}, BATCH)


def test_one_value_an_image_is_a_metric():
    distillers.build(own_modules.VectorMetric(), outputs(8), {1.0: outputs(8)}, BATCH)


def test_dropout_in_a_distiller_follows_the_key():
    fitted = distillers.build(own_modules.DropoutHint(), outputs(8), {1.0: outputs(8)}, BATCH)
    assert fitted.draws
    params, state = fitted.init(jax.random.key(0))
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), outputs(8))
    batch = {"label": jnp.zeros(4, jnp.int32)}
    values = [
        float(fitted(params, state, 1.0, ones, ones, batch, distillers.START, jax.random.key(n))[0]) for n in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert not distillers.build(own_modules.VectorMetric(), outputs(8), {1.0: outputs(8)}, BATCH).draws
