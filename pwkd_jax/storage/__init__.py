"""The one door to the files of workdirs, runs and weights: read, written whole, appended to, listed, removed.

A place is a local path or gs://BUCKET/NAME, which `path` makes of what a user wrote: a pathlib.Path, or etils' path of the same
methods, of which only those that put names together are used elsewhere. Everything else that is done with one is done here, by
`local` or by `bucket`, which is loaded where there is an address. `data` reads its records by itself, and Orbax writes its own.
"""

import importlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePath
from types import ModuleType
from typing import IO, Any, NamedTuple

from pwkd_jax.errors import UserError
from pwkd_jax.storage import local
from pwkd_jax.storage.failures import behind, failure
from pwkd_jax.storage.local import Held
from pwkd_jax.storage.shapes import misfit

__all__ = [
    "Entry", "Held", "Unreachable", "above", "absolute", "exists", "failure", "holding", "is_file", "is_folder", "lines",
    "listed", "lock", "misfit", "names", "opened", "outbox", "path", "put_aside", "read", "read_bytes", "read_part", "record",
    "remove", "replace", "same", "saved_steps", "size", "unreachable",
]  # fmt: skip


class Unreachable(UserError, OSError):
    """A bucket that does not answer, or refuses. began: whether it did answer, earlier in this command."""

    began = False

    def __str__(self) -> str:
        return f"{self.filename or 'gs://'}: cannot be read or written ({self.strerror})"


class Entry(NamedTuple):
    """Of an object: its size in bytes, and its CRC-32C as the bucket writes it."""

    size: int
    crc32c: str


def path(text: str | PurePath, option: str = "") -> Path:
    """The place that a user wrote, ~ being their home. option: what gave it, for errors.

    Raises UserError for an address that is not gs://BUCKET/NAME, of which pathlib would make a folder, and where gcsfs, which
    reads and writes buckets, is not installed.
    """
    if isinstance(text, PurePath):
        return text
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if not scheme:
        return Path(text).expanduser()
    said = f"{option}: " if option else ""
    if not re.match(r"gs://[a-z0-9][a-z0-9._-]{2,}(/|$)", text):
        raise UserError(
            f"{said}'{text}' is an address that is not known here; give a folder or gs://BUCKET/NAME, or mount {scheme[1]} as "
            "a folder"
        )
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{said}'{text}' needs gcsfs, which is not installed: pip install gcsfs")
    return _bucket().path(text)


def unreachable(error: Exception, place: Path) -> Unreachable | None:
    """What an `error` of another library, or one behind it, says of the bucket of `place`: that it does not answer or refuses.
    None for every other error, and for a folder."""
    if isinstance(place, Path) or isinstance(error, Unreachable):
        return error if isinstance(error, Unreachable) else None
    found = next((one for one in behind(error) if _bucket().outage(one)), None)
    return found and _bucket().unreachable(found, place)


def _bucket() -> ModuleType:
    return importlib.import_module("pwkd_jax.storage.bucket")


def _home(place: Path) -> ModuleType:
    return local if isinstance(place, Path) else _bucket()


def absolute(place: Path, straight: bool = False) -> Path:
    """A place that another folder of this process does not change. etils makes a local path of an address (1.15).

    straight: without `..`, as it is written, whatever is a link.
    """
    if not isinstance(place, Path):
        return place
    return Path(os.path.abspath(place)) if straight else place.absolute()


def same(one: Path, other: Path) -> bool:
    """Whether two places are one; local links are followed."""
    return one == other or (isinstance(one, Path) and isinstance(other, Path) and one.resolve() == other.resolve())


def above(place: Path) -> list[Path]:
    """The folders that a place is in, the nearest first; a bucket is the last."""
    found = list(place.parents)
    return found if isinstance(place, Path) else found[: len(place.parts) - 3]


def replace(place: Path, content: str | bytes) -> None:
    """Write a file: a kill leaves the old one or the new, never half. Raises OSError."""
    _home(place).replace(place, content.encode() if isinstance(content, str) else content)


def lines(place: Path, content: str) -> Any:
    """A file of `content`, to which `write` adds lines, `flush` makes them last, and which `close` ends. Raises OSError.

    On a local disk a line is handed to the kernel as the buffer fills. An object cannot be added to, so that there `flush`
    writes it anew, and a kill costs what was added since.
    """
    replace(place, content)
    return _home(place).Lines(place)


def read(place: Path) -> str:
    """The text of a file. Raises OSError, and UnicodeDecodeError where it is not UTF-8."""
    return read_bytes(place).decode("utf-8")


def record(place: Path, shape: Any) -> Any:
    """The JSON of a file, which has at least what `shape` says: {key: shape} ("key?" may be absent, "*" is every key), [shape
    of each], float (a finite number), int, str, bool, object (anything), None, or a tuple of those that are possible. Raises
    UserError naming the file and what is wrong in it."""
    try:
        value = json.loads(read(place))
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e).partition("\n")[0]
        raise UserError(f"'{place}' is not whole ({reason}); bring it back as it was written") from e
    if fault := misfit(value, shape):
        raise UserError(f"'{place}' is not as it was written: {fault}; bring it back, or make it anew")
    return value


def read_bytes(place: Path) -> bytes:
    """The content of a file. Raises OSError."""
    return _home(place).read_bytes(place)


def read_part(place: Path, start: int, end: int) -> bytes:
    """Of an object the bytes from `start` to before `end`. Raises OSError."""
    return _bucket().read_part(place, start, end)


def listed(place: Path) -> dict[str, Entry]:
    """All objects below a place on a bucket, by their names from there on. Raises OSError."""
    return {name: Entry(*found) for name, found in _bucket().listed(place).items()}


def opened(place: Path) -> IO[bytes]:
    """A file to read here and there, of a bucket whole in memory. Raises OSError."""
    return place.open("rb") if isinstance(place, Path) else io.BytesIO(read_bytes(place))


def size(place: Path) -> int:
    """Of a file, in bytes. Raises OSError."""
    return _home(place).size(place)


def exists(place: Path) -> bool:
    """Whether there is a file or a folder."""
    return _home(place).exists(place)


def is_file(place: Path) -> bool:
    """Whether there is a file."""
    return _home(place).is_file(place)


def is_folder(place: Path) -> bool:
    """Whether there is a folder; of a bucket, whether a name begins so."""
    return _home(place).is_folder(place)


def names(folder: Path) -> list[str]:
    """What lies in a folder, sorted; [] where there is none."""
    return _home(folder).names(folder)


def holding(folder: Path, name: str) -> list[Path]:
    """The folders at any depth of `folder` that hold something called `name`, sorted."""
    return _home(folder).holding(folder, name)


def saved_steps(folder: Path) -> list[int]:
    """The steps of a folder of checkpoints that were saved to their end.

    Orbax renames a local folder last. Of a bucket, where nothing can be renamed, it writes `commit_success.txt` last; without
    one a folder is what a kill left of a save.
    """
    return sorted(int(n) for n in _home(folder).saved(folder) if n.isdigit())


def put_aside(folder: Path, ending: str) -> Path:
    """Rename a folder to its name and `ending`, in place of what was called so; the new path. Raises OSError.

    Objects are copied and then removed, so that a kill between leaves both.
    """
    return _home(folder).put_aside(folder, ending)


def remove(place: Path, missing_ok: bool = False) -> None:
    """Remove a file, or a folder with all that is in it. Raises OSError unless `missing_ok`."""
    _home(place).remove(place, missing_ok)


def outbox(folder: Path) -> Any:
    """`folder` for libraries that write local files only: they write into its `.local`; `push` sends what is there in the
    background, `close` waits until all is sent."""
    return _home(folder).Outbox(folder)


@contextmanager
def lock(place: Path) -> Iterator[None]:
    """Hold `place`, a file that names its holder, until the end of the block. Raises Held, and OSError.

    On a local disk it is the kernel's lock, see `local.lock`; on a bucket an object that its holder renews, see `lease`.
    """
    home: AbstractContextManager = _home(place).lock(place)
    with home:
        yield
