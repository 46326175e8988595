"""What a finished run leaves in its directory, of a teacher or a student: result.json, and what both put there."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.reporting import per_class
from pwkd_jax.training import distributed, preemption


def result(directory: Path, shape: dict, **own: object) -> dict | None:
    """What a finished run left, or None: then it is this run's turn. Raises Preempted between runs.

    shape: `summary.TEACHER` or `STUDENT`. own: what it has to say of itself. Raises UserError where it does not.
    """
    preemption.check()
    path = directory / "result.json"

    def whole() -> dict | None:
        found = read(path)
        if found is None:
            return None
        if fault := storage.misfit(found, shape) or per_class.fault(found.get("classes")):
            raise UserError(f"'{path}' is not as it was written: {fault}; bring it back, or make it anew")
        for key, value in json.loads(json.dumps(own)).items():
            if found[key] != value:
                was = f"whose {key} is {found[key]!r:.80} and not {value!r:.80}"
                raise UserError(f"'{path}' is another run's, {was}; bring it back, or make it anew")
        return found

    return distributed.decide(whole)


def read(path: Path) -> dict | None:
    """A run's result.json; None where there is none, and where it is damaged, for the run's checkpoints give it again."""
    if not storage.exists(path):
        return None
    try:
        return json.loads(storage.read(path))
    except (ValueError, RecursionError):
        print(f"warning: {path} is not whole; it is made again from the run's checkpoints", file=sys.stderr)
        return None


def point(row: dict) -> dict:
    """A row of metrics.jsonl as a point of the curve in result.json, but for its scores."""
    return {key: row[key] for key in ("step", "epoch", "learning_rate", "train_loss")}


def effort(rows: Sequence[dict], total: int, batch_size: int, images: int) -> dict:
    """The median rate is that of a window without compilation; seconds count everything that was kept."""
    return {
        "steps": total,
        "epochs": total * batch_size / images,
        "seconds": sum(r["seconds"] for r in rows),
        "images_per_second": float(np.median([r["images_per_second"] for r in rows])),
    }
