"""Where arrays live: one mesh of `data` x `model`, the batch split along `data`, parameters as the config says.

Everything is computed under `jax.jit` on global arrays, so batch norm and losses see the global batch and no result depends on
the mesh; where arrays lie decides memory and speed alone. Mesh axes are Auto: XLA's partitioner chooses the collectives.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pwkd_jax.errors import UserError
from pwkd_jax.models import compute

HOW = ("replicated", "fsdp")

# Elements below which an array is replicated: 64 KiB of float32, less than what gathering it costs in latency.
SMALL = 2**14


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices as data x model, `model` neighbours sharing one copy of a network. Raises UserError.

    devices: others than those here, such as a described pod's, to compile for.
    """
    count = len(devices) if devices else jax.device_count()
    own = sum(d.process_index == devices[0].process_index for d in devices) if devices else jax.local_device_count()
    if own % model:
        # A model spread over processes would have them read the same rows, but each reads its own.
        whose = "the number of devices" if count == own else "each process's number of devices"
        raise UserError(f"mesh.model: {model} does not divide {whose}, {own}; 1 is pure data parallelism")
    # Said out loud: without axis_types, make_mesh would give Explicit axes.
    return jax.make_mesh((count // model, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(mesh: Mesh, batch_size: int, key: str, parts: int = 1) -> None:
    """UserError unless a global batch, in so many parts, divides over the devices."""
    if batch_size % (mesh.shape["data"] * parts):
        accumulated = f", each in {parts} parts" * (parts > 1)
        raise UserError(
            f"{key}: a global batch of {batch_size} does not divide over {mesh.shape['data']} device(s){accumulated}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def shardings(mesh: Mesh, tree: Any, how: str = "replicated") -> Any:
    """The NamedSharding of every array of `tree`, arrays or ShapeDtypeStructs; by shape alone, so momenta follow parameters.

    Arrays below SMALL elements are replicated. Of the others, the last axis (output channels) is split over the mesh's
    `model` axis where that divides it; `fsdp` (fully sharded data parallel, ZeRO stage 3) splits the largest other axis that
    `data` divides too, or, without one, the last axis over both.
    """
    sizes = dict(mesh.shape)
    data, model = sizes["data"], sizes.get("model", 1)

    def one(x) -> NamedSharding:
        shape = np.shape(x)
        if math.prod(shape) < SMALL:
            return replicated(mesh)
        spec: list = [None] * len(shape)
        if model > 1 and shape[-1] % model == 0:
            spec[-1] = "model"
        if how == "fsdp" and data > 1:
            free = [a for a in range(len(shape)) if spec[a] is None and shape[a] % data == 0]
            if free:
                spec[max(free, key=lambda a: shape[a])] = "data"
            elif spec[-1] == "model" and shape[-1] % (data * model) == 0:
                spec[-1] = ("data", "model")
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(one, tree)


def creator(mesh: Mesh, make: Callable, how: str, *like, layout: Callable | None = None) -> Callable:
    """make(*args) -> tree, computed where its arrays will live: with fsdp no device ever holds all of it.

    like: arguments of the same shapes, not kept. layout(tree) -> shardings, in place of `shardings` by `how`. `.layout` of the
    result is the shardings of what it makes, `.like` its ShapeDtypeStructs.
    """
    shapes = jax.eval_shape(lambda *like: like, *like)
    made = jax.jit(make).eval_shape(*abstract(shapes, shardings(mesh, shapes, how)))  # a trace that the call finds again
    layout = layout(made) if layout else shardings(mesh, made, how)
    # This runs once, so that what LLVM's higher levels would save is less than they take (tests/bench/start.py). The lowest
    # fuses no product and sum, so that weights may be a rounding apart from those of `jax.jit(model.init)`.
    sooner = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    compiled = jax.jit(make, out_shardings=layout, compiler_options=sooner)

    def create(*args):
        return compiled(*place(mesh, args, how))

    create.layout, create.like = layout, abstract(made, layout)
    return create


def abstract(tree: Any, layout: Any) -> Any:
    """ShapeDtypeStructs of `tree`, arrays or abstract, that lie as `layout` (a tree of shardings) has it."""

    def one(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=getattr(x, "weak_type", False))

    return jax.tree.map(one, tree, layout)


def place(mesh: Mesh, tree: Any, how: str = "replicated") -> Any:
    """`tree` moved to where `shardings` has it."""
    return jax.device_put(tree, shardings(mesh, tree, how))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as global arrays sharded along the axis of the rows."""
    sharding = NamedSharding(mesh, P(*[None] * axis, "data"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def jit_step(mesh: Mesh, step, layout: Any = None):
    """`step(state, batch, **frozen) -> (state, metrics)` compiled: the state donated and left in `layout`.

    layout: the state's shardings, replicated by default. What goes in is sharded as it comes; metrics are replicated.
    """
    whole = replicated(mesh)
    options = compute.compiler_options(mesh.devices.flat[0].platform)
    layout = whole if layout is None else (layout, whole)
    return jax.jit(step, donate_argnums=0, out_shardings=layout, compiler_options=options)
