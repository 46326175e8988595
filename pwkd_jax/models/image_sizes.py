"""Sizes of images that a family can use, read off its traced layers: no pixel is lost, and no map is halved that is one pixel.

Of a strided layer whose windows are as wide as its stride or wider, a patch or a pool, every pixel is in a window; a layer of
narrower windows, the 1x1 shortcut of a residual network, skips pixels by design and its neighbours read them.
"""

import functools

import flax.linen as nn

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models import costs

# How far from the images' own the sizes are that a refusal tries and names.
FAR = 64


def check(model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """UserError, naming sizes that fit, where a model of this package cannot use images [H, W, C]."""
    fault, step = faults(model, image_shape)
    if not fault:
        return
    height, width, channels = image_shape
    fits = functools.cache(lambda size: not faults(model, (size, size, channels))[0])
    start, far = max(height, width), max(FAR, 2 * step)
    below = next((s for s in range(start // step * step, max(0, start - far), -step) if fits(s)), None)
    above = next((s for s in range(-(-start // step) * step, start + far, step) if fits(s)), None)
    sizes = dict.fromkeys(f"{s}x{s}" for s in (below, above) if s)
    known = models.name_of(model)
    name = type(model).__name__ if ":" in known else known
    right = f"images of {' or '.join(sizes)} fit" if sizes else "use larger images"
    raise UserError(f"'{name}' cannot use images of {height}x{width}: {fault}; {right}, or take another model")


@functools.lru_cache(maxsize=1024)
def faults(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[str, int]:
    """(what goes wrong with images [H, W, C], as a phrase, '' where nothing does; what sizes that fit are multiples of)."""
    program = costs.evaluated(model, image_shape)[0]
    return next((found for layer in _layers(program) if (found := _fault(*layer))[0]), ("", 1))


def _layers(jaxpr):
    """(size in, size out, windows, strides, padding before) of every convolution and pool, each of [height, width]."""
    for eqn in jaxpr.eqns:
        p, name = eqn.params, eqn.primitive.name
        if name == "conv_general_dilated":
            numbers = p["dimension_numbers"]
            spatial = numbers.lhs_spec[2:]
            made = [eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:]]
            window = [eqn.invars[1].aval.shape[d] for d in numbers.rhs_spec[2:]]
            given = [eqn.invars[0].aval.shape[d] for d in spatial]
            yield given, made, window, p["window_strides"], [a for a, _ in p["padding"]]
        elif name.startswith("reduce_window") and eqn.invars[0].aval.ndim == 4:
            given, made = eqn.invars[0].aval.shape[1:3], eqn.outvars[0].aval.shape[1:3]
            yield given, made, p["window_dimensions"][1:3], p["window_strides"][1:3], [a for a, _ in p["padding"][1:3]]
        for value in p.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _layers(inner)


def _fault(given, made, windows, strides, before) -> tuple[str, int]:
    for size, out, window, stride, low in zip(given, made, windows, strides, before, strict=True):
        if not size or not out:
            patch = f"a patch of {window}x{window} is more than their {size} pixels"
            return (patch if stride > 2 else "its pools leave no pixel of them"), stride
        if stride > 1 and size == 1:
            return f"a layer of stride {stride} is given a map of one pixel", 1
        covered = (out - 1) * stride + window - low
        if window >= stride > 1 and covered < size:
            return f"{window}x{window} windows of stride {stride} leave out {size - covered} of {size} pixels", stride
    return "", 1
