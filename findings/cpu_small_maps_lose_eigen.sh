#!/usr/bin/env bash
# jaxlib 0.10.2 on CPU: a convolution whose images have fewer pixels than its kernel takes twenty times as long and more.
#
# XLA exchanges images and kernel there, to slide the smaller over the larger, and turns the kernel around for it. Its CPU
# compiler hands only convolutions in the usual order of axes to Eigen, so that this one becomes a kernel of its own, of plain
# loops on one thread. Zeros put around the images first do not help: they are folded back into the convolution. The same
# numbers as one product of patches have a library. Guess before running: twice, for a single thread.
# Who meets it: the last stages of networks on small images, 3x3 kernels on maps of 2x2 (8x8 images in a CIFAR network of three
# stages, 32x32 in one of four or five), forward and backward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AXES = ("NHWC", "HWIO", "NHWC")


def convolved(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=AXES)


def padded(x, kernel):
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return lax.conv_general_dilated(x, kernel, (1, 1), ((0, 0), (0, 0)), dimension_numbers=AXES)


def product(x, kernel):
    count, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], 3)
    return patches.reshape(-1, 9 * channels).dot(kernel.reshape(9 * channels, -1)).reshape(count, height, width, -1)


found = {}
for size in (2, 3):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((64, size, size, 256), (3, 3, 256, 256)))
    forms = {form.__name__: jax.jit(form).lower(x, kernel).compile() for form in (convolved, padded, product)}
    least = dict.fromkeys(forms, float("inf"))
    for turn in range(6):
        for name, run in forms.items():
            begun = time.perf_counter()
            out = jax.block_until_ready(run(x, kernel))
            least[name] = min(least[name], time.perf_counter() - begun) if turn else least[name]
            np.testing.assert_allclose(out, forms["product"](x, kernel), rtol=0, atol=1e-2)
    for name, run in forms.items():
        exchanged = bool(re.search(r"convolution\(.*rhs_reversal", run.as_text()))
        found[size, name] = exchanged, least[name] / least["product"]
        print(f"{size}x{size} pixels under 3x3, {name}: exchanged {exchanged}; {found[size, name][1]:.1f} times the product's time")
exchanged = {key for key, (value, _) in found.items() if value}
if exchanged != {(2, "convolved"), (2, "padded")} or min(found[key][1] for key in exchanged) < 10 or found[3, "convolved"][1] > 5:
    sys.exit(f"something else happens now: {found}")
PYTHON
# Seen, on two cores of an AMD EPYC with AVX-512:
# 2x2 pixels under 3x3, convolved: exchanged True; 22.4 times the product's time
# 2x2 pixels under 3x3, padded: exchanged True; 22.2 times the product's time
# 2x2 pixels under 3x3, product: exchanged False; 1.0 times the product's time
# 3x3 pixels under 3x3, convolved: exchanged False; 1.0 times the product's time
# 3x3 pixels under 3x3, padded: exchanged False; 1.0 times the product's time
# 3x3 pixels under 3x3, product: exchanged False; 1.0 times the product's time
