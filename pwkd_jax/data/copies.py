"""A data set on a bucket, copied once onto a disk of this machine: what a run reads of it, with the bucket's checksums.

DIR/BUCKET/NAME is what lies at gs://BUCKET/NAME. A file is there under its own name when it is whole; what has come of one
stays in FILE.part, and the next command goes on from there. `.copied.json` holds the checksum of every file that was compared,
so that a second command reads none of them, and a file that changed on the bucket is copied again.
"""

import base64
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path

import google_crc32c
import tqdm

from pwkd_jax import storage
from pwkd_jax.data import slices
from pwkd_jax.errors import UserError

_THREADS, _CHUNK = 8, 16 << 20
_READS_BUCKETS = (0, 8, 6)  # array_record, by gRPC
_SHARD = re.compile(r"-(\w+)\.\w+-\d+-of-\d+$")


def copied(name: str, data_dir: str, copy: str, specs: Mapping[str, str]) -> str:
    """`data_dir`, or of one on a bucket the folder below `copy` that holds what `specs` ask of the data set `name`.

    Without `copy` it stays where it is, if it is in array_record, whose own reader reads Google's buckets. specs: {key:
    specification} of the splits. Raises UserError.
    """
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", data_dir):
        return data_dir
    place = storage.path(data_dir, "data.data_dir")
    if not copy:
        if reason := _not_in_place(name):
            raise UserError(
                f"data.data_dir: '{data_dir}' is not a folder of this machine, and {reason}; give data.copy=DIR, into which "
                "what is needed is copied once, or mount the bucket as a folder"
            )
        return data_dir
    target = storage.path(copy, "data.copy").joinpath(*place.parts[2:])
    if not isinstance(target, Path):
        raise UserError(f"data.copy: '{copy}' is not a folder of this machine")
    asked = [slices.asked(key, spec) for key, spec in specs.items()]
    splits = None if None in asked else {split for names in asked for split in names}
    wanted = _of_folder(place, splits) if name == "folder" else _of_tfds(name, place, splits)
    try:
        with _alone(target):
            _bring(place, target, wanted)
    except storage.Unreachable:
        raise
    except OSError as e:
        raise UserError(f"data.copy: '{target}' cannot be written ({e.strerror})") from e
    return str(target)


def _not_in_place(name: str) -> str:
    """Why records of the data set `name` cannot be read from a bucket, one by one; "" where they can."""
    if name == "folder":
        return "images of a folder are not read from there"
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return "array_record reads Google's own servers only, not STORAGE_EMULATOR_HOST"
    have = importlib.metadata.version("array_record")
    if tuple(map(int, re.findall(r"\d+", have)[:3])) < _READS_BUCKETS:
        wanted = ".".join(map(str, _READS_BUCKETS))
        return f"array_record {have} does not read buckets, as {wanted} does"
    return ""


def _of_folder(place: Path, splits: set[str] | None) -> dict[str, storage.Entry]:
    """Of SPLIT/CLASS/IMAGE those of some splits, and lists that lie beside them."""
    found = storage.listed(place)
    if not found:
        raise UserError(f"data.data_dir: there is nothing at '{place}'")
    return {n: e for n, e in found.items() if "/" not in n or splits is None or n.partition("/")[0] in splits}


def _of_tfds(name: str, place: Path, splits: set[str] | None) -> dict[str, storage.Entry]:
    """Of a version of a data set what describes it, and the files of some splits."""
    known, _, version = name.partition(":")
    found = storage.listed(place / known)
    versions = [m[1] for n in found if (m := re.fullmatch(r"(\d+\.\d+\.\d+)/dataset_info\.json", n))]
    if version:
        versions = [v for v in versions if v == version]
    if not versions:
        have = ", ".join(storage.names(place)[:12]) or "nothing"
        raise UserError(f"data.name: '{place}' holds no prepared data set '{name}' (it holds {have}); prepare or copy it there")
    begin = max(versions, key=lambda v: tuple(map(int, v.split(".")))) + "/"

    def needed(file: str) -> bool:
        shard = _SHARD.search(file)
        return file.startswith(begin) and not (shard and splits is not None and shard[1] not in splits)

    return {f"{known}/{file}": entry for file, entry in found.items() if needed(file)}


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Other processes of this machine that want the same wait until it is there."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(storage.lock(target / ".copying"))
                break
            except storage.Held:
                time.sleep(0.5)
        yield


def _bring(place: Path, target: Path, wanted: Mapping[str, storage.Entry]) -> None:
    record = target / ".copied.json"
    try:
        known = json.loads(storage.read(record))
    except (OSError, ValueError):
        known = {}
    left = {n: e for n, e in wanted.items() if known.get(n) != e.crc32c or _size(target / n) != e.size}
    if not left:
        return
    total = sum(e.size for e in left.values())
    there = sum(max(_size(target / n), _size(target / f"{n}.part")) for n in left)
    free = shutil.disk_usage(target).free
    if total - there > free:
        raise UserError(
            f"data.copy: '{target}' has {free / 1e9:.1f} GB free, and {(total - there) / 1e9:.1f} GB are to be copied there; "
            "give another folder"
        )
    print(f"copying {len(left)} files, {total / 1e9:.2f} GB, from {place} to {target}", file=sys.stderr)
    done, last = threading.Lock(), time.monotonic()
    bar = tqdm.tqdm(total=total, desc="copy", unit="B", unit_scale=True, leave=False, disable=None)
    pool = futures.ThreadPoolExecutor(_THREADS)
    try:
        tasks = {pool.submit(_one, place / n, target / n, e, bar): n for n, e in left.items()}
        for task in futures.as_completed(tasks):
            task.result()
            known[tasks[task]] = left[tasks[task]].crc32c
            with done:
                if time.monotonic() - last > 5:
                    storage.replace(record, json.dumps(known))
                    last = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        storage.replace(record, json.dumps(known))


def _size(file: Path) -> int:
    """In bytes; -1 where there is none."""
    return storage.size(file) if storage.is_file(file) else -1


def _one(source: Path, file: Path, entry: storage.Entry, bar: tqdm.tqdm) -> None:
    """Bring one file, unless the one that is there is it. Raises UserError where it comes damaged twice."""
    if _size(file) == entry.size and checksum(file) == entry.crc32c:
        bar.update(entry.size)
        return
    part = file.with_name(file.name + ".part")
    for _ in range(2):
        _rest(source, part, entry.size, bar)
        if checksum(part) == entry.crc32c:
            part.replace(file)
            return
        part.unlink()
    raise UserError(f"{source}: comes with another checksum than the bucket gives for it, {entry.crc32c}; put it there anew")


def _rest(source: Path, part: Path, size: int, bar: tqdm.tqdm) -> None:
    """Append to `part` what it lacks of `source`."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        at = file.tell()
        bar.update(at)
        while at < size:
            chunk = storage.read_part(source, at, min(at + _CHUNK, size))
            file.write(chunk)
            file.flush()
            at += len(chunk)
            bar.update(len(chunk))
        file.truncate(size)


def checksum(file: Path) -> str:
    """The CRC-32C of a file as buckets write it."""
    digest = google_crc32c.Checksum()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()
