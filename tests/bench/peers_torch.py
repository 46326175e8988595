"""The steps of `peers.py` in PyTorch: CIFAR ResNets in its standard layers, and RepDistiller's and S-Net's training steps.

The networks have the shapes of `pwkd_jax.models.resnet`; the slimmable one reads slices of full-width weights, and has batch
norm of its own for each width.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from peers_torch_depthwise import MobileNetV2, ShuffleV2
from torch import nn

CLASSES = 100


class Conv(nn.Conv2d):
    """A convolution whose leading block is read at a width: `width` of its channels out, and as many in as there come."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1):
        super().__init__(inputs, outputs, size, stride, padding=size // 2, bias=False)
        self.width = 1.0

    def forward(self, x):
        weight = self.weight
        if self.width < 1:
            weight = weight[: int(len(weight) * self.width), : x.shape[1]]
        return F.conv2d(x, weight, None, self.stride, self.padding)


class Norm(nn.Module):
    """Batch norm with statistics, scale and bias for each of `widths` (switchable batch norm)."""

    def __init__(self, channels: int, widths: tuple[float, ...]):
        super().__init__()
        self.widths, self.width = widths, 1.0
        self.norms = nn.ModuleList(nn.BatchNorm2d(int(channels * w)) for w in widths)

    def forward(self, x):
        return self.norms[self.widths.index(self.width)](x)


class Classifier(nn.Linear):
    """A linear layer of the leading features."""

    def forward(self, x):
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, widths):
        super().__init__()
        self.conv1, self.norm1 = Conv(inputs, outputs, 3, stride), Norm(outputs, widths)
        self.conv2, self.norm2 = Conv(outputs, outputs, 3), Norm(outputs, widths)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(Conv(inputs, outputs, 1, stride), Norm(outputs, widths))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """resnet{depth}x4 of CIFAR, at width 1 or, with several `widths`, at whichever `set_width` chose last."""

    def __init__(self, depth: int, widths: tuple[float, ...] = (1.0,)):
        super().__init__()
        self.stem, self.norm = Conv(3, 32, 3), Norm(32, widths)
        blocks, inputs = [], 32
        for stage, outputs in enumerate((64, 128, 256)):
            for block in range((depth - 2) // 6):
                blocks.append(Block(inputs, outputs, 2 if stage and not block else 1, widths))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = Classifier(inputs, CLASSES)
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_width(self, width: float) -> None:
        for module in self.modules():
            if isinstance(module, Conv | Norm):
                module.width = width

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x)), inplace=True))
        return self.classifier(x.mean((2, 3)))


NETWORKS = {
    "resnet8x4": partial(ResNet, 8),
    "resnet32x4": partial(ResNet, 32),
    "MobileNetV2": partial(MobileNetV2, CLASSES),
    "ShuffleV2": partial(ShuffleV2, CLASSES),
}


def sgd(model: nn.Module, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, **options)


def kd_loss(logits, taught, labels, temperature: float = 4.0):
    """0.1 of cross entropy and 0.9 of KD, as RepDistiller has it."""
    soft = F.kl_div(F.log_softmax(logits / temperature, 1), F.softmax(taught / temperature, 1), reduction="sum")
    return 0.1 * F.cross_entropy(logits, labels) + 0.9 * temperature**2 * soft / len(logits)


def facts(model: nn.Module) -> dict:
    """{"parameters", "macs"}: of all that trains, and of the convolutions and products for one image at width 1."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device))
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


class Runner:
    """run(n): n steps from batches of normalised float32 images that lie in host memory, as DataLoader's workers leave them."""

    def __init__(
        self, batch: int, teacher: str, student: str, widths: tuple[float, ...], compiled: bool, dtype: str, threads: int
    ):
        """student: '' is a teacher of `widths` itself; one without teacher learns from labels."""
        torch.set_num_threads(threads or torch.get_num_threads())
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda, self.compiled, self.widths = self.device.type == "cuda", compiled, () if student else widths
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        if self.cuda and compiled:
            torch.backends.cudnn.benchmark = True
        rng = np.random.default_rng(0)
        self.batches = []
        for _ in range(4):
            images = torch.from_numpy(rng.standard_normal((batch, 3, 32, 32), np.float32))
            labels = torch.from_numpy(rng.integers(0, CLASSES, batch))
            self.batches.append((images.pin_memory(), labels.pin_memory()) if self.cuda else (images, labels))
        self.model = self.make(NETWORKS[student]() if student else NETWORKS[teacher](widths))
        self.facts = facts(self.model)
        self.optimizer = sgd(self.model, fused=True) if compiled else sgd(self.model)
        self.forward = self.model.train()
        self.teach = None
        if student:
            self.forward = torch.compile(self.model) if compiled else self.model
        if student and teacher:
            taught = self.make(NETWORKS[teacher]()).eval().requires_grad_(False)
            self.teach = torch.compile(taught) if compiled else taught

    def make(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.compiled else model

    def student(self, images, labels):
        if self.compiled:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast:
            with torch.no_grad():
                taught = self.teach(images) if self.teach is not None else None
            logits = self.forward(images).float()
        loss = F.cross_entropy(logits, labels) if taught is None else kd_loss(logits, taught.float(), labels)
        if not self.compiled:
            self.meter = loss.item(), (logits.argmax(1) == labels).float().mean().item()  # RepDistiller's meters, every step
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def slimmable(self, images, labels):
        """One update from the gradients of all widths, widest first, each with hard labels and a backward pass of its own."""
        self.optimizer.zero_grad(set_to_none=True)
        for width in self.widths:
            self.model.set_width(width)
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
        self.optimizer.step()
        return loss

    def run(self, steps: int) -> None:
        step = self.slimmable if self.widths else self.student
        for i in range(steps):
            loss = step(*(x.to(self.device, non_blocking=True) for x in self.batches[i % len(self.batches)]))
        if not np.isfinite(loss.item()):  # which waits for the device too
            raise RuntimeError("the loss is not finite")


def versions() -> dict:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "torch_threads": torch.get_num_threads(), "torch_device": name or "cpu"}
