"""Many steps a dispatch: small data sets lie on the devices, and one compiled loop takes a chunk of batches from there.

A dispatch costs a fraction of a millisecond of host time, gathering a batch on the host and sending it another one; where a
step computes for less, the device waits. Here the host sends no image after the first step, only int32 indices, those of up
to `most` steps at once. The loop's trip count is an argument, so chunks of all lengths are one program, and where a chunk
ends changes no bit.

On CPU the default is one step a dispatch: within a loop XLA has no fast kernels for JAX's gradients of convolutions (jax issue
12868), which models/convolution.py gives back to Flax's layers alone. A step of resnet8, 64 images of 32x32, took 1.06 s in the
loop and 0.32 s outside before that held for maps of 64 pixels or fewer too, but one of a linear classifier 0.013 ms and 0.73 ms
(tests/bench/dispatch.py --resnet8; two EPYC cores under other load, jax 0.10.2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax import data
from pwkd_jax.errors import UserError
from pwkd_jax.training import sharding

# What `auto` puts on every device, in bytes: six times CIFAR, and little beside a network's activations.
LIMIT = 1 << 30

# A signal or a preemption is noticed between two dispatches, so a chunk has to end soon.
MOST = 100


def on_device(choice: str, split: data.Split | data.Stream) -> bool:
    """Whether data.on_device = `choice` (auto, always or never) puts the images of `split` on the devices."""
    if not isinstance(split, data.Split):
        return False
    return choice == "always" or (choice == "auto" and split.images.nbytes <= LIMIT)


def most(choice: int, resident: bool) -> int:
    """The steps of a dispatch for steps_per_dispatch = `choice`. Raises UserError for several of batches from the host."""
    if choice > 1 and not resident:
        raise UserError(
            f"steps_per_dispatch: {choice} steps in one dispatch need the images on the devices, but they are more than "
            f"the {LIMIT >> 20} MiB of data.on_device=auto; set data.on_device=always or steps_per_dispatch=0"
        )
    return choice or (1 if not resident or jax.default_backend() == "cpu" else MOST)


def store(mesh: jax.sharding.Mesh, split: data.Split) -> dict[str, jax.Array]:
    """{"image": uint8 [N, H * W * C], "label": int32 [N]} of a split, whole on every device.

    In rows, for a TPU lays out what it gathers from: of [N, H, W, C] it would copy all images at every dispatch.
    """
    rows = np.ascontiguousarray(split.images).reshape(len(split), -1)
    arrays, whole = {"image": rows, "label": split.labels}, sharding.replicated(mesh)
    return {name: jax.make_array_from_process_local_data(whole, array, array.shape) for name, array in arrays.items()}


class Resident:
    """The batches of a `data.Pipeline` as indices into `stored`, up to `most` of them at once, for the steps of `many`."""

    def __init__(self, mesh: jax.sharding.Mesh, pipeline: data.Pipeline, stored: dict[str, jax.Array], most: int):
        self.most, self._mesh, self._pipeline, self._stored = most, mesh, pipeline, stored

    def __call__(self, step: int, count: int = 1) -> dict:
        """Global batches step ... step + count - 1.

        {"stored", "rows": int32 [most, B], of which the first `count` are used, split over the devices by B, "count"}.
        """
        index = self._pipeline.index(step, count)
        rows = np.zeros((self.most, index.shape[1]), np.int32)
        rows[:count] = index
        return {"stored": self._stored, "count": np.int32(count), **sharding.put_batch(self._mesh, {"rows": rows}, axis=1)}


def many(step: Callable, image_shape: tuple[int, ...], prepare: Callable[[dict], dict] | None = None) -> Callable:
    """`step` for the batches of `Resident`: as many steps as a chunk has. Other batches it takes as `step` does.

    image_shape: (H, W, C) of the images that lie in rows. The metrics of several steps come back with a leading axis [most],
    zero after the last step. prepare: what a dispatch makes of the frozen variables before its steps.
    """

    @jax.jit  # traced once for its shapes and for the loop
    def one(state, index, stored, frozen):
        batch = {name: array[index] for name, array in stored.items()}
        batch["image"] = batch["image"].reshape(len(index), *image_shape)
        return step(state, batch | {"index": index, "dataset_label": stored["label"]}, **frozen)

    def run(state, batch, **frozen):
        frozen = prepare(frozen) if prepare else frozen
        if "rows" not in batch:
            return step(state, batch, **frozen)
        rows, stored = batch["rows"], batch["stored"]
        if len(rows) == 1:
            return one(state, rows[0], stored, frozen)
        _, like = jax.eval_shape(one, state, rows[0], stored, frozen)
        leaves, tree = jax.tree.flatten(like)
        # All numbers of a kind in one row: a GPU writes what it is to keep of a step at once, not each by itself.
        kinds: dict[tuple, list[int]] = {}
        for i, leaf in enumerate(leaves):
            kinds.setdefault((leaf.shape, leaf.dtype), []).append(i)
        groups = [*kinds.values()]

        def body(i, carry):
            state, kept = carry
            state, found = one(state, rows[i], stored, frozen)
            found = jax.tree.leaves(found)
            new = [jnp.stack([found[member] for member in group]) for group in groups]
            return state, [all.at[i].set(this) for all, this in zip(kept, new, strict=True)]

        empty = [jnp.zeros((len(rows), len(group), *leaves[group[0]].shape), leaves[group[0]].dtype) for group in groups]
        state, kept = jax.lax.fori_loop(0, batch["count"], body, (state, empty))
        of = {member: all[:, at] for group, all in zip(groups, kept, strict=True) for at, member in enumerate(group)}
        return state, jax.tree.unflatten(tree, [of[i] for i in range(len(leaves))])

    return run
