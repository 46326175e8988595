"""Arrays of an Orbax checkpoint, of whichever of its two interfaces and of however many devices, as NumPy arrays.

The tree of a directory is there where `_METADATA` lies: in itself (`StandardCheckpointer`, `PyTreeCheckpointer`), in folders of
it (version 1, and `CheckpointManager`, which put what was saved together side by side), or in those of its latest step.
"""

import contextlib
import sys
from pathlib import Path

import jax
import numpy as np

from pwkd_jax import storage
from pwkd_jax.errors import UserError

UNNAMED = ("default", "state", "pytree")  # what the library calls a single tree that nobody named


def read(folder: Path) -> dict[str, np.ndarray]:
    """{name: array}, parts of a name joined by /. Raises UserError for a directory without a checkpoint, or with a torn one."""
    trees = _trees(folder)
    found: dict[str, np.ndarray] = {}
    for name, place in trees.items():
        head = "" if len(trees) == 1 and name in UNNAMED else name
        found |= {f"{head}/{key}".strip("/"): array for key, array in _tree(folder, place).items()}
    return found


def _trees(folder: Path) -> dict[str, Path]:
    """{name: its folder} of the trees of a checkpoint."""
    if storage.is_file(folder / "_METADATA"):
        return {"": folder}
    inside = {name: folder / name for name in storage.names(folder) if storage.is_file(folder / name / "_METADATA")}
    if inside:
        return inside
    steps = storage.saved_steps(folder)
    if not steps:
        raise UserError(
            f"{folder}: is a directory, and not a checkpoint of Orbax, for there is no _METADATA in it; name a file, or the "
            "directory that Orbax saved"
        )
    if len(steps) > 1:
        print(f"note: {folder} holds several steps; the latest, {steps[-1]}, was taken", file=sys.stderr)
    return _trees(folder / str(steps[-1]))


def _tree(folder: Path, place: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            place = storage.absolute(place)
            # As NumPy arrays: on their devices, those of the machine that saved them would be asked for.
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(place).tree)
            tree = handler.restore(place, args=ocp.args.PyTreeRestore(restore_args=how))
    except Exception as e:  # Orbax and TensorStore raise of everything
        if outage := storage.unreachable(e, place):
            raise outage from e
        reason = next((line for line in str(e).splitlines() if line), type(e).__name__)
        raise UserError(f"{folder}: is not a whole checkpoint of Orbax ({reason[:200]}); save or copy it again") from e
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_part(entry) for entry in path): np.asarray(leaf) for path, leaf in leaves}


def _part(entry) -> str:
    return str(next(getattr(entry, word) for word in ("key", "name", "idx") if hasattr(entry, word)))
