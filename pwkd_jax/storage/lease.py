"""A lock for buckets, which know none: an object that names its holder, and that its holder renews.

It is made by a request that fails where there is one already. Its holder writes it anew every RENEW seconds, and removes it at
the end. One that was not renewed for LEASE seconds, by the bucket's own clock, is of a holder that died or was cut off: who
meets it waits until then, and takes it over by a request that fails where someone else has changed it. So a command that was
killed can be given again at once; it begins at most LEASE seconds later, and immediately where its holder was a process of
this machine that is no more. A holder that slept through its lease finds its lock to be another's when it is to renew it, and
ends at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pwkd_jax.storage import bucket
from pwkd_jax.storage.local import Held

RENEW, LEASE, POLL = 15.0, 60.0, 3.0
LOST = 75  # give the same command again: it will be told who has it


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the object at `path` until the end of the block. Raises Held, and OSError where it cannot be written."""
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                          "process": _process(os.getpid())})  # fmt: skip
    ours = [_take(path, content)]
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(path, content, ours, ended), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with contextlib.suppress(OSError):  # then it is free when its lease ends
            bucket.request("DELETE", path, ifGenerationMatch=ours[0])


def _take(path: Path, content: str) -> str:
    """The generation of the lock, now ours."""
    seen = None
    while True:
        try:
            return _write(path, content, "0")
        except FileExistsError:
            pass
        try:
            holder, generation, age = _look(path)
        except FileNotFoundError:
            continue
        if seen not in (None, generation):  # renewed while we waited: it is alive
            raise Held(holder)
        here = _alive(holder.get("process"))
        if age > LEASE or here is False:
            with contextlib.suppress(FileExistsError):
                return _write(path, content, generation)
            continue
        if here:
            raise Held(holder)
        if seen is None:
            print(f"{path} is held by {holder.get('host', 'another machine')}: waiting until it is renewed, or for "
                  f"{LEASE - age:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
        seen = generation
        time.sleep(POLL)


def _keep(path: Path, content: str, ours: list[str], ended: threading.Event) -> None:
    """Renew until `ended`. ours: [its generation]. A request that fails is tried again: the lease is long enough for some."""
    while not ended.wait(RENEW):
        try:
            ours[0] = _write(path, content, ours[0])
        except FileExistsError:
            if _ours(path, content):  # an answer that was lost on its way
                ours[0] = _look(path)[1]
                continue
            print(f"error: another command has taken {path} over, for this one did not renew it in {LEASE:.0f} s; the same "
                  "command continues from the last checkpoint", file=sys.stderr, flush=True)  # fmt: skip
            os._exit(LOST)
        except OSError:
            pass


def _ours(path: Path, content: str) -> bool:
    try:
        return bucket.read_bytes(path).decode() == content
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _write(path: Path, content: str, generation: str) -> str:
    """Write the object if it is of that generation ("0": not there); its new one. Raises FileExistsError, OSError."""
    return json.loads(bucket.request("POST", path, ifGenerationMatch=generation, data=content.encode()))["generation"]


def _look(path: Path) -> tuple[dict, str, float]:
    """(its holder, its generation, seconds since it was written, by the bucket's clock). Raises OSError."""
    probe = path.with_name(f"{path.name}.{os.getpid()}")
    with bucket.plain(path):
        files, found = bucket.files(), bucket.files().info(str(path))
        try:
            holder = json.loads(files.cat_file(str(path)))
        except ValueError:
            holder = {}
        files.pipe_file(str(probe), b"")
        now = files.info(str(probe))
        files.rm_file(str(probe))
    return holder, found["generation"], (now["mtime"] - found["mtime"]).total_seconds()


def _process(pid: int) -> str | None:
    """A process of this machine, by which it is known even where another has its number later; None where /proc is not."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            began = stat.read().rpartition(")")[2].split()[19]
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')} {pid} {began}"
    except OSError:
        return None


def _alive(process: str | None) -> bool | None:
    """Whether a process of this machine still runs; None of one of another machine."""
    mine = _process(os.getpid())
    if not process or not mine or process.split()[:2] != mine.split()[:2]:
        return None
    return _process(int(process.split()[2])) == process
