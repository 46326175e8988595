"""A function of images as an ONNX model: what JAX traces of it, operation by operation, in the operators of ONNX.

What depends on no image is computed here, so that the model holds numbers in its place: of a batch norm two sums and a product
are left, which runtimes put into the convolution before it. Only the package onnx is needed; jax2onnx 0.17.1, which knows more
operations, requires orbax-checkpoint below 0.11.37, which this project is past, and silently drops the padding of pools
(findings/jax2onnx_drops_padding.sh).
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend import core

from pwkd_jax.errors import UserError
from pwkd_jax.experiment import onnx_operators
from pwkd_jax.experiment.onnx_graph import OPSET, Graph, Tensor, Unknown

__all__ = ["OPSET", "refuse_missing", "write"]


def refuse_missing() -> None:
    """UserError unless onnx is installed."""
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--onnx: needs the package onnx, which is not installed: pip install onnx")


def write(function: Callable, image_shape: Sequence[int], name: str) -> bytes:
    """function(uint8 images [batch, H, W, C]) -> float32 [batch, classes] as the bytes of an ONNX model for any batch size; one
    function gives the same bytes on one machine. Raises UserError, by the model's `name`, for what ONNX has no operator for."""
    refuse_missing()
    (batch,) = jax_export.symbolic_shape("batch")
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8))
    graph = Graph(batch)
    try:
        (result,) = _run(graph, traced.jaxpr, traced.consts, [Tensor("images", (0, 1, 2, 3))])
        if not isinstance(result, Tensor):
            raise Unknown("does not look at its images")
        return graph.model(image_shape, graph.lay(result), traced.out_avals[0].shape[1])
    except Unknown as e:
        raise UserError(f"--onnx: '{name}' {e}; leave it away, the other files need none") from e


def _run(graph: Graph, jaxpr: core.Jaxpr, consts: Sequence, arguments: Sequence) -> list:
    """What a program makes of its arguments: arrays where they are known here, tensors of the graph elsewhere."""
    values = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else values[atom]

    for eqn in _needed(jaxpr):
        inputs, inner = [read(atom) for atom in eqn.invars], _inner(eqn)
        if inner is not None:
            results = _run(graph, *inner, inputs)
        elif eqn.primitive.name != "dim_as_value" and _fixed(eqn) and not any(isinstance(x, Tensor) for x in inputs):
            made = eqn.primitive.bind(*inputs, **eqn.params)
            results = [np.asarray(x) for x in (made if eqn.primitive.multiple_results else [made])]
        else:
            results = onnx_operators.write(graph, eqn, inputs)
        values |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: core.Jaxpr) -> list:
    """The operations on which a program's results depend: a network gives more than its logits."""
    wanted, found = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            found.append(eqn)
            wanted |= {x for x in eqn.invars if not isinstance(x, core.Literal)}
    return found[::-1]


def _inner(eqn: Any) -> tuple[core.Jaxpr, Sequence] | None:
    """(program, its constants) of an operation that only stands for one: jit, a function with its own gradient, remat."""
    if eqn.primitive.name not in ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
                                  "custom_vjp_call", "custom_vjp_call_jaxpr"):  # fmt: skip
        return None
    found = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    return (found.jaxpr, found.consts) if isinstance(found, core.ClosedJaxpr) else (found, ())


def _fixed(eqn: Any) -> bool:
    """Whether the batch's size is nowhere in what an operation makes."""
    return all(isinstance(d, int) for x in eqn.outvars for d in getattr(x.aval, "shape", ()))
