"""Layer-wise learning-rate decay against optax's own groups of parameters, and what counts as a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import config, models, slimmable
from pwkd_jax.errors import UserError
from pwkd_jax.models import precision
from pwkd_jax.training import layer_decay, optimizers, state

SHAPE = (8, 8, 3)


def test_layers_are_counted_as_they_compute():
    vit = layer_decay.layers(models.create("vit_tiny_patch4"), SHAPE)
    # BEiT's numbers: what makes tokens is 0, then the blocks, then the head.
    first = dict.fromkeys(("patch_conv", "class_token", "position"), 0)
    assert vit == first | {f"block{b}": b for b in range(1, 13)} | {"final_norm": 12, "classifier": 13}
    for wrapped in (models.create("resnet8"), precision.wrap(models.create("resnet8"), "bfloat16", 0)):
        blocks = {f"stage{s}_block1": s for s in (1, 2, 3)}
        assert layer_decay.layers(wrapped, SHAPE) == {"stem_conv": 0, "stem_bn": 0, **blocks, "classifier": 4}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_it_is_optaxs_groups_each_at_its_own_rate(name):
    options = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.01, "decay": "all", "clip_norm": 0.0}
    model, rate, decay = models.create("resnet8"), 0.1, 0.7
    net = slimmable.build(lambda w: models.create("resnet8", width=w), (0.5, 1.0), SHAPE)
    params, _ = net.init(jax.random.key(0), SHAPE)
    assert set(params["batch_norm"]) == {"0.5", "1"}
    student = {"student": params["shared"], "distiller": {"classifier": {"kernel": jnp.ones((3, 3))}}}
    number = {"stem_conv": 0, "stem_bn": 0, "stage1_block1": 1, "stage2_block1": 2, "stage3_block1": 3, "classifier": 4}
    made = {"sgd": lambda r: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(r, momentum=0.9)),
            "adamw": lambda r: optax.adamw(r, b1=0.9, weight_decay=0.01)}[name]  # fmt: skip

    def group(path):
        return 4 if path[0] == "distiller" else number[path[2 if path[0] == "batch_norm" else 1]]

    for tree in (params, student):
        labels = unflatten_dict({path: group(path) for path in flatten_dict(tree)})
        theirs = optax.multi_transform({n: made(rate * decay ** (4 - n)) for n in range(5)}, labels)
        ours = layer_decay.scaled(optimizers.optimizer(name, **options), layer_decay.layers(model, SHAPE), decay)
        now = state.create(0, tree, {}, ours)
        expected, kept = tree, theirs.init(tree)
        for seed in range(3):
            rng = np.random.default_rng(seed)
            grads = jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape, np.float32), tree)
            now, used = state.apply_gradients(now, grads, {}, ours, lambda step: rate)
            updates, kept = theirs.update(grads, kept, expected)
            expected = optax.apply_updates(expected, updates)
        assert used == {"learning_rate": rate}
        assert jax.tree.structure(expected) == jax.tree.structure(now.params)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(now.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("layer_decay=0",), "student.optimizer.layer_decay: 0.0 is not possible; it should be above 0 and at most 1"),
        (("layer_decay=0.8", "name=optax:adamw"), "it should be 1 with module:function, whose steps come with"),
    ],
)
def test_it_is_refused_where_it_cannot_be(words, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.").replace("(", r"\(")):
        config.load(["--config=configs/digits.py", *(f"--config.student.optimizer.{word}" for word in words)])
