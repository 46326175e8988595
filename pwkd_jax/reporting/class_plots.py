"""The pictures of the classes: how well each is known, and for which others it is taken. Made as those of `plots` are."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextToPath

from pwkd_jax.reporting import per_class
from pwkd_jax.reporting.plots import FOCUS, INK, LOOKS, OTHER, styled, svg, zoom

FONT = 8
SHADES = 8
FULL = 20  # classes beyond which a picture takes the page's whole width
TEACHERS = {"slimmable teacher": "*", "standard teacher": "d"}


@styled
def accuracy(classes: dict) -> str:
    """Top-1 [%] of each class, a row each, the worst first by the arm that the page is about: of the teachers' full width and
    of the arms, mean over seeds. classes: see `per_class.of_summary`."""
    order = [c for c in per_class.worst_first(classes["top1"][classes["focus"]]) if classes["images"][c]]
    if not order or len(classes["names"]) > per_class.MATRIX:
        return ""
    series = {who: classes["top1"][who] for who in shown(classes)}
    labels = [per_class.shown(classes["names"][c], 20) for c in order]
    wide = len(order) > FULL
    height, width, beside = (0.2 if wide else 0.28) * len(order), 6.6 if wide else 3.5, _room(labels)
    figure, axes = _canvas(beside, width, height, below=0.95)
    for i, (who, top1) in enumerate(series.items()):
        colour, _, marker, _ = (INK, "", TEACHERS[who], "") if who in TEACHERS else LOOKS.get(who, OTHER)
        # A little apart, so that equal ones do not hide each other.
        at = [y + 0.5 * ((i + 0.5) / len(series) - 0.5) for y in range(len(order))]
        look = {"color": colour, "markersize": (6 if who == classes["focus"] else 4.5) - wide, "clip_on": False, "label": who}
        axes.plot([top1[c] for c in order], at, marker, zorder=3, **look)
    axes.set_yticks(range(len(order)), labels, parse_math=False, fontsize=FONT)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("top-1 (%)")
    zoom(axes, [top1[c] for top1 in series.values() for c in order], "x")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=3)
    focus = classes["top1"][classes["focus"]]
    said = "; ".join(f"{classes['names'][c]} {focus[c]:.2f}" for c in order)
    return svg(figure, "class-accuracy", f"Top-1 in percent of each class, the worst first, for {classes['focus']}: {said}")


def shown(classes: dict) -> list[str]:
    """Whose accuracies the picture has: many arms would hide each other."""
    arms = [who for who in classes["top1"] if who not in TEACHERS]
    kept = arms if len(arms) <= 4 else [arm for arm in arms if arm in (*FOCUS, classes["focus"])]
    return [who for who in classes["top1"] if who in TEACHERS or who in kept]


@styled
def confusion(classes: dict) -> str:
    """The confusion matrix of one run, true classes down, predicted ones across, shaded by the share of the true class's
    images, mistakes on a scale of their own; up to a dozen classes with the counts."""
    matrix = classes["run"]["classes"].get("matrix")
    if not matrix:
        return ""
    counted = np.array(matrix)
    n, labels = len(counted), [per_class.shown(name, 20) for name in classes["names"]]
    room, cell = _room(labels), 0.42 if n <= 12 else max(0.17, 4.5 / n)
    figure, axes = _canvas(room + 0.35, cell * n, cell * n, above=room + 0.35)
    share, right = counted / np.maximum(counted.sum(1, keepdims=True), 1), np.eye(n, dtype=bool)
    for where, colour in ((right, LOOKS["kd_whole"][0]), (~right, LOOKS["pwkd"][0])):
        most = share[where].max(initial=0) if colour == LOOKS["pwkd"][0] else 1
        level = np.ceil(SHADES * share / most).astype(int) if most else np.zeros_like(counted)
        for shade in range(1, SHADES + 1):
            _squares(axes, np.argwhere(where & (level == shade)), colour, 0.06 + 0.44 * shade / SHADES)
    if n <= 12:
        for i, j in np.argwhere(counted):
            axes.text(j, i, f"{counted[i, j]:,}", ha="center", va="center", fontsize=FONT)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xticks(range(n), labels, rotation=90, parse_math=False, fontsize=FONT)
    axes.set_yticks(range(n), labels, parse_math=False, fontsize=FONT)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.tick_params(which="both", length=0, labeltop=True, labelbottom=False)
    axes.grid(False, which="major")
    axes.grid(True, which="minor")
    axes.spines[:].set_visible(False)
    axes.set_ylabel("true class", labelpad=8)
    axes.set_xlabel("taken for", labelpad=8)
    axes.xaxis.set_label_position("top")
    found = per_class.confused(classes["run"]["classes"], 10)
    said = "; ".join(f"{classes['names'][a]} for {classes['names'][b]}, {count} images" for a, b, count in found)
    return svg(figure, "confusion", f"Confusion matrix; most often taken: {said or 'none for another'}")


def worst_share(classes: dict) -> float:
    """The largest share [%] of a class's images that the run of the picture takes for one other class."""
    images = classes["images"]
    found = per_class.confused(classes["run"]["classes"], len(images) ** 2)
    return max((100 * count / images[a] for a, _, count in found), default=0.0)


def _canvas(beside: float, width: float, height: float, above: float = 0.1, below: float = 0.1) -> tuple[Figure, Axes]:
    """A figure whose axes have so many inches of room around them, and right of them a little."""
    whole = beside + width + 0.15, above + height + below
    figure = Figure(whole)
    return figure, figure.add_axes((beside / whole[0], below / whole[1], width / whole[0], height / whole[1]))


def _room(labels: Sequence[str]) -> float:
    """Inches that the longest label takes. Characters that the font lacks are as wide as they are where they are read."""
    measure, font = TextToPath().get_text_width_height_descent, FontProperties(size=FONT)
    texts = ["".join("W" if unicodedata.east_asian_width(c) in "WF" else c for c in label) for label in labels]
    return max(measure(text, font, False)[0] for text in texts) / 72 + 0.15


def _squares(axes: Axes, cells: np.ndarray, colour: str, alpha: float) -> None:
    """Fills cells [M, 2] (row, column) as one path: a picture of thousands of them stays small."""
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)])
    if len(cells):
        vertices = (cells[:, None, ::-1] + corners).reshape(-1, 2)
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(cells)
        axes.add_patch(PathPatch(Path(vertices, codes), facecolor=colour, alpha=alpha, linewidth=0))
