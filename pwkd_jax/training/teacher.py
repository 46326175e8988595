"""The teacher: one sandwich-rule step over all its widths, and what is left of it when training ends."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from pwkd_jax import data, slimmable
from pwkd_jax.slimmable import Slimmable
from pwkd_jax.training import local, metrics, sharding
from pwkd_jax.training.state import State, apply_gradients, rng


def make_step(
    net: Slimmable, tx: optax.GradientTransformation, schedule, preprocess, mesh: jax.sharding.Mesh | None = None, **sandwich
) -> Callable:
    """step(state, batch) -> (state, metrics): one optimiser update from the gradients of all sub-networks together.

    preprocess(key, uint8 images) -> float images, augmented. sandwich: the keywords of `slimmable.sandwich_loss`. mesh: that of
    the state's arrays where each device along `data` has the parameters whole; the step then communicates less.
    """

    def loss_fn(params, statistics, key, images, labels):
        return slimmable.sandwich_loss(net, params, statistics, images, labels, key=key, **sandwich)

    gradient = local.value_and_grad(loss_fn, net, mesh) if mesh else jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: State, batch: dict):
        images = preprocess(rng(state, 0), batch["image"])
        (loss, (statistics, values)), grads = gradient(
            state.params, state.collections, rng(state, 1), images, batch["label"]
        )
        state, rate = apply_gradients(state, grads, statistics, tx, schedule)
        return state, metrics.collect({"train_loss": loss, "learning_rate": rate, **values})

    return step


def freeze(net: Slimmable, params: dict, statistics: dict) -> dict[float, dict]:
    """{width: variables of the standalone narrow model} of a trained teacher: what students and export read."""
    return {w: net.extract(params, statistics, w) for w in net.table}


def make_calibration(net: Slimmable, split: data.Split, preprocess, mesh, *, images: int, batch_size: int, seed: int):
    """calibrate(frozen) -> frozen with every width's statistics measured anew under its own weights.

    True cumulative mean over at least `images` training images in batches of `batch_size` through the training
    transform, always the same ones for a seed; nothing of the old statistics remains.
    """
    count = slimmable.calibration_batches(images, batch_size)
    pipeline = data.batches(split, batch_size, seed, jax.process_index(), jax.process_count(), cycle=count)

    def one(member, variables, step, batch):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return slimmable.batch_statistics(member, variables, preprocess(key, batch["image"]))

    compiled = jax.jit(one, static_argnums=0, out_shardings=sharding.replicated(mesh))

    def calibrate(frozen: dict[float, dict]) -> dict[float, dict]:
        result = {}
        for width, variables in frozen.items():
            stats = slimmable.calibrate(
                lambda i, w=width, v=variables: compiled(
                    net.members[w], v, np.int32(i), sharding.put_batch(mesh, pipeline(i))
                ),
                count,
            )
            result[width] = {"params": variables["params"], "batch_stats": stats}
        return result

    return calibrate
