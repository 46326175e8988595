"""Files from the network, continued where they were stopped, and checksums."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

import tqdm

from pwkd_jax.data.tfds_writer import writing_to
from pwkd_jax.errors import UserError

_CHUNK = 1 << 20


def checksum(path: Path, algorithm: str) -> str:
    """The file's digest in hexadecimal. Raises UserError where it cannot be read."""
    digest = hashlib.new(algorithm)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file, _bar(f"checksum of {path.name}", size) as bar:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    return digest.hexdigest()


def verify(path: Path, algorithm: str, expected: str) -> None:
    """Raises UserError unless the file's digest is `expected`."""
    found = checksum(path, algorithm)
    if found != expected:
        raise UserError(
            f"{path}: its {algorithm} is {found}, but that of the official file is {expected}; download it again, or give "
            "--no-checksum if it is meant to differ"
        )


def fetch(url: str, path: Path, algorithm: str, expected: str) -> None:
    """Download `url` as `path`, which then has the digest `expected`. What has come of it stays in `path`.part, and the next
    call asks for the rest only. Raises UserError."""
    partial = path.with_name(path.name + ".part")
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _rest(url, partial)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        reason = str(getattr(e, "reason", "") or e or type(e).__name__).rstrip(".")
        raise UserError(
            f"{url}: cannot be downloaded ({reason}); run again where there is a network, or give the file with --archive"
        ) from e
    except OSError as e:
        raise UserError(f"{partial}: cannot be written ({e.strerror})") from e
    found = checksum(partial, algorithm)
    if found != expected:
        partial.unlink()
        raise UserError(f"{url}: came with {algorithm} {found}, but should have {expected}; run again to download it anew")
    os.replace(partial, path)


def _rest(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks of `url`."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # nothing lies beyond: it is whole, or the checksum will tell
            return
        raise
    with response:
        if response.status != 206:  # the server sends all of it
            have = 0
        left = int(response.headers.get("Content-Length") or 0)
        with open(partial, "ab" if have else "wb") as file, _bar(partial.stem, have + left, have) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                left -= len(chunk)
    if left > 0:  # read() gives what came before the connection broke, without an error
        raise http.client.IncompleteRead(b"", left)


def _bar(name: str, total: int, initial: int = 0) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, initial=initial, desc=name, unit="B", unit_scale=True, leave=False, disable=None)
