"""ImageNet from ILSVRC2012_img_train.tar (a tar of one tar a class) and ILSVRC2012_img_val.tar, with the features, splits and
version of TFDS's imagenet2012.

Every image's bytes are kept as they are: TFDS re-encodes the one PNG and the 22 CMYK JPEGs among them, here they stay for the
reader, which decodes by content. The tars are indexed and read in place. Images are ordered by a hash of their file names, so
that a slice such as 'train[:10%]' holds every class.
"""

import functools
import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pwkd_jax.data import download, tfds_writer
from pwkd_jax.errors import UserError

NAME, VERSION = "imagenet2012", "5.1.0"
_LABELS = "datasets/imagenet2012/labels.txt"
_VALIDATION = "datasets/imagenet2012/validation_labels.txt"
_CHECKSUMS = "datasets/imagenet2012/checksums.tsv"

# (its file name, its class, its first byte in the tar, its bytes)
Image = tuple[str, str, int, int]


def plan(
    data_dir: Path, train: Path, validation: Path, labels: Path | None = None, verified: bool = True, workers: int = 1
) -> tfds_writer.Plan:  # fmt: skip
    """How the two tars become data_dir/imagenet2012/5.1.0.

    labels: the synset of each validation image, one a line, in the order of their file names; TFDS's own list where not given.
    verified: whether size and SHA-256 have to be the official ones; a file that was found so is not read again for it until
    it changes. Raises UserError.
    """
    known = _synsets()
    for path in (train, validation):
        if not path.is_file():
            raise UserError(f"{path}: is no file; give the tar as it was downloaded")
    if verified:
        _verify(data_dir, {"train": train, "val": validation}, workers)
    splits = {"train": _train_index(train, known), "validation": _validation_index(validation, labels, known)}
    shards = []
    for split, path in (("train", train), ("validation", validation)):
        images = sorted(splits[split], key=lambda image: (hashlib.blake2b(image[0].encode()).digest(), image[0]))
        sizes = [size for *_, size in images]
        for first, end in tfds_writer.bounds(sum(sizes), len(images)):
            part = images[first:end]
            shards.append(
                tfds_writer.Shard(split, end - first, sum(sizes[first:end]), part, functools.partial(records, path, part))
            )
    lengths = {split: [s.length for s in of] for split, of in tfds_writer.splits_of(shards).items()}
    return tfds_writer.Plan(data_dir / NAME, NAME, VERSION, shards, functools.partial(_describe, lengths))


def records(tar: Path, images: Sequence[Image]) -> Iterator[bytes]:
    """The serialised examples of `images`, in order. Holds their bytes at once, to read the tar from front to back."""
    content = {}
    try:
        with open(tar, "rb") as file:
            for name, _, start, size in sorted(images, key=lambda image: image[2]):
                file.seek(start)
                content[name] = file.read(size)
                if len(content[name]) < size:
                    raise UserError(f"{tar}: is cut off in {name}; download it again")
    except OSError as e:
        raise UserError(f"{tar}: cannot be read ({e.strerror})") from e
    serialise = tfds_writer.serialiser(_features())
    for name, synset, *_ in images:
        yield serialise({"file_name": name, "image": content.pop(name), "label": synset})


def _features():
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict({
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=_synsets()),
        "file_name": tfds.features.Text(),
    })  # fmt: skip


def _describe(lengths, folder: Path, files: Mapping[str, list[str]]) -> None:
    tfds_writer.describe(
        folder, files, name=NAME, version=VERSION,
        module="tensorflow_datasets.datasets.imagenet2012.imagenet2012_dataset_builder", features=_features(), lengths=lengths, homepage="https://image-net.org/",
        description="ILSVRC2012 from its tars; every image's bytes as they are there, one PNG and 22 CMYK JPEGs included.",
    )  # fmt: skip


def _packaged(path: str) -> list[str]:
    """The lines of a file that TFDS brings."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(path).read_text().split("\n")


@functools.cache
def _synsets() -> list[str]:
    """The 1000 classes, in the order of their labels."""
    return [line for line in _packaged(_LABELS) if line]


def _verify(data_dir: Path, tars: Mapping[str, Path], workers: int) -> None:
    official = {}
    for line in filter(None, _packaged(_CHECKSUMS)):
        url, size, digest, *_ = line.split()
        official[url.rpartition("_")[2].removesuffix(".tar")] = (int(size), digest)
    # Sizes first: they cost nothing, and tell most mistakes.
    for which, path in tars.items():
        expected, found = official[which][0], path.stat().st_size
        if found != expected:
            raise UserError(
                f"{path}: has {found} bytes, but ILSVRC2012_img_{which}.tar has {expected}; download it again, or give "
                "--no-checksum if it is meant to differ"
            )
    incomplete = tfds_writer.incomplete_folder(data_dir / NAME / VERSION)
    wanted = []
    for which, path in tars.items():
        state = path.stat()
        mark = incomplete / f"verified.{official[which][1]}.{state.st_size}.{state.st_mtime_ns}"
        if not mark.exists():
            wanted.append((path, official[which][1], mark))
    for _ in tfds_writer.run(_verify_one, wanted, wanted, workers):
        pass


def _verify_one(path: Path, digest: str, mark: Path) -> None:
    download.verify(path, "sha256", digest)
    with tfds_writer.writing_to(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _members(path: Path, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(file name, first byte, bytes) of each file in the tar that lies in `path` between the bytes `start` and `end`."""
    damaged = UserError(f"{path}: is cut off or no tar; download it again")
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > end:
                        raise damaged
                    if member.isfile():
                        yield Path(member.name).name, member.offset_data, member.size
                # tarfile takes a damaged or missing header for the end; the end is a block of zeros.
                file.seek(tar.offset)
                if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
                    raise damaged
    except tarfile.TarError as e:
        raise damaged from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def _train_index(path: Path, known: Sequence[str]) -> list[Image]:
    images, labels = [], set(known)
    for name, start, length in _members(path, 0, path.stat().st_size):
        synset = name.removesuffix(".tar")
        if synset not in labels:
            raise UserError(f"{path}: holds {name}, which is none of ImageNet's 1000 classes, as n01440764.tar is")
        images += [(image, synset, first, size) for image, first, size in _members(path, start, start + length)]
    return _checked(path, images)


def _validation_index(path: Path, labels: Path | None, known: Sequence[str]) -> list[Image]:
    members = sorted(_members(path, 0, path.stat().st_size))
    try:
        lines = labels.read_text().split() if labels else list(filter(None, _packaged(_VALIDATION)))
    except (OSError, ValueError) as e:
        raise UserError(f"--labels: {labels} cannot be read ({getattr(e, 'strerror', None) or e})") from e
    if len(lines) != len(members):
        whose = f"{labels} has" if labels else "TFDS's list of the official ones has"
        raise UserError(
            f"--labels: {path} holds {len(members)} images, but {whose} {len(lines)} labels; give a file of one synset a line, "
            "in the order of the images' file names"
        )
    if unknown := sorted(set(lines) - set(known)):
        raise UserError(f"--labels: {unknown[0]} in {labels} is none of ImageNet's 1000 classes, as n01440764 is")
    return _checked(path, [(name, label, *where) for (name, *where), label in zip(members, lines, strict=True)])


def _checked(path: Path, images: list[Image]) -> list[Image]:
    if not images:
        raise UserError(f"{path}: holds no images; give the tar as it was downloaded")
    seen = set()
    for name, _, _, size in images:
        if not size or name in seen:
            raise UserError(f"{path}: {name} {'occurs twice' if size else 'is empty'}; download it again")
        seen.add(name)
    return images
