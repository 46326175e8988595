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


def is_there(place: Path) -> bool:
    """Whether a whole data set lies at `place` on a bucket."""
    return storage.is_file(place / INFO)


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
