"""The sandwich rule's gradient, width by width: that of the joint loss, with one width's activations in memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import IMAGE_SHAPE, close, perturbed

from pwkd_jax import models, slimmable
from pwkd_jax.training import sandwich

ROOT = Path(__file__).parents[1]
WIDTHS = (0.25, 0.5, 0.75, 1.0)


class Deep(nn.Module):
    """Convolutions in a row, with dropout before the classifier where `rate` is given."""

    width: float = 1.0
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(3):
            x = nn.Conv(models.channels(16, self.width), (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(10)(x)


def both(net, count=8, **options):
    """(jitted gradient width by width, jitted gradient of the joint loss, their arguments)."""
    params, statistics = net.init(jax.random.key(0), IMAGE_SHAPE)
    rng = np.random.default_rng(1)
    images = rng.standard_normal((count, *IMAGE_SHAPE)).astype(np.float32)
    arguments = perturbed(params), statistics, images, rng.integers(0, 10, count), jax.random.key(3)

    def joint(params, statistics, images, labels, key):
        def loss(params):
            return sandwich.sandwich_loss(net, params, statistics, images, labels, key=key, **options)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def in_turn(params, statistics, images, labels, key):
        return sandwich.sandwich_gradient(net, params, statistics, images, labels, key=key, **options)

    return jax.jit(in_turn), jax.jit(joint), arguments


def family(rate=0.0, **options):
    return slimmable.build(lambda w: Deep(width=w, rate=rate), options.pop("widths", WIDTHS), IMAGE_SHAPE, **options)


CASES = {
    "inplace": ({}, {"loss": "inplace"}),
    "mean": ({}, {"loss": "inplace_mix", "reduction": "mean"}),
    "masked": ({"execution": "mask"}, {}),
    "shared": ({"batch_norm": "shared"}, {}),
    "dropout": ({"rate": 0.5}, {"loss": "inplace_mix"}),
    "one width": ({"widths": (1.0,)}, {}),
    "drawn": (
        {"widths": (0.25, 1.0), "batch_norm": "private_stats", "pool": (0.5, 0.75), "rate": 0.2},
        {"sampling": "sandwich", "loss": "inplace", "reduction": "mean"},
    ),
    "own": ({}, {"own": lambda outputs, labels: {"first": outputs.logits[:, 0] * labels}}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_width_by_width_is_that_of_the_joint_loss(case):
    made, options = CASES[case]
    in_turn, joint, arguments = both(family(**made), **options)
    ((loss, (statistics, values)), grads), known = in_turn(*arguments), joint(*arguments)
    close(loss, known[0][0], 1e-6)
    assert jax.tree.structure((statistics, values, grads)) == jax.tree.structure((*known[0][1], known[1]))
    close((statistics, values, grads), (*known[0][1], known[1]), 2e-5)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads["shared"]))


def test_drawn_widths_keep_no_other_widths_activations():
    """The gradient of a switch holds what the backward pass of every branch needs."""
    net = family(widths=(0.25, 1.0), batch_norm="private_stats", pool=(0.375, 0.5, 0.625, 0.75, 0.875))
    in_turn, joint, arguments = both(net, 64, sampling="sandwich", subnetworks=4)
    ours, theirs = (f.lower(*arguments).compile().memory_analysis().temp_size_in_bytes for f in (in_turn, joint))
    assert ours <= 0.7 * theirs, (ours, theirs)


AOT = """
import json
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pwkd_jax import models, slimmable
from pwkd_jax.training import sandwich

SHAPE = (32, 32, 3)
net = slimmable.build(lambda w: models.create("resnet8", width=w), (0.25, 0.5, 0.75, 1.0), SHAPE)
chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])

def joint(params, statistics, images, labels):
    return jax.value_and_grad(lambda p: sandwich.sandwich_loss(net, p, statistics, images, labels), has_aux=True)(params)

def in_turn(params, statistics, images, labels):
    return sandwich.sandwich_gradient(net, params, statistics, images, labels)

arguments = *jax.eval_shape(lambda: net.init(jax.random.key(0), SHAPE)), jax.ShapeDtypeStruct((256, *SHAPE), "float32"), \\
    jax.ShapeDtypeStruct((256,), "int32")
placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments)
compiled = [jax.jit(f).lower(*placed).compile({"exec_time_optimization_effort": -1.0}) for f in (joint, in_turn)]
print(json.dumps([[c.memory_analysis().temp_size_in_bytes, c.cost_analysis()["bytes accessed"]] for c in compiled]))
"""


@pytest.mark.slow
def test_a_tpu_holds_one_widths_activations():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu, whose compiler counts: pip install 'jax[tpu]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", AOT], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    (before, traffic_before), (after, traffic_after) = json.loads(done.stdout.splitlines()[-1])
    assert after <= 0.7 * before
    assert traffic_after <= 1.01 * traffic_before
