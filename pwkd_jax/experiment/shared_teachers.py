"""A finished teacher of one workdir teaches in others (`teacher.run`): a sweep over methods trains it once.

What its training left is copied, so the borrowing workdir is whole: evaluate, export and report read it as they read one that
was trained there. A student learns the very same bits from either.
"""

from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from pwkd_jax import storage
from pwkd_jax.config import leaves
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import results
from pwkd_jax.experiment.workdir import changed_since, differences, settings

# Neither changes a teacher: where the data lie, and where it came from itself.
FREE = ("data.data_dir", "data.copy", "teacher.run")


def identity(known: dict) -> dict:
    """Of {dotted key: value} those settings that make the teachers of a config: those of its data and its teacher.

    `seed` is not among them: students of another seed may share a teacher, as those of one workdir do.
    """
    return {k: v for k, v in known.items() if k.startswith(("data.", "teacher.")) and k not in FREE}


def check(config: ConfigDict, facts: dict, names: Iterable[str]) -> None:
    """Refuse a `teacher.run` that has no finished teacher of each of those `names`, or another teacher. Raises UserError."""
    run = config.teacher.run
    if not run:
        return
    place = storage.path(run, "teacher.run")
    try:
        lender, known = settings(place), storage.record(place / "data.json", {"digests?": {}})
    except (OSError, ValueError, UserError) as e:
        why = e if isinstance(e, UserError) else type(e).__name__
        raise UserError(f"teacher.run: '{run}' is not a workdir of pwkd_jax.train ({why})") from e
    changed_since(place)
    own, other = identity(dict(leaves(config))), identity(lender)
    if differ := [k for k in sorted(own.keys() | other.keys()) if own.get(k) != other.get(k)]:
        key, more = differ[0], f" (nor are {', '.join(differ[1:4])} as they were)" if len(differ) > 1 else ""
        raise UserError(
            f"teacher.run: the teacher in '{run}' was trained with {key} = {other.get(key)!r}, not {own.get(key)!r}{more}; "
            "name the workdir of a teacher with this config's data and teacher keys"
        )
    if changed := differences(known, facts):
        raise UserError(f"teacher.run: '{run}' had other data: {'; '.join(changed[:3])}; name a workdir of these data")
    for name in names:
        if results.read(place / "teacher" / name / "result.json") is None:
            raise UserError(f"teacher.run: '{run}' holds no finished {name} teacher; train it there first")


def copy(lender: Path, workdir: Path, name: str) -> None:
    """Bring the finished teacher `name` of `lender` into `workdir`, its result last; nothing where there is one already."""
    source, target = lender / "teacher" / name, workdir / "teacher" / name
    if not storage.exists(target / "result.json"):
        for file in (*(n for n in storage.names(source) if n.startswith("width_")), "result.json"):
            storage.replace(target / file, storage.read_bytes(source / file))
