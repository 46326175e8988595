"""Wide residual networks of CIFAR (Zagoruyko and Komodakis 2016): `wrn_16_2` is 16 layers deep, twice as wide.

As in RepDistiller: three stages of n = (depth - 4) / 6 pre-activation blocks, strides 1, 2, 2. Where channels change, the
shortcut is a 1x1 convolution without batch norm on the activated input. The field's "post" maps of these networks are the
raw sums of the residual stream, negative values included, and its "preact" maps those sums under the next batch norm;
`stages` and `preact` follow it.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels
from pwkd_jax.models.layers import BatchNorm, Conv, affine, classify, drop_path, drop_rates

KNOWN = tuple(f"wrn_{depth}_{k}" for depth in (16, 40) for k in (1, 2))


def parse(name: str):
    """(WideResNet, its options) for `wrn_<depth>_<k>` with depth 6 n + 4, or None."""
    match = re.fullmatch(r"wrn_(\d+)_([1-9]\d?)", name)
    if not match or int(match[1]) < 10 or (int(match[1]) - 4) % 6:
        return None
    k = int(match[2])
    return WideResNet, {"blocks": (int(match[1]) - 4) // 6, "full_channels": (16, 16 * k, 32 * k, 64 * k)}


class Block(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv plus shortcut; returns the sum, the first batch norm's output and its (scale, bias)."""

    features: int
    stride: int
    project: bool
    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        norm = partial(BatchNorm, use_running_average=not train)
        first = norm(name="bn1")
        normed = first(x)
        y = nn.relu(normed)
        if self.project:
            x = Conv(self.features, (1, 1), strides=self.stride, padding=0, name="shortcut_conv")(y)
        y = Conv(self.features, (3, 3), strides=self.stride, padding=1, name="conv1")(y)
        y = Conv(self.features, (3, 3), padding=1, name="conv2")(nn.relu(norm(name="bn2")(y)))
        return x + drop_path(y, self.drop), normed, affine(first)


class WideResNet(nn.Module):
    """Images [B, H, W, C] to Outputs with three stage maps at H, H/2 and H/4.

    blocks: of each stage. full_channels: of the stem and the three stages at width 1. divisor: see `models.channels`.
    drop_path, dropout: as those of `resnet.ResNet`.
    """

    blocks: int = 2
    full_channels: tuple[int, ...] = (16, 32, 64, 128)
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    drop_path: float = 0.0
    dropout: float = 0.0
    signed = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        stem, *features = (channels(c, self.width, self.divisor) for c in self.full_channels)
        first = None
        if not start:
            x = first = Conv(stem, (3, 3), padding=1, name="stem_conv")(x)
        sums, preact, norms = [], [], []
        drops = iter(drop_rates(train * self.drop_path, 3 * self.blocks))
        for s in range(3):
            for b in range(self.blocks):
                project = not b and self.full_channels[s] != self.full_channels[s + 1]
                stride, drop = 2 if s and not b else 1, next(drops)
                if s < start:
                    continue
                block = Block(features[s], stride, project, drop, name=f"stage{s + 1}_block{b + 1}")
                x, normed, norm = block(x, train)
                if s > start and not b:  # the norm that the previous stage's sum runs into
                    preact.append(normed)
                    norms.append(norm)
            if s >= start:
                sums.append(x)
        last = BatchNorm(use_running_average=not train, name="final_bn")
        normed = last(x)
        if sums:
            preact.append(normed)
            norms.append(affine(last))
        final = nn.relu(normed)
        pooled = jnp.mean(final, axis=(1, 2))
        logits, head = classify(pooled, self.num_classes, bias_init=nn.initializers.zeros, dropout=train * self.dropout)
        return Outputs(logits, tuple(sums), tuple(preact), pooled, head, tuple(norms), first, final)

    @staticmethod
    def torch_names(module: str) -> tuple[str, ...]:
        """Names of `module` in RepDistiller and mdistiller; see `weights.torch`."""
        top = {"stem_conv": ("conv1",), "final_bn": ("bn1",), "classifier": ("fc",)}
        if module in top:
            return top[module]
        stage, block, layer = re.fullmatch(r"stage(\d+)_block(\d+)/(\w+)", module).groups()
        return (f"block{stage}.layer.{int(block) - 1}.{layer.replace('shortcut_conv', 'convShortcut')}",)
