"""A workdir belongs to one config: claimed before anything is trained, refused to another."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from pwkd_jax import storage
from pwkd_jax.config import leaves
from pwkd_jax.errors import UserError

# Keys that may change between two commands in one workdir: they add runs to it, or change nothing of a finished one.
FREE = (
    "name", "arms", "seeds", "data.data_dir", "data.workers", "data.on_device", "steps_per_dispatch", "teacher.run",
    "student.ensemble", "log.every", "log.tensorboard", "checkpoint.every", "mesh.model", "teacher.sharding",
    "student.sharding", "student.teacher_sharding", "student.together", "profile",
)  # fmt: skip


def claim(workdir: Path, config: ConfigDict, facts: dict) -> None:
    """Write config.json and data.json, or refuse a workdir that holds runs of another config."""
    path = workdir / "config.json"
    if storage.exists(path):
        before = dict(leaves(ConfigDict(json.loads(storage.read(path)))))
        now = dict(leaves(ConfigDict(json.loads(config.to_json()))))
        differ = [k for k in sorted(before.keys() | now.keys()) if k not in FREE and before.get(k) != now.get(k)]
        if differ:
            key = differ[0]
            more = f" (and {len(differ) - 1} more keys)" if len(differ) > 1 else ""
            raise UserError(
                f"--workdir: '{workdir}' holds runs with {key} = {before.get(key)!r}, not {now.get(key)!r}{more}; "
                "give another workdir"
            )
    try:
        storage.replace(path, config.to_json(indent=2) + "\n")
        storage.replace(workdir / "data.json", json.dumps(facts, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be written ({e.strerror})") from e
