"""The students of depthwise convolutions of `peers.py` in PyTorch's standard layers, in the shapes of `pwkd_jax.models`."""

import torch
from torch import nn

from pwkd_jax.models.mobilenet import SMALL


def layer(inputs: int, outputs: int, size: int = 1, stride: int = 1, depthwise: bool = False, relu: bool = True):
    """A convolution without bias, batch norm and, of most, ReLU."""
    groups = inputs if depthwise else 1
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        middle, self.add = inputs * expansion, stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            layer(inputs, middle), layer(middle, middle, 3, stride, depthwise=True), layer(middle, outputs, relu=False)
        )

    def forward(self, x):
        return x + self.layers(x) if self.add else self.layers(x)


class MobileNetV2(nn.Module):
    """RepDistiller's for 32x32."""

    def __init__(self, classes: int):
        super().__init__()
        blocks, inputs = [layer(3, 16, 3, 2)], 16
        for expansion, outputs, count, stride in SMALL:
            for block in range(count):
                blocks.append(Inverted(inputs, outputs, 1 if block else stride, expansion))
                inputs = outputs
        self.trunk = nn.Sequential(*blocks, layer(inputs, 1280))
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x):
        return self.classifier(self.trunk(x).mean((2, 3)))


def shuffled(x: torch.Tensor) -> torch.Tensor:
    images, channels, height, width = x.shape
    return x.view(images, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


class Split(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.layers = nn.Sequential(layer(half, half), layer(half, half, 3, depthwise=True, relu=False), layer(half, half))

    def forward(self, x):
        kept, y = x.chunk(2, 1)
        return shuffled(torch.cat([kept, self.layers(y)], 1))


class Down(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(layer(inputs, inputs, 3, 2, depthwise=True, relu=False), layer(inputs, half))
        self.right = nn.Sequential(layer(inputs, half), layer(half, half, 3, 2, depthwise=True, relu=False), layer(half, half))

    def forward(self, x):
        return shuffled(torch.cat([self.left(x), self.right(x)], 1))


class ShuffleV2(nn.Module):
    """RepDistiller's for 32x32."""

    def __init__(self, classes: int):
        super().__init__()
        blocks, inputs = [layer(3, 24)], 24
        for outputs, count in ((116, 3), (232, 7), (464, 3)):
            blocks += [Down(inputs, outputs), *(Split(outputs) for _ in range(count))]
            inputs = outputs
        self.trunk = nn.Sequential(*blocks, layer(inputs, 1024))
        self.classifier = nn.Linear(1024, classes)

    def forward(self, x):
        return self.classifier(self.trunk(x).mean((2, 3)))
