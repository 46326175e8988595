"""Chosen by validation images: the best evaluation of a run, and when there is no use in waiting for a better one."""

from collections.abc import Sequence

KEY = "validation_top1"


def best(rows: Sequence[dict], key: str = KEY, after: int = 0) -> int | None:
    """The step after `after` of the largest `key` among the rows of metrics.jsonl, the first of equals; None where no row has
    it."""
    found = [row for row in rows if key in row and row["step"] > after]
    return max(found, key=lambda row: (row[key], -row["step"]))["step"] if found else None


def over(rows: Sequence[dict], keys: Sequence[str], patience: int, after: int) -> bool:
    """Whether the last `patience` evaluations after step `after` were none of them better than one before, by the first of
    `keys`; never for 0."""
    if not patience or not keys:
        return False
    chosen = best(rows, keys[0], after)
    return chosen is not None and sum(keys[0] in row and row["step"] > chosen for row in rows) >= patience
