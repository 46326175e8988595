"""Files that are whole at every instant."""

import os
from pathlib import Path


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
