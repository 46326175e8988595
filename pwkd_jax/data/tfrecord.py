"""TFDS directories in TFRecord, which cannot be read at random, as the same examples in array_record."""

import functools
import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from pwkd_jax.data import tfds_writer
from pwkd_jax.errors import UserError

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def records(path: Path, length: int | None = None) -> Iterator[bytes]:
    """The records of a TFRecord file: each is its length (uint64), the length's masked CRC-32C, the bytes, theirs.

    length: how many there should be. Raises UserError, naming the file and the record.
    """
    import google_crc32c

    def checked(data: bytes, stored: bytes) -> bool:
        crc = google_crc32c.value(data)
        return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little") == stored

    number = 0
    try:
        with open(path, "rb") as file:
            while head := file.read(12):
                # The length is trusted only after its own checksum: a wrong one could ask for all memory.
                if len(head) < 12 or not checked(head[:8], head[8:]):
                    what = "is cut off" if len(head) < 12 else "has a wrong checksum"
                    raise UserError(f"{path}: record {number} {what}; copy or prepare the file again")
                (size,) = struct.unpack("<Q", head[:8])
                body = file.read(size + 4)
                if len(body) < size + 4:
                    raise UserError(f"{path}: record {number} is cut off; copy or prepare the file again")
                if not checked(body[:size], body[size:]):
                    raise UserError(f"{path}: record {number} has a wrong checksum; copy or prepare the file again")
                yield body[:size]
                number += 1
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    if length is not None and number != length:
        raise UserError(f"{path}: holds {number} records, but dataset_info.json says {length}; copy or prepare it again")


def plan(directory: Path, out: Path | None) -> tfds_writer.Plan:
    """How `directory`, one version of a data set, becomes array_record below the data directory `out`; without it, that is
    the source's own data directory with '-array_record' added to its name. The source is only read. Raises UserError."""
    import tensorflow_datasets as tfds

    directory = directory.expanduser().absolute()
    path = directory / "dataset_info.json"
    if not path.is_file():
        inner = sorted(d.parent for d in directory.glob("**/dataset_info.json")) if directory.is_dir() else []
        hint = f"give one of {', '.join(map(str, inner[:3]))}" if inner else "give the folder of one version, as .../name/1.0.0"
        raise UserError(f"{directory}: holds no dataset_info.json; {hint}")
    try:
        info = json.loads(path.read_text())
        splits = tfds.builder_from_directory(directory).info.splits
        name, version = info["name"], info["version"]
        stored = info.get("fileFormat", "tfrecord")
    except Exception as e:  # json, protobuf, imports of feature classes: tfds has no common type for these
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{directory}: is not a readable TFDS data set ({reason})") from e
    if stored != "tfrecord":
        ready = "; it can be used as it is" if stored == "array_record" else ""
        raise UserError(f"{directory}: is stored as {stored}, not tfrecord{ready}")
    inner = Path(name, *filter(None, [info.get("configName")]), version)
    root = directory.parents[len(inner.parts) - 1]
    if out is None:
        if root / inner != directory:
            raise UserError(f"--out: give a data directory, for {directory} does not end in {inner}")
        out = root.with_name(f"{root.name}-array_record")
    home = (out.expanduser().absolute() / inner).parent
    if (home / version).resolve() == directory.resolve():
        raise UserError(f"--out: {out} holds the source itself; give another directory")

    shards, sources = [], set()
    for split in splits.values():
        for file, length in zip(map(Path, split.filepaths), split.shard_lengths, strict=True):
            if not file.is_file():
                raise UserError(f"{file}: is missing; copy or prepare the data set again")
            size, changed = file.stat().st_size, file.stat().st_mtime_ns
            sources.add(file.name)
            make = functools.partial(records, file, length)
            shards.append(tfds_writer.Shard(split.name, length, size, [file.name, size, changed], make))
    if not shards:
        raise UserError(f"{directory}: says of itself that it has no files of examples; prepare it again")
    return tfds_writer.Plan(home, name, version, shards, functools.partial(_describe, directory, sources))


def _describe(directory: Path, sources: set[str], folder: Path, names: Mapping[str, list[str]]) -> None:
    for file in directory.iterdir():
        if file.is_file() and file.name not in sources:
            shutil.copyfile(file, folder / file.name)
    info = json.loads((directory / "dataset_info.json").read_text())
    info.pop("alternativeFileFormats", None)  # their files stay behind, or are what is written here
    info["fileFormat"] = "array_record"
    for split in info["splits"]:
        split["filepathTemplate"] = TEMPLATE
        assert len(names[split["name"]]) == len(split["shardLengths"])
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
