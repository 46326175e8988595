"""Vision transformers (Dosovitskiy et al. 2021; the small sizes of DeiT, Touvron et al. 2021) with a width.

`vit_tiny_patch16`, `vit_small_patch16`, `vit_base_patch16`, or any other patch (`vit_tiny_patch4` for 32x32 images). A width
slices attention heads and the hidden layer of the MLP, and never the residual stream (DynaBERT, Hou et al. 2020): every
LayerNorm sees all its channels at every width, so the norm can be shared, sliced and masked execution are equal, and a
narrow member's features have the full one's channels. The number of heads is rounded as `models.channels` rounds.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels
from pwkd_jax.models.layers import classify, drop_path, drop_rates, uniform, uniform_bias

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # channels of the stream, heads
KNOWN = tuple(f"vit_{size}_patch16" for size in SIZES)

# timm truncates at 100 deviations, which is not at all.
normal = nn.initializers.normal(0.02)
# The variance around the mean, as PyTorch takes it: mean square less squared mean loses digits where the mean is large.
LayerNorm = partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def parse(name: str):
    """(ViT, its options) for `vit_<size>_patch<pixels>`, or None."""
    match = re.fullmatch(r"vit_(tiny|small|base)_patch([1-9]\d*)", name)
    if not match:
        return None
    features, heads = SIZES[match[1]]
    return ViT, {"patch": int(match[2]), "features": features, "heads": heads}


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on tokens [B, N, features]."""

    heads: int
    head_features: int
    hidden: int
    drop: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=self.heads * self.head_features, out_features=features, kernel_init=normal,
            deterministic=True, name="attention",
        )  # fmt: skip
        x = x + drop_path(attention(LayerNorm(name="norm1")(x)), self.drop)
        y = nn.Dense(self.hidden, kernel_init=normal, name="mlp1")(LayerNorm(name="norm2")(x))
        y = nn.gelu(y, approximate=False)
        return x + drop_path(nn.Dense(features, kernel_init=normal, name="mlp2")(y), self.drop)


class ViT(nn.Module):
    """Images [B, H, W, C], H and W multiples of `patch`, to Outputs.

    pooled is the class token after the last norm. stages are the patch tokens of the residual stream after each quarter of
    the blocks, as maps [B, H / patch, W / patch, features]; they pass no ReLU, so `preact` holds the same maps. They lack the
    class token: from a stage on (`start`) it begins anew, and sees the later blocks alone.
    features: channels of the stream; heads, and hidden = 4 * features, are those at width 1. divisor: of the hidden layer,
    see `models.channels`. drop_path, dropout: as those of `resnet.ResNet`.
    """

    patch: int = 16
    features: int = 192
    heads: int = 3
    depth: int = 12
    width: float = 1.0
    num_classes: int = 10
    divisor: int = 0
    drop_path: float = 0.0
    dropout: float = 0.0
    signed = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        heads = channels(self.heads, self.width, 1)
        hidden = channels(4 * self.features, self.width, self.divisor)
        size, stem = (self.patch, self.patch), None
        if not start:
            starts = {"kernel_init": uniform, "bias_init": uniform_bias(self.patch**2 * x.shape[-1])}
            x = stem = nn.Conv(self.features, size, strides=size, padding="VALID", name="patch_conv", **starts)(x)
        batch, height, width, features = x.shape
        x = x.reshape(batch, height * width, features)
        token = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, features))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, features)), x], axis=1)
        position = self.param("position", normal, (1, height * width + 1, features))
        # A stage's map is past its positions; its class token, which no map has, begins anew.
        x = x.at[:, 0].add(position[:, 0]) if start else x + position
        stages, begin = [], ([b for b in range(1, self.depth + 1) if 4 * b % self.depth == 0][start - 1] if start else 0)
        for b, drop in enumerate(drop_rates(train * self.drop_path, self.depth), start=1):
            if b <= begin:
                continue
            x = Block(heads, self.features // self.heads, hidden, drop, name=f"block{b}")(x)
            if 4 * b % self.depth == 0:
                stages.append(x[:, 1:].reshape(batch, height, width, features))
        pooled = LayerNorm(name="final_norm")(x)[:, 0]
        logits, head = classify(pooled, self.num_classes, normal, nn.initializers.zeros, train * self.dropout)
        return Outputs(logits, tuple(stages), tuple(stages), pooled, head, (), stem)

    @staticmethod
    def torch_names(module: str) -> tuple[str, ...]:
        """Names of `module` in timm and torchvision; see `weights.torch`."""
        top = {
            "patch_conv": ("patch_embed.proj", "conv_proj"),
            "class_token": ("cls_token", "class_token"),
            "position": ("pos_embed", "encoder.pos_embedding"),
            "final_norm": ("norm", "encoder.ln"),
            "classifier": ("head", "heads.head"),
        }
        if module in top:
            return top[module]
        block, layer = re.fullmatch(r"block(\d+)/(.+)", module).groups()
        timm, vision = {
            "norm1": ("norm1", "ln_1"),
            "norm2": ("norm2", "ln_2"),
            "mlp1": ("mlp.fc1", "mlp.0"),
            "mlp2": ("mlp.fc2", "mlp.3"),
            "attention/query": ("attn.qkv", "self_attention.in_proj_"),
            "attention/key": ("attn.qkv", "self_attention.in_proj_"),
            "attention/value": ("attn.qkv", "self_attention.in_proj_"),
            "attention/out": ("attn.proj", "self_attention.out_proj"),
        }[layer]
        b = int(block) - 1
        return f"blocks.{b}.{timm}", f"encoder.layers.encoder_layer_{b}.{vision}"
