"""The one door to the files of workdirs, runs and weights: read, written whole, appended to, listed, removed.

Elsewhere paths are only put together; `data` reads its records by itself, and Orbax and TensorBoard write their own.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pwkd_jax.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


class Held(OSError):
    """A lock is held by another process. holder: {"host", "pid", "since"} of it, {} where it has not said."""

    def __init__(self, holder: dict):
        super().__init__("held by another process")
        self.holder = holder


# What a disk does to any program; TensorStore, which writes checkpoints, tells it by these words alone.
_DISK = {
    number: os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EFBIG)
}


def failure(error: BaseException, place: Path) -> str | None:
    """What the disk of the folder `place` did to make `error`, or an error behind it, as a phrase; None where it was something
    else."""
    waiting, seen, place = [error], set(), place.absolute()
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno in _DISK:
            if not one.filename:  # as where a file that is open is written
                return _DISK[one.errno]
            if Path(os.fsdecode(one.filename)).absolute().is_relative_to(place):
                return f"{_DISK[one.errno]}: {os.fsdecode(one.filename)}"
        told = str(one) if isinstance(one, (ValueError, RuntimeError)) and str(place) in str(one) else ""
        if found := [words for words in _DISK.values() if words in told]:
            return found[0]
        waiting += [*getattr(one, "exceptions", ()), one.__cause__, one.__context__]
    return None


def local(option: str, text: str | Path) -> Path:
    """The path that a user wrote, ~ being their home. Raises UserError for an address such as gs://bucket/x.

    option: what gave it, for the error. pathlib would make a folder `gs:` of it.
    """
    text = str(text)
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text):
        raise UserError(f"{option}: '{text}' is an address, not a folder; give one, or mount {scheme[1]} as one")
    return Path(text).expanduser()


def replace(path: Path, content: str | bytes) -> None:
    """Write a file beside `path` and move it there: a kill leaves the old one or the new, never half. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as e:
        e.filename = str(path)  # a full disk says none
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def append(path: Path) -> IO[str]:
    """`path` open for lines at its end; its folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def read(path: Path) -> str:
    """The text of a file. Raises OSError, and UnicodeDecodeError where it is not UTF-8."""
    return path.read_text(encoding="utf-8")


def record(path: Path, shape: Any) -> Any:
    """The JSON of a file, which has at least what `shape` says: {key: shape} ("key?" may be absent, "*" is every key), [shape
    of each], float (a finite number), int, str, bool, object (anything), None, or a tuple of those that are possible. Raises
    UserError naming the file and what is wrong in it."""
    try:
        value = json.loads(read(path))
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e).partition("\n")[0]
        raise UserError(f"'{path}' is not whole ({reason}); bring it back as it was written") from e
    if fault := misfit(value, shape):
        raise UserError(f"'{path}' is not as it was written: {fault}; bring it back, or make it anew")
    return value


def misfit(value: Any, shape: Any, where: str = "") -> str:
    """What keeps plain data from having the shape that `record` describes, as a phrase; '' where it has it."""
    if isinstance(shape, tuple):
        faults = [misfit(value, one, where) for one in shape]
        return "" if "" in faults else faults[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        wanted = {key.removesuffix("?"): inner for key, inner in shape.items() if key != "*"}
        if lacks := [key for key in shape if key != "*" and key[-1] != "?" and key not in value]:
            return f"it lacks '{where}{lacks[0]}'"
        inside = {key: wanted.get(key, shape.get("*", object)) for key in value}
        return next((f for key, inner in inside.items() if (f := misfit(value[key], inner, f"{where}{key}."))), "")
    if isinstance(shape, list) and isinstance(value, list):
        return next((f for i, x in enumerate(value) if (f := misfit(x, shape[0], f"{where}{i}."))), "")
    kind = type(value)
    right = shape is object or value is shape is None or kind is shape or (kind is int and shape is float)
    if right and (not isinstance(value, (int, float)) or shape is object or abs(value) < 2**1023):
        return ""
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", None: "null"}
    what = names[shape] if not isinstance(shape, (dict, list)) else "a list" if isinstance(shape, list) else "an object"
    name = f"'{where[:-1]}'" if where else "it"
    return f"{name} is {value!r:.40}, not {what}"


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises OSError."""
    return path.read_bytes()


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
                    holder = json.loads(file.read())
                    raise Held({} if misfit(holder, {"host": str, "pid": int, "since": str}) else holder) from None
                except ValueError:
                    raise Held({}) from None
            file.seek(0)
            file.truncate()
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
            file.flush()
        yield
