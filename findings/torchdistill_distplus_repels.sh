#!/usr/bin/env bash
# torchdistill 1.1.5 with torch 2.13.0: the channel term of DISTPlusLoss is a correlation and not one minus it, so that minimising
# the loss drives the student's feature maps to the teacher's negative.
#
# DIST and DIST+ learn by Pearson distances, 1 - r. Three of the four terms are that (classes, images, positions); the fourth, over
# channels at every position, is added as r itself, with a positive weight. A student that is its teacher has the term's greatest
# value, 1; its mirror image about the mean over channels has the least, -1; gradient descent on the term alone goes there from
# anywhere. With all weights at 1 and equal logits, a student that equals its teacher has a loss of 1. The loss falls, is finite and
# may be negative, and nothing is said.
# Guessed before it ran, from the class's words and from its other three terms: 0 for a student that equals its teacher.
# Who meets it: whoever trains with DIST+ from a YAML file of torchdistill, or compares with such numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 torchvision==0.28.0 torchdistill==1.1.5 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata

import torch
from torchdistill.losses.mid_level import DISTPlusLoss

torch.manual_seed(0)
teacher, logits = torch.randn(8, 16, 4, 4), torch.randn(8, 10)
mirrored = 2 * teacher.mean(1, keepdim=True) - teacher
where = [x for who in ("student", "teacher") for x in ("fc", "output")] + [x for who in ("student", "teacher") for x in ("maps", "output")]


def loss(maps, **weights):
    criterion = DISTPlusLoss(*where, **weights)
    student, taught = ({"fc": {"output": logits}, "maps": {"output": m}} for m in (maps, teacher))
    return criterion(student, taught, None)


def correlation(maps):
    s, t = (m - m.mean(1, keepdim=True) for m in (maps, teacher))
    return float(torch.nn.functional.cosine_similarity(s, t, dim=1).mean())


alone = {"beta": 0.0, "gamma": 0.0, "kappa": 0.0}
print("torchdistill", importlib.metadata.version("torchdistill"), "torch", torch.__version__)
terms = {"equal to the teacher": round(float(loss(teacher, **alone)), 3), "mirrored": round(float(loss(mirrored, **alone)), 3)}
print("channel term of a student", terms)
whole = {"equal to the teacher": round(float(loss(teacher)), 3)}
print("the loss with all weights at 1, logits equal:", whole)
maps = torch.randn_like(teacher).requires_grad_()
before, optimizer = correlation(maps.detach()), torch.optim.Adam([maps], 0.05)
for _ in range(300):
    optimizer.zero_grad()
    loss(maps, **alone).backward()
    optimizer.step()
after = correlation(maps.detach())
print(f"300 steps on that term: correlation with the teacher over channels {before:+.2f} before, {after:+.2f} after")
if terms != {"equal to the teacher": 1.0, "mirrored": -1.0} or whole != {"equal to the teacher": 1.0} or after > -0.95:
    raise SystemExit("this has changed")
PYTHON
