"""Steps per second by how they are dispatched: python tests/bench/dispatch.py [--json] [--resnet8]

    host      one dispatch a step, its batch gathered on the host and sent
    resident  one dispatch a step, gathered on the device
    loop      100 steps (resnet8: 1) a dispatch, in one compiled loop

The model is a linear classifier of 16 pixels, whose step computes for far less than 0.1 ms; --resnet8 adds resnet8 on batches
of 64 images of 32x32 (minutes on CPU, where convolutions are slow in loops). Rounds take turns; a ratio is of one round,
given as the median with the smallest and largest.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax import data, models
from pwkd_jax.stages import Stage
from pwkd_jax.training import dispatch, loop, optimizers, sharding, student


class Linear(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)
        return models.Outputs(nn.Dense(self.num_classes)(x), (), (), x)


def measure(model: nn.Module, shape, batch_size: int, images: int, most: int, steps: dict[str, int], rounds: int) -> dict:
    """Seconds of one step in each round, by way; and how long the host is busy with a step of `host`, in the last."""
    rng, mesh = np.random.default_rng(0), sharding.make_mesh()
    pixels = rng.integers(0, 256, (images, *shape)).astype(np.uint8)
    split = data.Split(pixels, rng.integers(0, 10, images).astype(np.int32))
    pipeline, stored = data.Pipeline(split, batch_size, 0), dispatch.store(mesh, split)
    tx = optimizers.optimizer("sgd", momentum=0.9, nesterov=False, weight_decay=5e-4, decay="all", clip_norm=0.0)

    def preprocess(key, batch):
        return data.normalise(batch, (0.5,) * shape[-1], (0.25,) * shape[-1])

    plan = [Stage("slimmable", (), 0, 1 << 30)]
    step = student.make_step(model, {}, (), None, plan, tx, lambda s: 0.01, preprocess, images=images)
    step = functools.partial(sharding.jit_step(mesh, dispatch.many(step, shape)), teacher={})
    ways = {
        "host": lambda n: sharding.put_batch(mesh, pipeline(n)) | {"dataset_label": stored["label"]},
        "resident": dispatch.Resident(mesh, pipeline, stored, 1),
        "loop": dispatch.Resident(mesh, pipeline, stored, most),
    }
    fresh = student.init(model, shape, None, tx, 0)
    at = {way: jax.device_put(jax.tree.map(jnp.copy, fresh), sharding.replicated(mesh)) for way in ways}
    seconds = {way: [] for way in ways}
    for turn in range(rounds + 1):  # the first compiles
        for way, batches in ways.items():
            until = int(at[way].step) + steps[way]
            begun = time.perf_counter()
            at[way] = loop.fit(at[way], step, batches, until, due=lambda n: False)
            returned = time.perf_counter() - begun
            jax.block_until_ready(at[way])
            if turn:
                seconds[way].append((time.perf_counter() - begun) / steps[way])
                if way == "host":
                    busy = returned / steps[way]
    return {"seconds": seconds, "host_busy": busy}


def spread(values) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": float(min(values)), "most": float(max(values))}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--resnet8", action="store_true")
    options = parser.parse_args(arguments)
    cases = {"linear": (Linear(), (4, 4, 1), 8, 1000, 100, dict.fromkeys(("host", "resident", "loop"), 1000), 7)}
    if options.resnet8:
        model = models.create("resnet8", num_classes=10)
        cases["resnet8"] = (model, (32, 32, 3), 64, 500, 2, {"host": 4, "resident": 4, "loop": 1}, 3)
    result = {"machine": f"{jax.devices()[0].platform}, {os.cpu_count()} cores, jax {jax.__version__}", "models": {}}
    for name, case in cases.items():
        found = measure(*case)
        host = np.array(found["seconds"]["host"])
        result["models"][name] = {
            "milliseconds": {way: spread(1e3 * np.array(s)) for way, s in found["seconds"].items()},
            "times_host": {way: spread(host / np.array(s)) for way, s in found["seconds"].items() if way != "host"},
            "host_busy_milliseconds": 1e3 * found["host_busy"],
        }
    if options.json:
        print(json.dumps(result))
        return
    print(result["machine"])
    for name, model in result["models"].items():
        print(f"{name}: ms a step (median, least to most), and steps per second as a multiple of host's")
        for way, ms in model["milliseconds"].items():
            ratio = model["times_host"].get(way)
            times = f"{ratio['median']:8.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else ""
            print(f"  {way:<9}{ms['median']:10.3f} ({ms['least']:.3f} to {ms['most']:.3f}){times}")
        busy = model["host_busy_milliseconds"]
        print(f"  of a step of host, the host itself is busy for {busy:.3f} ms; the rest it could prepare the next batch")


if __name__ == "__main__":
    main(sys.argv[1:])
