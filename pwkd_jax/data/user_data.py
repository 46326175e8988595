"""Data of your own: arrays in memory, or any iterable of batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pwkd_jax.data.splits import Split
from pwkd_jax.errors import UserError


class Batches:
    """An iterable of batches as a split: PyTorch's loaders, tf.data, Grain, a generator.

    Each batch is (images, labels) or {"image", "label"}: images [B, H, W, C], uint8 or float, labels [B] of whole numbers, all
    of one size. images: how many make an epoch; where it is 0, `len(batches)` tells. An iterable that can be begun again is,
    when it ends; a generator that ends before training does is refused. Batches come in order, so a resumed run first skips
    those that it has seen; whether they are the same ones is the iterable's affair.
    """

    skipped = ()

    def __init__(self, batches: Iterable, images: int = 0):
        self._batches, self._iterator, self._at = batches, iter(batches), 0
        first = next(self._iterator, None)
        if first is None:
            raise UserError("the iterable of batches gives none")
        self._again = iter(batches) is not self._iterator
        if self._again:
            self._iterator = iter(batches)
        else:
            self._iterator = itertools.chain([first], self._iterator)
        example = _batch(first)
        self.batch_size, self.image_shape = len(example["label"]), tuple(example["image"].shape[1:])
        self.dtype, self.keys = example["image"].dtype, tuple(example)
        if not images and not hasattr(batches, "__len__"):
            raise UserError("an iterable without a length has no epochs; give pwkd_jax.Batches(iterable, images=...)")
        self.num_classes = 0  # that labels are held to, once it is known
        self._images = images or len(batches) * self.batch_size

    def __len__(self) -> int:
        return self._images

    def batches(self, batch_size: int, cycle: int = 0) -> Callable[[int], dict[str, np.ndarray]]:
        """step -> that step's batch; asked for in rising order. cycle: asked again for the first of so many."""
        if batch_size != self.batch_size:
            raise UserError(f"batch_size: {batch_size} is not that of the iterable's first batch, {self.batch_size}")
        kept: dict[int, dict[str, np.ndarray]] = {}

        def at(step: int) -> dict[str, np.ndarray]:
            if cycle and step % cycle in kept:
                return kept[step % cycle]
            if step < self._at:  # another run begins
                if not self._again:
                    raise UserError("a generator gives its batches once; give a list, or an iterable that can begin again")
                self._iterator, self._at = iter(self._batches), 0
            while True:
                batch = self._next(step)
                self._at += 1
                if self._at > step:
                    break
            if cycle:
                kept[step % cycle] = batch
            return batch

        return at

    def _next(self, step: int) -> dict[str, np.ndarray]:
        batch = next(self._iterator, None)
        if batch is None and self._again:
            self._iterator = iter(self._batches)
            batch = next(self._iterator, None)
        if batch is None:
            raise UserError(f"the iterable of batches ended before step {step + 1}; give one that lasts, or can begin again")
        batch = _batch(batch)
        if batch["image"].dtype != self.dtype:
            raise UserError(f"the images of step {step + 1} are {batch['image'].dtype}, and the first were {self.dtype}")
        if self.num_classes and int(batch["label"].max()) >= self.num_classes:
            raise UserError(f"a label of step {step + 1} is {int(batch['label'].max())}, of {self.num_classes} classes")
        if batch["image"].shape != (self.batch_size, *self.image_shape):
            raise UserError(
                f"the batch of step {step + 1} is {list(batch['image'].shape)}, and the first was "
                f"{[self.batch_size, *self.image_shape]}; drop the last, smaller batch"
            )
        return batch

    def eval_batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Every image once, with "index" and "mask", in batches of `batch_size`: the last of them filled up with zeros."""
        if not self._again:
            raise UserError("test images are read at every evaluation; give arrays or a list of batches, not a generator")
        at = 0
        for found in self._batches:
            batch = _batch(found)
            for start in range(0, len(batch["label"]), batch_size):
                part = {key: batch[key][start : start + batch_size] for key in ("image", "label")}
                real = len(part["label"])
                pad = [(0, batch_size - real)]
                index = np.arange(at, at + batch_size, dtype=np.int32)
                yield {key: np.pad(x, pad + [(0, 0)] * (x.ndim - 1)) for key, x in part.items()} | {
                    "index": index, "mask": (np.arange(batch_size) < real).astype(np.float32),
                }  # fmt: skip
                at += real


def _batch(found: Any) -> dict[str, np.ndarray]:
    """A batch of someone's iterable as {"image", "label"} and "index" where it has one."""
    if isinstance(found, Mapping):
        batch = {key: np.asarray(found[key]) for key in ("image", "label", "index") if key in found}
    elif isinstance(found, (tuple, list)) and len(found) == 2:
        batch = dict(zip(("image", "label"), map(np.asarray, found), strict=True))
    else:
        batch = {}
    if {"image", "label"} - batch.keys():
        raise UserError('a batch should be (images, labels) or {"image": images, "label": labels}')
    _check(batch["image"], batch["label"])
    return {key: x if key == "image" else x.astype(np.int32) for key, x in batch.items()}


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim != 4 or (images.dtype != np.uint8 and images.dtype.kind != "f"):
        raise UserError(f"images should be uint8 or float of shape [N, H, W, C], not {images.dtype}{list(images.shape)}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"labels should be {len(images)} whole numbers, one an image, not {labels.dtype}{list(labels.shape)}")


def as_split(data: Any) -> Any:
    """Data as a split: (images [N, H, W, C], labels [N]) or {"image", "label"} of such arrays, an iterable of batches (see
    `Batches`), or what is a split already. Raises UserError."""
    if isinstance(data, Batches) or all(hasattr(data, name) for name in ("image_shape", "skipped", "__len__")):
        return data
    pair = data
    if isinstance(data, Mapping) and {"image", "label"} <= data.keys():
        pair = (data["image"], data["label"])
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and getattr(pair[0], "ndim", 0) == 4:
        images, labels = map(np.asarray, pair)
        _check(images, labels)
        if labels.size and labels.min() < 0:
            raise UserError(f"labels should count from 0, but one is {labels.min()}")
        return Split(images, labels.astype(np.int32))
    if not isinstance(data, Iterable):
        raise UserError(f"data should be (images, labels), or an iterable of such batches, not {type(data).__name__}")
    return Batches(data)
