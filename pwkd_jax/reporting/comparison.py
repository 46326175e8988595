"""Several experiments side by side: what tells their configs apart, and their results in one table."""

import json

from pwkd_jax.reporting import phrases

MISSING = "(not set)"


def name(found: dict[str, dict]) -> dict[str, dict]:
    """The summaries of {path: summary} under their own names, with the path too where two have the same."""
    names = [summary["name"] for summary in found.values()]
    labels = [f"{own} ({path})" if names.count(own) > 1 else own for own, path in zip(names, found, strict=True)]
    return dict(zip(labels, found.values(), strict=True))


def differing(named: dict[str, dict]) -> list[list[str]]:
    """Rows [key, value in each summary] of the config keys, dotted, that are not the same in all."""
    flat = [_flatten(summary["config"]) for summary in named.values()]
    rows = [[key, *(values.get(key, MISSING) for values in flat)] for key in dict.fromkeys(k for f in flat for k in f)]
    return [row for row in rows if len(set(row[1:])) > 1]


def compare(named: dict[str, dict]) -> str:
    """The comparison as plain text of at most 100 columns: the summaries numbered, then a row an arm."""
    header, rows = phrases.comparison_rows(named)
    parts = [
        phrases.wrap(f"[{i}] {own}: {data}, teacher {teacher}, student {student}", "    ")
        for i, (own, data, teacher, student, *_) in enumerate(rows, 1)
    ]
    parts = ["\n".join(parts)]
    # As many summaries side by side as fit the line.
    for first in range(0, len(rows), 3):
        some = rows[first : first + 3]
        numbers = [f"[{first + i}]" for i in range(1, len(some) + 1)]
        cells = [[header[c], *(row[c] for row in some)] for c in (*range(5, len(header)), 4)]
        parts.append(phrases.grid(["last top-1", *numbers], cells))
    parts.append("gain: pwkd minus the better of kd_whole and kd_whole_cyclic, in points, seed by seed, 95 % interval")
    if differ := differing(named):
        parts.append(phrases.wrap("Config keys that differ: " + ", ".join(row[0] for row in differ), "  "))
    return "\n\n".join(parts)


def _flatten(config: dict, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat
