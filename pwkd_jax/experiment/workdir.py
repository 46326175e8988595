"""A workdir belongs to one config, and while it trains to one command: claimed before anything is trained, refused to
another."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from pwkd_jax import storage
from pwkd_jax.config import check_kinds, complete, leaves
from pwkd_jax.errors import UserError
from pwkd_jax.models import reason
from pwkd_jax.reporting.environment import environment
from pwkd_jax.training import distributed

# What a workdir is laid out as. One without made_with.json is of before it was written, and laid out as 1.
FORMAT, VERSION = "pwkd_jax.workdir", 1

# Keys that may change between two commands in one workdir: they add runs to it, or change nothing of a finished one.
FREE = (
    "name", "arms", "seeds", "data.data_dir", "data.copy", "data.workers", "data.on_device", "steps_per_dispatch",
    "teacher.run", "student.ensemble", "log.every", "log.tensorboard", "log.tracker", "checkpoint.every", "mesh.model",
    "teacher.sharding", "student.sharding", "student.teacher_sharding", "student.together", "student.study",
    "profile",
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
        try:
            yield
        except storage.Unreachable as e:
            e.began = True
            raise


def claim(workdir: Path, config: ConfigDict, facts: dict) -> None:
    """Write config.json, data.json and made_with.json, or refuse a workdir that holds runs of another config, of other data, or
    of a later version.

    facts: of the data, see `definition.data_facts`. Those of the first command stay: its runs were made with them.
    """
    path, known = workdir / "config.json", workdir / "data.json"
    changed_since(workdir)
    if storage.exists(path):
        before, now = settings(workdir), dict(leaves(config))
        differ = [k for k in sorted(before.keys() | now.keys()) if k not in FREE and before.get(k) != now.get(k)]
        if differ:
            key = differ[0]
            more = f" (and {len(differ) - 1} more keys)" if len(differ) > 1 else ""
            raise UserError(
                f"--workdir: '{workdir}' holds runs with {key} = {before.get(key)!r}, not {now.get(key)!r}{more}; "
                "give another workdir"
            )
    if storage.exists(known):
        before = storage.record(known, {"digests?": {}})
        if changed := differences(before, facts):
            raise UserError(
                f"--workdir: '{workdir}' holds runs of other data: {'; '.join(changed[:3])}; give another workdir, or the data "
                "as they were"
            )
    try:
        storage.replace(path, config.to_json(indent=2) + "\n")
        if not storage.exists(known):
            made = {"format": FORMAT, "version": VERSION, **environment()}
            storage.replace(workdir / "made_with.json", json.dumps(made, indent=2) + "\n")
            storage.replace(known, json.dumps(facts, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be written ({e.strerror})") from e


def settings(workdir: Path) -> dict:
    """{dotted key: value} of the config in a workdir; keys that are newer than it have the default, which is what it did.

    Raises UserError where it is not whole, or has a key that this version no longer knows."""
    return dict(leaves(config_of(workdir)))


def config_of(workdir: Path) -> ConfigDict:
    """The same as a config."""
    path = workdir / "config.json"
    try:
        config = complete(ConfigDict(storage.record(path, {})), (), str(path))
    except (TypeError, ValueError, AttributeError, KeyError) as e:  # groups that are none, names with dots
        raise UserError(f"'{path}' is not as it was written ({reason(e)}); bring it back") from e
    try:
        check_kinds(config)
    except UserError as e:
        raise UserError(f"'{path}' is not as it was written: {e}; bring it back") from e
    return config


def made_with(workdir: Path) -> dict:
    """{"format", "version", "pwkd_jax", "jax", ...} of what began a workdir, {} of an older one. Raises UserError."""
    path = workdir / "made_with.json"
    if not storage.exists(path):
        return {}
    try:
        made = json.loads(storage.read(path))
        return made | {"version": int(made["version"])}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        raise UserError(f"'{path}' is not whole; give another workdir") from e


def changed_since(workdir: Path) -> dict:
    """`made_with`, of a workdir that may be read and added to: refuses one of a later version, and warns of one that other
    versions of pwkd_jax or jax, another device or another number of CPU threads began. Raises UserError."""
    made, now = made_with(workdir), environment()
    if (version := made.get("version", VERSION)) > VERSION:
        raise UserError(
            f"'{workdir}' was laid out by pwkd_jax {made.get('pwkd_jax')}, as version {version}, and this one knows versions "
            f"up to {VERSION}; use that pwkd_jax or a later one"
        )
    parts = [name for name in ("pwkd_jax", "jax", "device", "cpu_threads") if made.get(name, now.get(name)) != now.get(name)]
    if parts:
        then = ", ".join(f"{name} {made[name]} (now {now.get(name, 'none')})" for name in parts)
        print(f"warning: '{workdir}' was begun with {then}: what is added may differ from it in the last bits", file=sys.stderr)
    return made


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
