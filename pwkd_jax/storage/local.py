"""Files of disks, and of what is mounted as one: what `storage` promises, by pathlib and the kernel."""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


class Held(OSError):
    """A lock is held by another process. holder: {"host", "pid", "since"} of it, {} where it has not said."""

    def __init__(self, holder: dict):
        super().__init__("held by another process")
        self.holder = holder


def replace(path: Path, content: bytes) -> None:
    """Write a file beside `path` and move it there: a kill leaves the old one or the new, never half. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as e:
        e.filename = str(path)  # a full disk says none
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class Lines:
    """A file that is added to."""

    def __init__(self, path: Path):
        self._file = path.open("a")

    def write(self, text: str) -> None:
        self._file.write(text)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Outbox:
    """A folder that needs none."""

    def __init__(self, folder: Path):
        self.local = folder

    def push(self) -> None:
        pass

    close = push


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises OSError."""
    return path.read_bytes()


def size(path: Path) -> int:
    """Of a file, in bytes. Raises OSError."""
    return path.stat().st_size


def exists(path: Path) -> bool:
    """Whether there is a file or a folder."""
    return path.exists()


def is_file(path: Path) -> bool:
    """Whether there is a file."""
    return path.is_file()


def is_folder(path: Path) -> bool:
    """Whether there is a folder."""
    return path.is_dir()


def names(folder: Path) -> list[str]:
    """What lies in a folder, sorted; [] where there is none."""
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def holding(folder: Path, name: str) -> list[Path]:
    """The folders at any depth of `folder` that hold something called `name`, sorted."""
    return sorted(p.parent for p in folder.rglob(name))


def saved(folder: Path) -> list[str]:
    """The checkpoints of a folder; one that a kill tore has another name."""
    return names(folder)


def put_aside(folder: Path, ending: str) -> Path:
    """Rename a folder to its name and `ending`, in place of what was called so; the new path. Raises OSError."""
    aside = folder.with_name(folder.name + ending)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def remove(path: Path, missing_ok: bool = False) -> None:
    """Remove a file, or a folder with all that is in it. Raises OSError unless `missing_ok`."""
    if path.is_file():
        path.unlink(missing_ok=missing_ok)
    else:
        shutil.rmtree(path, ignore_errors=missing_ok)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path`, a file that names its holder, until the end of the block. Raises Held, and OSError.

    The kernel's lock on an open file: it ends with the process that holds it, however that ends, on local disks and on NFS 4
    (whose server ends it when the client's lease runs out). The file stays. Without POSIX locks nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                try:
                    raise Held(json.loads(file.read())) from None
                except ValueError:
                    raise Held({}) from None
            file.seek(0)
            file.truncate()
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
            file.flush()
        yield
