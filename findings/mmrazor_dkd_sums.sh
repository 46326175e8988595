#!/usr/bin/env bash
# mmrazor 1.0.0 with torch 2.13.0: DKDLoss with reduction='mean' or 'none' is the sum over the batch, and the config that comes with
# it asks for 'mean'.
#
# It calls torch's kl_div with size_average=False beside reduction. That old argument wins over the new one and means "sum"; only
# 'batchmean', the default, is divided afterwards. configs/distill/mmcls/dkd (ResNet-34 to ResNet-18, ImageNet) says reduction='mean'
# and weight 1: with its 32 images a GPU the loss and its gradient are 32 times those of the paper, and 32,000 times the mean over
# images and 1,000 classes that the word stands for in the part of the other classes; another batch size is another weight. With
# 'none', which should be one number an image, it is the same scalar.
# Guessed before it ran, from the call: a sum for all four words. 'batchmean' turned out to be right.
# Who meets it: whoever distils by DKD with that config, or takes over a weight that was tuned on it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 mmengine==0.10.7 numpy==2.4.6 setuptools==80.9.0
"$folder/venv/bin/pip" install -qq --disable-pip-version-check --no-deps mmrazor==1.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import torch

# The loss's own file and the registry that it names; the rest of the package wants mmcv, which has to be compiled.
root = Path(importlib.util.find_spec("mmengine").origin).parents[1] / "mmrazor"
for name in ("mmrazor", "mmrazor.registry"):
    module = types.ModuleType(name)
    module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = module
from mmengine.registry import Registry

sys.modules["mmrazor.registry"].MODELS = Registry("model")
spec = importlib.util.spec_from_file_location("decoupled_kd", root / "models" / "losses" / "decoupled_kd.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

torch.manual_seed(0)
print("mmrazor", importlib.metadata.version("mmrazor"), "torch", torch.__version__)
values = {}
for reduction in ("batchmean", "mean", "sum", "none"):
    for batch in (4, 64):
        # The same image `batch` times: a mean says the same for any of them.
        torch.manual_seed(1)
        student, teacher = (torch.randn(1, 10).repeat(batch, 1) for _ in range(2))
        loss = module.DKDLoss(reduction=reduction)(student, teacher, torch.zeros(batch, dtype=torch.long))
        values[reduction, batch] = (tuple(loss.shape), float(loss))
for batch in (4, 64):
    print(f"{batch} times one image:", {r: round(v, 3) for (r, b), (_, v) in values.items() if b == batch})
one, rest = values["batchmean", 64][1], ("mean", "sum", "none")
print(f"of one image {one:.3f}; with reduction='mean' 64 of them have {values['mean', 64][1] / one:.1f} times that")
right = all(abs(values["batchmean", b][1] / one - 1) < 1e-4 for b in (4, 64))
if not right or any(values[r, b][0] != () or abs(values[r, b][1] / one / b - 1) > 1e-4 for r in rest for b in (4, 64)):
    raise SystemExit("this has changed")
PYTHON
