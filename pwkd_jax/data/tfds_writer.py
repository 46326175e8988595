"""A data set written as TFDS lays it out in array_record, without TensorFlow: shards in parallel, resumed where it was
stopped, and seen under its own name only when it is whole.

Until then it lives in `home/incomplete.VERSION/`: `plan.json` says what each file is made from, `files/` holds the
finished shards. A shard is written under a temporary name and renamed, and `files/` is renamed to `home/VERSION` at the end.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from multiprocessing import connection
from pathlib import Path
from typing import Any

import tqdm

from pwkd_jax.errors import UserError
from pwkd_jax.storage import replace


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file to be: `length` records of about `size` bytes together.

    source: what it is made from, in JSON's types, so that another run can tell whether it is the same.
    make(): yields the serialised records; it is pickled, to run in another process.
    """

    split: str
    length: int
    size: int
    source: Any
    make: Callable[[], Iterable[bytes]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to write. home: data_dir/name[/config]; describe(folder, names): writes everything but the shards, whose file names
    it gets by split."""

    home: Path
    name: str
    version: str
    shards: Sequence[Shard]
    describe: Callable[[Path, Mapping[str, list[str]]], None]

    @property
    def folder(self) -> Path:
        """Where it will be."""
        return self.home / self.version


def splits_of(shards: Iterable[Shard]) -> dict[str, list[Shard]]:
    """{split: its shards, in order}."""
    found: dict[str, list[Shard]] = {}
    for shard in shards:
        found.setdefault(shard.split, []).append(shard)
    return found


def file_names(name: str, shards: Sequence[Shard]) -> dict[str, list[str]]:
    """{split: the names of its files}, as TFDS gives them."""
    return {
        split: [f"{name}-{split}.array_record-{i:05d}-of-{len(of):05d}" for i in range(len(of))]
        for split, of in splits_of(shards).items()
    }


def already_there(folder: Path) -> bool:
    """Whether a finished data set stands at `folder`. Raises UserError where something else does."""
    if not folder.exists():
        return False
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        stored = info.get("fileFormat", "tfrecord")
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{folder}: exists but is no TFDS data set; move it away or give another directory") from e
    if stored != "array_record":
        raise UserError(
            f"{folder}: exists, stored as {stored}; give another directory, or convert it with 'prepare tfrecord {folder}'"
        )
    return True


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Says in one sentence that `path` cannot be written."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e


@contextlib.contextmanager
def sole(incomplete: Path) -> Iterator[None]:
    """Makes `incomplete` and holds it against a second run at the same time; the kernel lets go when this process ends."""
    with writing_to(incomplete):
        incomplete.mkdir(parents=True, exist_ok=True)
        lock = os.open(incomplete / "lock", os.O_RDWR | os.O_CREAT)
    try:
        # File systems without locks get none.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise UserError(f"{incomplete}: another run is writing it now; wait for that one") from e
        yield
    finally:
        os.close(lock)


def incomplete_folder(folder: Path) -> Path:
    """Where the data set lives until it is whole; TFDS and our reader take it for no version."""
    return folder.with_name(f"incomplete.{folder.name}")


def write(plan: Plan, workers: int) -> Path:
    """Write what is not yet written of `plan` and return its folder. Raises UserError; then finished shards stay."""
    incomplete = incomplete_folder(plan.folder)
    with sole(incomplete):
        files = incomplete / "files"
        with writing_to(incomplete):
            names = file_names(plan.name, plan.shards)
            shards = {n: s for split, of in splits_of(plan.shards).items() for n, s in zip(names[split], of, strict=True)}
            _keep(incomplete, shards)
        missing = [(files / name, shard) for name, shard in shards.items() if not (files / name).exists()]
        if len(missing) < len(shards):
            print(f"{incomplete}: {len(shards) - len(missing)} of {len(shards)} files were written before", file=sys.stderr)
        needed, free = sum(shard.size for _, shard in missing), shutil.disk_usage(files).free
        if needed > free:
            raise UserError(f"{plan.home}: has {free / 1e9:.1f} GB free, but about {needed / 1e9:.1f} GB are to be written")
        with tqdm.tqdm(total=needed, desc=plan.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for size in run(_write_shard, missing, [shard.size for _, shard in missing], workers):
                bar.update(size)
        with writing_to(incomplete):
            plan.describe(files, names)
            os.rename(files, plan.folder)
            _sync(plan.home)
            shutil.rmtree(incomplete)
    return plan.folder


def _keep(incomplete: Path, shards: Mapping[str, Shard]) -> None:
    """Of the files of an earlier run keep those that are made from what they would be made from now."""
    files, path = incomplete / "files", incomplete / "plan.json"
    files.mkdir(exist_ok=True)
    now = {name: hashlib.sha256(json.dumps([s.length, s.source]).encode()).hexdigest() for name, s in shards.items()}
    before = json.loads(path.read_text()) if path.exists() else {}
    stale = [file for file in files.iterdir() if before.get(file.name) != now.get(file.name, "")]
    for file in stale:
        file.unlink()
    replace(path, json.dumps(now))
    if changed := sum(file.name in before for file in stale):
        print(f"{incomplete}: {changed} files were made from other images or labels, and are made anew", file=sys.stderr)


def run(function: Callable, arguments: Sequence[tuple], results: Sequence, workers: int) -> Iterator:
    """Yield results[i] whenever function(*arguments[i]) is done, in `workers` processes (here for 1). What one raises, it
    raises, and starts no more."""
    workers = min(workers, len(arguments))
    if workers <= 1:
        for each, result in zip(arguments, results, strict=True):
            function(*each)
            yield result
        return
    # Spawned, since JAX's threads do not survive a fork.
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        pending = {pool.submit(function, *each): result for each, result in zip(arguments, results, strict=True)}
        for done in futures.as_completed(pending):
            done.result()
            yield pending[done]
    except futures.process.BrokenProcessPool as e:
        raise UserError("--workers: a worker was killed, perhaps for memory; run again with fewer, to go on from here") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is for the parent, which lets the shards at hand be finished; killed without notice, it takes its workers along,
    which would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_shard(path: Path, shard: Shard) -> None:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            writer = ArrayRecordWriter(str(partial), "group_size:1")
            for record in shard.make():
                writer.write(record)
            writer.close()
            # A full disk can leave a short file without an error.
            written = ArrayRecordReader(str(partial)).num_records()
        except RuntimeError as e:
            reason = str(e).partition(";")[0].splitlines()[0]
            raise UserError(f"{path.parent}: cannot be written ({reason}); make room and run again, to go on from here") from e
        if written != shard.length:
            raise UserError(f"{path}: {written} records reached the disk of {shard.length}; make room and run again")
        with writing_to(path.parent):
            _sync(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """To the disk: a rename must not outlive, in a power cut, what was renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bounds(total_size: int, length: int) -> list[tuple[int, int]]:
    """(first, one past the last) record of each shard, in the number that TFDS takes for `total_size` bytes."""
    from tensorflow_datasets.core.utils import shard_utils

    count = shard_utils.ShardConfig.calculate_number_shards(total_size, length)
    ends = shard_utils.get_shard_boundaries(length, count)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def serialiser(features) -> Callable[[Mapping[str, Any]], bytes]:
    """example -> its tf.train.Example as bytes, the same in every process (TFDS's own call leaves map order open)."""
    from tensorflow_datasets.core import example_serializer

    to_proto = example_serializer.ExampleSerializer(features.get_serialized_info()).get_tf_example
    return lambda example: to_proto(features.encode_example(example)).SerializeToString(deterministic=True)


def describe(
    folder: Path, names: Mapping[str, list[str]], *, name: str, version: str, module: str, features, lengths, **about: str
) -> None:
    """Write dataset_info.json, features.json and the label names. lengths: {split: [records in each shard]}."""
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(name, tfds.core.Version(version), str(folder), module)
    info = tfds.core.DatasetInfo(builder=identity, features=features, supervised_keys=("image", "label"), **about)
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.splits.SplitDict([
        tfds.core.SplitInfo(split, list(lengths[split]), sum((folder / n).stat().st_size for n in of))
        for split, of in names.items()
    ]))  # fmt: skip
    info.write_to_directory(folder)
