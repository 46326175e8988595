"""Orbax checkpoints of a `State`: asynchronous, atomic, compared by path before anything is loaded, and by checksum after.

Orbax writes zarr3 with zstd, both without checksums (0.12.8): a bit that flips in a file changes numbers without a word. So
every array's CRC-32C is kept in the checkpoint's metadata. Of several processes' arrays those that each has whole are checked.
"""

import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.training import distributed, preemption


class Checkpoints:
    """The checkpoints of one run: the latest two, those at the steps to `keep` (stage ends), and at the steps that `choose` was
    told last. Without a directory there are none."""

    def __init__(self, directory: Path | None, keep: Sequence[int] = ()):
        self.steps: list[int] = []
        self._directory, self._manager, self._saving = directory, None, None
        if directory is None:
            return
        self._always, self._kept = set(keep), _At(set(keep))
        self._open()

    @preemption.unbroken()
    def _open(self) -> None:
        from orbax.checkpoint import v1 as ocp  # takes a while, which may be that in which a step is compiled

        distributed.decide(self._put_unreadable_aside)
        policies = ocp.training.preservation_policies
        self._manager = ocp.training.Checkpointer(
            storage.absolute(self._directory),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), self._kept]),
            cleanup_tmp_directories=True,  # a save that a kill tore is a temporary directory, never a step
        )
        self.steps = distributed.decide(lambda: sorted(c.step for c in self._manager.checkpoints))

    def choose(self, steps: set[int]) -> None:
        """Keep those at `steps` too, in place of what was chosen before."""
        if self._directory is not None:
            self._kept.steps = self._always | steps

    def _put_unreadable_aside(self) -> None:
        """Of checkpoints whose metadata Orbax cannot read, for it would then list none of the others either."""
        from orbax.checkpoint import v1 as ocp

        for name in map(str, storage.saved_steps(self._directory)):
            try:
                ocp.checkpointables_metadata(self._directory / name)
            except Exception as e:  # Orbax raises of everything
                self._put_aside(damaged(self._directory / name, e), name)

    def _put_aside(self, damage: "Damaged", name: str) -> None:
        print(f"warning: {damage}; the checkpoint before it is used", file=sys.stderr)
        storage.put_aside(self._directory / name, ".damaged")

    @preemption.unbroken()
    def save(self, step: int, state, note: dict | None = None) -> None:
        """Start saving in the background; waits only for a save still under way. note: JSON to keep beside the state."""
        if self._manager is None or step in self.steps:
            return
        _refuse_shared_names(state)
        # Orbax has copied the arrays when this returns, so the next step may overwrite them.
        own = {"note": note, "crc32c": checksums(state)}
        own["self"] = _sum(own)
        self._wait()
        self._saving = self._manager.save_checkpointables_async(step, {"state": state}, force=True, custom_metadata=own)
        self.steps.append(step)

    def _wait(self) -> None:
        """For the save under way. Its result has to be asked for: otherwise Orbax keeps a thread and three open files for every
        save until the process ends (0.12.8, findings/orbax_async_saves_leak.sh)."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    @preemption.unbroken()
    def note(self, step: int) -> dict | None:
        """What was noted at that step, the same on every process."""
        path = self._directory / str(step)
        return distributed.decide(lambda: facts(path, self._manager.checkpointables_metadata(step))["note"])

    def restore(self, like, step: int | None = None):
        """The state saved at `step` (default: the latest that is whole), shaped and placed as `like`; None if there is none.

        A damaged latest one is named, put aside as STEP.damaged, and the one before is used. Raises UserError for a damaged
        `step`, and naming every path that the checkpoint and the config disagree on.
        """
        if step is not None:
            return self._load(like, step)
        while self.steps:
            try:
                return self._load(like, self.steps[-1])
            except Damaged as e:
                self._manager.close()
                distributed.decide(functools.partial(self._put_aside, e, str(self.steps[-1])))
                self._open()
        return None

    @preemption.unbroken()
    def _load(self, like, step: int):
        path = self._directory / str(step)
        try:
            metadata = self._manager.checkpointables_metadata(step)
            saved, own = metadata.metadata["state"], facts(path, metadata)
            if saved is None:
                raise ValueError("its arrays are not listed")
        except Exception as e:  # Orbax and TensorStore raise of everything
            raise damaged(path, e) from e
        if bad := _differences(saved, like):
            shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise UserError(f"{self._directory / str(step)} is not a checkpoint of this config: {shown}")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            state = self._manager.load_checkpointables(step, {"state": abstract})["state"]
        except Exception as e:
            raise damaged(path, e) from e
        refuse_damage(path, state, own["crc32c"])
        return state

    @preemption.unbroken()
    def close(self) -> None:
        """Wait for the last save to be complete on disk."""
        if self._manager is not None:
            self._wait()
            self._manager.close()


class _At:
    """Orbax's policy that keeps checkpoints at `steps`, which may change while it is in use."""

    def __init__(self, steps: set[int]):
        self.steps = steps

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        return [found.step in self.steps for found in checkpoints]


class Damaged(UserError):
    """A checkpoint that cannot be read, or holds other numbers than were saved."""

    def __init__(self, path: Path, reason: object):
        # Orbax prints objects in what it raises, at any length.
        words = re.split(r"<|\n", str(reason).strip())[0].rstrip("'\"([{:, ")
        super().__init__(f"{path} is not a whole checkpoint ({words[:200] or type(reason).__name__})")


def damaged(path: Path, error: Exception) -> Damaged:
    """The checkpoint at `path` that an error of Orbax or TensorStore tells of; raises what says that its bucket cannot be
    reached, by which nothing is known of it."""
    if lost := storage.unreachable(error, path):
        raise lost from error
    return Damaged(path, error)


def facts(path: Path, metadata) -> dict:
    """{"note", "crc32c"} of the metadata of the checkpoint at `path`; of an older one, without checksums, its note and {}.

    Raises Damaged where they are not as they were written: Orbax takes a file that it cannot parse for one without metadata.
    """
    own = metadata.custom_metadata or {}
    if {*own} == {"note", "crc32c", "self"} and own["self"] == _sum({key: own[key] for key in ("note", "crc32c")}):
        return own
    try:
        text = storage.read(path / "_CHECKPOINT_METADATA")
        json.loads(text)
    except (OSError, ValueError) as e:
        raise Damaged(path, "its metadata cannot be read") from e
    if "crc32c" in text or '"self"' in text or {*own} - {"due", "window", "clock"}:
        raise Damaged(path, "its metadata were changed since they were saved")
    return {"note": own or None, "crc32c": {}}


def _sum(value: dict) -> int:
    """The CRC-32C of plain data."""
    return google_crc32c.value(json.dumps(value, sort_keys=True).encode())


def checksums(tree) -> dict[str, int]:
    """{path: CRC-32C of the bytes} of every array that this process has whole."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            found[_name(path)] = google_crc32c.value(np.ascontiguousarray(leaf).tobytes())
    return found


def refuse_damage(path: Path, tree, known: dict[str, int]) -> None:
    """Raise Damaged where an array of `tree` is not the one whose checksum is `known`."""
    bad = [name for name, value in checksums(tree).items() if known.get(name, value) != value]
    if bad:
        raise Damaged(path, f"{bad[0]} was changed since it was saved")


def _name(path) -> str:
    def name(part) -> str:
        return str(next(getattr(part, a) for a in ("key", "name", "idx") if hasattr(part, a)))

    return "/".join(name(part) for part in path)


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
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): (tuple(leaf.shape), jnp.dtype(leaf.dtype)) for path, leaf in flat}


def _differences(saved, like) -> list[str]:
    a, b = _shapes(saved), _shapes(like)
    text = [f"{path} is saved but not wanted" for path in a if path not in b]
    text += [f"{path} is wanted but not saved" for path in b if path not in a]
    return text + [
        f"{path} is {a[path][1]}{list(a[path][0])}, not {b[path][1]}{list(b[path][0])}"
        for path in a
        if path in b and a[path] != b[path]
    ]
