"""Channels sorted by importance, so that the leading blocks of a trained network are its best sub-networks.

Which axes of which arrays carry the same channels is read off the traced program: dimensions of values are tied together
equation by equation, and dimensions whose elements have a place of their own (an image's pixels, what is cut,
concatenated, grouped or shuffled) are pinned. Each free group of channels is then permuted in every array at once, which
leaves the function of the full network as it was. It serves any model, and sorts less where a layer is not understood.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import models
from pwkd_jax.errors import UserError

Path = tuple[str, ...]
Axes = list[tuple[Path, int]]

# Element by element: every dimension of the result is that of each operand that has it.
ELEMENTWISE = {
    "add", "sub", "mul", "div", "max", "min", "neg", "exp", "log", "sqrt", "rsqrt", "tanh", "logistic", "erf", "erfc", "pow",
    "integer_pow", "square", "abs", "sign", "select_n", "convert_element_type", "stop_gradient", "copy", "eq", "ne", "lt",
    "le", "gt", "ge", "and", "or", "not", "is_finite", "clamp", "exp2", "log1p", "expm1", "floor", "ceil", "round", "sin",
    "cos", "add_any", "optimization_barrier",
}  # fmt: skip
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"}
WINDOWS = {"reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min", "cumsum", "cummax"}


class _Ties:
    """Union-find over dimensions; number 0 is the pinned one."""

    def __init__(self):
        self.parent = [0]

    def new(self) -> int:
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def root(self, d: int) -> int:
        while self.parent[d] != d:
            self.parent[d] = d = self.parent[self.parent[d]]
        return d

    def tie(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        self.parent[b] = a

    def pin(self, dimensions) -> None:
        for d in dimensions:
            self.tie(0, d)


def groups(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[list[Axes], set[tuple[Path, int]]]:
    """(groups of array axes that carry the same channels, those axes that are outputs of a kernel).

    Paths start with the collection. Every axis of the model's variables that may be permuted is in one group.
    """
    variables = models.abstract(model, image_shape)
    flat = flatten_dict(variables)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def logits(flat, images):
        return models.apply(model, unflatten_dict(flat), images, train=False)[0].logits

    program = jax.make_jaxpr(logits)(flat, images)
    ties, outputs = _Ties(), set()
    inputs = [[ties.new() for _ in v.aval.shape] for v in program.jaxpr.invars]
    consts = [[0] * v.aval.ndim for v in program.jaxpr.constvars]
    results = _run(program.jaxpr, consts, inputs, ties, outputs)
    ties.pin(d for dims in (inputs[-1], *results) for d in dims)

    found: dict[int, Axes] = {}
    made = set()
    # A dict of tuples is flattened in sorted order.
    for path, dims in zip(sorted(flat), inputs[:-1], strict=True):
        for axis, d in enumerate(dims):
            if d in outputs:
                made.add((path, axis))
            if ties.root(d):
                found.setdefault(ties.root(d), []).append((path, axis))
    sizes = {root: {flat[path].shape[axis] for path, axis in axes} for root, axes in found.items()}
    return [axes for root, axes in found.items() if len(sizes[root]) == 1], made


def _run(jaxpr, consts, inputs, ties: _Ties, outputs: set[int]) -> list[list[int]]:
    """Dimensions of the results of `jaxpr`, with those of its equations tied on the way."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(atom) -> list[int]:
        # A literal is one number, the same for all.
        return known[atom] if not hasattr(atom, "val") else [ties.new() for _ in atom.aval.shape]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        if inner is not None and eqn.primitive.name not in ("scan", "while", "cond"):
            closed = getattr(inner, "jaxpr", inner)
            nested = [[0] * np.ndim(c) for c in getattr(inner, "consts", ())]
            results = _run(closed, nested, operands, ties, outputs)
        else:
            results = [[ties.new() for _ in v.aval.shape] for v in eqn.outvars]
            if not _tie(eqn, operands, results, ties, outputs):
                ties.pin(d for dims in (*operands, *results) for d in dims)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _tie(eqn, operands: list[list[int]], results: list[list[int]], ties: _Ties, outputs: set[int]) -> bool:
    """Tie the dimensions of one equation; False for one that is not understood."""
    name, params, out = eqn.primitive.name, eqn.params, results[0]
    shapes = [v.aval.shape for v in eqn.invars]

    def same(pairs) -> bool:
        for a, b in pairs:
            ties.tie(a, b)
        return True

    if name in ELEMENTWISE:
        # Operands of one element (the predicate of a select, the bounds of a clamp) say nothing of the others' places.
        return same(pair for dims, shape in zip(operands, shapes, strict=True) if shape
                    for result in results for pair in zip(dims, result, strict=True))  # fmt: skip
    if name in REDUCTIONS:
        kept = [d for i, d in enumerate(operands[0]) if i not in params["axes"]]
        return same(zip(kept, out, strict=True))
    if name == "transpose":
        return same(zip((operands[0][i] for i in params["permutation"]), out, strict=True))
    if name == "broadcast_in_dim":
        # A dimension of one that grows repeats itself: it has no channels to tie.
        return same((d, out[to]) for d, n, to in zip(operands[0], shapes[0], params["broadcast_dimensions"], strict=True)
                    if n == params["shape"][to])  # fmt: skip
    if name in ("reshape", "squeeze", "expand_dims"):
        return _tie_reshaped(operands[0], shapes[0], out, eqn.outvars[0].aval.shape, ties)
    if name in WINDOWS or name == "pad":
        if name == "pad":
            moved = [i for i, (low, high, between) in enumerate(params["padding_config"]) if low or high or between]
            operands = operands[:1]
        elif "window_dimensions" in params:
            moved = [i for i, n in enumerate(params["window_dimensions"]) if n > 1]
            operands = operands[:1]
        else:
            moved = [params["axis"]]
        ties.pin(dims[i] for dims in (operands[0], out) for i in moved)
        return same((a, b) for i, (a, b) in enumerate(zip(operands[0], out, strict=True)) if i not in moved)
    if name == "concatenate":
        ties.pin(dims[params["dimension"]] for dims in (*operands, out))
        return same(pair for dims in operands for i, pair in enumerate(zip(dims, out, strict=True)) if i != params["dimension"])
    if name in ("slice", "split", "dynamic_slice", "rev"):
        cut, reversed_ = eqn.outvars[0].aval.shape, params.get("dimensions", ())
        whole = [i for i, n in enumerate(shapes[0]) if n == cut[i] and i not in reversed_]
        ties.pin(dims[i] for dims in (operands[0], *results) for i in range(len(shapes[0])) if i not in whole)
        return same((operands[0][i], result[i]) for result in results for i in whole)
    if name == "dot_general":
        (left, right), (left_batch, right_batch) = params["dimension_numbers"]
        a, b = operands
        free = [[d for i, d in enumerate(dims) if i not in (*c, *batch)] for dims, c, batch in
                ((a, left, left_batch), (b, right, right_batch))]  # fmt: skip
        outputs.update(d for part in free for d in part)
        same((a[i], b[j]) for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True))
        return same(zip([*(a[i] for i in left_batch), *free[0], *free[1]], out, strict=True))
    if name == "conv_general_dilated":
        numbers, count = params["dimension_numbers"], params["feature_group_count"]
        (x_batch, x_features, *_), (made, read, *space), (batch, features, *_) = numbers
        x, kernel = operands
        ties.tie(x[x_batch], out[batch])
        ties.pin(kernel[i] for i in space)
        ties.pin(d for dims, spec in ((x, numbers.lhs_spec), (out, numbers.out_spec)) for d in (dims[i] for i in spec[2:]))
        ties.tie(kernel[made], out[features])
        outputs.add(kernel[made])
        if count == 1:
            ties.tie(x[x_features], kernel[read])
        elif count == shapes[0][x_features] == shapes[1][made]:
            ties.tie(x[x_features], kernel[made])  # depthwise: each channel by itself
        else:
            ties.pin((x[x_features], kernel[made], kernel[read]))
        return params["batch_group_count"] == 1
    return False


def _tie_reshaped(before: list[int], old: tuple[int, ...], after: list[int], new: tuple[int, ...], ties: _Ties) -> bool:
    """Dimensions that survive stay tied; those that are merged or split are pinned."""
    a, b = ([i for i, n in enumerate(shape) if n != 1] for shape in (old, new))
    while a and b:
        ours, theirs = [a.pop(0)], [b.pop(0)]
        while (left := np.prod([old[i] for i in ours])) != (right := np.prod([new[i] for i in theirs])):
            (ours if left < right else theirs).append((a if left < right else b).pop(0))
        if len(ours) == len(theirs) == 1:
            ties.tie(before[ours[0]], after[theirs[0]])
        else:
            ties.pin([*(before[i] for i in ours), *(after[i] for i in theirs)])
    return True


def importance(axes: Axes, arrays: dict[Path, np.ndarray], made: set[tuple[Path, int]], by: str) -> np.ndarray:
    """How much each channel of a group matters, [C].

    bn_scale: the sum of |scale| over the batch norms on it (network slimming, Liu et al., ICCV 2017), where there are any.
    l1, or where there are none: the sum over the kernels that make it of the channel's L1 norm (Li et al., ICLR 2017).
    """

    def norms(path: Path, axis: int) -> np.ndarray:
        array = np.abs(arrays[path])
        return array.sum(axis=tuple(i for i in range(array.ndim) if i != axis), dtype=np.float64)

    # A batch norm's scale is one whose layer keeps running statistics.
    scales = [(p, a) for p, a in axes if p[-1] == "scale" and ("batch_stats", *p[1:-1], "mean") in arrays]
    kernels = [(p, a) for p, a in axes if (p, a) in made and arrays[p].ndim > 1]
    chosen = scales if by == "bn_scale" and scales else kernels
    return sum((norms(*one) for one in chosen), np.zeros(arrays[axes[0][0]].shape[axes[0][1]]))


def order(model: nn.Module, variables: dict, image_shape: tuple[int, ...], narrow: dict, by: str = "bn_scale") -> dict:
    """`variables` with the channels of every group sorted by falling `importance`; ties keep their order.

    narrow: abstract variables of the narrowest member; only axes that it has less of are sorted. Raises UserError where there
    are none, and where the sorted network is not the same function, which is tried out on random images.
    """
    arrays = {path: np.asarray(x) for path, x in flatten_dict(variables).items()}
    small, result = flatten_dict(narrow), dict(arrays)
    found, made = groups(model, image_shape)
    sliced = [axes for axes in found if any(small[path].shape[axis] < arrays[path].shape[axis] for path, axis in axes)]
    if not sliced:
        raise UserError("teacher.order: no channels of this model can be sorted, all being grouped or shuffled; set it to none")
    for axes in sliced:
        permutation = np.argsort(-importance(axes, arrays, made, by), kind="stable")
        for path, axis in axes:
            result[path] = np.take(result[path], permutation, axis)
    ordered = unflatten_dict(result)
    _refuse_change(model, variables, ordered, image_shape)
    return ordered


def _refuse_change(model: nn.Module, before: dict, after: dict, image_shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).standard_normal((2, *image_shape), np.float32)
    run: Callable = jax.jit(lambda v: models.apply(model, v, images, train=False)[0].logits)
    with jax.default_matmul_precision("highest"):
        a, b = run(before), run(after)
    if not (error := float(jnp.abs(a - b).max() / jnp.abs(a).max())) < 1e-3:
        raise UserError(
            f"teacher.order: sorting this model's channels changes its output by {error:.0%}, for some layer gives them a "
            "place of their own; set it to none"
        )
