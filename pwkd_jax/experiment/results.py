"""What a finished run leaves in its directory, of a teacher or a student: result.json, and what both put there."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pwkd_jax import storage
from pwkd_jax.training import distributed, preemption


def result(directory: Path) -> dict | None:
    """What a finished run left, or None: then it is this run's turn. Raises Preempted between runs."""
    preemption.check()
    path = directory / "result.json"
    return distributed.decide(lambda: json.loads(storage.read(path)) if storage.exists(path) else None)


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
