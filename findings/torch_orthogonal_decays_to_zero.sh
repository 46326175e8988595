#!/usr/bin/env bash
# torch 2.13.0: one step with weight decay turns a layer that torch.nn.utils.parametrizations.orthogonal holds into all zeros.
#
# For a matrix that is not square the default map is Householder's, whose signs are kept as the diagonal of the trained tensor: 1
# and -1. The forward pass casts that diagonal to integers so that nothing is learnt there, and no gradient reaches it; but an
# optimiser's weight decay does. 1 becomes 1 - rate * decay, the cast makes that 0, and every row or column of the weight is
# multiplied by it. SGD with weight decay and AdamW alike, at any rate * decay that float32 can take from 1, from the first step on;
# no error and no NaN, the loss merely stops caring for what the layer says. Square matrices, whose default is the matrix
# exponential, are not concerned.
# Who meets it: orthogonal projections from a narrow student to a wide teacher (VkD, CVPR 2024, whose released optimiser decays
# them), orthogonal initialisation layers, normalising flows: whoever hands model.parameters() to an optimiser with a decay.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal


def after_a_step(shape, decay, optimiser, **more):
    """(largest entry, distance from orthonormal) of the weight before and after one step."""
    torch.manual_seed(0)
    layer = orthogonal(nn.Linear(*shape, bias=False), **more)
    steps = optimiser(layer.parameters(), lr=0.01, weight_decay=decay)

    def state():
        w = layer.weight.detach()
        w = w if w.shape[0] <= w.shape[1] else w.T
        return round(float(w.abs().max()), 3), round(float((w @ w.T - torch.eye(len(w))).abs().max()), 3)

    before = state()
    layer(torch.randn(5, shape[0])).square().sum().backward()
    steps.step()
    return before, state()


print("torch", torch.__version__)
print("one step: (largest entry, distance from orthonormal) before and after")
found = {}
for name, shape, decay, optimiser, more in (
    ("192 to 384, SGD, no decay", (192, 384), 0.0, torch.optim.SGD, {}),
    ("192 to 384, SGD, decay 1e-4", (192, 384), 1e-4, torch.optim.SGD, {}),
    ("384 to 192, AdamW, decay 0.05", (384, 192), 0.05, torch.optim.AdamW, {}),
    ("192 to 192, SGD, decay 1e-4", (192, 192), 1e-4, torch.optim.SGD, {}),
    ("192 to 384, SGD, decay 1e-4, matrix_exp", (192, 384), 1e-4, torch.optim.SGD, {"orthogonal_map": "matrix_exp"}),
):
    found[name] = after_a_step(shape, decay, optimiser, **more)
    print(f"{name}:", *found[name])
zero = [name for name, (_, after) in found.items() if after[0] == 0.0]
if any(before[0] == 0.0 for before, _ in found.values()) or len(zero) != 2 or not all("decay 1e-4" in n or "0.05" in n for n in zero):
    sys.exit(f"Changed: all zeros after a step are {zero}, which were the two non-square ones with a decay.")
if any(after[1] > 1e-3 for name, (_, after) in found.items() if name not in zero):
    sys.exit("Changed: a layer that was not turned into zeros is no longer orthonormal.")
print("As stated: weight decay turns non-square orthogonal layers into zeros at the first step.")
PYTHON
