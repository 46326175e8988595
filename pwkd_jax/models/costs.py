"""Parameters and multiply-accumulates of a model, counted from the model itself."""

import math

import jax
import jax.extend
import jax.numpy as jnp
from flax import linen as nn

from pwkd_jax import models
from pwkd_jax.models import sight


def parameters(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Trainable parameters, batch-norm scale and bias included, running statistics not."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(models.abstract(model, image_shape)["params"]))


def macs(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image [H, W, C] in evaluation.

    Read off the traced program, so it holds for any model; element-wise work (norms, ReLU, adds) is not counted, as
    is the field's custom.
    """
    model, image_shape = sight.inner(model, image_shape)  # resizing images is no work of a network
    return _count(evaluated(model, tuple(image_shape))[0])


@models.remembered
def evaluated(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[jax.extend.core.Jaxpr, models.Outputs]:
    """(the program, its Outputs as ShapeDtypeStructs) of one image [H, W, C] in evaluation."""
    variables = models.abstract(model, image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    program, out = jax.make_jaxpr(lambda v, x: models.apply(model, v, x, train=False)[0], return_shape=True)(variables, images)
    return program.jaxpr, out


def outputs(model: nn.Module, image_shape: tuple[int, ...], count: int) -> models.Outputs:
    """Outputs of a model of this package for so many images [H, W, C] in evaluation, as ShapeDtypeStructs."""
    one = evaluated(model, tuple(image_shape))[1]
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), one)
    return found._replace(head=one.head, norms=one.norms)  # parameters, which are of no image


def _count(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            # rhs_spec names the kernel's (out, in, *spatial) axes; `in` is already divided by the groups.
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeats * _count(inner)
    return total
