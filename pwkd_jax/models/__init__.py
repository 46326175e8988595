"""Model families: plain Flax Linen modules that take a `width` and return `Outputs`.

The rest of the package sees a model as two pure functions, `init` and `apply`, over nested dicts. A model knows nothing
of slimming: it only builds itself narrower when its `width` is smaller, with the same tree of parameters.
"""

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.errors import UserError
from pwkd_jax.models import compute


class Outputs(NamedTuple):
    """What every model returns for a batch of B images.

    logits: [B, classes]. stages: tuple of [B, H, W, C] maps, one per stage, after their last ReLU where they have one.
    preact: the same maps before that ReLU. pooled: [B, D], what the classifier reads. head: the classifier's
    (kernel [D, classes], bias [classes]). norms: (scale [C], bias [C]) of the batch norm that feeds each preact map.
    stem: [B, H, W, C], what the first stage reads, before any pooling. final: [B, H, W, D], the map whose mean over pixels
    is `pooled`. A model of your own may return bare logits; feature distillers then refuse it by name. again: the network
    itself, for a method that runs it once more, see `models.again`; no model returns it.
    """

    logits: jax.Array
    stages: tuple[jax.Array, ...] = ()
    preact: tuple[jax.Array, ...] = ()
    pooled: jax.Array | None = None
    head: tuple[jax.Array, jax.Array] | None = None
    norms: tuple[tuple[jax.Array, jax.Array], ...] = ()
    stem: jax.Array | None = None
    final: jax.Array | None = None
    again: Any = None


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


def import_path(path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as e:  # of a module of someone's own, which may fail in any way
        raise UserError(
            f"'{path}' cannot be imported ({reason(e)}): it should be importable.module:Name, found from where you run"
        ) from e


def from_name(name: str, builtin: Callable[[str], tuple[Callable[..., Any], dict] | None], kind: str, known: str):
    """(constructor, its fixed options) of a built-in `name`, or of your own class given as `module:Name`."""
    if ":" in name:
        return import_path(name), {}
    found = builtin(name)
    if found is None:
        raise UserError(f"there is no {kind} '{name}': known are {known}, or your own as module:Name")
    return found


def _families() -> tuple:
    from pwkd_jax.models import mobilenet, resnet, shufflenet, vgg, vit, wrn

    return (resnet, wrn, vgg, mobilenet, shufflenet, vit)


def name_of(model: nn.Module) -> str:
    """The name by which `create` makes this model: a built-in one's own, or `module:Name` of your class."""
    model = _itself(model)
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
    known = _fields(make)
    for key in options:
        if known is not None and key not in known:
            raise UserError(f"the model '{name}' has no '{key}': leave it at its default")
    return construct(make, name, width=width, num_classes=num_classes, **fixed, **options)


def _fields(make: Callable[..., Any]) -> set[str] | None:
    """The keywords that a constructor takes; None where it takes any, or does not say."""
    try:
        found = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in found.values()) else {*found}


# What a family of ours may be told to leave out at random in training.
RATES = ("drop_path", "dropout")
FIELDS = {"width": "width: float = 1.0", "num_classes": "num_classes: int = 10"}


def construct(make: Callable[..., Any], name: str, **fields: Any) -> nn.Module:
    """make(**fields) of your own class or function, or of a family. Raises UserError where that is no Flax Linen module with
    these fields."""
    nnx = sys.modules.get("flax.nnx")  # which takes a while to import, and has been where something is of it
    if nnx and isinstance(make, type) and issubclass(make, nnx.Module):
        raise UserError(f"'{name}' is a module of flax.nnx; it should be one of flax.linen, built by its width")
    if not callable(make) or (isinstance(make, type) and not issubclass(make, nn.Module)):
        raise UserError(f"'{name}' is no Flax module; it should be a class derived from flax.linen.Module")
    known = _fields(make)
    for key in fields:
        if known is not None and key not in known:
            right = f"give it one, as in {FIELDS[key]}, and build its layers by it" if key in FIELDS else "leave it away"
            raise UserError(f"the model '{name}' has no field '{key}': {right}")
    try:
        model = make(**fields)
    except UserError:
        raise
    except Exception as e:
        if getattr(make, "__module__", "").startswith("pwkd_jax."):
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in fields.items())
        raise UserError(f"'{name}' cannot be made with {given} ({reason(e)}); its other fields should have defaults") from e
    if not isinstance(model, nn.Module):
        raise UserError(f"'{name}' makes a {type(model).__name__}; it should make a flax.linen.Module")
    return model


def reason(error: Exception) -> str:
    """An exception in a few words: its name and the first line of what it says."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}".rstrip(":. ")


def _itself(model: Any) -> Any:
    """Without what `sight` puts around it."""
    from pwkd_jax.models import sight

    return sight.inner(model, ())[0]


def ours(module: Any) -> bool:
    """Whether a module is of this package, and not of a user's."""
    home = type(_itself(module)).__module__
    return home.startswith("pwkd_jax.") and not home.startswith("pwkd_jax.examples")


def apply(
    model: nn.Module, variables: dict, images: jax.Array, *, train: bool, key: jax.Array | None = None
) -> tuple[Outputs, dict]:
    """Run `model` on images [B, H, W, C]; returns its Outputs and its new batch statistics ({} unless training).

    key: for a model that draws random numbers in training, such as dropout. `models.forward` gives collections of its own too.
    """
    out, new = forward(model, variables, images, train=train, key=key)
    return out, new.get("batch_stats", {})


def forward(
    model: nn.Module, variables: dict, images: jax.Array, *, train: bool, key: jax.Array | None = None, start: int = 0
) -> tuple[Outputs, dict]:
    """Outputs of images [B, H, W, C], and what training changes: {} in evaluation, else {"batch_stats": tree} and, of a model
    with collections of its own, {collection: tree}.

    key: of every stream that the model draws from; None draws nothing. start: where it is above 0, `images` are maps in the
    place of the start-th of `stages`, and only what comes after it runs; a model's own argument, see `models.contract`.
    """
    options: dict[str, Any] = {"start": start} if start else {}
    if not train:
        return as_outputs(model.apply(variables, images, train=False, **options)), {}
    own = collections(variables)
    # Flax takes the stream "params" where a model asks for one that was not given, whatever its name.
    rngs = {} if key is None else {"rngs": {"dropout": key, "params": jax.random.fold_in(key, 1)}}
    with compute.layers():
        out, updated = model.apply(variables, images, train=True, mutable=["batch_stats", *own], **rngs, **options)
    updated = dict(updated)
    # In bfloat16 a model may compute them so; they are kept as they began.
    kept = {k: jax.tree.map(lambda x, old: x.astype(old.dtype), updated.get(k, tree), tree) for k, tree in own.items()}
    return as_outputs(out), {"batch_stats": updated.get("batch_stats", {}), **kept}


def collections(variables: dict) -> dict:
    """{name: tree} of a model's variables that neither train nor are batch statistics: what it keeps of its own."""
    return {name: tree for name, tree in variables.items() if name not in ("params", "batch_stats")}


def whole(variables: dict) -> dict:
    """Variables with "batch_stats" among them, {} where the model has none."""
    return {"batch_stats": {}, **variables}


def draws(model: Any, image_shape: tuple[int, ...]) -> bool:
    """Whether a model asks for random numbers in training, as dropout does; found by shapes alone for images [H, W, C]."""
    while not isinstance(model, nn.Module):
        model = model.model  # what `precision` and `batch_norm_folding` put around it
    if ours(model) and not any(getattr(model, rate, 0.0) for rate in RATES):
        return False
    return _draws(model, tuple(image_shape))


@functools.lru_cache(maxsize=256)
def _draws(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    try:
        traced(model, abstract(model, image_shape), image_shape, train=True)
    except flax.errors.InvalidRngError:
        return True
    return False


def traced(
    model: nn.Module, variables: dict, image_shape: tuple[int, ...], *, train: bool, key: bool = False
) -> tuple[Any, dict]:
    """(what `model.apply` returns, {collection: tree}) for two images [H, W, C], abstract. key: whether it may draw."""
    shape = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    options = {"mutable": ["batch_stats", *collections(variables)]} if train else {}

    def run(variables, images, key):
        rngs = {} if key is None else {"rngs": {"dropout": key, "params": key}}
        found = model.apply(variables, images, train=train, **options, **rngs)
        return found if train else (found, {})

    return jax.eval_shape(run, variables, shape, jax.eval_shape(lambda: jax.random.key(0)) if key else None)


def as_outputs(out: Any) -> Outputs:
    """A model's return value as Outputs: bare logits, or any object with a subset of its fields, are accepted."""
    if isinstance(out, Outputs):
        return out
    if hasattr(out, "logits"):
        return Outputs(**{name: getattr(out, name) for name in Outputs._fields if hasattr(out, name)})
    return Outputs(out)


def remembered(function: Callable) -> Callable:
    """function(model, ...) of hashable arguments, run once for those that it has had; anew for a model that has no hash."""
    known = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def run(model, *rest):
        try:
            hash(model)
        except TypeError:
            return function(model, *rest)
        return known(model, *rest)

    return run


def abstract(model: nn.Module, image_shape: tuple[int, ...]) -> dict:
    """Shapes and dtypes of the model's variables for images [H, W, C], without allocating anything."""
    return jax.tree.map(lambda leaf: leaf, _abstract(model, tuple(image_shape)))


@remembered
def _abstract(model: nn.Module, image_shape: tuple[int, ...]) -> dict:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return dict(jax.eval_shape(lambda key, x: model.init(key, x, train=False), key, images))
