"""The classes of a split one by one: which of them a network knows, and for which others it takes their images. NumPy alone.

labels, predicted: int [N], the true class of each image and the one it was taken for. names: of the classes, or empty.
"""

import csv
import io
import unicodedata
from collections.abc import Sequence

import numpy as np

from pwkd_jax.reporting import phrases

MATRIX = 50  # classes up to which a confusion matrix is kept in results, and drawn
PAIRS = 30  # the most confused pairs that are kept beyond
WORST, BEST = 20, 5  # classes that tables show of many

# What a finished run keeps of its classes, as `storage.record` compares it.
COUNTS = {"images": [int], "correct": [int], "matrix?": [[int]], "confused?": [[int]]}


def pairs(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [M, 3]: (true class, another that its images were taken for, how many), the most first, then by class. Only pairs
    that occur, so that 20,000 classes take no more than their mistakes do."""
    wrong = labels != predicted
    codes, images = np.unique(labels[wrong].astype(np.int64) * classes + predicted[wrong], return_counts=True)
    order = np.lexsort((codes, -images))
    return np.stack([codes // classes, codes % classes, images], axis=1)[order]


def matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes, classes]: images of each class (row) by the class they were taken for (column)."""
    return np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes**2).reshape(classes, classes)


def counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict:
    """What a run keeps, of `COUNTS`: images and correct [classes], and the confusion matrix where there are at most MATRIX
    classes, else the PAIRS most confused pairs, as `pairs` has them."""
    images, correct = (np.bincount(of, minlength=classes).tolist() for of in (labels, labels[labels == predicted]))
    found = {"images": images, "correct": correct}
    if classes <= MATRIX:
        return found | {"matrix": matrix(labels, predicted, classes).tolist()}
    return found | {"confused": pairs(labels, predicted, classes)[:PAIRS].tolist()}


def fault(found: dict | None) -> str:
    """What of `counts` does not fit the rest, as a phrase; '' where all does, or where nothing was counted. found: of the shape
    COUNTS."""
    if found is None:
        return ""
    images, correct = found["images"], found["correct"]
    classes = len(images)
    if len(correct) != classes or not all(0 <= right <= of < 2**53 for right, of in zip(correct, images, strict=True)):
        return "of some class more images are right than there are"
    if rows := found.get("matrix"):
        square = len(rows) == classes and all(len(row) == classes and min(row) >= 0 for row in rows)
        if not square or any(sum(row) != of for row, of in zip(rows, images, strict=True)):
            return "its confusion matrix does not count each image once"
        if any(row[i] != correct[i] for i, row in enumerate(rows)):
            return "its confusion matrix counts others as right"
    for pair in found.get("confused", ()):
        known = len(pair) == 3 and all(0 <= c < classes for c in pair[:2]) and pair[0] != pair[1]
        if not known or not 0 < pair[2] <= images[pair[0]] - correct[pair[0]]:
            return f"{pair} is no pair of classes that are confused"
    return ""


def confused(found: dict, most: int = WORST) -> list[tuple[int, int, int]]:
    """The most confused pairs of `counts`, as `pairs` has them."""
    rows = [(i, j, n) for i, row in enumerate(found.get("matrix", ())) for j, n in enumerate(row) if n and i != j]
    return sorted(rows or map(tuple, found.get("confused", ())), key=lambda pair: (-pair[2], *pair[:2]))[:most]


def percent(part: int, whole: int) -> float | None:
    """None of nothing."""
    return 100 * part / whole if whole else None


def rows(
    labels: np.ndarray, predicted: np.ndarray, classes: int, names: Sequence[str] = (), teacher: np.ndarray | None = None
) -> list[dict]:
    """For each class, in their order: class, name (None without), images, top1 (its recall), precision, and taken_for, the
    other class that most of its images were given: {class, name, images, share}. In percent; None where there is nothing to
    divide by, or no mistake. teacher [N]: the classes that a teacher gave; then also teacher_top1 and difference, in points."""
    found, given = counts(labels, predicted, classes), np.bincount(predicted, minlength=classes)
    most = {int(c): (int(other), int(n)) for c, other, n in reversed(pairs(labels, predicted, classes))}
    beside = None if teacher is None else counts(labels, teacher, classes)["correct"]

    def name(c: int) -> str | None:
        return names[c] if c < len(names) else None

    result = []
    for c, (images, correct) in enumerate(zip(found["images"], found["correct"], strict=True)):
        row = {"class": c, "name": name(c), "images": images, "top1": percent(correct, images)}
        row |= {"precision": percent(correct, int(given[c])), "taken_for": None}
        if c in most:
            other, n = most[c]
            row["taken_for"] = {"class": other, "name": name(other), "images": n, "share": percent(n, images)}
        if beside:
            row["teacher_top1"] = percent(beside[c], images)
            row["difference"] = percent(correct - beside[c], images)
        result.append(row)
    return result


def worst_first(top1: Sequence[float | None]) -> list[int]:
    """Classes by their recall, those without images last."""
    return sorted(range(len(top1)), key=lambda c: (top1[c] is None, top1[c] or 0.0))


def some(order: Sequence[int], top1: Sequence[float | None]) -> tuple[list[int], list[int]]:
    """(the worst, the best) of classes in the order of `worst_first`: all and none where there are few."""
    known = [c for c in order if top1[c] is not None]
    return (list(order), []) if len(order) <= WORST + BEST else (known[:WORST], known[WORST:][-BEST:])


def table(found: Sequence[dict]) -> str:
    """`rows` as plain text, the worst first, and of many classes the worst and the best."""
    top1 = [row["top1"] for row in found]
    worst, best = some(worst_first(top1), top1)
    beside = "teacher_top1" in found[0]

    def cells(row: dict) -> list[str]:
        other = row["taken_for"]
        taken = [shown(title(other["class"], other["name"])), cell(other["share"])] if other else ["-", "-"]
        own = [shown(title(row["class"], row["name"])), *taken, f"{row['images']:,}", cell(row["top1"]), cell(row["precision"])]
        return own + ([cell(row["teacher_top1"]), cell(row["difference"], "+")] if beside else [])

    header = ["class", "most often taken for", "share", "images", "top-1", "precision"]
    lines = phrases.grid(
        header + (["teacher", "difference"] if beside else []), [cells(found[c]) for c in [*worst, *best]], text=2
    ).splitlines()
    said = f"{len(found):,} classes, the worst top-1 first; in percent" + ", the difference from the teacher in points" * beside
    if len(worst) + len(best) < len(found):
        left = len(found) - len(worst) - len(best)
        empty = sum(value is None for value in top1)
        note = f", {empty:,} of them without images" if empty else ""
        lines.insert(2 + len(worst), f"... {left:,} more{note}; --json lists all ...")
    return "\n".join([f"{said}:", *lines])


def as_csv(counted: np.ndarray, names: Sequence[str] = ()) -> str:
    """A confusion matrix [classes, classes]: a row for each true class, a column for each predicted one, under their names.

    Every name is quoted. A spreadsheet would run one that begins as a formula does: it is given an apostrophe, as for text.
    """
    heads = [title(c, names[c] if c < len(names) else None) for c in range(len(counted))]
    heads = ["'" + head if head.startswith(("=", "+", "-", "@", "\t", "\r")) else head for head in heads]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(["true class by predicted", *heads])
    writer.writerows([head, *row] for head, row in zip(heads, counted.tolist(), strict=True))
    # A folder's name may hold bytes that are no text.
    return text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")


def title(number: int, name: str | None) -> str:
    """A class by its name, or by its number without one."""
    return str(number) if name is None else name


def cell(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def printable(name: str) -> str:
    """A name without anything that a terminal would obey, a page could not hold, or UTF-8 could not write."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def shown(name: str, room: int = 24) -> str:
    """A name on one line of at most so many columns, its middle left out where it is longer."""
    name = printable(name)
    if columns(name) <= room:
        return name
    head, tail = "", ""
    for c in name:
        if columns(head + c) > (room - 2) // 2:
            break
        head += c
    for c in reversed(name):
        if columns(head + tail + c) > room - 3:
            break
        tail = c + tail
    return f"{head}...{tail}"


def columns(text: str) -> int:
    """How wide a text is in a terminal: Chinese, Japanese and Korean characters take two columns."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def of_summary(summary: dict) -> dict | None:
    """The classes of a summary, or None where no arm's runs all counted them: names, images [classes], top1 {who: percent or
    None of each class} of the teachers' full width and of those arms, mean over seeds; focus, the arm that the page is about;
    and run, its best by its last epoch."""
    found = {f"{kind} teacher": [t["classes"]] for kind, t in summary["teachers"].items() if "classes" in t}
    runs = {arm: [run for run in summary["runs"] if run["arm"] == arm] for arm in summary["arms"]}
    runs = {arm: own for arm, own in runs.items() if own and all("classes" in run for run in own)}
    if not runs:
        return None
    found |= {arm: [run["classes"] for run in own] for arm, own in runs.items()}
    top1 = {who: _mean_top1(each) for who, each in found.items()}
    focus = "pwkd" if "pwkd" in runs else next(iter(runs))
    best = max(runs[focus], key=lambda run: run["top1_last"])
    images, given = best["classes"]["images"], summary["data"].get("classes", ())
    names = [printable(title(c, given[c] if c < len(given) else None)) for c in range(len(images))]
    return {"names": names, "images": images, "top1": top1, "focus": focus, "run": best}


def _mean_top1(each: Sequence[dict]) -> list[float | None]:
    """Of each class, from the `counts` of several runs on the same images."""
    correct, images = (map(sum, zip(*(c[key] for c in each), strict=True)) for key in ("correct", "images"))
    return [percent(right, of) for right, of in zip(correct, images, strict=True)]
