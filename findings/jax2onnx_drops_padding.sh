#!/usr/bin/env bash
# jax2onnx 0.17.1: explicit padding of Flax's pooling is dropped, so the ONNX model computes another, smaller map without a word.
#
# nn.max_pool and nn.avg_pool with padding=((1, 1), (1, 1)), as every ImageNet ResNet has after its stem, become MaxPool and
# AveragePool with pads of 0; padding="SAME" is right. The model passes onnx.checker and runs in onnxruntime; what follows a pool
# up to a global mean takes any size, so a classifier gives probabilities, of other features. Convolutions keep their padding.
# Who meets it: whoever takes a trained Flax ResNet, ShuffleNet or Inception to ONNX for serving, and compares no numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax2onnx==0.17.1 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 \
  numpy==2.4.6 onnxruntime==1.32.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import flax.linen as nn
import jax2onnx
import numpy as np
import onnx
import onnxruntime

print("jax2onnx", version("jax2onnx"), "flax", version("flax"), "onnxruntime", onnxruntime.__version__)
x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
wrong = []
for pool in ("max_pool", "avg_pool"):
    for padding in (((1, 1), (1, 1)), "SAME"):
        def run(x, pool=pool, padding=padding):
            return getattr(nn, pool)(x, window_shape=(3, 3), strides=(2, 2), padding=padding)  # as a model calls it

        model = jax2onnx.to_onnx(run, inputs=[(2, 8, 8, 3)])
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: x})
        right = np.asarray(run(x))
        same = got.shape == right.shape and np.allclose(got, right, atol=1e-5)
        print(f"{pool} padding {padding}: Flax {right.shape}, ONNX {got.shape}, equal: {same}")
        wrong += [] if same else [(pool, padding)]

expected = [("max_pool", ((1, 1), (1, 1))), ("avg_pool", ((1, 1), (1, 1)))]
if wrong != expected:
    sys.exit(f"Changed: {wrong} differ, and were {expected}.")
print("As stated: explicit padding is dropped, and the model is smaller than Flax's without an error.")
PYTHON
