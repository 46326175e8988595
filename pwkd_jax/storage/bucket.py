"""Objects of gs://BUCKET/NAME: what `storage` promises, by requests of gcsfs.

An object is there whole or not at all, and cannot be renamed or added to. Listings are never kept, for other processes write
too. Credentials are Google's default ones; an emulator (STORAGE_EMULATOR_HOST) needs none.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from etils import epath
from fsspec.asyn import sync
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError
from google.auth.exceptions import GoogleAuthError

from pwkd_jax import storage

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its tracebacks; what is raised says it too

# Orbax reaches the same file system through etils, by these two. By default gcsfs first asks of what kind a bucket is, by a
# service that few may use, and says so at every request (2026.10.1).
if not os.environ.get("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"):
    for _name in ("gcs", "gs"):
        fsspec.register_implementation(_name, GCSFileSystem, clobber=True)
_OPTIONS = {"use_listings_cache": False} | ({"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {})
fsspec.config.conf.setdefault("gcs", {}).update(_OPTIONS)

_LARGE = 50 << 20  # gcsfs sends so much in parts, which can be continued
MARKER = "commit_success.txt"  # what Orbax writes last of a checkpoint


@functools.cache
def files() -> Any:
    """gcsfs's file system. Raises OSError."""
    with plain(""):
        return fsspec.filesystem("gcs")


@contextlib.contextmanager
def plain(path: object) -> Iterator[None]:
    """What gcsfs, aiohttp and Google's libraries raise, as FileNotFoundError, FileExistsError or `storage.Unreachable` with one
    line."""
    try:
        yield
    except FileNotFoundError as e:
        raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", str(path)) from e
    except FileExistsError:
        raise
    except Exception as e:
        raise unreachable(e, path) from e


def unreachable(error: Exception, path: object) -> Exception:
    """`storage.Unreachable` with what an error of these libraries says."""
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(w for w in words if "://" not in w and not w.startswith("Forbidden")) or type(error).__name__
    if "Forbidden" in str(error):
        said = f"access is forbidden: {said}"
    return storage.Unreachable(errno.EIO, said.rstrip("."), str(path))


def outage(error: BaseException) -> bool:
    """Whether it is of a bucket that does not answer or refuses, and not of what lies there."""
    if isinstance(error, (HttpError, aiohttp.ClientError, GoogleAuthError)):
        return True
    if isinstance(error, OSError):
        return str(error).startswith("Forbidden") or isinstance(error, (ConnectionError, TimeoutError))
    return bool(re.match(r"(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|ABORTED)\b", str(error)))


def path(text: str) -> Path:
    return epath.Path(text)


def request(method: str, path: Path, **options) -> bytes:
    """What gcsfs has no name for. POST: write the object at `path`, of `data`; otherwise to that object. Raises OSError."""
    fs, (name, key) = files(), str(path).removeprefix("gs://").split("/", 1)
    where = ["b/{}/o/{}", name, key]
    if method == "POST":
        where = [f"{fs._location}/upload/storage/v1/b/{name}/o"]
        options |= {"uploadType": "media", "name": key}
    with plain(path):
        return sync(fs.loop, fs._call, method, *where, **options)[1]


def replace(path: Path, content: bytes) -> None:
    if content and len(content) < _LARGE:
        # gcsfs's own way (2026.10.1) cuts content that holds its boundary, "--==0==", after a line break.
        request("POST", path, data=content)
        return
    with plain(path):
        files().pipe_file(str(path), content)


class Lines:
    """A file that is added to: kept here, and written whole."""

    def __init__(self, path: Path):
        self._path, self._written = path, read_bytes(path)
        self._new: list[str] = []

    def write(self, text: str) -> None:
        self._new.append(text)

    def flush(self) -> None:
        if self._new:
            self._written += "".join(self._new).encode()
            self._new.clear()
            replace(self._path, self._written)

    close = flush


class Outbox:
    """A folder of this machine whose files are sent to a bucket. They are no promise: what cannot be sent is said once."""

    def __init__(self, folder: Path):
        self._folder, self._sent = folder, {}
        self.local = Path(tempfile.mkdtemp(prefix="pwkd_jax-"))
        self._sender = concurrent.futures.ThreadPoolExecutor(1)
        self._sending: concurrent.futures.Future | None = None

    def push(self) -> None:
        if self._sending is None or self._sending.done():
            self._sending = self._sender.submit(self._send)

    def _send(self) -> None:
        try:
            for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
                content = file.read_bytes()
                if self._sent.get(file) != len(content):
                    replace(self._folder / file.relative_to(self.local).as_posix(), content)
                    self._sent[file] = len(content)
        except OSError as e:
            if "said" not in self._sent:
                print(f"warning: {self._folder}: cannot be written ({e.strerror})", file=sys.stderr)
            self._sent["said"] = True

    def close(self) -> None:
        self._sender.submit(self._send)
        self._sender.shutdown()
        shutil.rmtree(self.local, ignore_errors=True)


def read_bytes(path: Path) -> bytes:
    with plain(path):
        return files().cat_file(str(path))


def size(path: Path) -> int:
    with plain(path):
        return files().info(str(path))["size"]


def exists(path: Path) -> bool:
    with plain(path):
        return files().exists(str(path))


def is_file(path: Path) -> bool:
    with plain(path):
        return files().isfile(str(path))


def is_folder(path: Path) -> bool:
    with plain(path):
        return files().isdir(str(path))


def names(folder: Path) -> list[str]:
    try:
        with plain(folder):
            found = files().ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    own = str(folder).removeprefix("gs://")
    return sorted({name.rstrip("/").removeprefix(own + "/") for name in found if name.rstrip("/") != own})


def _objects(folder: Path) -> list[str]:
    """The names of all objects below a folder, from there on."""
    own = str(folder).removeprefix("gs://") + "/"
    with plain(folder):
        return [name.removeprefix(own) for name in files().find(str(folder)) if name.startswith(own)]


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    own = str(folder).removeprefix("gs://") + "/"
    with plain(folder):
        found = files().find(str(folder), detail=True)
    return {name.removeprefix(own): (entry["size"], entry["crc32c"]) for name, entry in found.items() if name.startswith(own)}


def read_part(path: Path, start: int, end: int) -> bytes:
    with plain(path):
        return files().cat_file(str(path), start=start, end=end)


def holding(folder: Path, name: str) -> list[Path]:
    parts = [Path(found).parts for found in _objects(folder)]
    return sorted({folder.joinpath(*p[: p.index(name)]) for p in parts if name in p})


def saved(folder: Path) -> list[str]:
    """The checkpoints of a folder that are marked as whole."""
    return [Path(name).parts[0] for name in _objects(folder) if Path(name).parts[1:] == (MARKER,)]


def put_aside(folder: Path, ending: str) -> Path:
    aside = folder.with_name(folder.name + ending)
    remove(aside, missing_ok=True)
    found = sorted(_objects(folder), key=lambda name: name == MARKER)
    with plain(folder):
        for name in found:
            files().cp_file(str(folder / name), str(aside / name))
        # What is left of it when this is torn is then no checkpoint.
        for name in reversed(found):
            files().rm_file(str(folder / name))
    return aside


def remove(path: Path, missing_ok: bool = False) -> None:
    try:
        with plain(path):
            files().rm(str(path), recursive=True)
    except FileNotFoundError:
        if not missing_ok:
            raise


def lock(path: Path) -> contextlib.AbstractContextManager:
    from pwkd_jax.storage import lease

    return lease.hold(path)
