"""Class attention transfer (Guo, Yan, Li, Wang and Lin, CVPR 2023)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import adaptive_pool, normalise
from pwkd_jax.distillers.heads import map_head
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.taps import need


def activation_maps(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """Class activation maps [B, H, W, classes]: the classifier's kernel [C, classes] at each pixel of [B, H, W, C].

    Their mean over pixels is the logits less the classifier's bias, for pooling and a linear map change places.
    """
    return jnp.einsum("bhwc,ck->bhwk", wide(features), wide(kernel), precision="highest")


def cat_loss(student: jax.Array, teacher: jax.Array, resolution: int, normalised: bool) -> jax.Array:
    """Mean of (S - T)^2, S and T being class activation maps [B, H, W, classes] averaged to resolution x resolution.

    normalised: each class's map is first scaled to length 1. Heights and widths of the two may differ. A scalar.
    """
    s, t = (adaptive_pool(wide(x), (resolution, resolution)) for x in (student, teacher))
    if normalised:
        s, t = (normalise(x, axis=(1, 2)) for x in (s, t))
    return jnp.mean((s - t) ** 2)


class CATKD(nn.Module):
    """`cat_loss` between the class activation maps of both networks' `final` maps, those that the classifier reads pooled.

    The authors' weight depends on the pair: 15 for resnet32x4 to resnet8x4 (the default), 0.7 for resnet56 to resnet20,
    1.8 for resnet110 to resnet32, 12 and 1.5 for wrn40-2 to wrn16-2 and wrn40-1; with `resolution` 4 and `normalised`,
    600 for ShuffleNets. Theirs are classifiers without bias inside the model; here the maps come from the pooled
    classifier's kernel, so models stay as they are.
    """

    ce_weight: float = 1.0
    weight: float = 15.0
    resolution: int = 2
    normalised: bool = False

    def __post_init__(self):
        above_zero(resolution=self.resolution)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("CAT-KD", student, teacher, "final", "head")
        pairs = [map_head("CAT-KD", who, out) for who, out in (("student", student), ("teacher", teacher))]
        maps = [activation_maps(features, kernel) for features, (kernel, _) in pairs]
        return cat_loss(*maps, self.resolution, self.normalised), {}
