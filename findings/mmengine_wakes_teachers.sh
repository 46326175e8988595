#!/usr/bin/env bash
# mmengine 0.10.7 with torch 2.13.0: its training loops put a frozen teacher back into training mode at every epoch.
#
# EpochBasedTrainLoop.run_epoch and IterBasedTrainLoop.run call runner.model.train(), and a torch module's train() reaches all
# its children. A distiller that is written as OpenMMLab's are, one model with student and teacher in it, and that says
# teacher.eval() and requires_grad_(False) once, in its constructor, therefore teaches with its teacher in training mode: batch
# norm normalises by the batch at hand, so that the same image is taught differently by the company it comes in, and the running
# statistics of the "frozen" teacher drift with every step. Nothing is said, the loss falls, and the teacher that is scored or
# saved afterwards is another than the one that was loaded. Between epochs validation switches to eval and hides it.
# Who meets it: whoever distils in mmengine without overriding train() (yzd-v/cls_KD and yzd-v/MGD have no such override; mmrazor's
# SingleTeacherDistill has one), and whoever compares with numbers that such code reported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 mmengine==0.10.7 numpy==2.4.6 setuptools==80.9.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
import sys

import mmengine
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class Distiller(BaseModel):
    """A teacher that is frozen in the constructor, in the manner of OpenMMLab's distillers."""

    def __init__(self, careful):
        super().__init__()
        self.student, self.teacher, self.careful, self.modes, self.taught = net(), net(), careful, set(), []
        self.teacher.eval().requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.careful:
            self.teacher.eval()
        return self

    def forward(self, images, labels, mode="tensor"):
        with torch.no_grad():
            taught = self.teacher(images)
        self.modes.add(self.teacher.training)
        self.taught.append(taught)
        return {"loss": F.cross_entropy(self.student(images), labels) + F.mse_loss(self.student(images), taught)}


images, labels = 2 + 3 * torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))
loader = DataLoader(TensorDataset(images, labels), batch_size=16)


def trained(careful, by_epoch):
    torch.manual_seed(1)
    model = Distiller(careful)
    before, frozen = model.teacher[1].running_mean.clone(), model.teacher(images[:16]).detach()
    limit = {"max_epochs": 1} if by_epoch else {"max_iters": 4}
    runner = Runner(model, "work", train_dataloader=loader, train_cfg={"by_epoch": by_epoch, **limit}, log_level="ERROR",
                    optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}}, experiment_name=f"{careful}{by_epoch}")
    runner.train()
    moved = float((model.teacher[1].running_mean - before).abs().max())
    off = float((model.taught[0] - frozen).norm() / frozen.norm())
    return sorted(model.modes), round(moved, 3), round(off, 3)


print("mmengine", mmengine.__version__, "torch", torch.__version__)
print("teacher.training seen by steps, how far its running mean moved, how far the first logits are from the frozen teacher's")
found = {(careful, by_epoch): trained(careful, by_epoch) for careful in (False, True) for by_epoch in (True, False)}
for (careful, by_epoch), row in found.items():
    print(f"{'with' if careful else 'without'} train() overridden, {'epochs' if by_epoch else 'iterations'}:", *row)
if any(found[True, by] != ([False], 0.0, 0.0) for by in (True, False)):
    sys.exit("Changed: even a model that overrides train() does not keep its teacher frozen.")
if any(found[False, by][0] != [True] or found[False, by][1] < 0.1 or found[False, by][2] < 0.05 for by in (True, False)):
    sys.exit("Changed: mmengine leaves a teacher that was put into evaluation mode as it was.")
print("As stated: both loops put the frozen teacher back into training mode.")
PYTHON
