"""CIFAR-10 and CIFAR-100 from the binary archives of their authors (https://www.cs.toronto.edu/~kriz/cifar.html), with the
features, names, splits and version of TFDS's own data sets; images are stored as PNG, without loss, in the archive's order."""

import dataclasses
import functools
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pwkd_jax.data import download, tfds_writer
from pwkd_jax.errors import UserError

_PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """One archive. labels: {feature: (file of its class names, number of classes)} in the order of the label bytes."""

    archive: str
    md5: str
    title: str
    splits: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, tuple[str, int]]

    @property
    def record(self) -> int:
        """Bytes of one image and its labels."""
        return len(self.labels) + _PIXELS


# The sums stand on the authors' page.
LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "CIFAR-10",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        {"label": ("batches.meta.txt", 10)},
    ),
    "cifar100": Layout(
        "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "CIFAR-100",
        {"train": ("train.bin",), "test": ("test.bin",)},
        {"coarse_label": ("coarse_label_names.txt", 20), "label": ("fine_label_names.txt", 100)},
    ),
}  # fmt: skip
URL = "https://www.cs.toronto.edu/~kriz/"
VERSION = "3.0.2"


def plan(name: str, data_dir: Path, archive: Path | None = None, verified: bool = True) -> tfds_writer.Plan:
    """How the archive becomes data_dir/name/3.0.2. Without `archive` it is downloaded to data_dir/downloads, or found there.
    verified: whether its md5 has to be the official one. Raises UserError."""
    layout = LAYOUTS[name]
    if archive is None:
        archive = data_dir / "downloads" / layout.archive
        if not archive.exists():
            download.fetch(URL + layout.archive, archive, "md5", layout.md5)
    if verified:
        download.verify(archive, "md5", layout.md5)
    content = _read(archive, layout)
    names = {key: _class_names(archive, content[file], classes) for key, (file, classes) in layout.labels.items()}
    shards = []
    for split, files in layout.splits.items():
        data = b"".join(content[file] for file in files)
        _check(archive, layout, split, data)
        for first, end in tfds_writer.bounds(len(data), len(data) // layout.record):
            make = functools.partial(records, name, archive, split, first, end, names)
            part = data[first * layout.record : end * layout.record]
            source = [zlib.crc32(part), first, names]
            shards.append(tfds_writer.Shard(split, end - first, len(part), source, make))
    lengths = {split: [s.length for s in of] for split, of in tfds_writer.splits_of(shards).items()}
    describe = functools.partial(_describe, name, names, lengths)
    return tfds_writer.Plan(data_dir / name, name, VERSION, shards, describe)


def records(
    name: str, archive: Path, split: str, first: int, end: int, names: Mapping[str, list[str]]
) -> Iterator[bytes]:  # fmt: skip
    """The serialised examples `first` to `end` of `split`."""
    import PIL.Image

    layout = LAYOUTS[name]
    content = _read(archive, layout, layout.splits[split])
    data = np.frombuffer(b"".join(content[file] for file in layout.splits[split]), np.uint8).reshape(-1, layout.record)
    serialise = tfds_writer.serialiser(_features(name, names))
    for number in range(first, end):
        row, labels = data[number], len(layout.labels)
        buffer = io.BytesIO()
        PIL.Image.fromarray(np.ascontiguousarray(row[labels:].reshape(3, 32, 32).transpose(1, 2, 0))).save(buffer, "png")
        values = dict(zip(layout.labels, map(int, row[:labels]), strict=True))
        yield serialise({"id": f"{split}_{number:05d}", "image": buffer.getvalue(), **values})


def _features(name: str, names: Mapping[str, list[str]]):
    import tensorflow_datasets as tfds

    labels = {key: tfds.features.ClassLabel(names=names[key]) for key in LAYOUTS[name].labels}
    return tfds.features.FeaturesDict({"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3)), **labels})


def _describe(name: str, names, lengths, folder: Path, files: Mapping[str, list[str]]) -> None:
    tfds_writer.describe(
        folder, files, name=name, version=VERSION, module="tensorflow_datasets.image_classification.cifar",
        features=_features(name, names), lengths=lengths,
        description=f"{LAYOUTS[name].title}: colour images of 32x32 pixels, from the authors' binary archive.",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    )  # fmt: skip


def _read(archive: Path, layout: Layout, files: tuple[str, ...] = ()) -> dict[str, bytes]:
    """{file: its content} of the archive's `files`, by default all that the layout has."""
    wanted = set(files) or {file for of in layout.splits.values() for file in of} | {f for f, _ in layout.labels.values()}
    found = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                file = Path(member.name).name
                if file in wanted and member.isfile():
                    found[file] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise UserError(f"{archive}: is cut off or no archive; download it again") from e
    except OSError as e:  # gzip's own error has no strerror
        raise UserError(f"{archive}: cannot be read ({e.strerror or e})") from e
    if missing := wanted - set(found):
        raise UserError(f"{archive}: lacks {', '.join(sorted(missing))}; it should be {layout.archive} of {URL}")
    return found


def _class_names(archive: Path, content: bytes, classes: int) -> list[str]:
    names = [line for line in content.decode(errors="replace").splitlines() if line]
    if len(set(names)) != classes or len(names) != classes:
        raise UserError(f"{archive}: names {len(set(names))} classes where there should be {classes}; download it again")
    return names


def _check(archive: Path, layout: Layout, split: str, data: bytes) -> None:
    if not data or len(data) % layout.record:
        raise UserError(
            f"{archive}: its {split} images take {len(data)} bytes, which is no multiple of {layout.record}; download it again"
        )
    labels = np.frombuffer(data, np.uint8).reshape(-1, layout.record)[:, : len(layout.labels)]
    for column, (key, (_, classes)) in enumerate(layout.labels.items()):
        if (wrong := labels[:, column].max()) >= classes:
            raise UserError(f"{archive}: has {key} {wrong} among its {split} images; there are {classes}, from 0")
