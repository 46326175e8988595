"""What the library's functions are given, looked at before anything is compiled: one sentence for each mistake."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models import precision
from pwkd_jax.stages import Stage
from pwkd_jax.training import sharding


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """UserError unless `value` is one of the words `known`."""
    if value not in known:
        raise UserError(f"{name}: {value!r} is not possible; it should be one of {', '.join(map(repr, known))}")


def positive(name: str, value: Any) -> None:
    """UserError unless `value` is a whole number above 0."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: {value!r} is not possible; it should be a whole number above 0")


def seed(value: Any) -> None:
    """UserError unless `value` can seed random numbers."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise UserError(f"seed: {value!r} is not possible; it should be a whole number from 0 to 2^31 - 1")


def task(value: Any) -> None:
    """UserError unless `value` is a `Task`."""
    if not hasattr(value, "preprocess"):
        raise UserError(f"task: should be made by pwkd_jax.task((images, labels)), and this is a {type(value).__name__}")


def module(name: str, value: Any) -> None:
    """UserError unless `value` is a Flax module that can be run."""
    plain = precision.plain(value)
    if isinstance(plain, type):
        raise UserError(f"{name}: {plain.__name__} is a class; give a module made of it, as in {plain.__name__}(width=0.5)")
    if isinstance(plain, str):
        raise UserError(f"{name}: '{plain}' is a name; give a module, as in pwkd_jax.create_model('{plain}', num_classes=10)")
    if not isinstance(plain, nn.Module):
        raise UserError(f"{name}: should be a Flax module, not {type(plain).__name__}")


def optimizer(value: Any, learning_rate: Any) -> None:
    """UserError unless these are an optax transformation, or None, and a learning rate that training can use."""
    if value is not None and not (isinstance(value, tuple) and (hasattr(value, "update") or hasattr(value, "direction"))):
        raise UserError(f"optimizer: should be an optax transformation, as in optax.adamw(1e-3), not {value!r}")
    rate = 1.0 if learning_rate is None or callable(learning_rate) else learning_rate
    if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise UserError(f"learning_rate: {rate!r} is not possible; it should be a number above 0, or a schedule")


def averaging(ema: Any) -> None:
    """UserError unless `ema` is a decay, or 0."""
    if isinstance(ema, bool) or not isinstance(ema, (int, float)) or not 0 <= ema < 1:
        raise UserError(f"ema: {ema!r} is not possible; it should be 0 (off) or a decay below 1, as in 0.999")


def parts(accumulate: Any, batch_size: int, mesh: jax.sharding.Mesh) -> None:
    """UserError unless a batch can be learnt from in so many parts, all of them on all devices."""
    positive("accumulate", accumulate)
    sharding.check_batch(mesh, batch_size, "batch_size", accumulate)


def duration(value: Any) -> None:
    """UserError unless `value` is a text such as '60 epochs' or a whole number of steps above 0."""
    if isinstance(value, str):
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"duration: {value!r} is not possible; write '60 epochs', '5000 steps' or a whole number of steps")


def batch_size(task: Any, given: int | None) -> int:
    """The batch size of training on `task`: 64 unless `given`, or that of an iterable, which `given` may not contradict."""
    own = getattr(task.train, "batch_size", None)
    if given is not None:
        positive("batch_size", given)
        if own and given != own:
            raise UserError(f"batch_size: {given} is not that of the iterable's batches, {own}; leave it away")
    return own or given or 64


def plan(stages: Sequence[Stage]) -> None:
    """UserError unless the stages follow each other from step 0 without a gap."""
    if not stages:
        raise UserError("plan: has no stages; pwkd_jax.stage_plan or even_plan make some")
    at = 0
    for number, stage in enumerate(stages, 1):
        one_of(f"plan, stage {number}, teacher", stage.teacher, ("slimmable", "standard", "none"))
        if stage.start != at or stage.end <= stage.start:
            raise UserError(
                f"plan: stage {number} goes from step {stage.start} to {stage.end}, but the one before ends at {at}; stages "
                "follow each other from step 0"
            )
        at = stage.end


RESERVED = {"train_loss", "learning_rate", "train_top1", "cross_entropy", "distillation", "top1", "test_loss", "seconds",
            "step", "epoch", "images_per_second"}  # fmt: skip


def own_metrics(function: Any) -> Any:
    """`function`(outputs, labels) with what it returns looked at when it is traced: {name: values [B]} under free names."""
    if function is None:
        return None
    if not callable(function):
        raise UserError(f"metrics: should be a function of (outputs, labels), not {type(function).__name__}")

    def checked(outputs: models.Outputs, labels: jax.Array) -> dict[str, jax.Array]:
        found = function(outputs, labels)
        if not isinstance(found, Mapping) or any(not isinstance(name, str) for name in found):
            raise UserError("metrics: should return {name: values [B]}, one value an image")
        for name, values in found.items():
            if name in RESERVED:
                raise UserError(f"metrics: '{name}' is a name of ours; give yours another")
            if np.shape(values) != labels.shape:
                raise UserError(f"metrics: '{name}' is {list(np.shape(values))}; give one value an image, {list(labels.shape)}")
        return dict(found)

    return checked
