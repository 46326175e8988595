"""Layers on a CPU, ours beside XLA's and Flax's own: python tests/bench/layers.py [--rounds=N] [--json=FILE]

The convolutions of resnet8x4 and resnet32x4, one of a map smaller than its kernel, and some depthwise ones (a group each
channel), on 64 images of 32x32 or what is left of them: forward and with respect to images and kernel, in one program's main
computation; then batch norm of a batch, by itself and with all its gradients. The other side is what JAX and Flax give by
themselves, ours has models/convolution.py, models/batch_norm.py and the compiler options of models/compute.py. Milliseconds of
processor time and, behind the stroke, of the clock, the least of the rounds, which take turns; other load on the machine
disturbs the first less.
"""

import argparse
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.models import compute, convolution

BATCH = 64
# (channels in, channels out, height and width, kernel, stride, groups)
SHAPES = (
    (3, 32, 32, 3, 1, 1), (32, 64, 32, 3, 1, 1), (64, 64, 32, 3, 1, 1), (32, 64, 32, 1, 1, 1), (64, 128, 32, 3, 2, 1),
    (128, 128, 16, 3, 1, 1), (64, 128, 32, 1, 2, 1), (128, 256, 16, 3, 2, 1), (256, 256, 8, 3, 1, 1),
    (512, 512, 2, 3, 1, 1),
    (48, 48, 16, 3, 1, 48), (58, 58, 16, 3, 1, 58), (96, 96, 8, 3, 1, 96), (48, 48, 16, 3, 2, 48), (480, 480, 4, 3, 1, 480),
)  # fmt: skip

NORMS = ((64, 32), (16, 32), (128, 16), (256, 8))  # (channels, height and width)


def programs(inputs: int, outputs: int, side: int, size: int, stride: int, groups: int) -> dict:
    """{name: compiled function of no arguments}."""
    rng, made = np.random.default_rng(0), side // stride
    shapes = (BATCH, side, side, inputs), (size, size, inputs // groups, outputs), (BATCH, made, made, outputs)
    images, kernel, cotangent = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    found = {}
    for whose, function, options in (
        ("XLA", jax.lax.conv_general_dilated, {}),
        ("ours", convolution.convolve, compute.compiler_options("cpu")),
    ):

        def convolve(images, kernel, function=function):
            how = {"dimension_numbers": convolution.NUMBERS, "feature_group_count": groups}
            return function(images, kernel, (stride, stride), ((size // 2, size // 2),) * 2, **how)

        def by_images(images, kernel, cotangent, convolve=convolve):
            return jax.vjp(lambda x: convolve(x, kernel), images)[1](cotangent)

        def by_kernel(images, kernel, cotangent, convolve=convolve):
            return jax.vjp(lambda k: convolve(images, k), kernel)[1](cotangent)

        arrays = images, kernel, cotangent
        asked = {"out": (convolve, arrays[:2]), "images": (by_images, arrays), "kernel": (by_kernel, arrays)}
        for name, (program, given) in asked.items():
            found[f"{name}, {whose}"] = partial(jax.jit(program, compiler_options=options), *given)
    return found


def norms(channels: int, side: int) -> dict:
    """{name: compiled function of no arguments} of batch norm by itself and with its gradient."""
    images = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, side, side, channels)), jnp.float32)
    layer = nn.BatchNorm(use_running_average=False)
    variables, found = layer.init(jax.random.key(0), images), {}
    for whose, context in (("Flax", contextlib.nullcontext), ("ours", compute.layers)):

        def apply(images, context=context):
            with context():
                return layer.apply(variables, images, mutable=["batch_stats"])

        def gradient(images, apply=apply):
            out, back, _ = jax.vjp(apply, images, has_aux=True)
            return back(out)

        for name, program in (("out", apply), ("all", gradient)):
            jitted = jax.jit(program, compiler_options=compute.compiler_options("cpu"))
            found[f"{name}, {whose}"] = partial(jitted, images)
    return found


def least(compiled: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """{name: (milliseconds of processor time, of the clock)}."""
    found = dict.fromkeys(compiled, (np.inf, np.inf))
    for turn in range(1 + rounds):
        for name, run in compiled.items():
            begun = time.process_time(), time.perf_counter()
            jax.block_until_ready(run())
            ended = time.process_time(), time.perf_counter()
            if turn:  # the first compiles
                found[name] = tuple(min(m, 1e3 * (e - b)) for m, b, e in zip(found[name], begun, ended, strict=True))
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    tables = {"convolution": ("in out side size step groups", programs, SHAPES), "batch norm": ("channels side", norms, NORMS)}
    rows = []
    for title, (columns, make, shapes) in tables.items():
        for shape in shapes:
            found = least(make(*shape), options.rounds)
            if shape is shapes[0]:
                print(title + "\n" + "".join(f"{name:>9}" for name in columns.split()) + "".join(f"{n:>14}" for n in found))
            rows.append({"layer": title, **dict(zip(columns.split(), shape, strict=True)), "milliseconds": found})
            times = "".join(f"{f'{cpu:.1f}/{wall:.1f}':>14}" for cpu, wall in found.values())
            print("".join(f"{n:>9}" for n in shape) + times, flush=True)
    if options.json:
        device = jax.devices()[0].device_kind
        options.json.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
