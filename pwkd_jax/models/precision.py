"""How a model is computed, whoever wrote it: in which precision, and with batch norm over which images.

`wrap` puts both around a model; the result has Flax's `init` and `apply`, and the same variables, so nothing else changes.

bfloat16: parameters and images are cast where they enter, so convolutions and matrix products run in bfloat16 (half the
memory, twice the rate of a TPU's matrix unit or better); Flax's normalisation layers still take their statistics in float32.
Parameters, their gradients, running statistics, and every output (logits and maps, so all losses) are float32.

Groups: in training a batch norm layer normalises each group of `group` images by their own statistics (Ghost batch norm, Hoffer
et al., NeurIPS 2017), the groups being consecutive in the global batch, so they do not depend on the number of devices.
Running statistics move towards the mean over the groups. While every device holds whole groups (`group` divides the batch
divided by the devices) batch norm communicates nothing of its own; larger groups are as right, and communicate.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models import batch_norm_folding
from pwkd_jax.models.ensemble import Ensemble, gather, spread

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Computed:
    """`model` in `dtype` with batch norm over groups of `group` images, 0 for the whole batch."""

    model: nn.Module
    dtype: str
    group: int

    def __getattr__(self, name: str) -> Any:
        # A family says things of itself that are no matter of computing, such as its arrays' names in PyTorch.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def init(self, rngs, images: jax.Array, train: bool = False) -> dict:
        """The model's own fresh variables, float32."""
        return self.model.init(rngs, images, train=train)

    def apply(
        self, variables: dict, images: jax.Array, train: bool = False, mutable=False, rngs: dict | None = None, start: int = 0
    ):
        """Outputs of images [B, H, W, C], and with `mutable` (Outputs, {collection: tree}) as Flax returns them. start: see
        `models.forward`.

        rngs: {"dropout": key} of a model that draws in training. A batch smaller than a group is one group. Raises UserError
        where `group` does not divide a larger one.
        """
        variables = {**variables, "params": _cast(variables["params"], self.dtype)}
        images = _cast(images, self.dtype)
        if not train:
            return _float32(models.forward(self.model, variables, images, train=False, start=start)[0])
        count, left = divmod(len(images), self.group or len(images))
        if count and left:
            raise UserError(f"batch_norm_group: a batch of {len(images)} images does not divide into groups of {self.group}")
        key = rngs["dropout"] if rngs else None
        if count <= 1:
            out, kept = models.forward(self.model, variables, images, train=True, key=key, start=start)
        else:
            out, kept = _grouped(self.model, variables, images, count, key, start)
        out = _float32(out)
        return (out, kept) if mutable else out


def _grouped(
    model: nn.Module, variables: dict, images: jax.Array, count: int, key: jax.Array | None, start: int
) -> tuple[models.Outputs, dict]:
    """Outputs [B, ...] and {collection: tree}, the mean of what `count` groups of consecutive images [B, H, W, C] leave.

    key: split, so that each group draws its own."""
    # What a classifier or a norm is made of does not depend on the images, so there is one of it for all groups.
    axes = models.Outputs(**dict.fromkeys(models.Outputs._fields, 0) | {"head": None, "norms": None})
    keys = () if key is None else (jax.random.split(key, count),)

    # Under vmap a convolution's extra batch axis is only a reshape of its images, one layer of the model one program.
    def one(x, *key):
        return models.forward(model, variables, x, train=True, key=key[0] if key else None, start=start)

    out, kept = jax.vmap(one, out_axes=(axes, 0))(images.reshape(count, -1, *images.shape[1:]), *keys)
    merged = {
        name: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), value)
        for name, value in out._asdict().items()
        if name not in ("head", "norms")
    }
    return out._replace(**merged), jax.tree.map(_mean, kept)


def _mean(found: jax.Array) -> jax.Array:
    """Of what every group left, [groups, ...]; of whole numbers, a count of steps say, one group's."""
    return found.mean(0) if jnp.issubdtype(found.dtype, jnp.floating) else found[0]


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _float32(out: models.Outputs) -> models.Outputs:
    return _cast(out, "float32")


def wrap(model: nn.Module, dtype: str = "float32", group: int = 0) -> Any:
    """`model` computed in `dtype` (see DTYPES) with batch norm over `group` images; itself where that changes nothing."""
    return model if dtype == "float32" and not group else Computed(model, dtype, group)


def inference(model: Any, dtype: str = "", folded: bool = False) -> Any:
    """What `wrap` made, for prediction alone: in another `dtype` where one is given, and with batch norm `folded`."""
    if isinstance(model, Ensemble):
        return Ensemble(tuple(inference(member, dtype, folded) for member in model.members), model.shares)
    now, group = (model.dtype, model.group) if isinstance(model, Computed) else ("float32", 0)
    inner = batch_norm_folding.Folded(plain(model)) if folded else plain(model)
    return wrap(inner, dtype or now, group)


def prepared(model: Any, variables: dict, image_shape: tuple[int, ...]) -> dict:
    """What a model made by `inference` may be given in the place of its variables: what it would make of them at every call,
    made once. image_shape: (H, W, C)."""
    if isinstance(model, Ensemble):
        each = zip(model.members, spread(variables, len(model.members)), strict=True)
        return gather([prepared(member, own, image_shape) for member, own in each])
    if isinstance(model, Computed):
        variables = {**variables, "params": _cast(variables["params"], model.dtype)}
    inner = plain(model)
    return inner.prepare(variables, image_shape) if isinstance(inner, batch_norm_folding.Folded) else variables


def plain(model: Any) -> nn.Module:
    """The model that `wrap` was given: float32, batch norm over the whole batch."""
    return model.model if isinstance(model, Computed) else model
