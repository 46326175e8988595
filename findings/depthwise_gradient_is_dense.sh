#!/usr/bin/env bash
# jaxlib 0.10.2 on CPU: the gradient of a depthwise kernel is compiled into a dense C x C convolution, of which a mask keeps 1/C.
#
# Forward pass and gradient of the images stay depthwise. The kernel's gradient is a convolution with batch_group_count = C, and
# XLA's CPU compiler replaces it by all C * C pairs of channels: products grow by C, and so does a temporary array, [3, 3, C, C].
# lowered.cost_analysis() counts before that and tells nothing; compiled.cost_analysis() counts after it. The same numbers come
# from nine shifted products, C times cheaper.
# Who meets it: anybody training MobileNet or ShuffleNet students on CPU, where a wide layer's step is dominated by zeros, and
# anybody who reports the cost of a slimmable network from the compiled program: halving the width seems to save three quarters of
# a cost that is linear in the width.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp


def forward(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                        feature_group_count=images.shape[-1])


def of_images(images, kernel, cotangent):
    return jax.vjp(lambda x: forward(x, kernel), images)[1](cotangent)[0]


def of_kernel(images, kernel, cotangent):
    return jax.vjp(lambda k: forward(images, k), kernel)[1](cotangent)[0]


def shifted(images, kernel, cotangent):
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = images.shape[1:3]
    sums = [[jnp.sum(padded[:, i : i + h, j : j + w] * cotangent, (0, 1, 2)) for j in range(3)] for i in range(3)]
    return jnp.array(sums)[:, :, None]


print("jax", jax.__version__, jax.default_backend())
print("channels  program    products and sums: before, after compiling   ratio  temporaries  milliseconds")
ratios = {}
for channels in (64, 128, 256):
    keys = jax.random.split(jax.random.key(0), 3)
    images, cotangent = (jax.random.normal(k, (4, 8, 8, channels)) for k in keys[:2])
    kernel = jax.random.normal(keys[2], (3, 3, 1, channels))
    results = {}
    for function in (of_images, of_kernel, shifted):
        lowered = jax.jit(function).lower(images, kernel, cotangent)
        compiled, times = lowered.compile(), []
        for _ in range(5):
            begun = time.perf_counter()
            results[function] = jax.block_until_ready(compiled(images, kernel, cotangent))
            times.append(time.perf_counter() - begun)
        before, after = lowered.cost_analysis()["flops"], compiled.cost_analysis()["flops"]
        ratios[function, channels] = after / before
        print(f"{channels:8d}  {function.__name__:9s} {before:26.0f} {after:17.0f} {after / before:7.1f}"
              f" {compiled.memory_analysis().temp_size_in_bytes:12d} {1e3 * min(times):13.2f}")
    if not jnp.allclose(results[of_kernel], results[shifted], rtol=1e-3, atol=1e-3):
        sys.exit("Changed: the shifted products no longer give the gradient that XLA gives.")

if any(ratio > 2 for (function, _), ratio in ratios.items() if function is not of_kernel):
    sys.exit("Changed: another program than the kernel's gradient grows when it is compiled.")
if not all(0.9 * channels < ratios[of_kernel, channels] < 1.2 * channels for channels in (64, 128, 256)):
    sys.exit("Changed: the compiled gradient of a depthwise kernel no longer costs C times what it needs.")
print("As stated: compiling multiplies the cost of the kernel's gradient by the number of channels, and of nothing else.")
PYTHON
