"""Batches addressed by step. A batch is a pure function of (seed, step): no iterator, no state to save, and a run that
stopped on any number of hosts goes on with the same global batches on any other."""

from collections.abc import Iterator

import numpy as np

from pwkd_jax.data.splits import Split
from pwkd_jax.errors import UserError


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch`: int64 [size], independent between epochs and between seeds.

    Sorts raw generator output rather than calling `Generator.permutation`, because numpy keeps only the former stable
    between releases (NEP 19), and a run may be resumed after an upgrade.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable")


class Pipeline:
    """An infinite stream of epochs of `split`, cut into batches: `pipeline(step)`, pure in (seed, step).

    Every epoch is its own permutation of all images, and consecutive batches are consecutive stretches of the epochs
    laid end to end. So an image is seen exactly once an epoch also where batch_size does not divide the split; such a
    batch straddles two epochs, and one larger than the split several.

    batch_size is global: process p of n gets rows p * b : (p + 1) * b of the global batch, b = batch_size / n, cut
    after the shuffle. Raises UserError where n does not divide batch_size.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.rows = _host_rows(batch_size, process_index, process_count)
        self._orders: tuple[tuple[int, np.ndarray], ...] = ()

    def _order(self, epoch: int) -> np.ndarray:
        for known, order in self._orders:
            if known == epoch:
                return order
        order = permutation(self.seed, epoch, len(self.split))
        # The last two, since batches straddle. Replaced whole, never changed in place: a prefetching thread may look.
        self._orders = (*self._orders[-1:], (epoch, order))
        return order

    def index(self, step: int, count: int = 1) -> np.ndarray:
        """The positions in the split of this process's rows of global batches step ... step + count - 1: int32 [count, b]."""
        starts = np.arange(int(step), int(step) + count) * self.batch_size
        epochs, offsets = np.divmod(starts[:, None] + self.rows, len(self.split))
        index = np.empty(epochs.shape, np.int32)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = self._order(int(epoch))[offsets[here]]
        return index

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of global batch `step` (from 0).

        {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int32 [b], the positions in the split}.
        """
        index = self.index(step)[0]
        return {"image": self.split.images[index], "label": self.split.labels[index], "index": index}


def eval_batches(
    split: Split, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """`split` in its own order, every image once, in ceil(N / batch_size) batches of one fixed shape.

    {"image", "label", "index"} as `Pipeline` gives them and "mask": float32 [b], 1 for an image and 0 for the padding
    of the last batch, where the other entries are zero. Every process gets the same number of batches, and the rows
    that `Pipeline` would give it. Raises UserError where process_count does not divide batch_size.
    """
    rows = _host_rows(batch_size, process_index, process_count)

    def batches():
        for start in range(0, len(split), batch_size):
            index = start + rows
            real = index < len(split)
            index = np.where(real, index, 0).astype(np.int32)
            image, label = split.images[index], split.labels[index]
            image[~real], label[~real] = 0, 0
            yield {"image": image, "label": label, "index": index, "mask": real.astype(np.float32)}

    return batches()


def _host_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Row numbers of the global batch that belong to this process: int64 [batch_size / process_count]."""
    if batch_size % process_count:
        raise UserError(
            f"batch_size: {batch_size} images cannot be shared equally by {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    size = batch_size // process_count
    return process_index * size + np.arange(size)
