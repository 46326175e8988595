"""What a data set is to everything that reads one: splits of images in RAM, and how those are meant that are streamed."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
    """images: uint8 [N, H, W, C], C = 1 for grayscale; labels: int32 [N] in [0, num_classes)."""

    images: np.ndarray
    labels: np.ndarray

    skipped = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.images.shape[1:]


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How images of many sizes become squares of `image_size` pixels, see `images`; the keys of `data` of these names.

    resize: the shorter side of test images before their centre is cut out; 0 is 8/7 of image_size, as 256 is of 224.
    workers: processes that decode, below 0 one a core, 0 a thread of this one. unreadable: share of a training split.
    pixel_range: (black, white) of samples that are no bytes.
    """

    image_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    resize: int = 0
    flip: bool = False
    workers: int = -1
    unreadable: float = 0.0
    pixel_range: tuple[float, ...] = ()

    @property
    def shorter(self) -> int:
        """The shorter side of test images, in pixels."""
        return self.resize or round(self.image_size * 8 / 7)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Two splits, `Split` or `stream.Stream`, of equal image shape and the number of classes of their labels.

    classes: their names, () where there are none. validation: a third one, to choose by; None without one.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    classes: tuple[str, ...] = ()
    validation: Split | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train.image_shape
