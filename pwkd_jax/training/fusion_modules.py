"""The modules that `fusion` trains beside the students: maps to logits, a map to the maps that were fused, and a map back to
those before it. Each is a stack of convolution, batch norm and ReLU. Source: Li et al., AAAI 2022, arXiv 2103.14473."""

import flax.linen as nn
import jax

from pwkd_jax.models.layers import BatchNorm, Conv, classify

# PyTorch's default for transposed convolutions, whose fan it counts by their outputs: uniform within 1 / sqrt(fan out).
transposed = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


def _mixed(x: jax.Array, features: int, train: bool) -> jax.Array:
    """[B, H, W, features]: each channel by a 3x3 of its own, then all by a 1x1; submodules of the calling module."""
    x = Conv(x.shape[-1], (3, 3), padding=1, feature_group_count=x.shape[-1], name="depthwise")(x)
    x = nn.relu(BatchNorm(use_running_average=not train, name="norm1")(x))
    x = Conv(features, (1, 1), name="pointwise")(x)
    return nn.relu(BatchNorm(use_running_average=not train, name="norm2")(x))


class Fuse(nn.Module):
    """Maps side by side [B, H, W, K * features] to (logits [B, classes], the fused map [B, H, W, features])."""

    features: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool):
        x = _mixed(x, self.features, train)
        return classify(x.mean((1, 2)), self.classes)[0], x


class Unfuse(nn.Module):
    """A map [B, H, W, C] to one like those side by side [B, H, W, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool):
        return _mixed(x, self.features, train)


class Back(nn.Module):
    """A last map to those before it, from one to the next. sizes: of those, (height, width, channels) each, the first stage's
    first, as is what this returns."""

    sizes: tuple[tuple[int, int, int], ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool):
        found = []
        for number, (*size, features) in reversed([*enumerate(self.sizes, 1)]):
            sides = [*zip(x.shape[1:3], size, strict=True)]
            strides = tuple(-(-target // source) for source, target in sides)
            # Of the input spread out with zeros; the second one makes up whatever is left to the size asked for.
            padding = tuple((1, t - s * (n - 1)) for s, (n, t) in zip(strides, sides, strict=True))
            x = nn.ConvTranspose(
                features, (3, 3), strides, padding=padding, use_bias=False, kernel_init=transposed, name=f"stage{number}_conv"
            )(x)
            x = nn.relu(BatchNorm(use_running_average=not train, name=f"stage{number}_norm")(x))
            found.insert(0, x)
        return tuple(found)
