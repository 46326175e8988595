"""A data set that was made on a disk, sent to a bucket: every file once, what describes it last, compared by checksums."""

import sys
from concurrent import futures
from pathlib import Path

import tqdm

from pwkd_jax import storage
from pwkd_jax.data.copies import checksum
from pwkd_jax.errors import UserError

_THREADS = 4  # a file is in memory while it is sent
INFO = "dataset_info.json"  # without it a folder is no data set


def homes(option: str, given: str | None, disk: str | None) -> tuple[Path | None, Path | None]:
    """(the data directory on a disk, that on a bucket or None) of a command that was given `option`, and --disk=`disk`. Raises
    UserError."""
    place = storage.path(given, option) if given else None
    if place is None or isinstance(place, Path):
        if disk:
            raise UserError(f"--disk: is for a bucket, and {option} is none; leave it away")
        return place and place.absolute(), None
    if not disk or not isinstance(storage.path(disk, "--disk"), Path):
        raise UserError(f"--disk: '{given}' is a bucket; give a folder of this machine too, where the data set is made first")
    return storage.path(disk).absolute(), place


def on_bucket(folder: Path, home: Path | None, bucket: Path | None) -> bool:
    """Whether the data set whose place below `home` is `folder` lies whole below `bucket`."""
    return bool(bucket) and storage.is_file(bucket / folder.relative_to(home).as_posix() / INFO)


def sent(folder: Path, home: Path | None, bucket: Path | None) -> Path:
    """Where the data set is at last: `folder`, or its place on a bucket."""
    if not bucket:
        return folder
    place = bucket / folder.relative_to(home).as_posix()
    if on_bucket(folder, home, bucket):
        print(f"{place}: is there already; remove it to have it sent again", file=sys.stderr)
    else:
        send(folder, place)
    return place


def send(folder: Path, place: Path) -> None:
    """Send what lies in `folder` to `place` on a bucket; files that are there already, as an earlier command left them, are not
    sent again. Raises UserError."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}
    sums = {name: (path.stat().st_size, checksum(path)) for name, path in files.items()}
    known = storage.listed(place)
    left = [name for name in sorted(files) if name == INFO or known.get(name) != sums[name]]
    total = sum(sums[name][0] for name in left)
    print(f"sending {len(left)} files, {total / 1e9:.2f} GB, from {folder} to {place}", file=sys.stderr)
    bar = tqdm.tqdm(total=total, desc="send", unit="B", unit_scale=True, leave=False, disable=None)
    pool = futures.ThreadPoolExecutor(_THREADS)

    def one(name: str) -> int:
        storage.replace(place / name, files[name].read_bytes())
        return sums[name][0]

    try:
        for task in futures.as_completed([pool.submit(one, name) for name in left if name != INFO]):
            bar.update(task.result())
        there = storage.listed(place)
        if bad := [name for name in sorted(files) if name != INFO and there.get(name) != sums[name]]:
            raise UserError(f"{place / bad[0]}: is not what was sent; give the same command again")
        bar.update(one(INFO))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
