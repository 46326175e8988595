"""The one door to the files of workdirs, runs and weights: read, written whole, appended to, listed, removed.

Elsewhere paths are only put together; `data` reads its records by itself, and Orbax and TensorBoard write their own.
"""

import os
import shutil
from pathlib import Path
from typing import IO


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
    finally:
        partial.unlink(missing_ok=True)


def append(path: Path) -> IO[str]:
    """`path` open for lines at its end; its folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def read(path: Path) -> str:
    """The text of a file. Raises OSError, and UnicodeDecodeError where it is not UTF-8."""
    return path.read_text(encoding="utf-8")


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


def remove(folder: Path, missing_ok: bool = False) -> None:
    """Remove a folder with all that is in it. Raises OSError unless `missing_ok`."""
    shutil.rmtree(folder, ignore_errors=missing_ok)
