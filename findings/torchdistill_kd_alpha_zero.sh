#!/usr/bin/env bash
# torchdistill 1.1.5 with torch 2.13.0: KDLoss and LogitStdKDLoss with alpha = 0, distillation alone, drop the factor temperature^2
# and the weight beta as well: at temperature 4 the loss is 16 times smaller than with alpha = 1e-9.
#
# Both say L = alpha CE + (1 - alpha) T^2 KL. With alpha = 0 (or None, or no targets, as for unlabelled images) they return KL as it
# is. The gradient changes by T^2 and by beta at that one point: a sweep over alpha has its end in another unit, a temperature sweep
# at alpha = 0 measures the learning rate, and LogitStdKDLoss with beta = 9 loses a factor of 36 at T = 2.
# Guessed before it ran: the formula with alpha = 0, continuous in alpha.
# Who meets it: whoever tunes alpha, distils without labels, or takes the numbers of such a run for KD's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 torchvision==0.28.0 torchdistill==1.1.5 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata

import torch
from torchdistill.losses.mid_level import KDLoss, LogitStdKDLoss

torch.manual_seed(0)
student, teacher, labels = torch.randn(8, 10), torch.randn(8, 10), torch.arange(8)


def ratio(kind, **options):
    """The gradient with alpha = 1e-9 over that with alpha = 0."""
    norms = []
    for alpha in (1e-9, 0.0):
        logits = student.clone().requires_grad_()
        criterion = kind("fc", "output", "fc", "output", alpha=alpha, **options)
        criterion({"fc": {"output": logits}}, {"fc": {"output": teacher}}, labels).backward()
        norms.append(float(logits.grad.norm()))
    return round(norms[0] / norms[1], 2)


print("torchdistill", importlib.metadata.version("torchdistill"), "torch", torch.__version__)
found = {
    "KDLoss, T = 1": ratio(KDLoss, temperature=1.0), "KDLoss, T = 4": ratio(KDLoss, temperature=4.0),
    "KDLoss, T = 4, beta = 0.5": ratio(KDLoss, temperature=4.0, beta=0.5),
    "LogitStdKDLoss, T = 2, beta = 9": ratio(LogitStdKDLoss, temperature=2.0, beta=9.0),
}
for name, value in found.items():
    print(f"{name}: gradient at alpha = 1e-9 over that at alpha = 0: {value:g}")
if list(found.values()) != [1.0, 16.0, 8.0, 36.0]:
    raise SystemExit("this has changed")
PYTHON
