"""Model families: plain Flax Linen modules that take a `width` and return `Outputs`.

The rest of the package sees a model as two pure functions, `init` and `apply`, over nested dicts. A model knows nothing
of slimming: it only builds itself narrower when its `width` is smaller, with the same tree of parameters.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.errors import UserError
from pwkd_jax.models import convolution


class Outputs(NamedTuple):
    """What every model returns for a batch of B images.

    logits: [B, classes]. stages: tuple of [B, H, W, C] maps, one per stage, after their last ReLU where they have one.
    preact: the same maps before that ReLU. pooled: [B, D], what the classifier reads. head: the classifier's
    (kernel [D, classes], bias [classes]). norms: (scale [C], bias [C]) of the batch norm that feeds each preact map.
    stem: [B, H, W, C], what the first stage reads, before any pooling. final: [B, H, W, D], the map whose mean over pixels
    is `pooled`. A model of your own may return bare logits; feature distillers then refuse it by name.
    """

    logits: jax.Array
    stages: tuple[jax.Array, ...] = ()
    preact: tuple[jax.Array, ...] = ()
    pooled: jax.Array | None = None
    head: tuple[jax.Array, jax.Array] | None = None
    norms: tuple[tuple[jax.Array, jax.Array], ...] = ()
    stem: jax.Array | None = None
    final: jax.Array | None = None


class WidthError(UserError):
    """A width at which a layer would not have a whole number of channels."""


def channels(full: int, width: float, divisor: int = 0) -> int:
    """Channels of a layer that has `full` of them at width 1.

    divisor 0 means exact: `full * width` must be whole. Otherwise round to the nearest multiple of `divisor`, never
    below 90 % of the target (the rule of the mobile networks, and of US-Net, ICCV 2019).
    Raises WidthError where the count is not whole or is zero.
    """
    exact = Fraction(width).limit_denominator(10_000) * full
    if divisor:
        rounded = max(divisor, int(exact + Fraction(divisor, 2)) // divisor * divisor)
        return rounded if rounded >= Fraction(9, 10) * exact else rounded + divisor
    if exact.denominator != 1 or exact < 1:
        raise WidthError(
            f"width {width:g} makes {float(exact):g} of {full} channels, not a whole number: "
            "choose a width that does, or set divisor (say 8) to round"
        )
    return int(exact)


def _import(path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise UserError(
            f"'{path}' cannot be imported ({e}): it should be importable.module:Name, found from where you run"
        ) from e


def from_name(name: str, builtin: Callable[[str], tuple[Callable[..., Any], dict] | None], kind: str, known: str):
    """(constructor, its fixed options) of a built-in `name`, or of your own class given as `module:Name`."""
    if ":" in name:
        return _import(name), {}
    found = builtin(name)
    if found is None:
        raise UserError(f"there is no {kind} '{name}': known are {known}, or your own as module:Name")
    return found


def _families() -> tuple:
    from pwkd_jax.models import mobilenet, resnet, shufflenet, vgg, vit, wrn

    return (resnet, wrn, vgg, mobilenet, shufflenet, vit)


def name_of(model: nn.Module) -> str:
    """The name by which `create` makes this model: a built-in one's own, or `module:Name` of your class."""
    for family in _families():
        for name in family.KNOWN:
            make, fixed = family.parse(name)
            if type(model) is make and all(getattr(model, key) == value for key, value in fixed.items()):
                return name
    return f"{type(model).__module__}:{type(model).__qualname__}"


def create(name: str, *, width: float = 1.0, num_classes: int = 10, **options) -> nn.Module:
    """The model `name` at `width`: one of the families beside this file, each of which lists its names, or your own as
    `module:Name`.

    options: what that model's constructor knows besides (`divisor`, `zero_gamma`); those at their neutral value
    (0 or False) are not passed, so that a model needs to know only what is used of it.
    Raises UserError for an unknown name or option, and WidthError for a width that does not fit.
    """
    families = _families()

    def builtin(name: str):
        return next((found for family in families if (found := family.parse(name))), None)

    known = [n for family in families for n in family.KNOWN]
    lower = {n.lower(): n for n in reversed(known)}
    close = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 1, 0.7)]
    make, fixed = from_name(name, builtin, "model", (f"{close[0]} (the nearest), " if close else "") + ", ".join(known))
    options = {key: value for key, value in options.items() if value}
    known = {f.name for f in dataclasses.fields(make)} if dataclasses.is_dataclass(make) else None
    for key in options:
        if known is not None and key not in known:
            raise UserError(f"the model '{name}' has no '{key}': leave it at its default")
    return make(width=width, num_classes=num_classes, **fixed, **options)


def apply(model: nn.Module, variables: dict, images: jax.Array, *, train: bool) -> tuple[Outputs, dict]:
    """Run `model` on images [B, H, W, C]; returns its Outputs and its new batch statistics ({} unless training)."""
    if train:
        with convolution.products():
            out, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return as_outputs(out), dict(updated).get("batch_stats", {})
    return as_outputs(model.apply(variables, images, train=False)), {}


def as_outputs(out: Any) -> Outputs:
    """A model's return value as Outputs: bare logits, or any object with a subset of its fields, are accepted."""
    if isinstance(out, Outputs):
        return out
    if hasattr(out, "logits"):
        return Outputs(**{name: getattr(out, name) for name in Outputs._fields if hasattr(out, name)})
    return Outputs(out)


def abstract(model: nn.Module, image_shape: tuple[int, ...]) -> dict:
    """Shapes and dtypes of the model's variables for images [H, W, C], without allocating anything."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return dict(jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), images))
