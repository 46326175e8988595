"""A workdir belongs to one config, and while it trains to one command: claimed before anything is trained, refused to
another."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from pwkd_jax import storage
from pwkd_jax.config import leaves
from pwkd_jax.errors import UserError
from pwkd_jax.training import distributed

# Keys that may change between two commands in one workdir: they add runs to it, or change nothing of a finished one.
FREE = (
    "name", "arms", "seeds", "data.data_dir", "data.workers", "data.on_device", "steps_per_dispatch", "teacher.run",
    "student.ensemble", "log.every", "log.tensorboard", "checkpoint.every", "mesh.model", "teacher.sharding",
    "student.sharding", "student.teacher_sharding", "student.together", "profile",
)  # fmt: skip


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """The workdir for this command alone until the end of the block, its processes being one. Raises UserError, on all of them,
    where another command has it."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(storage.lock(workdir / ".lock"))
            except storage.Held as e:
                who = "process {pid} on {host} since {since}".format(**e.holder) if e.holder else "another process"
                raise UserError(
                    f"--workdir: '{workdir}' is in use by {who}; wait until it ends, or give another workdir"
                ) from e
            except OSError as e:
                raise UserError(f"--workdir: '{workdir}' cannot be written ({e.strerror})") from e

        distributed.decide(take)
        yield


def claim(workdir: Path, config: ConfigDict, facts: dict) -> None:
    """Write config.json and data.json, or refuse a workdir that holds runs of another config, or of other data.

    facts: of the data, see `definition.data_facts`. Those of the first command stay: its runs were made with them.
    """
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
    known = workdir / "data.json"
    if storage.exists(known):
        try:
            before = json.loads(storage.read(known))
        except ValueError as e:
            raise UserError(f"--workdir: '{known}' is not whole; give another workdir") from e
        if changed := differences(before, facts):
            raise UserError(
                f"--workdir: '{workdir}' holds runs of other data: {'; '.join(changed[:3])}; give another workdir, or the data "
                "as they were"
            )
    try:
        storage.replace(path, config.to_json(indent=2) + "\n")
        if not storage.exists(known):
            storage.replace(known, json.dumps(facts, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be written ({e.strerror})") from e


def differences(before: dict, now: dict) -> list[str]:
    """How two records of data differ, a phrase each; what only one of them says, as older ones do, is no difference."""
    found = []
    for key in before:
        if key in now and key != "digests" and before[key] != json.loads(json.dumps(now[key])):
            found.append(f"{key} was {_short(before[key])} and is {_short(now[key])}")
    for split, digest in before.get("digests", {}).items():
        if digest != now.get("digests", {}).get(split, digest):
            found.append(f"the {split} split holds other images or labels")
    return found


def _short(value: object) -> str:
    if not isinstance(value, (list, tuple)):
        return repr(value)
    words = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in value[:8]]
    return f"({', '.join(words)}{', ...' if len(value) > 8 else ''})"
