"""A network that sees the images of an experiment in its own way: at another size, or normalised by another mean and deviation.

For a teacher that was trained elsewhere: at 224 pixels, say, where the student's images have 64.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from pwkd_jax.models import Outputs


class Sight(nn.Module):
    """`network` on images [B, H, W, C] resized to [B, size, size, C] (0: as they are), bilinearly and smoothed where that is
    smaller, as torchvision does with antialias; then times `scale`, plus `shift`, per channel (() leaves them).

    Its variables are those of the network, so weights fit either.
    """

    network: nn.Module
    size: int = 0
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()

    def setup(self):
        nn.share_scope(self, self.network)

    def __call__(self, images: jax.Array, train: bool = False, start: int = 0) -> Outputs:
        if start:
            return self.network(images, train, start=start)
        if self.size:
            shape = (self.size, self.size, images.shape[-1])
            # One by one: an export does not know how many there are.
            images = jax.vmap(lambda image: jax.image.resize(image, shape, "bilinear"))(images)
        if self.scale:
            images = images * jax.numpy.asarray(self.scale, images.dtype) + jax.numpy.asarray(self.shift, images.dtype)
        return self.network(images, train)

    # What the rest asks of a family.
    width = property(lambda self: getattr(self.network, "width", 1.0))
    num_classes = property(lambda self: self.network.num_classes)
    drop_path = property(lambda self: getattr(self.network, "drop_path", 0.0))
    dropout = property(lambda self: getattr(self.network, "dropout", 0.0))
    torch_names = property(lambda self: self.network.torch_names)


def wrap(network: nn.Module, sees: dict | None) -> nn.Module:
    """`network` as a card's "sees" has it: {"size", "scale", "shift"}; itself where that is None."""
    return Sight(network, sees["size"], tuple(sees["scale"]), tuple(sees["shift"])) if sees else network


def sees(size: int, own: Sequence[Sequence[float]], data: Sequence[Sequence[float]]) -> dict | None:
    """How a network sees images that are normalised as `data` (mean, std), where it wants `own` and `size`; None where it
    wants nothing else. own: ((), ()) for that of the data."""
    (mean, std), (data_mean, data_std) = own, data
    scale = [d / s for s, d in zip(std, data_std, strict=True)] if mean else []
    shift = [(d - m) / s for m, s, d in zip(mean, std, data_mean, strict=True)] if mean else []
    return {"size": size, "scale": scale, "shift": shift} if size or scale else None


def wanted(card: dict) -> tuple[list[float], list[float]]:
    """(mean, std) by which the network of a card wants images normalised itself."""
    mean, std, found = card["mean"], card["std"], card.get("sees")
    if not found or not found["scale"]:
        return mean, std
    own = [s / scale for s, scale in zip(std, found["scale"], strict=True)]
    return [m - shift * s for m, s, shift in zip(mean, own, found["shift"], strict=True)], own


def alike(network: Any, other: nn.Module) -> nn.Module:
    """`other` seeing images as `network` does."""
    return network.clone(network=other) if isinstance(network, Sight) else other


def inner(network: Any, image_shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """(the network itself, the [H, W, C] that it is given) of a `Sight` or of any other."""
    if not isinstance(network, Sight):
        return network, image_shape
    return network.network, (network.size, network.size, *image_shape[2:]) if network.size else image_shape
