"""What a run in a directory of one's own was made with: written when it begins, and compared when it goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.training import distributed

FILE = "run.json"


def digest(tree: Any) -> str:
    """Of the arrays of a tree, by their paths, shapes, types and bytes."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(distributed.fetch(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def of_split(split: Any) -> str | None:
    """A digest of a split's labels and of up to 64 of its images, where they lie in RAM; None of a stream."""
    if not hasattr(split, "images"):
        return None
    some = np.linspace(0, len(split) - 1, min(len(split), 64)).astype(int)
    return digest((split.labels, split.images[some]))


def of_data(task: Any) -> dict[str, Any]:
    """Of a task: counts, shapes, normalisation, and where the images lie in RAM a digest of labels and of some images."""
    train = task.train
    found = {"training images": len(train), "image shape": list(task.image_shape), "classes": task.num_classes,
             "mean": list(map(float, task.mean)), "std": list(map(float, task.std))}  # fmt: skip
    return found | {"data": of_split(train)}


def schedule(rate: Any, steps: int) -> Any:
    """A learning rate as numbers: of some steps, where it is a schedule; "in the optimizer" where it is None."""
    if rate is None:
        return "in the optimizer"
    return [float(rate(int(n))) for n in np.linspace(0, max(0, steps - 1), 8)]


def claim(directory: Path, facts: dict[str, Any]) -> None:
    """Write `facts` to `directory`/run.json, or refuse a directory whose run was made with others. Raises UserError."""
    path, facts = directory / FILE, json.loads(json.dumps(facts))

    def decide() -> None:
        if storage.exists(directory) and not storage.is_folder(directory):
            raise UserError(f"directory: '{directory}' is a file; name a folder")
        if storage.exists(path):
            before = storage.record(path, {})
            if differ := [key for key in facts | before if facts.get(key) != before.get(key)]:
                key, more = differ[0], f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
                raise UserError(
                    f"directory: '{directory}' holds a run whose {key} was {before.get(key)!r}, not {facts.get(key)!r}{more}; "
                    "give another directory, or the same call"
                )
        else:
            storage.replace(path, json.dumps(facts, indent=1) + "\n")

    distributed.decide(decide)
