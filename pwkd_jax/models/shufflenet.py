"""ShuffleNet V1 (Zhang et al. 2018) and V2 (Ma et al. 2018) for 32x32 images, as in RepDistiller: `ShuffleV1`, `ShuffleV2`.

A 1x1 stem to 24 channels without stride or pooling, three stages. Channels of a stage's map are shuffled and, in V2,
concatenated, so a narrow member is a network of its own that shares leading blocks, and no subset of the full one's
channels: such teachers are sliced, never masked.
"""

import math
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels
from pwkd_jax.models.layers import BatchNorm, Conv, affine, classify, uniform

KNOWN = ("ShuffleV1", "ShuffleV2")
GROUPS = 3  # of V1's 1x1 convolutions

# RepDistiller leaves these networks to PyTorch's own initialisers.
Conv = partial(Conv, kernel_init=uniform)


def parse(name: str):
    """(class, {}) for a name in KNOWN, or None."""
    return ({"ShuffleV1": ShuffleV1, "ShuffleV2": ShuffleV2}[name], {}) if name in KNOWN else None


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """[..., C] with channel i * C / groups + j moved to j * groups + i."""
    grouped = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.swapaxes(grouped, -1, -2).reshape(x.shape)


def depthwise(x: jax.Array, stride: int, name: str) -> jax.Array:
    features = x.shape[-1]
    return Conv(features, (3, 3), strides=stride, padding=1, feature_group_count=features, name=name)(x)


class Unit(nn.Module):
    """V1's block: grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; with stride 2 its output is put before the pooled input,
    otherwise added to it. Returns that before its ReLU. features: of the last convolution."""

    middle: int
    features: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, nn.Module]:
        norm = partial(BatchNorm, use_running_average=not train)
        y = nn.relu(norm(name="bn1")(Conv(self.middle, (1, 1), feature_group_count=self.groups, name="conv1")(x)))
        y = nn.relu(norm(name="bn2")(depthwise(shuffle(y, self.groups), self.stride, "conv2")))
        last = norm(name="bn3")
        y = last(Conv(self.features, (1, 1), feature_group_count=GROUPS, name="conv3")(y))
        if self.stride == 1:
            return x + y, affine(last)
        pooled = nn.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # zeros outside count, as in PyTorch
        return jnp.concatenate([y, pooled], axis=-1), affine(last)


class ShuffleV1(nn.Module):
    """Images [B, H, W, C] to Outputs with three stage maps at H/2, H/4 and H/8. divisor: see `models.channels`.

    Inner channels, a quarter of a unit's, are rounded to multiples of the 3 groups where a width leaves them uneven.
    """

    full_channels: tuple[int, ...] = (24, 240, 480, 960)
    blocks: tuple[int, ...] = (4, 8, 4)
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        divisor = math.lcm(self.divisor, GROUPS) if self.divisor else 0
        slim = partial(channels, width=self.width, divisor=divisor)
        first = None
        if not start:
            x = Conv(slim(self.full_channels[0]), (1, 1), name="stem_conv")(x)
            x = first = nn.relu(BatchNorm(use_running_average=not train, name="stem_bn")(x))
        preact, norms = [], []
        for s, (count, before, full) in enumerate(
            zip(self.blocks, self.full_channels, self.full_channels[1:], strict=False)
        ):
            if s < start:
                continue
            for b in range(count):
                # The first unit of a stage makes only the channels that the pooled input does not bring.
                features, own = (slim(full), full) if b else (slim(full) - slim(before), full - before)
                middle = channels(own // 4, self.width, GROUPS)
                groups = 1 if not (s or b) else GROUPS
                pre, norm = Unit(middle, features, 1 if b else 2, groups, name=f"stage{s + 1}_block{b + 1}")(x, train)
                x = nn.relu(pre)
            preact.append(pre)
            norms.append(norm)
        pooled = jnp.mean(x, axis=(1, 2))
        logits, head = classify(pooled, self.num_classes, dropout=train * self.dropout)
        stages = tuple(nn.relu(p) for p in preact)
        return Outputs(logits, stages, tuple(preact), pooled, head, tuple(norms), first, x)

    @staticmethod
    def torch_names(module: str) -> tuple[str, ...]:
        return _torch_names(module)


class Split(nn.Module):
    """V2's basic block: half of the channels pass, half go through 1x1, 3x3 depthwise, 1x1. Returns both halves together
    before the last ReLU, not shuffled, and after it, shuffled."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        norm = partial(BatchNorm, use_running_average=not train)
        half = x.shape[-1] // 2
        kept, y = x[..., :half], x[..., half:]
        y = nn.relu(norm(name="bn1")(Conv(half, (1, 1), name="conv1")(y)))
        y = norm(name="bn2")(depthwise(y, 1, "conv2"))
        y = norm(name="bn3")(Conv(half, (1, 1), name="conv3")(y))
        pre = jnp.concatenate([kept, y], axis=-1)
        return pre, shuffle(jnp.concatenate([kept, nn.relu(y)], axis=-1), 2)


class Down(nn.Module):
    """V2's block of stride 2: two branches of half the features each, put together and shuffled."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm, half = partial(BatchNorm, use_running_average=not train), self.features // 2
        left = norm(name="bn1")(depthwise(x, 2, "conv1"))
        left = nn.relu(norm(name="bn2")(Conv(half, (1, 1), name="conv2")(left)))
        right = nn.relu(norm(name="bn3")(Conv(half, (1, 1), name="conv3")(x)))
        right = norm(name="bn4")(depthwise(right, 2, "conv4"))
        right = nn.relu(norm(name="bn5")(Conv(half, (1, 1), name="conv5")(right)))
        return shuffle(jnp.concatenate([left, right], axis=-1), 2)


class ShuffleV2(nn.Module):
    """Images [B, H, W, C] to Outputs with three stage maps at H/2, H/4 and H/8. divisor: see `models.channels`.

    A branch, half of a stage's channels, is rounded where a width does not leave a whole number. The channels of a `preact` map
    stand in another order than those of its `stages` map, which are shuffled; and half of them come from no batch norm of
    their own block, so there are no `norms`.
    """

    full_channels: tuple[int, ...] = (24, 116, 232, 464, 1024)
    blocks: tuple[int, ...] = (3, 7, 3)
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        norm = partial(BatchNorm, use_running_average=not train)
        slim = partial(channels, width=self.width, divisor=self.divisor)
        first = None
        if not start:
            x = Conv(slim(self.full_channels[0]), (1, 1), name="stem_conv")(x)
            x = first = nn.relu(norm(name="stem_bn")(x))
        stages, preact = [], []
        for s, (count, full) in enumerate(zip(self.blocks, self.full_channels[1:-1], strict=True), start=1):
            if s <= start:
                continue
            # Two equal branches, whose channels are rounded to a whole number at least.
            features = 2 * channels(full // 2, self.width, self.divisor or 1)
            x = Down(features, name=f"stage{s}_block1")(x, train)
            for b in range(count):
                pre, x = Split(name=f"stage{s}_block{b + 2}")(x, train)
            preact.append(pre)
            stages.append(x)
        x = Conv(slim(self.full_channels[-1]), (1, 1), name="last_conv")(x)
        x = nn.relu(norm(name="last_bn")(x))
        pooled = jnp.mean(x, axis=(1, 2))
        logits, head = classify(pooled, self.num_classes, dropout=train * self.dropout)
        return Outputs(logits, tuple(stages), tuple(preact), pooled, head, (), first, x)

    @staticmethod
    def torch_names(module: str) -> tuple[str, ...]:
        return _torch_names(module)


def _torch_names(module: str) -> tuple[str, ...]:
    """Names of `module` in RepDistiller and mdistiller; see `weights.torch`."""
    top = {"stem_conv": "conv1", "stem_bn": "bn1", "last_conv": "conv2", "last_bn": "bn2", "classifier": "linear"}
    if module in top:
        return (top[module],)
    stage, block, layer = re.fullmatch(r"stage(\d+)_block(\d+)/(\w+)", module).groups()
    return (f"layer{stage}.{int(block) - 1}.{layer}",)
