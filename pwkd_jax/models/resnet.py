"""Post-activation residual networks (He et al. 2016): those of CIFAR and those of ImageNet.

`resnet8` ... `resnet110`, `resnet8x4`, `resnet32x4`: the CIFAR networks of RepDistiller, three stages of n = (depth - 2) / 6
basic blocks, strides 1, 2, 2; `x4` nets are four times as wide after the stem. `ResNet18`, `34`, `50`, `101`: four
stages behind a 3x3 stem without pooling, for small images; `imagenet_ResNet18` and so on: the same behind torchvision's 7x7
stem of stride 2 and its max-pool, the stride of a bottleneck in its 3x3 convolution. A 1x1 convolution with batch norm is
the shortcut wherever stride or channels change (option B).
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels
from pwkd_jax.models.layers import BatchNorm, Conv, affine, classify, drop_path, drop_rates

KNOWN = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    "resnet8x4",
    "resnet32x4",
    *(f"{where}ResNet{depth}" for where in ("", "imagenet_") for depth in (18, 34, 50, 101)),
)
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def parse(name: str):
    """(ResNet, its options) for a name in KNOWN, or None."""
    if name not in KNOWN:
        return None
    depth = int(re.search(r"\d+", name)[0])
    if name.startswith("resnet"):
        full = (32, 64, 128, 256) if name.endswith("x4") else (16, 16, 32, 64)
        return ResNet, {"blocks": ((depth - 2) // 6,) * 3, "full_channels": full}
    large = name.startswith("imagenet")
    return ResNet, {"blocks": STAGES[depth], "full_channels": (64, 64, 128, 256, 512), "bottleneck": depth >= 50,
                    "large_stem": large}  # fmt: skip


class Block(nn.Module):
    """Two 3x3 convolutions, or a 1x1-3x3-1x1 bottleneck, plus shortcut; returns the sum, before its ReLU, and the last
    batch norm's (scale, bias). features: channels of the sum. drop: see `layers.drop_path`."""

    features: int
    stride: int
    project: bool
    bottleneck: bool
    zero_gamma: bool
    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        norm = partial(BatchNorm, use_running_average=not train)
        inner = self.features // 4 if self.bottleneck else self.features
        # (features, kernel size, stride); explicit padding: 'SAME' with stride 2 pads on one side only.
        layers = [(inner, 1, 1), (inner, 3, self.stride), (self.features, 1, 1)]
        if not self.bottleneck:
            layers = [(inner, 3, self.stride), (inner, 3, 1)]
        y = x
        for i, (features, size, stride) in enumerate(layers, start=1):
            last = i == len(layers)
            y = Conv(features, (size, size), strides=stride, padding=size // 2, name=f"conv{i}")(y)
            scale_init = nn.initializers.zeros if last and self.zero_gamma else nn.initializers.ones
            bn = norm(name=f"bn{i}", scale_init=scale_init)
            y = bn(y) if last else nn.relu(bn(y))
        if self.project:
            x = Conv(self.features, (1, 1), strides=self.stride, padding=0, name="shortcut_conv")(x)
            x = norm(name="shortcut_bn")(x)
        return x + drop_path(y, self.drop), affine(bn)


class ResNet(nn.Module):
    """Images [B, H, W, C] to Outputs with one map a stage: at H, H/2, H/4 (, H/8), or a quarter of that behind a large stem.

    blocks: of each stage. full_channels: of the stem and the stages at width 1, for bottlenecks of their 3x3 convolutions.
    divisor: see `models.channels`. zero_gamma: start each block's last batch-norm scale at 0 (BigNAS and AttentiveNAS do,
    S-Net does not). drop_path: the last block's, see `layers.drop_path`; dropout: before the classifier; in training only.
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    full_channels: tuple[int, ...] = (16, 16, 32, 64)
    bottleneck: bool = False
    large_stem: bool = False
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    zero_gamma: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        stem, *inner = (channels(c, self.width, self.divisor) for c in self.full_channels)
        expansion = 4 if self.bottleneck else 1
        first = None
        if not start:
            size, stride = (7, 2) if self.large_stem else (3, 1)
            x = Conv(stem, (size, size), strides=stride, padding=size // 2, name="stem_conv")(x)
            x = first = nn.relu(BatchNorm(use_running_average=not train, name="stem_bn")(x))
            if self.large_stem:
                x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        preact, norms, before = [], [], self.full_channels[0]
        drops = iter(drop_rates(train * self.drop_path, sum(self.blocks)))
        for s, (count, full) in enumerate(zip(self.blocks, self.full_channels[1:], strict=True)):
            for b in range(count):
                stride = 2 if s and not b else 1
                # Decided at full width, so that every width has the same tree of parameters.
                project = not b and (stride != 1 or before != full * expansion)
                drop = next(drops)
                if s < start:
                    continue
                block = Block(inner[s] * expansion, stride, project, self.bottleneck, self.zero_gamma,
                              drop, name=f"stage{s + 1}_block{b + 1}")  # fmt: skip
                pre, norm = block(x, train)
                x = nn.relu(pre)
            before = full * expansion
            if s >= start:
                preact.append(pre)
                norms.append(norm)
        pooled = jnp.mean(x, axis=(1, 2))
        logits, head = classify(pooled, self.num_classes, dropout=train * self.dropout)
        stages = tuple(nn.relu(p) for p in preact)
        return Outputs(logits, stages, tuple(preact), pooled, head, tuple(norms), first, x)

    @staticmethod
    def torch_names(module: str) -> tuple[str, ...]:
        """Names of `module` in RepDistiller, mdistiller and torchvision; see `weights.torch`."""
        top = {"stem_conv": ("conv1",), "stem_bn": ("bn1",), "classifier": ("fc", "linear")}
        if module in top:
            return top[module]
        stage, block, layer = re.fullmatch(r"stage(\d+)_block(\d+)/(\w+)", module).groups()
        part = {"shortcut_conv": ("downsample.0", "shortcut.0"), "shortcut_bn": ("downsample.1", "shortcut.1")}
        return tuple(f"layer{stage}.{int(block) - 1}.{name}" for name in part.get(layer, (layer,)))
