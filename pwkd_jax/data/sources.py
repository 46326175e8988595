"""Where images come from: the digits bundled with scikit-learn, a folder of images per class, or any TFDS directory in
array_record, read without TensorFlow and without the network. Decoded once into RAM, or streamed (`stream`)."""

import bisect
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Mapping

import numpy as np

from pwkd_jax.data.records import Records
from pwkd_jax.data.records import find as _find
from pwkd_jax.data.splits import Dataset, Split, Streaming
from pwkd_jax.data.stream import Stream
from pwkd_jax.errors import UserError

# Records fetched by one call: reading them one at a time costs as much as decoding them (measured: 130 us each).
_CHUNK = 256

# A stretch of one stored split: (its name, first record, one past the last).
Range = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class _Store:
    """What `load` needs of a place that holds images.

    shards: {split: number of records in each of its files}; num_classes: 0 where the store does not say;
    read(ranges, num_classes) -> Split; source(ranges) -> a `stream.Source` of the same images, still encoded;
    many_sizes(): whether it is, or may be, of images of many sizes.
    """

    shards: Mapping[str, list[int]]
    num_classes: int
    read: Callable[[list[Range], int], Split]
    source: Callable | None = None
    many_sizes: Callable[[], bool] = lambda: False


def load(
    name: str, data_dir: str = "", train_split: str = "train", test_split: str = "test", num_classes: int = 0,
    streaming: Streaming | None = None,
) -> Dataset:  # fmt: skip
    """The data set `name`, decoded into RAM; with `streaming` its splits are `stream.Stream`, of images of any size.

    `digits` is scikit-learn's copy of the UCI test set of handwritten digits: 1,797 gray 8x8 images in 10 classes,
    values 0..16 stretched to 0..255. It has no official split; here image i is a test image where i % 3 == 2 (599) and
    a training image otherwise (1,198). The same writers occur on both sides, so test accuracy is optimistic.

    `folder` is data_dir/SPLIT/CLASS/IMAGE, see `folder.scan`; a slice of a split then holds its first classes alone.

    Any other name is a TFDS data set already prepared in array_record: `name[/config][:version]` below `data_dir`, a
    local or mounted folder ('' is TFDS's default, ~/tensorflow_datasets or $TFDS_DATA_DIR); the newest version where
    none is given. Nothing is ever downloaded. It needs features `image` (uint8, one shape throughout) and `label`.

    Splits take TFDS's slices: 'train[:5000]', 'train[10%:20%]', 'train[:100]+train[200:300]'. Whether the two splits
    share images is not checked. num_classes: 0, or what the data set must have (for data sets that do not say: has).

    Raises UserError, naming the config key or the file at fault.
    """
    store, classes = _open(name, data_dir, num_classes)
    # Both specifications are checked before anything is decoded.
    train_ranges = _ranges("data.train_split", train_split, name, store.shards)
    test_ranges = _ranges("data.test_split", test_split, name, store.shards)
    train, test = (_take(store, ranges, name, classes, streaming) for ranges in (train_ranges, test_ranges))
    if train.image_shape != test.image_shape:
        raise UserError(
            f"data.name: images of data set '{name}' are {_size(train.image_shape)} in '{train_split}' but "
            f"{_size(test.image_shape)} in '{test_split}'; all must have one size, or be streamed at a data.image_size"
        )
    return Dataset(name, train, test, classes)


def load_split(
    name: str, data_dir: str, split: str, num_classes: int = 0, streaming: Streaming | None = None
) -> tuple[Split, int]:
    """(one split of the data set `name`, its number of classes); arguments and errors as `load` has them."""
    store, classes = _open(name, data_dir, num_classes)
    return _take(store, _ranges("--split", split, name, store.shards), name, classes, streaming), classes


def many_sizes(name: str, data_dir: str) -> bool:
    """Whether the data set `name` is of images of many sizes (TFDS: does not promise one), which have to be streamed."""
    return (_digits() if name == "digits" else _folder(data_dir) if name == "folder" else _tfds(name, data_dir)).many_sizes()


def _take(store: _Store, ranges: list[Range], name: str, num_classes: int, streaming: Streaming | None) -> Split:
    if streaming is None:
        return store.read(ranges, num_classes)

    if store.source is None:
        raise UserError(f"data.image_size: {streaming.image_size} is not possible for '{name}', which lies in RAM; set 0")
    source = store.source(ranges)
    if missing := source.missing():
        raise UserError(f"data.data_dir: file {missing[0]} is missing; prepare or copy the data set again")
    return Stream(source, num_classes, streaming)


def _open(name: str, data_dir: str, num_classes: int) -> tuple[_Store, int]:
    """(the store, its number of classes)."""
    store = _digits() if name == "digits" else _folder(data_dir) if name == "folder" else _tfds(name, data_dir)
    if num_classes and store.num_classes and num_classes != store.num_classes:
        raise UserError(
            f"data.num_classes: it says {num_classes}, but data set '{name}' has {store.num_classes} classes; "
            "set it to 0 to take the data set's own"
        )
    classes = store.num_classes or num_classes
    if not classes:
        raise UserError(f"data.num_classes: data set '{name}' does not say how many classes it has; give the number")
    return store, classes


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _first_line(error: Exception) -> str:
    """What an error of a library says, as part of a sentence: its first line, without the addresses of objects."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r" <\S+ object at \w+>", "", line).rstrip(".")


def _ranges(key: str, spec: str, name: str, shards: Mapping[str, list[int]]) -> list[Range]:
    """The non-empty ranges of records that a TFDS split specification names, in its order."""
    if spec in shards:  # no slice, so that the digits do not pay for importing tfds
        ranges = [(spec, 0, sum(shards[spec]))]
    else:
        import tensorflow_datasets as tfds

        try:
            instruction = tfds.core.ReadInstruction.from_spec(spec)
        except (ValueError, NotImplementedError) as e:
            raise UserError(
                f"{key}: '{spec}' is not a split; write a name with an optional slice, such as 'train', 'train[:500]', "
                "'train[10%:20%]' or a sum of these with '+'"
            ) from e
        for part in spec.split("+"):
            split = part.strip().partition("[")[0]
            if split not in shards and split != "all":
                raise UserError(f"{key}: data set '{name}' has no split '{split}'; it has {', '.join(sorted(shards))}")
        infos = {s: tfds.core.SplitInfo(name=s, shard_lengths=list(n), num_bytes=0) for s, n in shards.items()}
        try:
            absolute = instruction.to_absolute(infos)
        except ValueError as e:
            sizes = ", ".join(f"{s} {sum(n)}" for s, n in sorted(shards.items()))
            raise UserError(f"{key}: '{spec}' reaches beyond the images of data set '{name}', which has {sizes}") from e
        # None stands for an open end.
        ranges = [(a.splitname, a.from_ or 0, sum(shards[a.splitname]) if a.to is None else a.to) for a in absolute]
    ranges = [r for r in ranges if r[1] < r[2]]
    if not ranges:
        raise UserError(f"{key}: '{spec}' of data set '{name}' is empty; name a split or slice that holds images")
    return ranges


def _digits() -> _Store:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    is_test = np.arange(len(labels)) % 3 == 2
    splits = {s: Split(images[m], labels[m].astype(np.int32)) for s, m in (("train", ~is_test), ("test", is_test))}

    def read(ranges: list[Range], num_classes: int) -> Split:
        parts = [(splits[s].images[a:b], splits[s].labels[a:b]) for s, a, b in ranges]
        return Split(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    return _Store({s: [len(split)] for s, split in splits.items()}, 10, read)


def _folder(data_dir: str) -> _Store:
    from pwkd_jax.data import folder

    found, classes = folder.scan(data_dir)

    def read(ranges: list[Range], num_classes: int) -> Split:
        return Split(*folder.decode_all(folder.part(found, ranges)))

    return _Store({s: [len(f)] for s, f in found.items()}, len(classes), read, lambda ranges: folder.part(found, ranges),
                  lambda: folder.many_sizes(found))  # fmt: skip


def _tfds(name: str, data_dir: str) -> _Store:
    # tfds takes over half a second to import, and nothing but this path and split slices needs it.
    import tensorflow_datasets as tfds

    directory = _find(name, data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", bool(data_dir))
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as e:  # json, protobuf, imports of feature classes: tfds has no common type for these
        raise UserError(f"data.data_dir: {directory} is not a readable TFDS data set ({_first_line(e)})") from e
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise UserError(
            f"data.data_dir: {directory} is stored as {builder.info.file_format.value}, but random access needs array_record; "
            f"convert it with python -m pwkd_jax.prepare tfrecord {directory}"
        )
    features = builder.info.features
    names = sorted(features) if isinstance(features, tfds.features.FeaturesDict) else []
    for needed in ("image", "label"):
        if needed not in names:
            raise UserError(
                f"data.name: data set '{name}' has no feature '{needed}'; it has {', '.join(names) or 'no named ones'}"
            )
    image, label = features["image"], features["label"]
    if len(image.shape or ()) != 3 or image.np_dtype != np.uint8:
        raise UserError(
            f"data.name: feature 'image' of data set '{name}' is {np.dtype(image.np_dtype).name} of shape {image.shape}, "
            "but must be uint8 [height, width, channels]"
        )
    if label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
        raise UserError(f"data.name: feature 'label' of data set '{name}' is not one integer per image")
    shards = {s: list(info.shard_lengths) for s, info in builder.info.splits.items()}

    def read(ranges: list[Range], num_classes: int) -> Split:
        return _decode(builder, name, ranges, num_classes)

    return _Store(shards, getattr(label, "num_classes", None) or 0, read, functools.partial(Records, builder.info.data_dir),
                  lambda: None in image.shape)  # fmt: skip


def _decode(builder, name: str, ranges: list[Range], num_classes: int) -> Split:
    """The images and labels of `ranges`, in order.

    One thread: decoding small images is bound by the interpreter, and 2 or 3 threads were slower than one (measured).
    """
    import tensorflow_datasets as tfds

    directory, features = builder.info.data_dir, builder.info.features
    total = sum(stop - start for _, start, stop in ranges)
    images, labels, row = None, np.empty(total, np.int32), 0
    for split, start, stop in ranges:
        source = builder.as_data_source(
            split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format=tfds.core.FileFormat.ARRAY_RECORD,
        )
        for first in range(start, stop, _CHUNK):
            records = _fetch(builder, source, split, range(first, min(first + _CHUNK, stop)))
            for number, record in enumerate(records, first):
                try:
                    example = features.deserialize_example_np(record)
                except Exception as e:  # whatever the image library throws
                    # OpenCV gives None for bytes that are no image, and tfds does not look.
                    reason = "cannot identify image file" if isinstance(e, AttributeError) else _first_line(e)
                    raise UserError(
                        f"data.data_dir: record {number} of split '{split}' in {directory} cannot be decoded "
                        f"({reason}); prepare or copy the data set again"
                    ) from e
                image, label = example["image"], int(example["label"])
                if images is None:
                    images = np.empty((total, *image.shape), np.uint8)
                if image.shape != images.shape[1:]:
                    raise UserError(
                        f"data.name: images of data set '{name}' differ in size: record {number} of split '{split}' is "
                        f"{_size(image.shape)}, others are {_size(images.shape[1:])}; all must have one size, or be "
                        "streamed at a data.image_size"
                    )
                if not 0 <= label < num_classes:
                    raise UserError(
                        f"data.num_classes: record {number} of split '{split}' in {directory} has label {label}; with "
                        f"{num_classes} classes labels are 0 to {num_classes - 1}"
                    )
                images[row], labels[row] = image, label
                row += 1
    return Split(images, labels)


def _fetch(builder, source, split: str, numbers: range) -> list[bytes]:
    """The serialised records `numbers` of `split`."""
    try:
        records = source.__getitems__(numbers)
    except RuntimeError:
        records = [b""]
    if all(records):  # a file cut at its first 64 KiB reads as empty records, without an error
        return records
    records = []
    for number in numbers:  # one at a time, to name the record and the file at fault
        try:
            records.append(source[number])
            reason = "" if records[-1] else "empty record"
        except RuntimeError as e:
            reason = _first_line(e)
        if reason:
            info = builder.info.splits[split]
            path = info.filepaths[bisect.bisect_right(list(itertools.accumulate(info.shard_lengths)), number)]
            what = "cannot be read" if path.exists() else "is missing"
            raise UserError(
                f"data.data_dir: file {path} {what} at record {number} of split '{split}' ({reason}); "
                "prepare or copy the data set again"
            )
    return records
