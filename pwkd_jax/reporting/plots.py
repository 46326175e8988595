"""The pictures of the page, each an SVG string that takes its colours from the page, light or dark; "" for no data.

Drawn with matplotlib's Figure alone, never pyplot, so that nothing global is left behind.
"""

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pwkd_jax.reporting import phrases

# Text and axes are drawn in this colour, which the SVG then takes from the text around it.
INK = "#010203"
# For each arm: on light, on dark (each at least 3:1 on its page, and told apart by the colour-blind), marker, dashes.
LOOKS = {
    "alone": ("#6e6e6e", "#a8a8a8", "x", (0, (1, 1))),
    "kd_standard": ("#9a7200", "#e8c04a", "s", (0, (5, 1))),
    "kd_whole": ("#007a5e", "#3fc79a", "^", (0, (3, 1, 1, 1))),
    "kd_whole_cyclic": ("#0068b5", "#5aaeff", "D", (0, (4, 2))),
    "pwkd": ("#cc4e00", "#ff8a4a", "o", "-"),
    "pwkd_reversed": ("#a8448f", "#e58fd0", "v", (0, (6, 1, 1, 1))),
    "pwkd_random": ("#2b93c9", "#8fd6ff", "P", (0, (2, 1))),
}
OTHER = ("#5a5a9a", "#b0b0f0", "h", "-")
FOCUS = ("pwkd", *phrases.CONTROLS)
STYLE = {
    "font.size": 10,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.15,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "pwkd_jax",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
styled = matplotlib.style.context(["default", STYLE])


def colours(dark: bool) -> dict[str, str]:
    """The CSS variables that the pictures use, for a light or a dark page."""
    return {f"--{name}": look[dark] for name, look in {**LOOKS, "other": OTHER}.items()}


@styled
def teacher(summary: dict, axis: str) -> str:
    """Teacher top-1 [%] against `axis`, width or macs (log scale); student alone and standard teacher marked."""
    kinds = summary["teachers"]
    if not kinds:
        return ""
    figure = Figure((4.8, 3.5), layout="constrained")
    axes = figure.subplots()
    said, values, ticks = [], [], {}
    for kind, look, fmt in (("slimmable", LOOKS["pwkd"], "o-"), ("standard", LOOKS["kd_standard"], "s")):
        rows = sorted(kinds[kind]["widths"], key=lambda row: row["width"]) if kind in kinds else []
        if rows:
            x, y = [row[axis] for row in rows], [row["top1_last"] for row in rows]
            axes.plot(x, y, fmt, color=look[0], label=f"{kind} teacher", markersize=7, zorder=3, clip_on=False)
            ticks |= dict(zip(x, map(phrases.width if axis == "width" else phrases.count, x), strict=True))
            values += y
            said.append(f"{kind} " + ", ".join(f"{phrases.width(r['width'])}: {r['top1_last']:.2f}" for r in rows))
    if "alone" in summary["arms"]:
        mean = summary["arms"]["alone"]["top1_last"]["mean"]
        axes.axhline(mean, color=LOOKS["alone"][0], linestyle="--", label="student alone")
        if axis == "macs":
            at = summary["student"]["macs"]
            axes.plot([at], [mean], "x", color=LOOKS["alone"][0], markersize=9, markeredgewidth=2.5, zorder=4)
        values.append(mean)
        said.append(f"student alone: {mean:.2f}")
    if axis == "macs":
        axes.set_xscale("log")
        axes.minorticks_off()
    kept = _apart(sorted(ticks), axes.get_xlim(), log=axis == "macs")
    axes.set_xticks(kept, [ticks[x] for x in kept])
    axes.set_xlabel("width" if axis == "width" else "MACs of one image (log scale)")
    axes.set_ylabel("top-1 (%)")
    zoom(axes, values)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return svg(figure, f"teacher-{axis}", f"Teacher top-1 in percent by {axis}. " + "; ".join(said))


@styled
def curves(summary: dict) -> str:
    """Student top-1 [%] over epochs, a line an arm (mean over seeds, seeds faint), above the learning rates [1]."""
    groups = {arm: [r for r in summary["runs"] if r["arm"] == arm and r["curve"]] for arm in summary["arms"]}
    groups = {arm: runs for arm, runs in groups.items() if runs}
    if not groups:
        return ""
    figure = Figure((5.6, 6.4), layout="constrained")
    top, low = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    last = next(iter(groups.values()))[0]["curve"][-1]
    epoch = last["epoch"] / last["step"] if last["step"] and last["epoch"] else 1
    bands = _bands((top, low), summary["arms"].get("pwkd"), epoch)
    settled = []
    for arm in sorted(groups, key=lambda arm: arm == "pwkd"):
        runs, (colour, _, _, dashes) = groups[arm], LOOKS.get(arm, OTHER)
        rows = [{row["step"]: row["top1"] for row in run["curve"]} for run in runs]
        steps = sorted(set.intersection(*map(set, rows)))
        mean = [sum(row[s] for row in rows) / len(rows) for s in steps]
        # Many arms with many seeds would hide what the comparison is about.
        if len(runs) > 1 and (len(groups) <= 4 or arm in FOCUS):
            for row in rows:
                top.plot([s * epoch for s in row], list(row.values()), color=colour, alpha=0.25, linewidth=0.8)
        thick = 2.4 if arm == "pwkd" else 1.6 if arm in FOCUS else 1.2
        top.plot([s * epoch for s in steps], mean, color=colour, linestyle=dashes, linewidth=thick, label=arm)
        settled += [value for s, value in zip(steps, mean, strict=True) if s * 5 >= steps[-1]] or mean
    for points, arms in _schedules(groups).items():
        look = LOOKS.get(next((arm for arm in FOCUS if arm in arms), arms[0]), OTHER)
        label = textwrap.fill(", ".join(arms), 70)
        low.plot([s * epoch for s, _ in points], [r for _, r in points], color=look[0], linestyle=look[3], label=label)
    zoom(top, settled)
    top.set_ylabel("top-1 (%)")
    low.set_ylabel("learning rate")
    low.set_ylim(bottom=0)
    low.set_xlabel("epoch" if epoch != 1 else "step")
    low.margins(x=0.01)
    handles, labels = top.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: list(summary["arms"]).index(labels[i]))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside upper left", ncols=3)
    figure.legend(*low.get_legend_handles_labels(), loc="outside lower left")
    ends = ", ".join(f"{arm} ends at {phrases.spread(summary['arms'][arm]['top1_last'])}" for arm in groups)
    return svg(figure, "curves", f"Student top-1 in percent and learning rate over training; {bands}{ends}")


@styled
def arms(summary: dict) -> str:
    """Last top-1 [%] of the arms side by side: mean ± std and every seed."""
    if not summary["arms"]:
        return ""
    figure = Figure((5.4, 0.9 + 0.42 * len(summary["arms"])), layout="constrained")
    axes = figure.subplots()
    values = []
    for y, (name, arm) in enumerate(summary["arms"].items()):
        colour, stat = LOOKS.get(name, OTHER)[0], arm["top1_last"]
        seeds, std = [run["top1_last"] for run in arm["runs"]], stat["std"] or 0
        values += [*seeds, stat["mean"] - std, stat["mean"] + std]
        axes.errorbar(stat["mean"], y, xerr=std or None, fmt="o", color=colour, markersize=8, capsize=4, linewidth=2)
        if len(seeds) > 1:
            axes.plot(seeds, [y + 0.25] * len(seeds), "o", color=colour, markersize=4, alpha=0.6)
        axes.annotate(
            phrases.spread(stat), (1.02, y), xycoords=("axes fraction", "data"), va="center", annotation_clip=False
        )
    axes.set_yticks(range(len(summary["arms"])), list(summary["arms"]))
    axes.set_ylim(len(summary["arms"]) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("top-1 at the last epoch (%)")
    zoom(axes, values, "x")
    said = "; ".join(f"{name} {phrases.spread(arm['top1_last'])}" for name, arm in summary["arms"].items())
    return svg(figure, "arms", f"Top-1 at the last epoch in percent by arm: {said}")


@styled
def stage_ends(summary: dict) -> str:
    """Student top-1 [%] at the end of each stage, mean ± std, for the arms with more than one stage."""
    staged = {name: arm["stage_ends"] for name, arm in summary["arms"].items() if len(arm["stage_ends"]) > 1}
    return _by_count(staged, "stage-ends", "stage that has ended")


@styled
def ensembles(summary: dict) -> str:
    """Top-1 [%] of the ensemble of the last m snapshots against m, mean ± std over seeds."""
    found = {}
    for name in summary["arms"]:
        lists = [[e["top1"] for e in run["ensemble"]] for run in summary["runs"] if run["arm"] == name]
        if min(map(len, lists)) > 1:
            found[name] = [phrases.stat(column) for column in zip(*lists, strict=False)]
    return _by_count(found, "ensembles", "snapshots in the ensemble, from the last")


@styled
def gains(named: dict[str, dict]) -> str:
    """pwkd minus its better control [points], mean and 95 % interval, for each of the named summaries that has it."""
    found = {name: s["gain"]["partial_to_whole"] for name, s in named.items() if s["gain"]["partial_to_whole"]}
    if not found:
        return ""
    figure = Figure((5.4, 1.0 + 0.42 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    for y, stat in enumerate(found.values()):
        bar = {"fmt": "o", "color": LOOKS["pwkd"][0], "markersize": 8, "capsize": 4, "linewidth": 2}
        low, high = phrases.interval(stat) or (stat["mean"], stat["mean"])
        axes.errorbar(stat["mean"], y, xerr=[[stat["mean"] - low], [high - stat["mean"]]], **bar)
    short = [name if len(name) <= 28 else name[:12] + "..." + name[-13:] for name in found]
    axes.set_yticks(range(len(found)), short, parse_math=False)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("pwkd minus its better control (points)")
    said = "; ".join(f"{name} {phrases.gain(stat)}" for name, stat in found.items())
    return svg(figure, "gains", f"Gain of partial to whole in points: {said}")


def _by_count(series: dict[str, list[dict]], name: str, label: str) -> str:
    """Stats against 1, 2, 3, ..., one line an arm, a little apart so that error bars do not hide each other."""
    if not series:
        return ""
    figure = Figure((4.8, 3.7), layout="constrained")
    axes = figure.subplots()
    values = []
    for i, (arm, stats) in enumerate(series.items()):
        colour, _, marker, dashes = LOOKS.get(arm, OTHER)
        x = [k + 1 + 0.06 * (i - (len(series) - 1) / 2) for k in range(len(stats))]
        mean, std = [s["mean"] for s in stats], [s["std"] or 0 for s in stats]
        look = {"color": colour, "marker": marker, "linestyle": dashes, "capsize": 2, "elinewidth": 1, "label": arm}
        axes.errorbar(x, mean, yerr=std if any(std) else None, **look)
        values += [m + sign * s for m, s in zip(mean, std, strict=True) for sign in (-1, 1)]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 (%)")
    zoom(axes, values)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    said = "; ".join(f"{arm} " + ", ".join(f"{s['mean']:.2f}" for s in stats) for arm, stats in series.items())
    return svg(figure, name, f"Top-1 in percent by {label}: {said}")


def _bands(both: Sequence[Axes], pwkd: dict | None, epoch: float) -> str:
    """Shades every second stage of pwkd and writes its teacher's width on top; the same in words."""
    stages = pwkd["plan"] if pwkd else []
    for i, stage in enumerate(stages):
        start, end = stage["start"] * epoch, stage["end"] * epoch
        for axes in both:
            axes.axvspan(start, end, color=INK, alpha=0.06 if i % 2 else 0.0, linewidth=0)
        label = "|".join(phrases.width(w) for w in stage["widths"])
        if len(stages) <= 12:
            label = f"width {label}" if len(stages) <= 5 else label
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 9}
            both[0].annotate(label, ((start + end) / 2, 1.01), **place)
    widths = ", ".join("|".join(phrases.width(w) for w in stage["widths"]) for stage in stages)
    return f"stages of pwkd at widths {widths}; " if stages else ""


def _schedules(groups: dict[str, list[dict]]) -> dict[tuple, list[str]]:
    """The arms that share each learning-rate schedule: their lines would hide each other."""
    found: dict[tuple, list[str]] = {}
    for arm, runs in groups.items():
        found.setdefault(tuple(map(tuple, runs[0]["learning_rates"])), []).append(arm)
    return found


def zoom(axes: Axes, values: Sequence[float], axis: str = "y") -> None:
    """Limits accuracies to where they differ; a little above 100 %, for markers, but no tick there."""
    low, high = min(values), max(values)
    pad = max(0.12 * (high - low), 0.25)
    low, high = max(low - pad, -1), min(high + pad, 100 + 0.3 * pad)
    (axes.set_ylim if axis == "y" else axes.set_xlim)(low, high)
    line = axes.yaxis if axis == "y" else axes.xaxis
    line.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    line.set_major_formatter(lambda value, _: f"{value:g}" if value <= 100 else "")


def _apart(places: Sequence[float], limits: tuple[float, float], log: bool) -> list[float]:
    """Those of the sorted places, from the last, whose labels have room beside each other on an axis of such limits."""
    at, (low, high) = ([math.log(p) for p in series] if log else list(series) for series in (places, limits))
    room, kept = 0.17 * (high - low), [len(at) - 1]
    for i in reversed(range(len(at) - 1)):
        if at[kept[-1]] - at[i] >= room:
            kept.append(i)
    return [places[i] for i in reversed(kept)]


def svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an SVG element to put into a page, `name` unique within it; alt: what it shows, in words."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The text stays text, which the reader's own fonts draw.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', drawn)[0]
    head = f'<svg {box} role="img" aria-label="{html.escape(alt)}">'
    drawn = re.sub(r"<svg[^>]*>", lambda _: head, drawn, count=1)
    # Ids are unique within one picture only; `xlink:href` needs a namespace that a page does not declare.
    drawn = (
        re.sub(r'\bid="', f'id="{name}-', drawn)
        .replace("url(#", f"url(#{name}-")
        .replace('xlink:href="#', f'href="#{name}-')
    )
    for arm, (light, *_) in {**LOOKS, "other": OTHER}.items():
        drawn = drawn.replace(f": {light}", f": var(--{arm}, {light})")
    return drawn.replace(f": {INK}", ": currentColor")
