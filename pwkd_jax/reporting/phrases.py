"""Units, spreads and sentences, so that the text table and the page say the same thing in the same words."""

import statistics
import textwrap
from collections.abc import Sequence

LINE = 100
CONTROLS = ("kd_whole", "kd_whole_cyclic")


def count(number: float) -> str:
    """Parameters or multiply-accumulates in the field's units: 812, 47.0 k, 0.47 M, 67.9 M, 1083 M, 12.3 G."""
    if number < 1000:
        return f"{number:.0f}"
    unit, size = ("k", 1e3) if number < 1e5 else ("M", 1e6) if number < 1e10 else ("G", 1e9)
    value = number / size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def plural(number: int, noun: str) -> str:
    """1 seed, 3 seeds."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def stat(values: Sequence[float]) -> dict:
    """{"mean", "std", "n"} of one value or more: the sample standard deviation (ddof = 1), None of one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


def spread(value: dict | None) -> str:
    """`96.30 ± 0.20`, or `96.30` where one value has no spread."""
    if value is None:
        return "-"
    mean = f"{value['mean']:.2f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.2f}"


def interval(value: dict) -> tuple[float, float] | None:
    """(low, high) of the 95 % interval of a mean, by Student's t over its n values; None of one value."""
    if value["std"] is None:
        return None
    from scipy.special import stdtrit  # half a second, which nobody waits for before training begins

    half = float(stdtrit(value["n"] - 1, 0.975)) * value["std"] / value["n"] ** 0.5
    return value["mean"] - half, value["mean"] + half


def gain(value: dict | None) -> str:
    """`-0.74 (-1.75 to +0.26)`: a mean of paired differences and its 95 % interval; the mean alone of one."""
    if value is None:
        return "-"
    between = interval(value)
    return f"{value['mean']:+.2f}" + (f" ({between[0]:+.2f} to {between[1]:+.2f})" if between else "")


def width(value: float) -> str:
    """A width as short as it goes: 0.25, 1."""
    return f"{value:g}"


def plan(stages: Sequence[dict], cycles: Sequence) -> str:
    """Teacher and schedule of an arm: `slimmable 0.25 > 0.5 > 1, 3 cycles`."""
    drawn = [
        "|".join(width(w) for w in stage["widths"]) + " at random" * (len(stage["widths"]) > 1) for stage in stages
    ]
    path = [w for i, w in enumerate(drawn) if i == 0 or w != drawn[i - 1]]
    teachers = list(dict.fromkeys(stage["teacher"] for stage in stages))
    if teachers == ["none"]:
        teacher = "no teacher"
    elif teachers == ["standard"]:
        teacher = "standard teacher"
    else:
        teacher = f"{' and '.join(teachers)} {' > '.join(w for w in path if w)}"
    return f"{teacher}, {plural(len(cycles), 'cycle')}"


def against(difference: dict, arms: dict, baseline: str) -> str:
    """What pwkd earned over `difference["against"]`, called `baseline`, and whether that can be told from chance."""
    other, n, between = difference["against"], difference["n"], interval(difference)
    head = (
        f"pwkd {spread(arms['pwkd']['top1_last'])} against {spread(arms[other]['top1_last'])} for {baseline}: "
        f"{difference['mean']:+.2f} {'points' if n != 1 else 'points over 1 seed'}"
    )
    if between is None:
        tail = "; one seed has no spread, so this cannot be told from chance"
    else:
        tail = f" over {n} seeds, 95 % interval of the differences seed by seed {between[0]:+.2f} to {between[1]:+.2f}: "
        tail += "not distinguishable from none" if between[0] <= 0 <= between[1] else "more than chance"
    note = f" ({difference['note']})" if difference["note"] else ""
    return f"{head}{tail}{note}."


def headline(summary: dict) -> str:
    """The result of an experiment as a sentence: pwkd against the better of its two controls, or why there is none."""
    whole = summary["gain"]["partial_to_whole"]
    if whole is None:
        return f"No gain of partial to whole is reported: {summary['gain']['reason']}."
    both = all(control in summary["arms"] for control in CONTROLS)
    compared = "its better control" if both else "its only control"
    return against(whole, summary["arms"], f"{compared} {whole['against']}")


def standard(summary: dict) -> str:
    """The same over ordinary distillation from an ordinary teacher; empty where kd_standard or pwkd did not run."""
    over = summary["gain"]["over_kd_standard"]
    return against(over, summary["arms"], "kd_standard") if over else ""


def setting(summary: dict) -> str:
    """Who was taught what by whom, as one sentence."""
    data, student, teachers = summary["data"], summary["student"], summary["teachers"]
    article = "An" if student["model"][:1].lower() in "aeio" else "A"
    sentence = (
        f"{article} {student['model']} student ({count(student['params'])} parameters, {count(student['macs'])} MACs) on "
        f"{data['name']} ({data['train_images']:,} training and {data['test_images']:,} test images, "
        f"{data['num_classes']} classes, so one test image is {100 / data['test_images']:.2f} points)"
    )
    parts = []
    if slimmable := teachers.get("slimmable"):
        widths = ", ".join(width(row["width"]) for row in slimmable["widths"])
        parts.append(f"a slimmable {slimmable['model']} of widths {widths}")
    if ordinary := teachers.get("standard"):
        parts.append(f"a standard {ordinary['model']}")
    return sentence + (f", with {' and '.join(parts)} as teacher{'s' * (len(parts) > 1)}." if parts else ".")


def teacher_rows(summary: dict) -> list[list[str]]:
    """Cells for each teacher and width: teacher, width, params, MACs, last and best top-1."""
    return [
        [
            kind,
            width(row["width"]),
            count(row["params"]),
            count(row["macs"]),
            f"{row['top1_last']:.2f}",
            f"{row['top1_best']:.2f}",
        ]
        for kind, teacher in summary["teachers"].items()
        for row in teacher["widths"]
    ]


def arm_rows(summary: dict) -> list[list[str]]:
    """Cells for each arm: arm, teacher and schedule, last and best top-1, n; after it what is extra: its ensemble, and the
    weights chosen by validation."""
    rows = []
    for name, arm in summary["arms"].items():
        how = plan(arm["plan"], arm["cycles"])
        last, best, extra = arm["top1_last"], arm["top1_best"], arm["ensemble"]
        rows.append([name, how, spread(last), spread(best), str(last["n"])])
        if extra:
            said = f"+ ensemble of its last {extra['members']} (extra)"
            rows.append(["", said, spread(extra), "-", str(extra["n"])])
        chosen = [run["selected"]["top1"] for run in summary["runs"] if run["arm"] == name and "selected" in run]
        if chosen:
            rows.append(["", "+ its weights that were best on validation (extra)", spread(stat(chosen)), "-", str(len(chosen))])
    return rows


def wrap(text: str, indent: str = "") -> str:
    """`text` in lines of at most LINE columns, those after the first indented by `indent`."""
    return textwrap.fill(text, LINE, subsequent_indent=indent)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1, folded: int | None = None) -> str:
    """A plain-text table: the first `text` columns to the left, the others to the right, two spaces between.

    folded: the column whose cells are folded into as many lines as it takes to keep to LINE columns.
    """
    lines = [list(header), *map(list, rows)]
    if folded is not None:
        others = (i for i in range(len(header)) if i != folded)
        room = LINE - sum(2 + max(len(line[i]) for line in lines) for i in others)
        lines = [piece for line in lines for piece in _fold(line, folded, max(room, 10))]
    sizes = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * size for size in sizes])
    sides = [str.ljust if i < text else str.rjust for i in range(len(sizes))]
    cells = [[side(*cell) for side, *cell in zip(sides, line, sizes, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _fold(line: list[str], column: int, room: int) -> list[list[str]]:
    first, *rest = textwrap.wrap(line[column], room) or [""]
    empty = [""] * len(line)
    return [
        [*line[:column], first, *line[column + 1 :]],
        *([*empty[:column], more, *empty[column + 1 :]] for more in rest),
    ]


def comparison_rows(named: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells that compare summaries, a row each: name, dataset, teacher, student, gain, last top-1 by arm."""
    arms = list(dict.fromkeys(arm for summary in named.values() for arm in summary["arms"]))
    rows = []
    for name, summary in named.items():
        models = dict.fromkeys(teacher["model"] for teacher in summary["teachers"].values())
        last = [spread(summary["arms"].get(arm, {}).get("top1_last")) for arm in arms]
        earned = gain(summary["gain"]["partial_to_whole"])
        rows.append([name, summary["data"]["name"], ", ".join(models) or "-", summary["student"]["model"], earned, *last])
    return ["name", "dataset", "teacher", "student", "gain", *arms], rows
