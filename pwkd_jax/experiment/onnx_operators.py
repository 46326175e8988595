"""JAX's operations in ONNX's operators, for `onnx_program`: one function an operation, or a line of a table.

A function takes the graph, the traced operation and its inputs (arrays that are known, or tensors of the graph), and gives the
tensor of its result. What it cannot write it refuses, for a model that is silently another is worse than none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pwkd_jax.experiment.onnx_graph import DTYPES, Graph, Tensor, Unknown, rank

Input = Tensor | np.ndarray

# Elementwise, by operators of the same meaning; whole numbers are divided and raised otherwise.
UNARY = {"abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log", "neg": "Neg",
         "logistic": "Sigmoid", "not": "Not", "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh"}  # fmt: skip
BINARY = {"add": "Add", "mul": "Mul", "sub": "Sub", "div": "Div", "pow": "Pow", "max": "Max", "min": "Min", "and": "And",
          "or": "Or", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}  # fmt: skip
FLOATS = ("div", "pow", "max", "min", "neg", "abs", "sign", "integer_pow")  # written for float32 alone
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd"}
SAME = ("stop_gradient", "copy", "copy_p", "optimization_barrier", "name")


def write(graph: Graph, eqn: Any, inputs: Sequence[Input]) -> list[Tensor]:
    """The tensors of an operation's results. Raises Unknown."""
    name = eqn.primitive.name
    for x in (*eqn.invars, *eqn.outvars):
        if str(x.aval.dtype) not in DTYPES:
            raise Unknown(f"computes in {x.aval.dtype}, and ONNX is written in {', '.join(DTYPES)}")
    if name in FLOATS and str(eqn.invars[0].aval.dtype) != "float32":
        raise Unknown(f"uses the operation '{name}' of {eqn.invars[0].aval.dtype}, which is written for float32 alone")
    if name in ("and", "or", "not") and str(eqn.invars[0].aval.dtype) != "bool":
        raise Unknown(f"uses the operation '{name}' of bits, which is written for truth values alone")
    if name == "dim_as_value":
        raise Unknown("computes with the number of images in a batch, which has no form in ONNX here")
    if name in SAME:
        return [_tensor(graph, x) for x in inputs]
    if name in UNARY or name in BINARY:
        return [_elementwise(graph, {**UNARY, **BINARY}[name], inputs)]
    if name in REDUCTIONS:
        return [_reduce(graph, REDUCTIONS[name], inputs[0], eqn.params["axes"])]
    if name not in RULES:
        raise Unknown(f"uses the operation '{name}', which has no form in ONNX here")
    made = RULES[name](graph, eqn, *inputs)
    return made if isinstance(made, list) else [made]


def _plain(name: str, rank: int) -> Tensor:
    return Tensor(name, tuple(range(rank)))


def _tensor(graph: Graph, x: Input) -> Tensor:
    return x if isinstance(x, Tensor) else _plain(graph.constant(x), rank(x))


def _shape(atom: Any) -> tuple:
    return atom.aval.shape


def _order(inputs: Sequence[Input]) -> tuple[int, ...]:
    """The order of axes in which to compute: of an input that has channels first, if one has."""
    most = max(map(rank, inputs))
    orders = [x.axes for x in inputs if isinstance(x, Tensor) and rank(x) == most]
    plain = tuple(range(most))
    return next((axes for axes in orders if axes != plain), plain)


def _elementwise(graph: Graph, operator: str, inputs: Sequence[Input]) -> Tensor:
    axes = _order(inputs)
    if operator == "Max" and not isinstance(inputs[1], Tensor) and not np.any(inputs[1]) and np.ndim(inputs[1]) == 0:
        return Tensor(graph.node("Relu", graph.lay(inputs[0], axes)), axes)
    if operator == "Sub" and not isinstance(inputs[1], Tensor) and inputs[1].dtype == np.float32:
        # The same number, and runtimes know how to put a sum into the convolution before it.
        operator, inputs = "Add", (inputs[0], -inputs[1])
    return Tensor(graph.node(operator, *(graph.lay(x, axes if rank(x) else ()) for x in inputs)), axes)


def _select_n(graph: Graph, eqn: Any, which: Input, *cases: Input) -> Tensor:
    if len(cases) != 2 or str(eqn.invars[0].aval.dtype) != "bool":
        raise Unknown("uses the operation 'select_n' of more than two cases, which has no form in ONNX here")
    return _elementwise(graph, "Where", (which, cases[1], cases[0]))


def _ne(graph: Graph, eqn: Any, x: Input, y: Input) -> Tensor:
    equal = _elementwise(graph, "Equal", (x, y))
    return Tensor(graph.node("Not", equal.name), equal.axes)


def _clamp(graph: Graph, eqn: Any, low: Input, x: Input, high: Input) -> Tensor:
    raised = _elementwise(graph, "Max", (x, low)) if str(eqn.outvars[0].aval.dtype) == "float32" else None
    if raised is None:
        raise Unknown("uses the operation 'clamp' of whole numbers, which has no form in ONNX here")
    return _elementwise(graph, "Min", (raised, high))


def _square(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    return Tensor(graph.node("Mul", x.name, x.name), x.axes)


def _rsqrt(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    return Tensor(graph.node("Reciprocal", graph.node("Sqrt", x.name)), x.axes)


def _integer_pow(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    return Tensor(graph.node("Pow", x.name, graph.constant(eqn.params["y"], np.float32)), x.axes)


def _erfc(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    return Tensor(graph.node("Sub", graph.constant(1, np.float32), graph.node("Erf", x.name)), x.axes)


def _log1p(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    return Tensor(graph.node("Log", graph.node("Add", x.name, graph.constant(1, np.float32))), x.axes)


def _expm1(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    return Tensor(graph.node("Sub", graph.node("Exp", x.name), graph.constant(1, np.float32)), x.axes)


def _convert_element_type(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    from onnx import helper

    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return x if old == new else Tensor(graph.node("Cast", x.name, to=helper.np_dtype_to_tensor_dtype(np.dtype(new))), x.axes)


def _reduce(graph: Graph, operator: str, x: Tensor, axes: Sequence[int]) -> Tensor:
    if not axes:
        return x
    where = graph.constant([x.axes.index(a) for a in axes], np.int64)
    left = [a for a in x.axes if a not in axes]
    return Tensor(graph.node(operator, x.name, where, keepdims=0), tuple(sorted(left).index(a) for a in left))


def _transpose(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    moved = eqn.params["permutation"]
    return Tensor(x.name, tuple(moved.index(a) for a in x.axes))


def _reshape(graph: Graph, eqn: Any, x: Input) -> Tensor:
    shape = _shape(eqn.outvars[0])
    return _plain(graph.node("Reshape", graph.lay(x), graph.shape(shape, inferred=True)), len(shape))


def _squeeze(graph: Graph, eqn: Any, x: Input) -> Tensor:
    gone = [int(a) for a in eqn.params["dimensions"]]
    return _plain(graph.node("Squeeze", graph.lay(x), graph.constant(gone, np.int64)), rank(x) - len(gone))


def _broadcast_in_dim(graph: Graph, eqn: Any, x: Input, *sizes: Input) -> Tensor:
    shape, kept = _shape(eqn.outvars[0]), eqn.params["broadcast_dimensions"]
    name, before = graph.lay(x), dict(zip(kept, _shape(eqn.invars[0]), strict=True))
    new = [a for a in range(len(shape)) if a not in kept]
    if new:
        name = graph.node("Unsqueeze", name, graph.constant(new, np.int64))
    if any(before.get(a, 1) != d for a, d in enumerate(shape)):
        name = graph.node("Expand", name, graph.shape(shape))
    return _plain(name, len(shape))


def _concatenate(graph: Graph, eqn: Any, *inputs: Input) -> Tensor:
    axes = _order(inputs)
    names = [graph.lay(x, axes) for x in inputs]
    return Tensor(graph.node("Concat", *names, axis=axes.index(eqn.params["dimension"])), axes)


def _split(graph: Graph, eqn: Any, x: Tensor) -> list[Tensor]:
    sizes = graph.constant(eqn.params["sizes"], np.int64)
    names = graph.node("Split", x.name, sizes, outputs=len(eqn.outvars), axis=x.axes.index(eqn.params["axis"]))
    return [Tensor(name, x.axes) for name in ([names] if isinstance(names, str) else names)]


def _pad(graph: Graph, eqn: Any, x: Input, value: Input) -> Tensor:
    x = _tensor(graph, x)
    config = [eqn.params["padding_config"][a] for a in x.axes]
    if any(low < 0 or high < 0 or inner for low, high, inner in config):
        raise Unknown("pads between pixels or by less than nothing, which has no form in ONNX here")
    ends = [low for low, _, _ in config] + [high for _, high, _ in config]
    return Tensor(graph.node("Pad", x.name, graph.constant(ends, np.int64), graph.lay(value)), x.axes)


def _cut(graph: Graph, x: Tensor, shape: Sequence, starts: Sequence, ends: Sequence, steps: Sequence[int]) -> Tensor:
    """x[start:end:step] along each axis of an array of that shape; of axes whose size depends on the batch only the whole."""
    some = []
    for a, (size, start, end, step) in enumerate(zip(shape, starts, ends, steps, strict=True)):
        if isinstance(start, int) and start == 0 and end == size and step == 1:
            continue
        if not all(isinstance(n, int) for n in (size, start, end)):
            raise Unknown("takes some images of a batch of any size, which has no form in ONNX here")
        some.append((start, end, x.axes.index(a), step))
    columns = [graph.constant(column, np.int64) for column in zip(*some, strict=True)]
    return Tensor(graph.node("Slice", x.name, *columns), x.axes) if some else x


def _slice(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    p = eqn.params
    steps = p["strides"] or (1,) * rank(x)
    return _cut(graph, x, _shape(eqn.invars[0]), p["start_indices"], p["limit_indices"], steps)


def _dynamic_slice(graph: Graph, eqn: Any, x: Input, *starts: Input) -> Tensor:
    return _from(graph, eqn, x, starts, eqn.params["slice_sizes"])


def _from(graph: Graph, eqn: Any, x: Input, starts: Sequence[Input], sizes: Sequence) -> Tensor:
    """A block of these sizes that begins there, inside of x."""
    shape = _shape(eqn.invars[0])
    if not isinstance(x, Tensor) or any(isinstance(s, Tensor) for s in starts):
        raise Unknown("looks things up at places that depend on its images, which has no form in ONNX here")
    first = [int(s) for s in starts]
    ends = [n if s == 0 and n == d else s + n for s, n, d in zip(first, sizes, shape, strict=True)]
    if any(s < 0 or (isinstance(d, int) and e > d) for s, e, d in zip(first, ends, shape, strict=True)):
        raise Unknown("takes a part that lies outside of its array, which has no form in ONNX here")
    return _cut(graph, x, shape, first, ends, [1] * len(shape))


def _gather(graph: Graph, eqn: Any, x: Input, indices: Input) -> Tensor:
    """Of the many things that it can do: one block, as in x[:, 0], or rows along one axis, as in x[:, [2, 0, 1]]."""
    d, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], _shape(eqn.invars[0])
    if isinstance(indices, Tensor) or not isinstance(x, Tensor) or getattr(d, "operand_batching_dims", ()):
        raise Unknown("looks things up at places that depend on its images, which has no form in ONNX here")
    if indices.ndim == 1:
        starts = [np.int64(0)] * rank(x)
        for axis, start in zip(d.start_index_map, indices, strict=True):
            starts[axis] = start
        block = _from(graph, eqn, x, starts, sizes)
        gone = graph.constant(d.collapsed_slice_dims, np.int64)
        found = graph.lay(block)
        return _plain(graph.node("Squeeze", found, gone) if d.collapsed_slice_dims else found, len(d.offset_dims))
    out, (axis, *more) = len(_shape(eqn.outvars[0])), d.start_index_map
    rows = tuple(range(axis, axis + indices.ndim - 1))
    whole = all(n == (1 if a == axis else shape[a]) for a, n in enumerate(sizes))
    if more or not whole or d.collapsed_slice_dims != (axis,) or {*rows, *d.offset_dims} != {*range(out)}:
        raise Unknown("looks things up along several axes, which has no form in ONNX here")
    where = indices[..., 0].astype(np.int64)
    if not isinstance(shape[axis], int) or where.min(initial=0) < 0 or where.max(initial=0) >= shape[axis]:
        raise Unknown("takes a part that lies outside of its array, which has no form in ONNX here")
    return _plain(graph.node("Gather", graph.lay(x), graph.constant(where), axis=axis), out)


def _conv_general_dilated(graph: Graph, eqn: Any, x: Input, kernel: Input) -> Tensor:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    if p["batch_group_count"] != 1 or set(p["lhs_dilation"]) - {1} or any(n < 0 for pair in p["padding"] for n in pair):
        raise Unknown("has a convolution that is transposed, or groups images, which has no form in ONNX here")
    name = graph.node(
        "Conv", graph.lay(x, numbers.lhs_spec), graph.lay(kernel, numbers.rhs_spec), group=p["feature_group_count"],
        kernel_shape=[_shape(eqn.invars[1])[a] for a in numbers.rhs_spec[2:]], strides=list(p["window_strides"]),
        dilations=list(p["rhs_dilation"]), pads=[n for side in zip(*p["padding"], strict=True) for n in side],
    )  # fmt: skip
    return Tensor(name, numbers.out_spec)


def _reduce_window_max(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    name, axes, _ = _pool(graph, "MaxPool", eqn, x)
    return Tensor(name, axes)


def _reduce_window_sum(graph: Graph, eqn: Any, x: Tensor) -> Tensor:
    name, axes, pixels = _pool(graph, "AveragePool", eqn, x, count_include_pad=1)
    return Tensor(graph.node("Mul", name, graph.constant(pixels, np.float32)), axes)


def _pool(graph: Graph, operator: str, eqn: Any, x: Tensor, **more: Any) -> tuple[str, tuple[int, ...], int]:
    p = eqn.params
    size, step, pad = p["window_dimensions"], p["window_strides"], p["padding"]
    still = [a for a in range(rank(x)) if size[a] == 1 and step[a] == 1 and tuple(pad[a]) == (0, 0)]
    odd = {*p["base_dilation"], *p["window_dilation"]} - {1}
    if odd or len(still) < 2 or not 3 <= rank(x) <= 5 or str(eqn.invars[0].aval.dtype) != "float32":
        raise Unknown("has a pool over images or channels, with gaps, or of whole numbers, which has no form in ONNX here")
    ends = [still[0], still[-1]]
    axes = x.axes if {*x.axes[:2]} <= {*still} else (*ends, *(a for a in range(rank(x)) if a not in ends))
    moved = axes[2:]
    name = graph.node(
        operator, graph.lay(x, axes), kernel_shape=[size[a] for a in moved], strides=[step[a] for a in moved],
        pads=[pad[a][side] for side in (0, 1) for a in moved], **more,
    )  # fmt: skip
    return name, axes, int(np.prod([size[a] for a in moved]))


def _dot_general(graph: Graph, eqn: Any, x: Input, y: Input) -> Tensor:
    ((xs, ys), (xb, yb)), out = eqn.params["dimension_numbers"], _shape(eqn.outvars[0])
    if any(str(atom.aval.dtype) != "float32" for atom in (*eqn.invars, *eqn.outvars)):
        raise Unknown("multiplies matrices of whole numbers, which has no form in ONNX here")
    left = [a for a in range(rank(x)) if a not in (*xs, *xb)]
    right = [a for a in range(rank(y)) if a not in (*ys, *yb)]
    if not xb and not isinstance(y, Tensor):  # a layer: its kernel as one matrix
        kernel = np.transpose(y, (*ys, *right)).reshape(int(np.prod([y.shape[a] for a in ys])), -1)
        name = graph.lay(x, (*left, *xs))
        if len(xs) != 1:
            dims = [_shape(eqn.invars[0])[a] for a in left] + [kernel.shape[0]]
            name = graph.node("Reshape", name, graph.shape(dims, inferred=True))
        name = graph.node("MatMul", name, graph.constant(kernel))
        if len(right) != 1:
            name = graph.node("Reshape", name, graph.shape(out, inferred=True))
        return _plain(name, len(out))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    xl, yl = {a: next(letters) for a in range(rank(x))}, {}
    for theirs, ours in ((ys, xs), (yb, xb)):
        yl |= {b: xl[a] for a, b in zip(ours, theirs, strict=True)}
    yl |= {b: next(letters) for b in right}
    terms = ("".join(labels[a] for a in range(len(labels))) for labels in (xl, yl))
    made = "".join([xl[a] for a in (*xb, *left)] + [yl[b] for b in right])
    return _plain(graph.node("Einsum", graph.lay(x), graph.lay(y), equation=f"{','.join(terms)}->{made}"), len(out))


RULES = {
    "select_n": _select_n, "ne": _ne, "clamp": _clamp, "square": _square, "rsqrt": _rsqrt, "integer_pow": _integer_pow,
    "erfc": _erfc, "log1p": _log1p, "expm1": _expm1, "convert_element_type": _convert_element_type, "transpose":
    _transpose, "reshape": _reshape, "squeeze": _squeeze, "broadcast_in_dim": _broadcast_in_dim, "concatenate":
    _concatenate, "split": _split, "pad": _pad, "slice": _slice, "dynamic_slice": _dynamic_slice, "gather": _gather,
    "conv_general_dilated": _conv_general_dilated, "reduce_window_max": _reduce_window_max, "reduce_window_sum":
    _reduce_window_sum, "dot_general": _dot_general,
}  # fmt: skip
