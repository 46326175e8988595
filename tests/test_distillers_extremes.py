"""Every method in bfloat16 at what breaks losses: logits of 50, features of zero, equal images; two images a batch.

The loss of bfloat16 outputs is that of the same rounded outputs given in float32, within 1 %: what is computed from them is
computed in float32. Values and gradients are finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distiller_grid import Net, setup

from pwkd_jax import distillers, models
from pwkd_jax.models import again

BY_IMAGE = ("logits", "stages", "preact", "pooled", "final")
FEATURES = ("stages", "preact", "pooled", "final")
# Where the pair of the grid does not fit: channels of the student's own.
SAME = ("fsp", "kdsvd")


def edited(out: models.Outputs, change, fields) -> models.Outputs:
    return out._replace(**{name: jax.tree.map(change, getattr(out, name)) for name in fields})


CASES = {
    "logits of 50": lambda out: edited(out, lambda x: x * 50 / jnp.abs(x).max(), ("logits",)),
    "features of zero": lambda out: edited(out, jnp.zeros_like, FEATURES),
    "equal images": lambda out: edited(out, lambda x: jnp.broadcast_to(x[:1], x.shape), BY_IMAGE),
    "as they come": lambda out: out,
}


@pytest.mark.parametrize("name", sorted(distillers.BUILTIN))
def test_bfloat16_at_the_extremes(name):
    batch, taught = setup()
    pupil, width = Net(width=1.0 if name in SAME else 0.5), 1.0
    variables = pupil.init(jax.random.key(1), batch["image"][:1], train=False)
    two = {key: value if key == "dataset_label" else value[:2] for key, value in batch.items()}
    out = again.attach(models.apply(pupil, variables, two["image"], train=True)[0], pupil, variables, train=True)
    teacher = edited(taught[width], lambda x: x[:2], BY_IMAGE)
    fitted = distillers.build(distillers.create(name), *jax.eval_shape(lambda: (out, {width: teacher}, two)))
    own, state = fitted.init(jax.random.key(2))
    # Past every warm-up and initial phase.
    progress = distillers.Progress(jnp.int32(0), jnp.int32(1000), jnp.float32(200.0))

    def loss(out, teacher):
        return fitted(own, state, width, out, teacher, two, progress, jax.random.key(3))[0]

    @jax.jit
    def both(out, teacher):
        # Networks that run again keep their weights as they are.
        half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), x._replace(again=None)) for x in (out, teacher)]
        full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        half, full = ([x._replace(again=y.again) for x, y in zip(pair, (out, teacher), strict=True)] for pair in (half, full))
        return [jax.value_and_grad(loss)(*inputs) for inputs in (half, full)]

    for case, change in CASES.items():
        (value, grads), (expected, _) = both(change(out), change(teacher))
        assert value.dtype == jnp.float32, case
        assert np.isfinite(float(value)) and np.isfinite(float(expected)), case
        assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(grads)), case
        assert float(value) == pytest.approx(float(expected), rel=0.01, abs=1e-4), case
