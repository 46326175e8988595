"""Whether two splits make a task: there is more than one class, those that are tested are learnt, and images are not black."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from pwkd_jax.data import images
from pwkd_jax.data.depth import SLIVER, Unscaled
from pwkd_jax.data.folder import Files
from pwkd_jax.data.slices import OFFER
from pwkd_jax.data.splits import Split
from pwkd_jax.data.stream import Stream
from pwkd_jax.errors import UserError

# Of records that are streamed, reading labels means reading everything: so many test images stand for all.
_SAMPLE = 256
_CHUNK = 1024


def check(
    train: Any, test: Any, num_classes: int, names: Sequence[str] = (), keys: tuple[str, str] | None = None, cut: str = ""
) -> None:  # fmt: skip
    """Refuse a single class, and test images of classes without training images; warn of images that are nearly black.

    train, test: splits of any kind, test may be None; iterables of batches are not looked at, and of streamed records as many
    as it takes. names: of the classes, where they have any. keys: of a config, of its data set and its test split; None where
    the data are arrays. cut: how the config calls the training split. Raises UserError.
    """
    if num_classes == 1:
        which = f", '{names[0]}'" if len(names) == 1 else ""
        raise UserError(
            f"{keys[0] if keys else 'num_classes'}: there is a single class{which}, which any network gets right; give images "
            "of two or more"
        )
    if test is not None:
        _refuse_untaught(train, test, names, f"{keys[1]}: " if keys else "", cut)
    _warn_of_black(train)


def _refuse_untaught(train: Any, test: Any, names: Sequence[str], key: str, cut: str) -> None:
    tested, taught = _labels(test), _labels(train)
    if tested is None and isinstance(test, Stream):
        tested = _read(test, np.unique(np.linspace(0, len(test) - 1, _SAMPLE).astype(int)))
    if tested is None or (taught is None and not isinstance(train, Stream)):
        return
    kinds, counts = np.unique(tested, return_counts=True)
    missing = set(kinds.tolist())
    missing -= set(np.unique(taught).tolist()) if taught is not None else _seen(train, missing)
    if not missing:
        return
    shown = [f"'{names[k]}'" if 0 <= k < len(names) else str(k) for k in sorted(missing)]
    what = "class " + shown[0] if len(shown) == 1 else "classes " + ", ".join(shown[:5])
    what += f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    share = sum(int(n) for k, n in zip(kinds, counts, strict=True) if k in missing)
    has = "has" if len(shown) == 1 else "have"
    offer = OFFER if key else "cut them by class, such as with train_test_split(stratify=labels) of scikit-learn"
    raise UserError(
        f"{key}{what} of the test images ({share} of {len(tested)}) {has} no training image{f' in {cut!r}' if cut else ''}, as "
        f"where a sorted split is cut in two; {offer}"
    )


def _labels(split: Any) -> np.ndarray | None:
    """The labels of a split; None where they are not known before its images are read."""
    if isinstance(split, Split):
        return np.asarray(split.labels)
    if isinstance(split, Stream) and isinstance(split.source, Files):
        return split.source.labels()
    return None


def _read(split: Stream, index: np.ndarray) -> np.ndarray:
    return np.array([label for encoded, label in split.source.read(index.tolist()) if isinstance(encoded, bytes)], np.int32)


def _seen(split: Stream, wanted: set[int]) -> set[int]:
    """Those of the labels `wanted` that the images of a stream have, read no further than it takes to see them."""
    stride, seen = -(-len(split) // _CHUNK), set()
    for first in range(stride):
        seen |= wanted & set(_read(split, np.arange(first, len(split), stride)).tolist())
        if seen == wanted:
            break
    return seen


def _warn_of_black(split: Any) -> None:
    """Say where no pixel, or of a stream none of a few images, comes above a sixteenth of white. Raises UserError where one of
    these few does not say what is white."""
    top = 255
    if isinstance(split, Split) and split.images.dtype == np.uint8 and len(split):
        top = int(split.images.max())
    elif isinstance(split, Stream):
        some, tops = np.unique(np.linspace(0, len(split) - 1, 8).astype(int)).tolist(), []
        for index, (encoded, _) in zip(some, split.source.read(some), strict=True):
            try:
                if isinstance(encoded, bytes):
                    tops.append(int(images.decode(encoded, 1, split.options.pixel_range).max()))
            except Unscaled as e:
                raise UserError(f"data.pixel_range: {split.source.name(index)} is no image of bytes, and {e}") from e
            except images.Unreadable:  # said, or replaced, where it is trained on
                continue
        top = max(tops, default=255)
    if top <= SLIVER:
        print(
            f"warning: no pixel of the training images is above {top} of 255, so that they are nearly black; stretch them to 0 "
            "to 255 where they are made, or say what is white in images deeper than 8 bits in data.pixel_range",
            file=sys.stderr,
        )
