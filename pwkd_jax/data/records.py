"""A TFDS directory in array_record: where it lies, and its encoded images and labels, record by record, undecoded."""

import bisect
import functools
import hashlib
import io
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from pwkd_jax import storage
from pwkd_jax.data.images import Unreadable
from pwkd_jax.errors import UserError

_CHUNK = 256


class Records:
    """Ranges (split, first, one past the last) of a prepared TFDS directory, laid end to end. Can be pickled: a process
    opens the files when it first reads."""

    def __init__(self, directory: str, ranges: Sequence[tuple[str, int, int]]):
        self._directory, self._ranges = str(directory), list(ranges)
        self._ends = list(itertools.accumulate(stop - start for _, start, stop in self._ranges))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self):
        return {key: self.__dict__[key] for key in ("_directory", "_ranges", "_ends")}

    @functools.cached_property
    def _builder(self):
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self._directory)

    @functools.cached_property
    def _opened(self) -> dict:
        import tensorflow_datasets as tfds

        options = {"deserialize_method": tfds.decode.DeserializeMethod.RAW_BYTES,
                   "file_format": tfds.core.FileFormat.ARRAY_RECORD}  # fmt: skip
        return {s: self._builder.as_data_source(s, **options) for s in {split for split, _, _ in self._ranges}}

    def _place(self, index: int) -> tuple[str, int]:
        """(split, number of the record in it)."""
        part = bisect.bisect_right(self._ends, index)
        split, _, stop = self._ranges[part]
        return split, index - self._ends[part] + stop

    def name(self, index: int) -> str:
        """What a message calls it."""
        split, number = self._place(index)
        return f"record {number} of split '{split}' in {self._directory}"

    def missing(self) -> list[Path]:
        """The files of the directory that should be there and are not."""
        names = set(storage.names(storage.path(self._directory)))
        return [path for path in self._files() if path.name not in names]

    def _files(self) -> list[Path]:
        splits = sorted({split for split, _, _ in self._ranges})
        return [storage.path(str(p)) for s in splits for p in self._builder.info.splits[s].filepaths]

    def read(self, indices: Sequence[int]) -> list[tuple[bytes | Unreadable, int]]:
        """[(encoded image, label)] of `indices`; an Unreadable stands for a record that cannot be read or parsed."""
        return [self._parse(record) for record in self._serialised(indices)]

    def _serialised(self, indices: Sequence[int]) -> list[bytes | Unreadable]:
        places = [self._place(int(i)) for i in indices]
        records: list = [b""] * len(places)
        for split in {s for s, _ in places}:
            rows = [row for row, (s, _) in enumerate(places) if s == split]
            numbers = [places[row][1] for row in rows]
            try:
                found = self._opened[split].__getitems__(numbers)
            except RuntimeError:  # one at a time, to lose only the record at fault
                found = [self._one(split, number) for number in numbers]
            for row, record in zip(rows, found, strict=True):
                records[row] = record
        return records

    def _one(self, split: str, number: int) -> bytes | Unreadable:
        try:
            return self._opened[split][number]
        except RuntimeError as e:
            return Unreadable((str(e).strip() or "it cannot be read").splitlines()[0].rstrip("."))

    @staticmethod
    def _parse(record: bytes | Unreadable) -> tuple[bytes | Unreadable, int]:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        if isinstance(record, Unreadable):
            return record, 0
        try:
            features = tf_example_pb2.Example.FromString(record).features.feature
            return features["image"].bytes_list.value[0], int(features["label"].int64_list.value[0])
        except (DecodeError, IndexError):
            # A file cut at its first 64 KiB reads as empty records, without an error.
            return Unreadable("it holds no image and label" if record else "empty record"), 0

    def labels(self) -> np.ndarray:
        """int32 [N]. Every record has to be read for it, so the labels are kept: beside the data set, or in the user's
        cache where that cannot be written, under a name that changes when the files do."""
        paths = self._cache()
        for path in paths:
            try:
                kept, checksum = storage.read_bytes(path)[:-4], storage.read_bytes(path)[-4:]
            except OSError:
                continue
            if checksum == google_crc32c.value(kept).to_bytes(4, "little"):
                return np.load(io.BytesIO(kept), allow_pickle=False)
        print(f"reading the labels of {len(self)} images once, from {self._directory}", file=sys.stderr)
        labels, whole = np.empty(len(self), np.int32), True
        for start in range(0, len(self), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(self)))
            found = self.read(indices)
            labels[start : start + len(indices)] = [label for _, label in found]
            whole = whole and not any(isinstance(encoded, Unreadable) for encoded, _ in found)
        content = io.BytesIO()
        np.save(content, labels)
        content.write(google_crc32c.value(content.getvalue()).to_bytes(4, "little"))
        for path in paths if whole else ():  # those of unreadable records are not known
            try:
                storage.replace(path, content.getvalue())
                break
            except OSError:
                continue
        return labels

    def _cache(self) -> list[Path]:
        # The name says how it is laid out: labels, then their CRC-32C.
        digest = hashlib.sha256(repr(("crc32c", self._directory, self._ranges)).encode())
        place = storage.path(self._directory)
        on_bucket = None if isinstance(place, Path) else storage.listed(place)
        for path in self._files():
            stat = None if on_bucket else path.stat()
            known = on_bucket[path.name] if on_bucket else (stat.st_size, stat.st_mtime_ns)
            digest.update(repr((path.name, *known)).encode())
        name = f".labels-{digest.hexdigest()[:16]}.npy"
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return [place / name, home / "pwkd_jax" / name[1:]]


_VERSION = re.compile(r"\d+\.\d+\.\d+")


def _versions(home: Path) -> dict[tuple[int, ...], Path]:
    """{(major, minor, patch): folder} of the prepared versions right below `home`."""
    found = [home / n for n in storage.names(home) if _VERSION.fullmatch(n) and storage.is_file(home / n / "dataset_info.json")]
    return {tuple(map(int, d.name.split("."))): d for d in found}


def find(name: str, data_dir: str, given: bool) -> Path:
    """The folder of data set `name[/config][:version]`, laid out as TFDS does it: data_dir/name[/config]/version.

    Looked up here because `tfds.builder` falls back to the data set's code, which asks the network, where files are
    missing.
    """
    match = re.fullmatch(rf"(\w[\w-]*(?:/\w[\w.-]*)?)(?::({_VERSION.pattern}))?", name)
    if not match:
        raise UserError(f"data.name: '{name}' is not a data set's name; write name, name/config or name:1.0.0")
    root = storage.path(data_dir, "data.data_dir")
    if not storage.is_folder(root):
        what = "directory" if given else "it is empty, and TFDS's default directory"
        raise UserError(f"data.data_dir: {what} {root} does not exist; give the folder in which TFDS prepared '{match[1]}'")
    home, version = root / match[1], match[2]
    versions = _versions(home)
    if version:
        versions = {v: d for v, d in versions.items() if d.name == version}
    if versions:
        return versions[max(versions)]
    if storage.is_file(root / "dataset_info.json"):
        raise UserError(
            f"data.data_dir: {root} is one version of a data set; give the folder that holds '{match[1]}', "
            "its parent's parent (with a TFDS config, one more)"
        )
    configs = [n for n in storage.names(home) if storage.is_folder(home / n) and _versions(home / n)]
    if configs:
        raise UserError(f"data.name: '{match[1]}' comes in configs, add one: {', '.join(f'{match[1]}/{c}' for c in configs)}")
    if others := _versions(home):
        have = ", ".join(d.name for _, d in sorted(others.items()))
        raise UserError(f"data.name: {home} has no version {version}; it has {have}")
    have = [n for n in storage.names(root) if storage.is_folder(root / n) and not n.startswith(".")]
    raise UserError(
        f"data.name: {root} holds no prepared data set '{match[1]}' (it holds {', '.join(have[:12]) or 'nothing'}); "
        "nothing is downloaded here, so prepare it first (python -m pwkd_jax.prepare -h) or correct data.data_dir"
    )
