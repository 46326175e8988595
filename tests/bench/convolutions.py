"""Gradients of convolutions on a CPU, ours beside XLA's own: python tests/bench/convolutions.py [--rounds=N] [--json=FILE]

The convolutions of resnet8x4 and resnet32x4 on 64 images of 32x32, with respect to the kernel and, once in the program's main
computation and twice in a loop, to the images. Milliseconds of processor time, the least of the rounds, which take turns; other
load on the machine disturbs that less than the wall clock's.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.models import convolution

BATCH = 64
# (channels in, channels out, height and width, kernel, stride)
SHAPES = (
    (3, 32, 32, 3, 1), (32, 64, 32, 3, 1), (64, 64, 32, 3, 1), (32, 64, 32, 1, 1), (64, 128, 32, 3, 2), (128, 128, 16, 3, 1),
    (64, 128, 32, 1, 2), (128, 256, 16, 3, 2), (256, 256, 8, 3, 1),
)  # fmt: skip


def programs(inputs: int, outputs: int, side: int, size: int, stride: int) -> dict:
    """{name: compiled function of no arguments}."""
    rng, made = np.random.default_rng(0), side // stride
    shapes = (BATCH, side, side, inputs), (size, size, inputs, outputs), (BATCH, made, made, outputs)
    arrays = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
    how = {"strides": (stride, stride), "padding": ((size // 2, size // 2),) * 2}

    def xla_kernel(images, kernel, cotangent):
        return jax.vjp(lambda k: convolution._plain(images, k, **how), kernel)[1](cotangent)[0]

    def own_kernel(images, kernel, cotangent):
        return convolution.kernel_gradient(images, cotangent, (size, size), **how)

    def xla_images(images, kernel, cotangent):
        return jax.vjp(lambda x: convolution._plain(x, kernel, **how), images)[1](cotangent)[0]

    def own_images(images, kernel, cotangent):
        return convolution.image_gradient(kernel, cotangent, images.shape[1:3], **how)

    def twice(function, images, kernel, cotangent):
        def body(_, total):
            # Of the loop's own sum, so that XLA cannot take it out of the loop.
            return total + function(images, kernel, cotangent + total[:1, :1, :1, :1])

        return jax.lax.fori_loop(0, 2, body, jnp.zeros_like(images))

    found = {
        "kernel, XLA": xla_kernel, "kernel": own_kernel, "images, XLA": xla_images, "images": own_images,
        "loop, XLA": partial(twice, xla_images), "loop": partial(twice, own_images),
    }  # fmt: skip
    return {name: partial(jax.jit(function), *arrays) for name, function in found.items()}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = []
    for shape in SHAPES:
        compiled = programs(*shape)
        least = dict.fromkeys(compiled, np.inf)
        for turn in range(1 + options.rounds):
            for name, run in compiled.items():
                begun = time.process_time()
                jax.block_until_ready(run())
                if turn:  # the first compiles
                    least[name] = min(least[name], 1e3 * (time.process_time() - begun))
        if not rows:
            print(f"{'in':>5}{'out':>5}{'side':>5}{'size':>5}{'step':>5}" + "".join(f"{name:>13}" for name in least))
        rows.append({"shape": shape, "milliseconds": least})
        print("".join(f"{n:>5}" for n in shape) + "".join(f"{ms:>13.1f}" for ms in least.values()), flush=True)
    if options.json:
        device = jax.devices()[0].device_kind
        options.json.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
