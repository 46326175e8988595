"""VGG with batch norm for small images (Simonyan and Zisserman 2015), as in RepDistiller: `vgg8`, 11, 13, 16, 19.

Five blocks of 3x3 convolutions with bias; max-pool after the first three (and the fourth where images are 64 or more
pixels high), then the global mean and one linear layer. The first block plays the stem; the other four are the stages.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels
from pwkd_jax.models.layers import BatchNorm, Conv, affine, classify, small_normal

BLOCKS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
KNOWN = tuple(f"vgg{depth}" for depth in BLOCKS)


def parse(name: str):
    """(VGG, its options) for a name in KNOWN, or None."""
    return (VGG, {"blocks": BLOCKS[int(name[3:])]}) if name in KNOWN else None


class VGG(nn.Module):
    """Images [B, H, W, C] to Outputs with four stage maps at H/2, H/4, H/8 and H/8 (H/16 from 64 pixels on).

    blocks: convolutions in each of the five blocks. full_channels: of the blocks at width 1. divisor: see `models.channels`.
    """

    blocks: tuple[int, ...] = (1, 1, 1, 1, 1)
    full_channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        # The images' height; where it matters, every stage before `start` has halved it.
        pools = (0, 1, 2, 3) if x.shape[1] << start >= 64 else (0, 1, 2)
        norm = partial(BatchNorm, use_running_average=not train)
        preact, norms = [], []
        for i, (count, full) in enumerate(zip(self.blocks, self.full_channels, strict=True)):
            features = channels(full, self.width, self.divisor)
            if start and i <= start:
                # What is given is block `start`'s map, before its pooling.
                x = nn.max_pool(x, (2, 2), (2, 2)) if i == start and i in pools else x
                continue
            for j in range(count):
                y = Conv(features, (3, 3), padding=1, use_bias=True, name=f"block{i}_conv{j}")(x)
                bn = norm(name=f"block{i}_bn{j}")
                y = bn(y)
                x = nn.relu(y)
            preact.append(y)
            norms.append(affine(bn))
            if i in pools:
                x = nn.max_pool(x, (2, 2), (2, 2))
        pooled = jnp.mean(x, axis=(1, 2))
        logits, head = classify(pooled, self.num_classes, small_normal, nn.initializers.zeros, train * self.dropout)
        maps, own = tuple(nn.relu(p) for p in preact), not start  # the first block is the stem
        return Outputs(logits, maps[own:], tuple(preact[own:]), pooled, head, tuple(norms[own:]), maps[0] if own else None, x)

    @staticmethod
    def torch_names(module: str) -> tuple[str, ...]:
        """Names of `module` in RepDistiller and mdistiller; see `weights.torch`."""
        if module == "classifier":
            return ("classifier",)
        block, layer, index = re.fullmatch(r"block(\d)_(conv|bn)(\d)", module).groups()
        return (f"block{block}.{3 * int(index) + (layer == 'bn')}",)
