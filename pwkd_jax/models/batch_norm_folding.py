"""Batch norm of a network that only predicts, folded into the convolutions before it.

With fixed statistics batch norm is an affine map of each channel, and so is a convolution of its input:
(conv(x, k) - mean) * s + bias = conv(x, k * s) + (bias - mean * s), with s = scale / sqrt(var + epsilon); a bias of the
convolution's own is scaled with it.
Variables stay as they are, so whoever reads them (checkpoints, distillers that want a norm's scale) sees the network's own.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pwkd_jax import models
from pwkd_jax.models import convolution

Path = tuple[str, ...]
# The collection in which `prepare` puts what it made.
READY = "folded"


@dataclasses.dataclass(frozen=True)
class Folded:
    """`model` with every batch norm that can be folded so; in training, and where none can, itself."""

    model: nn.Module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def apply(self, variables: dict, images: jax.Array, train: bool = False, **options):
        """As the model's own. variables: the network's, or what `prepare` made of them."""
        variables = dict(variables)
        ready = variables.pop(READY, {})
        if train:
            return self.model.apply(variables, images, train=True, **options)
        found = pairs(self.model, variables, images)
        norms = {norm.path for norm in found.values()}

        def intercept(call, args, kwargs, context):
            layer, path = context.module, context.module.path
            if context.method_name == "__call__" and path in norms:
                return args[0] if args else kwargs["x"]
            if context.method_name != "__call__" or path not in found:
                return call(*args, **kwargs)
            # A layer is a frozen dataclass that may belong to the user, so it is left as it was.
            before, norm = layer.conv_general_dilated, found[path]
            known = ready.get("/".join(path)) or dict(zip(("scale", "shift"), affine(variables, path, norm), strict=True))
            object.__setattr__(layer, "conv_general_dilated", _convolve(before or lax.conv_general_dilated, **known))
            try:
                return call(*args, **kwargs)
            finally:
                object.__setattr__(layer, "conv_general_dilated", before)

        with nn.intercept_methods(intercept):
            return self.model.apply(variables, images, train=False, **options)

    def prepare(self, variables: dict, image_shape: tuple[int, ...]) -> dict:
        """`variables` and what of them `apply` would fold at every call."""
        found = pairs(self.model, variables, jax.ShapeDtypeStruct((1, *image_shape), "float32"))
        return {**variables, READY: {"/".join(c): _folded(variables, c, norm) for c, norm in found.items() if norm.stored}}


def _folded(variables: dict, conv: Path, norm: "Norm") -> dict[str, jax.Array]:
    """{"kernel", "shift" [C]} of a convolution and its batch norm in one, in the dtype of the kernel."""
    kernel = nn.meta.unbox(_at(variables["params"], conv)["kernel"])
    scale, shift = affine(variables, conv, norm)
    return {"kernel": (kernel * scale).astype(kernel.dtype), "shift": shift.astype(kernel.dtype)}


def _convolve(own: Callable, shift: jax.Array, kernel: jax.Array | None = None, scale: jax.Array | None = None) -> Callable:
    def convolve(images, plain, *args, **options):
        folded = plain * scale if kernel is None else kernel
        out = own(images, folded.astype(plain.dtype), *args, **options)
        return out + shift.astype(out.dtype)

    return convolve


class Norm(NamedTuple):
    """The batch norm that alone reads a convolution's output. stored: whether that convolution's kernel is the very array that
    the variables hold, not one made of it on the way to the layer, as weight normalisation does."""

    path: Path
    epsilon: float
    stored: bool


def affine(variables: dict, conv: Path, norm: Norm) -> tuple[jax.Array, jax.Array]:
    """(s [C], what is added [C]) of a convolution, before its own bias, and its batch norm; float32."""
    variables = nn.meta.unbox(variables)
    params, stats = _at(variables.get("params", {}), norm.path), _at(variables["batch_stats"], norm.path)
    scale = lax.rsqrt(stats["var"] + norm.epsilon) * params.get("scale", 1.0)
    shift = params.get("bias", 0.0) - stats["mean"] * scale
    shift += _at(variables["params"], conv).get("bias", 0.0) * (scale - 1)  # the layer adds it once more
    return scale.astype(jnp.float32), shift.astype(jnp.float32)


def _at(tree: dict, path: Path) -> dict:
    for key in path:
        tree = tree.get(key, {})
    return tree


def pairs(model: nn.Module, variables: dict, images: jax.Array) -> dict[Path, Norm]:
    """{path of a convolution: its batch norm}, read off the traced model; of layers that are called once."""
    layers: dict[str, nn.Module] = {}
    calls: collections.Counter[str] = collections.Counter()
    stored: set[str] = set()
    held: dict = {}

    def intercept(call, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not args:
            return call(*args, **kwargs)
        tag = "/".join(("pwkd", *layer.path))
        if isinstance(layer, nn.BatchNorm) and layer.axis == -1 and kwargs.get("mask") is None:
            layers[tag] = layer
            calls[tag] += 1
            return call(checkpoint_name(args[0], tag), *args[1:], **kwargs)
        usual = type(layer) is nn.Conv and layer.mask is None
        if usual and layer.conv_general_dilated in (None, convolution.convolve):  # the second within `compute.layers`
            layers[tag] = layer
            calls[tag] += 1
            mine, kernel = layer.variables.get("params", {}).get("kernel"), _at(held["params"], layer.path).get("kernel")
            if mine is not None and nn.meta.unbox(mine) is nn.meta.unbox(kernel):
                stored.add(tag)
            return checkpoint_name(call(*args, **kwargs), tag)
        return call(*args, **kwargs)

    def run(variables, images):
        held.update(variables)
        with nn.intercept_methods(intercept):
            return models.as_outputs(model.apply(variables, images, train=False))

    program = jax.make_jaxpr(run)(variables, images)
    found = {}
    for conv, norm in _alone(program.jaxpr):
        if calls[conv] > 1 or calls[norm] > 1:
            continue
        direct, conv, norm = conv in stored, layers.get(conv), layers.get(norm)
        # Layers that a loop stacked have statistics of more axes; they are left.
        if type(conv) is nn.Conv and isinstance(norm, nn.BatchNorm) and jnp.ndim(_mean(variables, norm)) == 1:
            found[conv.path] = Norm(norm.path, norm.epsilon, direct)
    return found


def _mean(variables: dict, norm: nn.BatchNorm) -> jax.Array:
    return _at(variables["batch_stats"], norm.path)["mean"]


def _alone(jaxpr):
    """(tag, tag) of every tagged value whose only reader is another tag."""
    readers: dict[Any, list] = {}
    for eqn in jaxpr.eqns:
        for value in eqn.invars:
            if not isinstance(value, jax.extend.core.Literal):
                readers.setdefault(value, []).append(eqn)
    for value in jaxpr.outvars:
        if not isinstance(value, jax.extend.core.Literal):
            readers.setdefault(value, []).append(None)
    for eqn in jaxpr.eqns:
        read = readers.get(eqn.outvars[0], []) if eqn.primitive.name == "name" else []
        if len(read) == 1 and read[0] is not None and read[0].primitive.name == "name":
            yield eqn.params["name"], read[0].params["name"]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _alone(inner)
