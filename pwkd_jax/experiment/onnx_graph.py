"""An ONNX model while it is put together: nodes, constants, and in which order a tensor has the axes of its array.

Transpositions wait until an operator needs its axes in place: a convolution leaves its map channels first, as ONNX has them,
and what follows is computed in that order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Of 2022, which runtimes from then on read. Operators that later ones added are written in those of this one.
OPSET, IR = 18, 8
# What onnxruntime computes on every device. Others are written down, but few runtimes have code for them.
DTYPES = ("float32", "int32", "int64", "uint8", "bool")


class Unknown(Exception):
    """What cannot be written, as a phrase after 'the model'."""


class Tensor(NamedTuple):
    """An array in the graph. axes: of the traced array, in the order in which the tensor has them."""

    name: str
    axes: tuple[int, ...]


class Graph:
    """Nodes and constants in the order of their making. batch: the symbol of the first axis of `images`."""

    def __init__(self, batch: Any):
        from onnx import helper, numpy_helper

        self._helper, self._as_tensor = helper, numpy_helper.from_array
        self._batch = batch
        self.nodes: list = []
        self._known: dict = {}
        self._laid: dict = {}

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The name of what an operator gives, a list of names where it gives several."""
        number = len(self.nodes)
        names = [f"{operator}_{number}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(self._helper.make_node(operator, inputs, names, name=f"node_{number}", **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant; equal ones are kept once."""
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._known:
            self._known[key] = self._as_tensor(array, f"constant_{len(self._known)}")
        return self._known[key].name

    def lay(self, x: Tensor | np.ndarray, axes: Sequence[int] | None = None) -> str:
        """The name of `x` with its axes in this order; by default as they were traced."""
        axes = tuple(range(rank(x)) if axes is None else axes)
        if not isinstance(x, Tensor):
            return self.constant(np.transpose(x, axes))
        if axes == x.axes:
            return x.name
        if (x.name, axes) not in self._laid:
            self._laid[x.name, axes] = self.node("Transpose", x.name, perm=[x.axes.index(a) for a in axes])
        return self._laid[x.name, axes]

    def shape(self, dims: Sequence[Any], inferred: bool = False) -> str:
        """The name of a shape. inferred: the operator finds the one size that depends on the batch, as Reshape does."""
        fixed = [d if isinstance(d, int) else -1 for d in dims]
        open_dims = [d for d in dims if not isinstance(d, int)]
        if not open_dims or (inferred and len(open_dims) == 1):
            return self.constant(fixed, np.int64)
        if any(d != self._batch for d in open_dims):
            sizes = ", ".join(map(str, dims))
            raise Unknown(f"makes an array of [{sizes}], not of one row an image, which has no form in ONNX here")
        if "shape" not in self._laid:
            self._laid["shape"] = self.node("Shape", "images", start=0, end=1)
        parts = [self._laid["shape"] if d == -1 else self.constant([d], np.int64) for d in fixed]
        return self.node("Concat", *parts, axis=0)

    def model(self, image_shape: Sequence[int], result: str, classes: int) -> bytes:
        """The bytes of a model of what was put together, checked by ONNX itself: images -> probabilities, named so."""
        import onnx

        kind, helper = onnx.TensorProto, self._helper
        self.nodes.append(helper.make_node("Identity", [result], ["probabilities"], name="node_last"))
        graph = helper.make_graph(
            self.nodes, "network",
            [helper.make_tensor_value_info("images", kind.UINT8, ["batch", *image_shape])],
            [helper.make_tensor_value_info("probabilities", kind.FLOAT, ["batch", classes])],
            list(self._known.values()),
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="pwkd_jax")
        try:
            onnx.checker.check_model(made, full_check=True)
            return made.SerializeToString(deterministic=True)
        except Exception as e:  # of more than 2 GiB, which ONNX keeps in other files, or a mistake of ours
            raise Unknown(f"makes a graph that ONNX refuses ({type(e).__name__}: {str(e).partition(chr(10))[0][:200]})") from e


def rank(x: Tensor | np.ndarray) -> int:
    return len(x.axes) if isinstance(x, Tensor) else np.ndim(x)
