"""MobileNetV1 (Howard et al. 2017) and MobileNetV2 (Sandler et al. 2018).

`MobileNetV2` is the CIFAR network of RepDistiller: half the channels (but 1,280 before the classifier), stem of stride 2,
ReLU in place of ReLU6, an expansion in the first block too. `imagenet_MobileNetV2` is torchvision's, without its dropout.
`imagenet_MobileNetV1` is mdistiller's, the student of the ImageNet pair. Stages of V2 are the linear outputs of its groups
2, 3, 5 and 7, signed: there is no ReLU after them, so `preact` holds the same maps.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels
from pwkd_jax.models.layers import BatchNorm, Conv, affine, classify, drop_path, drop_rates, small_normal, uniform

KNOWN = ("MobileNetV2", "imagenet_MobileNetV1", "imagenet_MobileNetV2")

# (expansion, channels, blocks, stride) of each group.
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# RepDistiller's for 32x32: half of the channels, rounded down, and no stride in the second group.
SMALL = tuple((t, c // 2, n, 1 if i == 1 else s) for i, (t, c, n, s) in enumerate(GROUPS))
# Groups of V2, counted from 0, whose outputs are the stages.
V2_STAGES = (1, 2, 4, 6)
# (channels, stride) of V1's blocks, and those whose outputs are the stages.
V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
V1_STAGES = (3, 5, 11, 13)


def parse(name: str):
    """(class, its options) for a name in KNOWN, or None."""
    v2 = {
        "MobileNetV2": {"groups": SMALL, "stem": 16, "expand_first": True},
        "imagenet_MobileNetV2": {"groups": GROUPS, "stem": 32, "relu6": True},
    }
    if name == "imagenet_MobileNetV1":
        return MobileNetV1, {}
    return (MobileNetV2, v2[name]) if name in v2 else None


def depthwise(features: int, stride: int, **options):
    return Conv(features, (3, 3), strides=stride, padding=1, feature_group_count=features, **options)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear; returns the output, plus the input where `add`, and the last batch norm's
    (scale, bias)."""

    middle: int
    features: int
    stride: int
    expand: bool
    add: bool
    relu6: bool
    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        norm, relu = partial(BatchNorm, use_running_average=not train), nn.relu6 if self.relu6 else nn.relu
        y = x
        if self.expand:
            y = relu(norm(name="expand_bn")(Conv(self.middle, (1, 1), name="expand_conv")(y)))
        y = relu(norm(name="depthwise_bn")(depthwise(self.middle, self.stride, name="depthwise_conv")(y)))
        last = norm(name="project_bn")
        y = last(Conv(self.features, (1, 1), name="project_conv")(y))
        return (x + drop_path(y, self.drop) if self.add else y), affine(last)


class MobileNetV2(nn.Module):
    """Images [B, H, W, C] to Outputs with four stage maps; H is halved by the stem and by every group of stride 2.

    groups: (expansion, channels at width 1, blocks, stride) of the seven. `width` slims every layer, also the last 1,280
    channels, which the mobile networks' own multiplier leaves. divisor: see `models.channels`.
    """

    groups: tuple[tuple[int, int, int, int], ...] = SMALL
    stem: int = 16
    expand_first: bool = False
    relu6: bool = False
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    drop_path: float = 0.0
    dropout: float = 0.0
    signed = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        norm, relu = partial(BatchNorm, use_running_average=not train), nn.relu6 if self.relu6 else nn.relu
        slim = partial(channels, width=self.width, divisor=self.divisor)
        first, begin = None, V2_STAGES[start - 1] + 1 if start else 0
        if not start:
            x = Conv(slim(self.stem), (3, 3), strides=2, padding=1, name="stem_conv")(x)
            x = first = relu(norm(name="stem_bn")(x))
        stages, norms, before = [], [], self.stem
        drops = iter(drop_rates(train * self.drop_path, sum(n for _, _, n, _ in self.groups)))
        for g, (expansion, full, count, stride) in enumerate(self.groups):
            for b in range(count):
                step, drop, read, before = stride if b == 0 else 1, next(drops), before, full
                if g < begin:
                    continue
                expand = expansion > 1 or self.expand_first
                block = InvertedResidual(slim(read) * expansion, slim(full), step, expand, step == 1 and read == full,
                                         self.relu6, drop, name=f"group{g + 1}_block{b + 1}")  # fmt: skip
                x, last = block(x, train)
            if g in V2_STAGES and g >= begin:
                stages.append(x)
                norms.append(last)
        x = relu(norm(name="last_bn")(Conv(slim(1280), (1, 1), name="last_conv")(x)))
        pooled = jnp.mean(x, axis=(1, 2))
        logits, head = classify(pooled, self.num_classes, small_normal, nn.initializers.zeros, train * self.dropout)
        return Outputs(logits, tuple(stages), tuple(stages), pooled, head, tuple(norms), first, x)

    def torch_names(self, module: str) -> tuple[str, ...]:
        """Names of `module` in RepDistiller and mdistiller (CIFAR) or torchvision (ImageNet); see `weights.torch`."""
        small = self.expand_first
        blocks = sum(n for _, _, n, _ in self.groups)
        stem, last = ("conv1", "conv2") if small else ("features.0", f"features.{blocks + 1}")
        top = {"stem_conv": f"{stem}.0", "stem_bn": f"{stem}.1", "last_conv": f"{last}.0", "last_bn": f"{last}.1",
               "classifier": "classifier.0" if small else "classifier.1"}  # fmt: skip
        if module in top:
            return (top[module],)
        group, block, layer, kind = re.fullmatch(r"group(\d)_block(\d)/(\w+)_(conv|bn)", module).groups()
        group, block = int(group) - 1, int(block) - 1
        bn, order = kind == "bn", ["expand", "depthwise", "project"].index(layer)
        if small:
            return (f"blocks.{group}.{block}.conv.{3 * order + bn}",)
        order -= self.groups[group][0] == 1  # torchvision's first block has no expansion
        place = sum(n for _, _, n, _ in self.groups[:group]) + block + 1
        return (f"features.{place}.conv.{order + bn if layer == 'project' else f'{order}.{int(bn)}'}",)


class MobileNetV1(nn.Module):
    """Images [B, H, W, C] to Outputs with four stage maps at H/4, H/8, H/16 and H/32. divisor: see `models.channels`."""

    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        norm = partial(BatchNorm, use_running_average=not train)
        slim = partial(channels, width=self.width, divisor=self.divisor)
        first, begin = None, V1_STAGES[start - 1] if start else 0
        if not start:
            x = Conv(slim(32), (3, 3), strides=2, padding=1, kernel_init=uniform, name="stem_conv")(x)
            x = first = nn.relu(norm(name="stem_bn")(x))
        preact, norms, before = [], [], 32
        for i, (full, stride) in enumerate(V1_BLOCKS, start=1):
            read, before = before, full
            if i <= begin:
                continue
            x = depthwise(slim(read), stride, kernel_init=uniform, name=f"block{i}_depthwise_conv")(x)
            x = nn.relu(norm(name=f"block{i}_depthwise_bn")(x))
            x = Conv(slim(full), (1, 1), kernel_init=uniform, name=f"block{i}_pointwise_conv")(x)
            last = norm(name=f"block{i}_pointwise_bn")
            pre = last(x)
            x = nn.relu(pre)
            if i in V1_STAGES:
                preact.append(pre)
                norms.append(affine(last))
        pooled = jnp.mean(x, axis=(1, 2))
        logits, head = classify(pooled, self.num_classes, dropout=train * self.dropout)
        stages = tuple(nn.relu(p) for p in preact)
        return Outputs(logits, stages, tuple(preact), pooled, head, tuple(norms), first, x)

    @staticmethod
    def torch_names(module: str) -> tuple[str, ...]:
        """Names of `module` in mdistiller; see `weights.torch`."""
        top = {"stem_conv": "model.0.0", "stem_bn": "model.0.1", "classifier": "fc"}
        if module in top:
            return (top[module],)
        block, layer, kind = re.fullmatch(r"block(\d+)_(depthwise|pointwise)_(conv|bn)", module).groups()
        return (f"model.{block}.{3 * (layer == 'pointwise') + (kind == 'bn')}",)
