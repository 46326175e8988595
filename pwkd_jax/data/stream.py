"""Images that do not fit RAM, or of many sizes: decoded by worker processes while the devices work, batch by batch.

A batch is the same pure function of (seed, step) as in `pipeline`: the same order of images, and random numbers that
depend on the seed and the place in that order alone. So neither the number of hosts or workers nor where a run was
resumed changes an image, and the step stays the only state. Grain carries batches from the workers.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from pwkd_jax.data import images, pipeline
from pwkd_jax.data.images import Unreadable
from pwkd_jax.data.pipeline import Pipeline
from pwkd_jax.data.prefetch import Reader, cores
from pwkd_jax.data.splits import Split, Streaming
from pwkd_jax.data.user_data import Batches
from pwkd_jax.errors import UserError

# Records fetched by one call: enough to share the cost of a call, few enough to keep them out of memory.
_CHUNK = 32


class Source(Protocol):
    """Encoded images by index, see `records.Records` and `folder.Files`. Pickled to the workers."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, indices: Sequence[int]) -> list[tuple[bytes | Unreadable, int]]: ...
    def labels(self) -> np.ndarray: ...


class Stream:
    """A split whose images stay encoded. Reads as `Split` does where no pixels are asked for."""

    def __init__(self, source: Source, num_classes: int, options: Streaming):
        self.source, self.num_classes, self.options = source, num_classes, options
        self.skipped: dict[int, str] = {}  # {index: reason} of the training images that could not be read so far
        self._scored: dict[tuple, Reader] = {}

    def __len__(self) -> int:
        return len(self.source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (self.options.image_size, self.options.image_size, 3)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N]. May read the whole data set once, see `records.Records.labels`."""
        return self.source.labels()

    @property
    def allowed(self) -> int:
        """How many training images may be unreadable."""
        return int(self.options.unreadable * len(self))

    def skip(self, index: int) -> None:
        """Count an unreadable training image and say so, once. Raises UserError beyond the share allowed."""
        if index in self.skipped:
            return
        _, reason = _decoded(self.source, [index], lambda encoded, row: images.decode(encoded, 1, self.options.pixel_range))[0]
        self.skipped[index] = str(reason)
        if len(self.skipped) > self.allowed:
            raise UserError(_complaint(self.source, index, reason, self.allowed))
        print(
            f"warning: {self.source.name(index)} cannot be decoded ({reason}); the next readable image takes its place "
            f"({len(self.skipped)} of at most {self.allowed} such images)",
            file=sys.stderr,
        )

    def batches(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1, cycle: int = 0
    ) -> Callable[[int], dict[str, np.ndarray]]:
        """`Pipeline`'s batches of random crops, mirrored ones among them, by step.

        Reading step, step + 1, ... is one stream; any other step starts it there. cycle: where above 0, only so many steps
        are read, over and over. An unreadable image is replaced by the next one of the split that can be read, cropped
        with the numbers of the place it takes; "label" and "index" are the replacement's. Raises UserError where
        process_count does not divide batch_size.
        """
        order = Pipeline(self.source, batch_size, seed, process_index, process_count)
        read = Reader(_Train(self.source, self.num_classes, self.options, order, self.allowed), self.options.workers, cycle)

        def batch(step: int) -> dict[str, np.ndarray]:
            found = read(int(step))
            wanted = found.pop("wanted")
            for index in wanted[wanted != found["index"]]:
                self.skip(int(index))
            return found

        return batch

    def eval_batches(self, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """`pipeline.eval_batches` of central crops. Raises UserError for the first image that cannot be read."""
        key = (batch_size, process_index, process_count)
        if key not in self._scored:
            rows = pipeline._host_rows(*key)
            count = -(-len(self) // batch_size)
            workers = min(count, cores() if self.options.workers < 0 else self.options.workers)
            batches = _Eval(self.source, self.num_classes, self.options, batch_size, rows)
            # Kept, and read in a circle: the next evaluation finds its workers alive and its first batches made.
            self._scored[key] = Reader(batches, workers, count)
        return map(self._scored[key], range(self._scored[key].cycle))


def batches(
    split: Split | Stream | Batches, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1, cycle: int = 0
) -> Callable[[int], dict[str, np.ndarray]]:
    """Training batches of any kind of split, addressed by step: `Pipeline`, `Stream.batches` or `Batches.batches`.

    cycle: where above 0, a promise to read the first so many steps only, over and over.
    """
    if isinstance(split, Stream):
        return split.batches(batch_size, seed, process_index, process_count, cycle)
    if isinstance(split, Batches):
        return split.batches(batch_size // process_count, cycle)
    return Pipeline(split, batch_size, seed, process_index, process_count)


def eval_batches(
    split: Split | Stream | Batches, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Any kind of split in its own order, every image once: see `pipeline.eval_batches`."""
    if isinstance(split, Stream):
        return split.eval_batches(batch_size, process_index, process_count)
    if isinstance(split, Batches):
        return split.eval_batches(batch_size // process_count)
    return pipeline.eval_batches(split, batch_size, process_index, process_count)


# Batches as pure functions of their number: what the workers compute.


def _decoded(source: Source, indices: Sequence[int], decode: Callable) -> list[tuple[int, np.ndarray | Unreadable]]:
    """[(label, decode(encoded, row))] of `indices`, an Unreadable in place of an image that is none."""
    result = []
    for start in range(0, len(indices), _CHUNK):
        for row, (encoded, label) in enumerate(source.read(indices[start : start + _CHUNK]), start):
            image = encoded
            if not isinstance(encoded, Unreadable):
                try:
                    image = decode(encoded, row)
                except Unreadable as e:
                    image = e
            result.append((label, image))
    return result


def _check_label(source: Source, index: int, label: int, num_classes: int) -> None:
    if not 0 <= label < num_classes:
        raise UserError(
            f"data.num_classes: {source.name(index)} has label {label}; with {num_classes} classes labels are 0 to "
            f"{num_classes - 1}"
        )


def _complaint(source: Source, index: int, reason, allowed: int) -> str:
    only = f"more than the {allowed} images that data.unreadable allows: " if allowed else ""
    return (
        f"data.unreadable: {only}{source.name(index)} cannot be decoded ({reason}); copy or prepare it again, or raise the "
        "share of training images that may be skipped"
    )


def uniform(seed: int, first: int, count: int = 1) -> np.ndarray:
    """The random numbers of the training images at positions first ... first + count - 1: in [0, 1), float64
    [count, images.NUMBERS].

    Philox counts through its numbers, 64 a position here, so that any of them is had without those before. From raw
    output, which numpy keeps stable between releases (NEP 19), as `pipeline.permutation` is.
    """
    bits = np.random.Philox(key=[seed, 1], counter=[16 * first, 0, 0, 0]).random_raw(64 * count).reshape(count, 64)
    return (bits[:, : images.NUMBERS] >> np.uint64(11)) * 2.0**-53


@dataclasses.dataclass(frozen=True)
class _Train:
    """step -> {"image", "label", "index", "wanted": the index whose place it is}."""

    source: Source
    num_classes: int
    options: Streaming
    order: Pipeline
    allowed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.order.rows), self.options.image_size, self.options.image_size, 3)

    def __call__(self, step: int, out: np.ndarray | None = None) -> dict[str, np.ndarray]:
        o, wanted = self.options, self.order.index(step)[0]
        numbers = uniform(self.order.seed, step * self.order.batch_size + int(self.order.rows[0]), len(wanted))
        batch = np.empty(self.shape, np.uint8) if out is None else out

        def decode(encoded: bytes, row: int) -> np.ndarray:
            return images.train_image(encoded, numbers[row], o.image_size, o.scale, o.flip, batch[row], o.pixel_range)

        index, labels = wanted.copy(), np.empty(len(wanted), np.int32)
        for row, (label, image) in enumerate(_decoded(self.source, wanted, decode)):
            for tried in range(1, self.allowed + 1):
                if not isinstance(image, Unreadable):
                    break
                index[row] = (wanted[row] + tried) % len(self.source)
                label, image = _decoded(self.source, index[row : row + 1], lambda x, _, row=row: decode(x, row))[0]
            if isinstance(image, Unreadable):
                raise UserError(_complaint(self.source, int(index[row]), image, self.allowed))
            _check_label(self.source, int(index[row]), label, self.num_classes)
            labels[row] = label
        return {"image": batch, "label": labels, "index": index, "wanted": wanted}


@dataclasses.dataclass(frozen=True)
class _Eval:
    """number -> {"image", "label", "index", "mask"}."""

    source: Source
    num_classes: int
    options: Streaming
    batch_size: int
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), self.options.image_size, self.options.image_size, 3)

    def __call__(self, number: int, out: np.ndarray | None = None) -> dict[str, np.ndarray]:
        o, index = self.options, number * self.batch_size + self.rows
        real = index < len(self.source)
        index = np.where(real, index, 0).astype(np.int32)
        image = np.empty(self.shape, np.uint8) if out is None else out
        image[~real] = 0
        labels = np.zeros(len(index), np.int32)
        found = _decoded(self.source, index[real], lambda x, _: images.test_image(x, o.image_size, o.shorter, o.pixel_range))
        for row, (label, pixels) in zip(np.flatnonzero(real), found, strict=True):
            if isinstance(pixels, Unreadable):
                raise UserError(
                    f"data.test_split: {self.source.name(int(index[row]))} cannot be decoded ({pixels}), and no test image "
                    "may be left out; copy or prepare it again"
                )
            _check_label(self.source, int(index[row]), label, self.num_classes)
            image[row], labels[row] = pixels, label
        return {"image": image, "label": labels, "index": index, "mask": real.astype(np.float32)}
