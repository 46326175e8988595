"""DiffKD: both of the authors' modules in the wrapper that their training script calls, with the same noise as ours."""

import itertools
from unittest import mock

import torch
from compare import Case, conv, norm
from inputs import CLASSES
from official import load
from ours import TIMES, noise
from recent_cases import quiet
from torch import nn

HUNTO = "hunto/image_classification_sota"


class Net(nn.Module):
    """A network whose modules "map" and "fc" give the last map and the logits."""

    def __init__(self, a):
        super().__init__()
        self.a, self.map, self.fc = a, nn.Identity(), nn.Identity()

    def forward(self, x):
        self.map(self.a["stage3"])
        return self.fc(self.a["logits"])


@quiet
def diffkd_build(s, t):
    made = load(HUNTO, "lib/models/losses/kd_loss.py")
    for name, a in (("student", s), ("teacher", t)):
        made.KD_MODULES[name] = {"modules": ["map", "fc"], "channels": [a["stage3"].shape[1], CLASSES]}
    student, settings = Net(s), {"use_ae": True, "ae_channels": t["stage3"].shape[1] // 2, "tau": 1}
    student.loss = made.KDLoss(
        student, Net(t), "student", "teacher", nn.CrossEntropyLoss(), "diffkd", 1.0, 1.0, settings)  # fmt: skip
    return student


def diffkd(module, s, t, batch):
    turn, dtype = itertools.count(), s["logits"].dtype

    def drawn(shape, **_):
        n, c, h, w = shape
        return torch.tensor(noise(next(turn), (n, h, w, c)), dtype=dtype).permute(0, 3, 1, 2)

    module.a, module.loss.teacher.a = s, t
    times = mock.patch.object(torch, "randint", lambda *_, **__: torch.tensor(TIMES))
    with mock.patch.object(torch, "randn", drawn), times:
        return module.loss(batch["image"], batch["label"])


def layers(ours: str, theirs: str, last: int, bias: bool = False) -> dict:
    """Weights of our `Layers`: convolutions, each with batch norm; bias: the last with a bias in its place."""
    found = {}
    for i in range(1, last + 1):
        found |= conv(f"{ours}/conv{i}", f"{theirs}{3 * i - 3}", bias=bias and i == last)
        found |= {} if bias and i == last else norm(f"{ours}/norm{i}", f"{theirs}{3 * i - 2}")
    return found


DIFFKD = conv("map/encoder", "_diff.map.ae.encoder.0") | norm("map/encoder_norm", "_diff.map.ae.encoder.1")
DIFFKD |= conv("map/decoder", "_diff.map.ae.decoder.0", bias=True)
DIFFKD |= layers("map/noise/block1", "_diff.map.model.pred.0.block.", 3)
DIFFKD |= layers("map/noise/block2", "_diff.map.model.pred.1.block.", 3)
DIFFKD |= conv("map/noise/out/conv1", "_diff.map.model.pred.2") | norm("map/noise/out/norm1", "_diff.map.model.pred.3")
DIFFKD |= layers("map/share/block", "_diff.map.noise_adapter.feat.0.block.", 3)
DIFFKD |= layers("logits/noise/block1", "_diff.fc.model.pred.", 2)
DIFFKD |= conv("logits/noise/block2/conv1", "_diff.fc.model.pred.5")
DIFFKD |= norm("logits/noise/block2/norm1", "_diff.fc.model.pred.6")
DIFFKD |= conv("logits/noise/block2/conv2", "_diff.fc.model.pred.8", bias=True)
DIFFKD |= layers("logits/share/block", "_diff.fc.noise_adapter.feat.", 2)
for ours, theirs in (("map", "_diff.map"), ("logits", "_diff.fc")):
    DIFFKD |= conv(f"{ours}/align", f"{theirs}.trans", bias=True) | conv(f"{ours}/project", f"{theirs}.proj.0")
    DIFFKD |= norm(f"{ours}/project_norm", f"{theirs}.proj.1")
    DIFFKD |= conv(f"{ours}/share/pick", f"{theirs}.noise_adapter.pred", "linear", True)
    DIFFKD[f"{ours}/noise/time"] = (f"{theirs}.model.time_embedding.weight", "same")

# As many channels as leave two in the narrowest layer: the gradient of one before a batch norm is nearly 0.
SHAPES = (((6, 8), (10, 8), (14, 4)), ((8, 8), (12, 8), (32, 4)))
CASES = [
    Case("diffkd", (HUNTO, "lib/models/losses/kd_loss.py, diffkd"), diffkd, ("logits", "stage3"),
         "total and all its networks, the same noise", build=diffkd_build, weights=DIFFKD, total=True, patch="diffkd",
         shapes=SHAPES, golden=True, rtol=2e-6,
         note="the schedule of the noise is float32 in both, by the cumulative products of PyTorch and of NumPy, which differ "
              "in the last place; with the same schedule in both the rest is equal to 1e-11"),
]  # fmt: skip
