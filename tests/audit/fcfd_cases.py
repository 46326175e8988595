"""FCFD: the authors' meta model of both networks, in the step of their training script."""

import functools
import types
from unittest import mock

import torch
import yaml
from compare import Case, conv, norm
from official import folder, load
from recent_cases import quiet
from staged import EPS
from torch import nn

FCFD = "LiuDongyang6/FCFD"
META, MAIN, CONFIG = (f"classification/{p}" for p in (
    "models/meta.py", "cifar/main.py", "experiments/cifar/resnet8x4-resnet32x4.yaml"))  # fmt: skip
# As they number them: 0 is the teacher. Of `ours.PATCHES` and of all.
OUTER, INNER = ([1, 1, 0, 0], [0, 0, 1, 1]), ([1, 1, 1, 0], [0, 0, 0, 1])


class Staged(nn.Module):
    """A network with the authors' interface, of arrays: its own maps are there, others go through `staged.Later`'s layers."""

    stage_input = "afterrelu"

    def __init__(self, a, train: bool):
        super().__init__()
        self.a, self.train_mode, self.none = a, train, nn.Parameter(torch.zeros(1))

    def own(self):
        return [self.a["stem"], *(self.a[f"stage{i}"] for i in (1, 2, 3))]

    def forward(self, image):
        return self.own()

    def get_stage_module(self, stage):
        return nn.Identity()

    def stage_forward(self, stage, x):
        before = self.own()[stage - 1]
        if not stage or x is before:
            return self.own()[stage]
        a, stride = self.a, before.shape[-1] // self.own()[stage].shape[-1]
        x = nn.functional.conv2d(x, a[f"conv{stage}"], stride=stride, padding=1)
        if self.train_mode:
            x = nn.functional.batch_norm(x, None, None, training=True, eps=EPS)
        return (x * a[f"scale{stage}"][:, None, None] + a[f"shift{stage}"][:, None, None]).relu()

    def forward_classifier(self, x):
        if x is self.own()[3]:
            return self.a["logits"]
        return nn.functional.linear(x.relu().mean((2, 3)), self.a["kernel"], self.a["bias"])


@quiet
def build(s, t):
    made = load(FCFD, META, ["utils"]).MetaModel
    return made([Staged(t, False), Staged(s, True)], "bi", input_size=(1, 3, 8, 8))


def step(paths, epoch: int):
    """Their total at these mixed networks in this epoch, counted from 0."""

    @quiet
    def theirs(module, s, t, batch):
        module.models[0].a, module.models[1].a, found = t, s, []
        missing = ["easydict", "torchsummary", "timm", "timm.utils", "timm.scheduler", "utils", "data_loader", "models"]
        trainer = load(FCFD, MAIN, missing).Trainer
        config = types.SimpleNamespace(**yaml.safe_load((folder(FCFD) / CONFIG).read_text()), extra_paths=len(paths))
        itself = types.SimpleNamespace(
            config=config, model=module, model_num=2, output_stages=3, train_loader=[(batch["image"], batch["label"])],
            loss_ce=nn.CrossEntropyLoss(), optimizer=mock.MagicMock(), scaler=lambda total, _: found.append(total),
            _get_loss_weight=trainer._get_loss_weight, _loss_kl=functools.partial(trainer._loss_kl, None),
        )  # fmt: skip
        drawn, memory = mock.patch("random.sample", lambda *_: [list(p) for p in paths]), mock.MagicMock(return_value=0.0)
        with drawn, mock.patch.object(torch.cuda, "max_memory_allocated", memory), mock.patch("builtins.print"):
            trainer.train_one_epoch(itself, epoch)
        return found[0]

    return theirs


BRIDGES = {}
for way, kept, (m, source) in (("to_teacher", (1, 2, 3), (0, 1)), ("to_student", (1, 2), (1, 0))):
    for i in kept:
        BRIDGES |= conv(f"{way}{i}/conv", f"bridges.{i}.{m}.{source}.0") | norm(f"{way}{i}/norm", f"bridges.{i}.{m}.{source}.1")
# The student's maps are half as large.
HALF = (((6, 4), (10, 4), (14, 2)), ((8, 8), (12, 8), (20, 4)))
DOUBLED = BRIDGES | {k: (v[0], "up") for k, v in BRIDGES.items() if k.startswith("to_teacher") and k.endswith("kernel")}
SOURCE, WRT = (FCFD, f"{MAIN}, {META}"), ("logits", "stage1", "stage2", "stage3", "conv2", "conv3", "scale3", "kernel", "bias")
HELD = "they hold the factor for an epoch, counted from 1; ours grows with every step from 0"
FROZEN = "with the teacher in evaluation mode, where theirs trains beside it in training mode"
CASES = [
    Case("fcfd", SOURCE, step(OUTER, 30), WRT, "total, the two longest mixed networks", build=build, weights=BRIDGES,
         total=True, patch="fcfd outer", golden=True, note=FROZEN),
    Case("fcfd", SOURCE, step(INNER, 4), WRT, "total, the two shortest in epoch 5 of the ramp", build=build, weights=BRIDGES,
         total=True, patch="fcfd inner", epoch=5.0, note=HELD),
    Case("fcfd", SOURCE, step(INNER + OUTER, 30), WRT, "all four, a student of half the size", build=build, weights=DOUBLED,
         total=True, options={"paths": 4}, shapes=HALF, golden=True),
]  # fmt: skip
