"""Orbax checkpoints of a `State`: asynchronous, atomic, and compared by path before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from pwkd_jax.errors import UserError
from pwkd_jax.training import distributed


class Checkpoints:
    """The checkpoints of one run: the latest, and those at the steps to `keep` (stage ends). Without a directory there are
    none."""

    def __init__(self, directory: Path | None, keep: Sequence[int] = ()):
        self.steps: list[int] = []
        self._directory, self._manager = directory, None
        if directory is None:
            return
        policies = ocp.training.preservation_policies
        self._manager = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(1), policies.CustomSteps(sorted(set(keep)))]
            ),
            cleanup_tmp_directories=True,  # a save that a kill tore is a temporary directory, never a step
        )
        self.steps = distributed.decide(lambda: sorted(c.step for c in self._manager.checkpoints))

    def save(self, step: int, state, note: dict | None = None) -> None:
        """Start saving in the background; waits only for a save still under way. note: JSON to keep beside the state."""
        if self._manager is None or step in self.steps:
            return
        _refuse_shared_names(state)
        # Orbax has copied the arrays when this returns, so the next step may overwrite them.
        self._manager.save_checkpointables_async(step, {"state": state}, force=True, custom_metadata=note)
        self.steps.append(step)

    def note(self, step: int) -> dict | None:
        """What was noted at that step, the same on every process."""
        return distributed.decide(lambda: self._manager.checkpointables_metadata(step).custom_metadata or None)

    def restore(self, like, step: int | None = None):
        """The state saved at `step` (default: the latest), shaped and placed as `like`; None if there is none.

        Raises UserError naming every path that the checkpoint and the config disagree on.
        """
        if not self.steps:
            return None
        step = self.steps[-1] if step is None else step
        saved = self._manager.checkpointables_metadata(step).metadata["state"]
        if bad := _differences(saved, like):
            shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise UserError(f"{self._directory / str(step)} is not a checkpoint of this config: {shown}")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._manager.load_checkpointables(step, {"state": abstract})["state"]

    def close(self) -> None:
        """Wait for the last save to be complete on disk."""
        if self._manager is not None:
            self._manager.close()


def _refuse_shared_names(tree) -> None:
    """UserError for two arrays that Orbax would write to one place: it joins a path's parts by dots, so that "a.b" beside
    {"a": {"b"}} loses one of them without a word (orbax-checkpoint 0.12.8, findings/orbax_dotted_keys.sh)."""
    seen: dict[str, str] = {}
    for path in _shapes(tree):
        if (other := seen.setdefault(path.replace("/", "."), path)) != path:
            raise UserError(
                f"a checkpoint cannot hold both {other} and {path}, whose names are one when their parts are joined by dots; "
                "rename one of these layers"
            )


def _shapes(tree) -> dict[str, tuple]:
    def name(part) -> str:
        return str(next(getattr(part, a) for a in ("key", "name", "idx") if hasattr(part, a)))

    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(name(part) for part in path): (tuple(leaf.shape), jnp.dtype(leaf.dtype)) for path, leaf in flat}


def _differences(saved, like) -> list[str]:
    a, b = _shapes(saved), _shapes(like)
    text = [f"{path} is saved but not wanted" for path in a if path not in b]
    text += [f"{path} is wanted but not saved" for path in b if path not in a]
    return text + [
        f"{path} is {a[path][1]}{list(a[path][0])}, not {b[path][1]}{list(b[path][0])}"
        for path in a
        if path in b and a[path] != b[path]
    ]
