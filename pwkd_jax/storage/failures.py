"""What a disk did, told from the error that a library made of it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

# What a disk does to any program; TensorStore, which writes checkpoints, tells it by these words alone.
_DISK = {
    number: os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EFBIG)
}


def behind(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, each once."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [*getattr(one, "exceptions", ()), one.__cause__, one.__context__]


def failure(error: BaseException, place: Path) -> str | None:
    """What the disk of the folder `place` did to make `error`, or an error behind it, as a phrase; None where it was something
    else."""
    if not isinstance(place, Path):  # of a bucket, see `unreachable`
        return None
    place = place.absolute()
    for one in behind(error):
        if isinstance(one, OSError) and one.errno in _DISK:
            if not one.filename:  # as where a file that is open is written
                return _DISK[one.errno]
            if Path(os.fsdecode(one.filename)).absolute().is_relative_to(place):
                return f"{_DISK[one.errno]}: {os.fsdecode(one.filename)}"
        told = str(one) if isinstance(one, (ValueError, RuntimeError)) and str(place) in str(one) else ""
        if found := [words for words in _DISK.values() if words in told]:
            return found[0]
    return None
