"""The teacher's gradient as each device takes it over its own rows: added over the widths first, then over the devices, once.

Left to XLA's partitioner, each sub-network's gradient is summed over the devices before the sub-networks are added: at widths
0.25 to 1 that sends 1 + 0.75^2 + 0.5^2 + 0.25^2 = 1.875 times the gradient, and of a large network in one piece an array.

Batch norm over the global batch is then no longer the partitioner's doing: Flax's `BatchNorm` is told the mesh axis along which
to average, wherever it stands in a model. A model that keeps batch statistics in any other layer is left to the partitioner.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pwkd_jax import models
from pwkd_jax.models import precision
from pwkd_jax.slimmable import Slimmable


def over_devices(gradient: Callable, net: Slimmable, mesh: Mesh, parts: int = 1) -> Callable:
    """`gradient`, which takes a batch in so many parts, of params that every device along `data` has whole.

    gradient(params, statistics, key, (images [B, H, W, C], labels [B])) -> ((scalar, (statistics, {name: values [B]})), grads),
    the scalar a mean over the images.
    """

    def run(params, statistics, key, rows):
        if not possible(net, mesh, (rows[0].shape[0] // parts, *rows[0].shape[1:])):
            return gradient(params, statistics, key, rows)
        grouped = _group(net) > 0

        def own(params, statistics, key, rows):
            # From here on each device's copy is its own, so that gradients stay apart until all widths are added.
            params = jax.lax.pcast(params, "data", to="varying")
            if grouped:
                statistics = jax.lax.pcast(statistics, "data", to="varying")
            with nullcontext() if grouped else _norms(_average):
                (value, (statistics, values)), grads = gradient(params, statistics, key, rows)
            if grouped:
                value, grads, statistics = jax.lax.pmean((value, grads, statistics), "data")
            else:
                value, grads = jax.lax.pmean((value, grads), "data")
            return (value, (statistics, values)), grads

        whole, shared = P(), P("data")
        return jax.shard_map(
            own, mesh=mesh, axis_names={"data"}, in_specs=(whole, whole, whole, shared),
            out_specs=((whole, (whole, shared)), whole),
        )(params, statistics, key, rows)  # fmt: skip

    return run


def possible(net: Slimmable, mesh: Mesh, shape: tuple[int, ...]) -> bool:
    """Whether the mean of what devices find in their own rows of images [B, H, W, C] is what the global batch would give."""
    own, left = divmod(shape[0], mesh.shape["data"])
    if left or mesh.shape["data"] == 1:
        return False
    # Dropout draws for the global batch, and of a collection of one's own only its model knows what the images do to it.
    if net.draws(shape[1:]) or models.collections(net.likes[net.widest]):
        return False
    return own % _group(net) == 0 if _group(net) else _all_norms_are_flax(net, shape[1:])


def _group(net: Slimmable) -> int:
    return getattr(net.members[net.widest], "group", 0)


def _all_norms_are_flax(net: Slimmable, image_shape: tuple[int, ...]) -> bool:
    model, like, seen = precision.plain(net.members[net.widest]), net.likes[net.widest], set()
    images = jax.ShapeDtypeStruct((2, *image_shape), "float32")
    with _norms(lambda layer: seen.add(layer.path)):
        jax.eval_shape(lambda v, x: models.apply(model, v, x, train=True), like, images)
    return seen == {path[:-1] for path in flatten_dict(like.get("batch_stats", {}))}


@contextmanager
def _norms(meet: Callable[[nn.BatchNorm], None]) -> Iterator[None]:
    """Within it, `meet` is given every batch-norm layer of Flax before it runs."""

    def intercept(run, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            meet(context.module)
        return run(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def _average(layer: nn.BatchNorm) -> None:
    # Modules are frozen, but this one was made for the trace that is under way, and ends with it.
    object.__setattr__(layer, "axis_name", "data")
