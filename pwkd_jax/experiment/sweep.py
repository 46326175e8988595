"""The points of a sweep: lists crossed from one TOML file, each a config, with one teacher for those that can share it."""

import itertools
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pwkd_jax import config, storage
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import chain, shared_teachers

FORMAT, VERSION = "pwkd_jax.sweep", 1


TEACHERLESS = "alone"


class Point(NamedTuple):
    """axes: {axis: text}. group: what it shares with the points that differ in `arms` and `seed` alone; "" for a teacher.
    assistant: (run, folder) of what has to be exported before, see `chain`."""

    name: str
    axes: dict[str, str]
    group: str
    arguments: list[str]
    assistant: tuple[str, str] | None = None


def load(path: Path, root: Path) -> list[Point]:
    """All points of a sweep, the teachers' first, each with a config that `config.load` accepts. Raises UserError."""
    base, grid, fixed, models, dense = _read(path)
    if models is not None:
        seed = config.load([f"--config={base}"])[0].seed
        return [_link(path, base, link) for link in chain.links(path, models, dense, fixed, seed, root)]
    points, configs = [], {}
    for entries in itertools.product(*grid.values()):
        axes, overrides, words = {}, dict(fixed), {}
        for axis, entry in zip(grid, entries, strict=True):
            if isinstance(entry, dict):
                axes[axis] = str(entry["name"])
                overrides |= {key: value for key, value in entry.items() if key != "name"}
            else:
                axes[axis] = _text(entry)
                (words if f"{{{axis}}}" in base else overrides)[axis] = entry
        spec = base
        for axis, value in words.items():
            spec = spec.replace(f"{{{axis}}}", _text(value))
        name = _name(grid, entries, axes, ())
        group = _name(grid, entries, axes, ("arms", "seed")) or path.stem
        arguments = [f"--config={spec}", *(f"--config.{key}={_text(value)}" for key, value in overrides.items())]
        if "name" not in overrides:
            arguments.append(f"--config.name={group}")
        if name in configs:
            raise UserError(f"{path}: two points are called '{name}'; make the entries of [grid] differ")
        try:
            configs[name] = config.load(arguments)[0]
        except UserError as e:
            raise UserError(f"{path}, point {name}: {e}") from e
        points.append(Point(name, axes, group, arguments))
    _refuse_overlaps(path, points, configs)
    return _with_teachers(points, configs, root)


def _link(path: Path, base: str, link: chain.Link) -> Point:
    arguments = [f"--config={base}", *(f"--config.{key}={_text(value)}" for key, value in link.overrides.items())]
    arguments.append(f"--config.name={link.name}")
    try:
        config.load(arguments)
    except UserError as e:
        raise UserError(f"{path}, link {link.name}: {e}") from e
    return Point(link.name, {"link": link.name}, link.name, arguments, link.assistant)


def _read(path: Path) -> tuple[str, dict[str, list], dict[str, Any], Any, bool]:
    try:
        found = tomllib.loads(storage.read(path))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: is not TOML ({e})") from e
    if unknown := sorted(found.keys() - {"config", "grid", "set", "chain", "dense"}):
        raise UserError(f"{path}: '{unknown[0]}' is not known; a sweep has config, [grid] or chain, and [set]")
    base, grid, fixed, models = found.get("config"), found.get("grid", {}), found.get("set", {}), found.get("chain")
    tables = isinstance(base, str) and isinstance(grid, dict) and isinstance(fixed, dict)
    if not tables or bool(grid) == (models is not None):
        example = 'config = "configs/digits.py"'
        raise UserError(f"{path}: needs config, as in {example}, and [grid] with a list to cross, or chain")
    if "dense" in found and (models is None or not isinstance(found["dense"], bool)):
        raise UserError(f"{path}: dense should be true or false, beside a chain")
    # Bare dotted keys (student.width = [..]) are nested tables in TOML.
    grid, fixed = dict(_flat(grid)), dict(_flat(fixed))
    for axis, entries in grid.items():
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{path}: grid.{axis} should be a list of values, as in [\"kd\", \"dkd\"]")
        if any(isinstance(entry, dict) and "name" not in entry for entry in entries):
            raise UserError(f"{path}: grid.{axis}: give each table a name")
        if axis in fixed:
            raise UserError(f"{path}: '{axis}' stands in [grid] and in [set]; keep one of them")
        grid[axis] = [dict(_flat(entry)) if isinstance(entry, dict) else entry for entry in entries]
    if missing := [word for word in re.findall(r"\{([^{}]*)\}", base) if word not in grid]:
        raise UserError(f"{path}: config names {{{missing[0]}}}, which is not in [grid]")
    return base, grid, fixed, models, found.get("dense", False)


def _flat(table: dict, prefix: str = ""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    """A TOML value as the command line of train takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        parts = [_text(v) for v in value]
        return ",".join(parts) if any(isinstance(v, str) for v in value) else f"({','.join(parts)},)" if parts else "()"
    return str(value)


def _name(grid: dict, entries: Sequence, axes: dict[str, str], without: Sequence[str]) -> str:
    """What tells a point from others, as a name for a directory: words speak for themselves, numbers bring their key."""
    parts = [
        axes[axis] if isinstance(entry, str | dict) else f"{axis.rpartition('.')[2]}={axes[axis].strip('(),')}"
        for axis, entry in zip(grid, entries, strict=True)
        if axis not in without
    ]
    return re.sub(r"[^\w.=+,-]", "_", "-".join(parts))


def _refuse_overlaps(path: Path, points: list[Point], configs: dict) -> None:
    seen: dict[tuple, str] = {}
    for point in points:
        c = configs[point.name]
        for run in itertools.product(c.arms, range(c.seed, c.seed + c.seeds)):
            if (other := seen.setdefault((point.group, *run), point.name)) != point.name:
                raise UserError(f"{path}: points {other} and {point.name} both run {run[0]} with seed {run[1]}; set seeds = 1")


def _with_teachers(points: list[Point], configs: dict, root: Path) -> list[Point]:
    """The points that train the teachers others share, then those others with `teacher.run` set to them."""
    shared: dict[str, list[Point]] = {}
    for point in points:
        c = configs[point.name]
        if not c.teacher.run and set(c.arms) != {TEACHERLESS}:
            shared.setdefault(json.dumps(shared_teachers.identity(dict(config.leaves(c))), sort_keys=True), []).append(point)
    teachers, lent, names = [], {}, set()
    for group in shared.values():
        model = re.sub(r"[^\w.+-]", "_", configs[group[0].name].teacher.model)
        name = _free(f"teachers/{model}", names)
        names.add(name)
        arms = dict.fromkeys(arm for point in group for arm in configs[point.name].arms if arm != TEACHERLESS)
        own = [*group[0].arguments, f"--config.arms={','.join(arms)}", "--config.seeds=0", f"--config.name={name}"]
        teachers.append(Point(name, {}, "", own))
        lent |= {point.name: f"--config.teacher.run={root / name}" for point in group}
    rest = [p._replace(arguments=[*p.arguments, lent[p.name]]) if p.name in lent else p for p in points]
    return [*teachers, *rest]


def _free(name: str, taken: set[str]) -> str:
    return next(n for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if n not in taken)


def command(point: Point, root: Path) -> list[str]:
    """The arguments of `python -m pwkd_jax.train` that run a point."""
    return [*point.arguments, f"--workdir={root / point.name}"]


def write(points: Sequence[Point], root: Path, name: str) -> None:
    """ROOT/sweep.json: which points there are, so that a report can name those that are not finished. Raises OSError."""
    rows = [{"name": p.name, "axes": p.axes, "group": p.group} for p in points]
    text = json.dumps({"format": FORMAT, "version": VERSION, "name": name, "points": rows}, indent=1) + "\n"
    storage.replace(root / "sweep.json", text)


def chosen(points: list[Point], what: str) -> list[Point]:
    if what in ("all", "teachers", "students"):
        return [p for p in points if what == "all" or bool(p.group) == (what == "students")]
    if not what.isdecimal() or int(what) >= len(points):
        raise UserError(f"--run={what}: give a number from 0 to {len(points) - 1}, or all, teachers or students")
    return [points[int(what)]]
