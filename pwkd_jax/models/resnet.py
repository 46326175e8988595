"""The CIFAR residual networks that the distillation literature compares on (He et al. 2016, section 4.2).

Architecture as in RepDistiller: three stages of n = (depth - 2) / 6 post-activation basic blocks, strides 1, 2, 2, and a
1x1 convolution with batch norm as shortcut wherever stride or channels change. `x4` nets are four times as wide after
the stem. Kernels start from a normal with variance 2 / (k * k * channels out); the classifier from a uniform.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels

KNOWN = "resnet8, 14, 20, 32, 44, 56, 110 and their x4 forms (resnet8x4, resnet32x4)"


def parse(name: str):
    """(ResNet, its options) for `resnet<depth>` or `resnet<depth>x4`, or None."""
    match = re.fullmatch(r"resnet(\d+)(x4)?", name)
    if not match or int(match[1]) < 8 or (int(match[1]) - 2) % 6:
        return None
    stem_and_stages = (32, 64, 128, 256) if match[2] else (16, 16, 32, 64)
    return ResNet, {"blocks": (int(match[1]) - 2) // 6, "full_channels": stem_and_stages}


Conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))
# Flax's momentum is the fraction kept: PyTorch's 0.1 is 0.9 here.
BatchNorm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut; returns the sum, before its ReLU, and the last BN's (scale, bias)."""

    features: int
    stride: int
    project: bool
    zero_gamma: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        norm = partial(BatchNorm, use_running_average=not train)
        # Explicit padding: 'SAME' with stride 2 pads on one side only, unlike the reference networks.
        y = Conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = Conv(self.features, (3, 3), padding=1, name="conv2")(y)
        last = norm(name="bn2", scale_init=nn.initializers.zeros if self.zero_gamma else nn.initializers.ones)
        y = last(y)
        if self.project:
            x = Conv(self.features, (1, 1), strides=self.stride, padding=0, name="shortcut_conv")(x)
            x = norm(name="shortcut_bn")(x)
        return x + y, (last.variables["params"]["scale"], last.variables["params"]["bias"])


class ResNet(nn.Module):
    """Images [B, H, W, C] to Outputs with three stage maps at H, H/2 and H/4.

    full_channels: of the stem and the three stages at width 1. divisor: see `models.channels`.
    zero_gamma: start each block's last batch-norm scale at 0 (BigNAS and AttentiveNAS do, S-Net does not).
    """

    blocks: int = 3
    full_channels: tuple[int, ...] = (16, 16, 32, 64)
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    zero_gamma: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Outputs:
        stem, *stages = (channels(c, self.width, self.divisor) for c in self.full_channels)
        x = Conv(stem, (3, 3), padding=1, name="stem_conv")(x)
        x = nn.relu(BatchNorm(use_running_average=not train, name="stem_bn")(x))
        preact, norms = [], []
        for s, features in enumerate(stages):
            for b in range(self.blocks):
                stride = 2 if s and not b else 1
                # Decided at full width, so that every width has the same tree of parameters.
                project = not b and (stride != 1 or self.full_channels[s] != self.full_channels[s + 1])
                block = Block(features, stride, project, self.zero_gamma, name=f"stage{s + 1}_block{b + 1}")
                pre, norm = block(x, train)
                x = nn.relu(pre)
            preact.append(pre)
            norms.append(norm)
        pooled = jnp.mean(x, axis=(1, 2))
        bound = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        classifier = nn.Dense(self.num_classes, kernel_init=bound, name="classifier")
        logits, head = classifier(pooled), classifier.variables["params"]
        stages = tuple(nn.relu(p) for p in preact)
        return Outputs(logits, stages, tuple(preact), pooled, (head["kernel"], head["bias"]), tuple(norms))
