"""Where images come from: the digits bundled with scikit-learn, a folder of images per class, or any TFDS directory in
array_record, read without TensorFlow and without the network. Decoded once into RAM, or streamed (`stream`)."""

import bisect
import dataclasses
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pwkd_jax.data import digits, slices
from pwkd_jax.data.copies import copied
from pwkd_jax.data.records import Records
from pwkd_jax.data.records import find as _find
from pwkd_jax.data.slices import Range
from pwkd_jax.data.splits import Dataset, Split, Streaming
from pwkd_jax.data.stream import Stream
from pwkd_jax.errors import UserError

# Records fetched by one call: reading them one at a time costs as much as decoding them (measured: 130 us each).
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class _Store:
    """What `load` needs of a place that holds images.

    shards: {split: number of records in each of its files}; num_classes: 0 where the store does not say;
    read(ranges, num_classes) -> Split; labels(ranges) -> int32 [N]; source(ranges) -> a `stream.Source` of the same images,
    still encoded; many_sizes(): whether it is, or may be, of images of many sizes. names: of the classes, where it has any;
    notes: {split: what a user should know of it, clauses for a message}.
    """

    shards: Mapping[str, list[int]]
    num_classes: int
    read: Callable[[list[Range], int], Split]
    labels: Callable[[list[Range]], np.ndarray]
    source: Callable | None = None
    many_sizes: Callable[[], bool] = lambda: False
    names: Sequence[str] = ()
    notes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def load(
    name: str, data_dir: str = "", train_split: str = "train", test_split: str = "test", num_classes: int = 0,
    streaming: Streaming | None = None, pixel_range: tuple[float, ...] = (), validation_split: str = "",
) -> Dataset:  # fmt: skip
    """The data set `name`, decoded into RAM; with `streaming` its splits are `stream.Stream`, of images of any size.

    `digits` is scikit-learn's copy of the UCI test set of handwritten digits: 1,797 gray 8x8 images in 10 classes,
    values 0..16 stretched to 0..255. It has no official split; here image i is a test image where i % 3 == 2 (599) and
    a training image otherwise (1,198). The same writers occur on both sides, so test accuracy is optimistic.

    `folder` is data_dir/SPLIT/CLASS/IMAGE, see `folder.scan`; a slice of a split then holds its first classes alone, and a
    slice of each class is stratified(SPLIT, 80%), see `slices`. pixel_range: (black, white) of samples that are no bytes, see
    `depth`.

    Any other name is a TFDS data set already prepared in array_record: `name[/config][:version]` below `data_dir`, a
    local or mounted folder ('' is TFDS's default, ~/tensorflow_datasets or $TFDS_DATA_DIR); the newest version where
    none is given. Nothing is ever downloaded. It needs features `image` (uint8, one shape throughout) and `label`.

    Splits take TFDS's slices, 'train[:5000]', 'train[10%:20%]', 'train[:100]+train[200:300]', and those of each class, see
    `slices`. Whether the two splits share images is not checked; whether they make a task is, where one is made of them, by
    `soundness`. validation_split: a third one, whose images may be in neither of the others; '' for none. num_classes: 0, or
    what the data set must have (for data sets that do not say: has).

    What of a folder was left out is said on standard error. Raises UserError, naming the config key or the file at fault.
    """
    specs = {"data.train_split": train_split, "data.test_split": test_split}
    if validation_split:
        specs["data.validation_split"] = validation_split
    store, classes = _open(name, data_dir, num_classes, specs, pixel_range)
    # Both specifications are checked before anything is decoded.
    ranges = {key: slices.ranges(key, spec, name, store.shards, store.labels) for key, spec in specs.items()}
    for key, spec in [*specs.items()][:2] if validation_split else []:
        if slices.share(ranges[key], ranges["data.validation_split"]):
            raise UserError(
                f"data.validation_split: '{validation_split}' shares images with {key} '{spec}'; cut it off, as in "
                "data.train_split='stratified(train, 90%)', data.validation_split='stratified(train, 90%:)'"
            )
    _say_notes(store, [stretch for found in ranges.values() for stretch in found])
    train, test, *rest = (_take(store, found, name, classes, streaming) for found in ranges.values())
    if train.image_shape != test.image_shape:
        raise UserError(
            f"data.name: images of data set '{name}' are {_size(train.image_shape)} in '{train_split}' but "
            f"{_size(test.image_shape)} in '{test_split}'; all must have one size, or be streamed at a data.image_size"
        )
    return Dataset(name, train, test, classes, tuple(store.names), rest[0] if rest else None)


def load_split(
    name: str, data_dir: str, split: str, num_classes: int = 0, streaming: Streaming | None = None,
    pixel_range: tuple[float, ...] = (),
) -> tuple[Split, int]:  # fmt: skip
    """(one split of the data set `name`, its number of classes); arguments and errors as `load` has them."""
    store, classes = _open(name, data_dir, num_classes, {"--split": split}, pixel_range)
    ranges = slices.ranges("--split", split, name, store.shards, store.labels)
    _say_notes(store, ranges)
    return _take(store, ranges, name, classes, streaming), classes


def class_names(name: str, data_dir: str, split: str = "") -> tuple[str, ...]:
    """The names of the classes of the data set `name`, in the order of its labels; () where it has none."""
    return tuple(_store(name, data_dir, {"--split": split} if split else None).names)


def many_sizes(name: str, data_dir: str, split: str = "") -> bool:
    """Whether the data set `name`, of a folder its `split`, is of images of many sizes (TFDS: does not promise one), which have
    to be streamed."""
    return _store(name, data_dir, {"--split": split} if split else None).many_sizes()


def _store(name: str, data_dir: str, specs: Mapping[str, str] | None = None, pixel_range: tuple[float, ...] = ()) -> _Store:
    """specs: {key: specification} of the splits that will be read; None: of them all."""
    copied(name, data_dir, "", {})
    if name == "folder":
        return _folder(data_dir, specs, pixel_range)
    return _digits() if name == "digits" else _tfds(name, data_dir)


def _say_notes(store: _Store, ranges: list[Range]) -> None:
    for split in dict.fromkeys(split for split, _, _ in ranges):
        for note in store.notes.get(split, ()):
            print(f"warning: split '{split}': {note}", file=sys.stderr)


def _take(store: _Store, ranges: list[Range], name: str, num_classes: int, streaming: Streaming | None) -> Split:
    if streaming is None:
        return store.read(ranges, num_classes)

    if store.source is None:
        raise UserError(f"data.image_size: {streaming.image_size} is not possible for '{name}', which lies in RAM; set 0")
    source = store.source(ranges)
    if missing := source.missing():
        raise UserError(f"data.data_dir: file {missing[0]} is missing; prepare or copy the data set again")
    return Stream(source, num_classes, streaming)


def _open(
    name: str, data_dir: str, num_classes: int, specs: Mapping[str, str], pixel_range: tuple[float, ...]
) -> tuple[_Store, int]:
    """(the store, its number of classes)."""
    store = _store(name, data_dir, specs, pixel_range)
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


def _digits() -> _Store:
    values, labels = digits.table()
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    is_test = np.arange(len(labels)) % 3 == 2
    splits = {s: Split(images[m], labels[m].astype(np.int32)) for s, m in (("train", ~is_test), ("test", is_test))}

    def read(ranges: list[Range], num_classes: int) -> Split:
        parts = [(splits[s].images[a:b], splits[s].labels[a:b]) for s, a, b in ranges]
        return Split(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def labels(ranges: list[Range]) -> np.ndarray:
        return np.concatenate([splits[s].labels[a:b] for s, a, b in ranges])

    return _Store({s: [len(split)] for s, split in splits.items()}, 10, read, labels)


def _folder(data_dir: str, specs: Mapping[str, str] | None = None, pixel_range: tuple[float, ...] = ()) -> _Store:
    from pwkd_jax.data import folder

    asked = [slices.asked(key, spec) for key, spec in specs.items()] if specs else [None]
    found, classes = folder.scan(data_dir, None if None in asked else [name for names in asked for name in names])

    def read(ranges: list[Range], num_classes: int) -> Split:
        return Split(*folder.decode_all(folder.part(found, ranges), pixel_range))

    # Splits that nobody asked for are known by name, for messages, and not looked into.
    shards = {name: [0] for name in folder.split_names(data_dir)} | {name: [len(files)] for name, files in found.items()}
    return _Store(
        shards, len(classes), read, lambda ranges: folder.part(found, ranges).labels(),
        lambda ranges: folder.part(found, ranges), lambda: folder.many_sizes(found), classes,
        {name: files.notes for name, files in found.items()},
    )  # fmt: skip


def _tfds(name: str, data_dir: str) -> _Store:
    # tfds takes over half a second to import, and nothing but this path and split slices needs it.
    import tensorflow_datasets as tfds

    directory = _find(name, data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", bool(data_dir))
    try:
        builder = tfds.builder_from_directory(directory)
        shards = {s: list(info.shard_lengths) for s, info in builder.info.splits.items()}
        _ = [info.filepaths for info in builder.info.splits.values()], builder.info.available_file_formats()
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

    def read(ranges: list[Range], num_classes: int) -> Split:
        return _decode(builder, name, ranges, num_classes)

    source = functools.partial(Records, builder.info.data_dir)
    # Names that were not given are numbers again.
    names = getattr(label, "names", None) or ()
    return _Store(
        shards, getattr(label, "num_classes", None) or 0, read, lambda ranges: source(ranges).labels(), source,
        lambda: None in image.shape, names,
    )  # fmt: skip


def _decode(builder, name: str, ranges: list[Range], num_classes: int) -> Split:
    """The images and labels of `ranges`, in order.

    One thread: decoding small images is bound by the interpreter, and 2 or 3 threads were slower than one (measured).
    """
    import tensorflow_datasets as tfds

    directory, features = builder.info.data_dir, builder.info.features
    total = sum(stop - start for _, start, stop in ranges)
    images, labels, row = None, np.empty(total, np.int32), 0
    options = {"deserialize_method": tfds.decode.DeserializeMethod.RAW_BYTES,
               "file_format": tfds.core.FileFormat.ARRAY_RECORD}  # fmt: skip
    sources = {split: builder.as_data_source(split, **options) for split in dict.fromkeys(s for s, _, _ in ranges)}
    for split, start, stop in ranges:
        source = sources[split]
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
