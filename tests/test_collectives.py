"""What a step communicates, as the TPU compiler reports it, without a TPU; and the counting itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pwkd_jax.cost.collectives import collectives

ROOT = Path(__file__).parents[1]

TEXT = """
HloModule jit_step
  %all-reduce.1 = (f32[32]{0:T(128)S(1)}, bf16[3,3,4]{2,1,0}, /*index=2*/f32[]{:T(128)}) all-reduce(%a, %b, %c), channel_id=1
  %get-tuple-element.2 = f32[32]{0} get-tuple-element(%all-reduce.1), index=0
  ROOT %all-gather.3 = f32[8,4]{1,0} all-gather(%d), dimensions={0}
  %all-gather-start.4 = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%d), dimensions={0}
  %all-gather-done.4 = f32[8,4]{1,0} all-gather-done(%all-gather-start.4)
  %all-reduce-start.5 = f32[16]{0} all-reduce-start(%e), channel_id=2
  %all-reduce-done.5 = f32[16]{0} all-reduce-done(%all-reduce-start.5)
  %collective-permute-start.6 = (u32[4]{0}, u32[4]{0}, u32[], u32[]) collective-permute-start(%f)
  %fusion.7 = f32[8]{0} fusion(%all-reduce.1), kind=kLoop, calls=%all-reduce-fusion
"""


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    assert collectives(TEXT) == {
        "all-reduce": (2, 4 * 32 + 2 * 36 + 4 + 4 * 16),
        "all-gather": (2, 4 * 32 + 4 * 32),
        "collective-permute": (1, 16),
    }


AOT = """
import dataclasses, json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import flax.linen as nn
from pwkd_jax import data, models, slimmable
from pwkd_jax.models import precision
from pwkd_jax.training import optimizers, sharding, state as states, teacher
from pwkd_jax.cost.collectives import collectives

SHAPE, BATCH = (8, 8, 3), 64

class TwoNorms(nn.Module):
    width: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = nn.Conv(models.channels(32, self.width), (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean((1, 2)))

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(4, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def count(widths, group=0, dtype="float32"):
    net = slimmable.build(lambda w: TwoNorms(width=w), widths, SHAPE)
    net = dataclasses.replace(net, members={w: precision.wrap(m, dtype, group) for w, m in net.members.items()})
    tx = optimizers.optimizer("sgd", momentum=0.9, nesterov=False, weight_decay=5e-4, decay="all", clip_norm=0.0)
    preprocess = lambda key, images: data.normalise(images, (0.5,) * 3, (0.25,) * 3)
    step = teacher.make_step(net, tx, lambda s: 0.1, preprocess, mesh)
    state = jax.eval_shape(lambda: states.create(0, *net.init(jax.random.key(0), SHAPE), tx))
    layout = sharding.shardings(mesh, state)
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    rows = NamedSharding(mesh, P("data"))
    batch = {"image": jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.uint8, sharding=rows),
             "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=rows)}
    lowered = sharding.jit_step(mesh, step, layout).lower(jax.tree.map(placed, state, layout), batch)
    return collectives(lowered.compile())

print(json.dumps({
    "two": count((0.5, 1.0), 0), "three": count((0.25, 0.5, 1.0), 0), "grouped": count((0.25, 0.5, 1.0), 16),
    "small groups": count((0.5, 1.0), 8), "bfloat16": count((0.5, 1.0), 16, "bfloat16"),
    "parameters": sum(x.size for x in jax.tree.leaves(models.abstract(TwoNorms(), SHAPE)["params"])),
}))
"""


@pytest.fixture(scope="module")
def counts():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu, whose compiler counts: pip install 'jax[tpu]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", AOT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("widths", ["two", "three"])
def test_global_batch_norm_costs_two_all_reduces_a_layer_whatever_the_widths(counts, widths):
    assert set(counts[widths]) == {"all-reduce"}
    assert counts[widths]["all-reduce"][0] <= 2 * 2 + 1


@pytest.mark.parametrize("groups", ["grouped", "small groups"])
def test_groups_within_a_device_leave_only_the_gradients_all_reduce(counts, groups):
    assert set(counts[groups]) == {"all-reduce"}
    assert counts[groups]["all-reduce"][0] == 1


def test_bfloat16_gradients_are_summed_in_float32_with_the_rest(counts):
    assert set(counts["bfloat16"]) == {"all-reduce"}
    assert counts["bfloat16"]["all-reduce"][0] == 1


def test_the_gradient_is_sent_once_whatever_the_widths(counts):
    """And not each width's: 1 + 0.5^2 + 0.25^2 = 1.31 times as much here."""
    own_norms = 2 * 2 * (32 + 16 + 8)  # scales and biases of all three widths
    statistics = 2 * own_norms  # a mean and a square, forward and backward
    metrics = 2 * 3 * 2 + 4
    least = 4 * (counts["parameters"] - 2 * 2 * 32 + own_norms)
    assert least <= counts["three"]["all-reduce"][1] <= least + 4 * (statistics + metrics)
