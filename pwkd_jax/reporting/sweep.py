"""The results of a sweep: ROOT/sweep.json and the summary of every point that is finished, put together.

`results.json`: {"format": "pwkd_jax.sweep_results", "version", "name", "rows", "unfinished": [point]}. A row is an experiment:
{"point", "axes", "arms": {arm: stat of last top-1}, "teacher_top1": last top-1 of the slimmable teacher's widest,
"standard_top1": the ordinary teacher's, "gain": stat of pwkd minus its better control}; what did not run is null.
`results.csv` has a line for each experiment and arm, with the gain's 95 % interval (gain_low, gain_high). Accuracies are in
percent, gains in points.
"""

import csv
import io
import json
from pathlib import Path

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.reporting import phrases
from pwkd_jax.reporting import summary as summaries


def is_root(path: Path) -> bool:
    return storage.is_file(path / "sweep.json")


def collect(root: Path) -> tuple[str, dict[str, dict], dict[str, dict], list[str]]:
    """(name, {experiment: summary}, {experiment: axes}, unfinished points). Raises UserError if nothing is finished yet.

    Points that differ in `arms` and `seed` alone are one experiment, its runs put together.
    """
    sweep = storage.record(root / "sweep.json", {"name": str, "points": [{"name": str, "axes": {"*": str}, "group": str}]})
    points, name = [(p["name"], p["axes"], p["group"]) for p in sweep["points"]], sweep["name"]
    groups: dict[str, list[dict]] = {}
    axes, unfinished = {}, []
    for point, own, group in points:
        if not storage.is_file(root / point / "summary.json"):
            unfinished.append(point)
        elif group:
            groups.setdefault(group, []).append(summaries.read(root / point))
            axes[group] = {key: value for key, value in own.items() if key not in ("arms", "seed")}
    if not groups:
        raise UserError(f"{root}: no point of this sweep is finished yet; unfinished are {phrases.some(unfinished)}")
    return name, {group: _together(group, found) for group, found in groups.items()}, axes, unfinished


def _together(name: str, found: list[dict]) -> dict:
    if len(found) == 1:
        return found[0]
    first = found[0]
    return summaries.build(
        name=name,
        config=first["config"],
        environment=first["environment"],
        data=first["data"],
        teachers={kind: teacher for summary in found for kind, teacher in summary["teachers"].items()},
        student=first["student"],
        runs=[run for summary in found for run in summary["runs"]],
        seconds=sum(summary["seconds"] for summary in found),
        ensemble_members=first["ensemble_members"],
    )


def _teacher(summary: dict, kind: str) -> float | None:
    teacher = summary["teachers"].get(kind)
    return max(teacher["widths"], key=lambda row: row["width"])["top1_last"] if teacher else None


def rows(named: dict[str, dict], axes: dict[str, dict]) -> list[dict]:
    """The rows of results.json."""
    return [
        {
            "point": name,
            "axes": axes[name],
            "arms": {arm: row["top1_last"] for arm, row in summary["arms"].items()},
            "teacher_top1": _teacher(summary, "slimmable"),
            "standard_top1": _teacher(summary, "standard"),
            "gain": summary["gain"]["partial_to_whole"],
        }
        for name, summary in named.items()
    ]


def cells(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, a row an experiment: point, teacher, standard teacher, each arm, gain."""
    arms = [arm for arm in summaries.ORDER if any(arm in row["arms"] for row in rows)]

    def one(score: float | None) -> str:
        return "-" if score is None else f"{score:.2f}"

    body = [
        [
            row["point"],
            one(row["teacher_top1"]),
            one(row["standard_top1"]),
            *(phrases.spread(row["arms"].get(arm)) for arm in arms),
            phrases.gain(row["gain"]),
        ]
        for row in rows
    ]
    return ["experiment", "teacher", "standard", *arms, "gain"], body


def as_csv(rows: list[dict]) -> str:
    """A line for each experiment and arm; the gain stands in the lines of pwkd."""
    keys = list(dict.fromkeys(key for row in rows for key in row["axes"]))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["point", *keys, "arm", "mean", "std", "n", "teacher_top1", "standard_top1", "gain_mean", "gain_low",
                    "gain_high"])  # fmt: skip
    for row in rows:
        for arm, stat in row["arms"].items():
            gain = row["gain"] if arm == "pwkd" else None
            between = [gain["mean"], *(phrases.interval(gain) or (None, None))] if gain else [None] * 3
            known = [stat["mean"], stat["std"], stat["n"], row["teacher_top1"], row["standard_top1"]]
            line = [row["point"], *(row["axes"].get(k, "") for k in keys), arm, *known, *between]
            table.writerow(["" if value is None else value for value in line])
    return out.getvalue()


def as_json(name: str, rows: list[dict], unfinished: list[str]) -> str:
    found = {"format": "pwkd_jax.sweep_results", "version": 1, "name": name, "rows": rows, "unfinished": unfinished}
    return json.dumps(found, indent=1) + "\n"


def text(name: str, rows: list[dict], unfinished: list[str]) -> str:
    """The table as plain text of at most 100 columns where the names allow it: as many arms side by side as fit."""
    header, body = cells(rows)
    room = phrases.LINE - 2 - max(len(header[0]), *(len(line[0]) for line in body))
    parts, columns = [phrases.wrap(f"{name}: {phrases.plural(len(rows), 'experiment')}, last top-1 in percent")], []
    for column in range(1, len(header)):
        size = 2 + max(len(line[column]) for line in (header, *body))
        if columns and sum(s for _, s in columns) + size > room:
            parts.append(_columns(header, body, [c for c, _ in columns]))
            columns = []
        columns.append((column, size))
    parts.append(_columns(header, body, [c for c, _ in columns]))
    parts.append(phrases.wrap(
        "teacher: the slimmable one's widest; gain: pwkd minus the better of kd_whole and kd_whole_cyclic, in points, "
        "seed by seed, and its 95 % interval"
    ))  # fmt: skip
    if unfinished:
        parts.append(phrases.wrap(missing(unfinished), "  "))
    return "\n\n".join(parts)


def _columns(header: list[str], body: list[list[str]], columns: list[int]) -> str:
    return phrases.grid([header[0], *(header[c] for c in columns)], [[line[0], *(line[c] for c in columns)] for line in body])


def missing(unfinished: list[str]) -> str:
    count = phrases.plural(len(unfinished), "point")
    return f"Unfinished: {count}, so what they add is not in this report: {', '.join(unfinished)}"
