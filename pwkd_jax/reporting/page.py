"""The page: one HTML file that needs no network, no script and no other file, in light and dark."""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from pwkd_jax.reporting import class_plots, per_class, phrases, plots

TEMPLATE = Path(__file__).with_name("page.html")


def report(summary: dict) -> str:
    """The page of one experiment."""
    config = {"title": "Full config", "text": json.dumps(summary["config"], indent=2, ensure_ascii=False)}
    sections = [
        _section("Results", _arm_figures(summary), _arm_tables(summary), folded=_run_table(summary)),
        _section("Training", _training_figures(summary)),
        _section("Stages and their snapshots", _stage_figures(summary)),
        _class_section(summary),
        _section("Teachers", _teacher_figures(summary), _teacher_tables(summary)),
        _section("Time and environment", tables=_environment_tables(summary), folded=[config]),
    ]
    title = f"{summary['name']}: partial to whole knowledge distillation"
    lead = [phrases.headline(summary), phrases.standard(summary), phrases.setting(summary)]
    lead.append(
        "Accuracies are top-1 in percent at the last epoch, mean ± sample standard deviation over seeds. The best "
        "epoch stands beside it; it is chosen on the test images, so it flatters."
    )
    return _render(title, lead, sections, summary["warnings"])


def comparison(named: dict[str, dict], differing: Sequence[Sequence[str]]) -> str:
    """The page that compares summaries, under the names given.

    differing: the rows of the table of config keys that differ, [key, value in each summary].
    """
    header, rows = phrases.comparison_rows(named)
    arms = {"caption": "Top-1 in percent at the last epoch, and what partial to whole gained in points, 95 % interval."}
    arms |= {"header": header, "rows": rows, "text": 4}
    gains = _figure(
        plots.gains(named),
        "What partial to whole gained: pwkd minus its better control in points, mean and 95 % interval "
        "(Student's t) of the differences seed by seed. Left of the line it lost.",
    )
    text = ["" if differing else "The configs do not differ."]
    config = {"caption": "Config keys that differ.", "header": ["key", *named], "rows": differing}
    config |= {"text": 1 + len(named)}
    warned = [f"{name}: {line}" for name, summary in named.items() for line in summary["warnings"]]
    sections = [
        _section("Results", gains, [arms], [f"{name}: {phrases.headline(summary)}" for name, summary in named.items()]),
        _section("Config", tables=[config] if differing else [], text=text),
    ]
    lead = [f"Experiments compared: {', '.join(named)}."]
    return _render(f"Comparison of {phrases.plural(len(named), 'experiment')}", lead, sections, warned)


def sweep(name: str, named: dict[str, dict], header: Sequence[str], rows: Sequence[Sequence[str]], missing: str) -> str:
    """The page of a sweep: its table, and the gains of its experiments. missing: a sentence on unfinished points, or ''."""
    told = "Top-1 in percent at the last epoch, mean ± sample standard deviation over seeds; gains in points, 95 % interval."
    table = {"caption": told}
    table |= {"header": header, "rows": rows, "text": 1}
    gains = _figure(plots.gains(named), "What partial to whole gained: pwkd minus its better control in points, 95 % interval.")
    warned = [f"{own}: {line}" for own, summary in named.items() for line in summary["warnings"]]
    said = [f"{own}: {phrases.headline(summary)}" for own, summary in named.items()]
    sections = [_section("Results", gains, [table]), _section("In words", text=said)]
    lead = [f"A sweep of {phrases.plural(len(named), 'experiment')}."]
    return _render(f"Sweep {name}", lead, sections, [*([missing] if missing else []), *warned])


def _render(title: str, lead: Sequence[str], sections: Sequence[dict], warnings: Sequence[str]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        headlines=[line for line in lead if line],
        sections=[section for section in sections if section],
        warnings=warnings,
        light=plots.colours(dark=False),
        dark=plots.colours(dark=True),
    )


def _section(
    title: str,
    figures: Sequence[dict] = (),
    tables: Sequence[dict] = (),
    text: Sequence[str] = (),
    folded: Sequence[dict] = (),
) -> dict | None:
    """A section, or None if there is nothing in it."""
    text = [line for line in text if line]
    if not (figures or tables or text or folded):
        return None
    return {"title": title, "figures": figures, "tables": tables, "text": text, "folded": folded}


def _figure(svg: str, caption: str, size: str = "") -> list[dict]:
    """size: "" of two side by side, or wide, or full, the page's whole width."""
    return [{"svg": svg, "caption": caption, "size": size}] if svg else []


def _arm_figures(summary: dict) -> list[dict]:
    side = "Top-1 at the last epoch: mean, one standard deviation, and each seed as a small dot below. "
    side += "The axis is cut to where the arms differ; it does not start at 0."
    return _figure(plots.arms(summary), side)


def _stage_figures(summary: dict) -> list[dict]:
    ends = "Top-1 at the end of each stage, mean and standard deviation over seeds. The axis is cut."
    last = "Extra, not the headline: averaging the last snapshots, one from each stage's end. The axis is cut."
    return [
        *_figure(plots.stage_ends(summary), ends),
        *_figure(plots.ensembles(summary), last),
    ]


def _training_figures(summary: dict) -> list[dict]:
    caption = "Above: top-1 of the student, mean over seeds"
    if any(arm["top1_last"]["n"] > 1 for arm in summary["arms"].values()):
        caption += "; faint lines are single seeds" + " of pwkd and its two controls" * (len(summary["arms"]) > 4)
    caption += ". The axis is cut, so the first evaluations may lie below it. "
    caption += "Below: the learning rate, once for arms that share it."
    if "pwkd" in summary["arms"]:
        caption += " Bands are the stages of pwkd, with the width of the sub-network that teaches."
    return _figure(plots.curves(summary), caption, "wide")


def _teacher_figures(summary: dict) -> list[dict]:
    caption = "Top-1 of the frozen teachers at the last epoch, by {}. The axis is cut."
    cost = caption.format("multiply-accumulates of one image; the cross is the student")
    return [
        *_figure(plots.teacher(summary, "width"), caption.format("width")),
        *_figure(plots.teacher(summary, "macs"), cost),
    ]


def _class_section(summary: dict) -> dict | None:
    """The classes one by one; None where no arm's runs counted them."""
    classes = per_class.of_summary(summary)
    if classes is None:
        return None
    text = []
    if missing := [arm for arm in summary["arms"] if arm not in classes["top1"]]:
        text.append(f"Without {', '.join(missing)}, of which some runs are of before classes were counted.")
    figures, tables = _class_figures(classes), _class_tables(classes)
    if len(classes["names"]) > per_class.MATRIX:
        text.append(
            "python -m pwkd_jax.evaluate, of any run, lists all classes with --per-class --json, and with --confusion=FILE.csv "
            "all that are confused."
        )
        return _section("Classes", figures, tables, text)
    return _section("Classes", figures, text=text, folded=[{"title": t.pop("title"), "table": t} for t in tables])


def _class_figures(classes: dict) -> list[dict]:
    size = "full" if len(classes["names"]) > class_plots.FULL else ""
    known = "Top-1 of each class at the last epoch, mean over seeds: the teachers at full width, and the arms"
    known += " (pwkd and its two controls)" * (len(classes["top1"]) > len(class_plots.shown(classes)))
    taken = f"Images of each class by the class that {_student(classes)}, takes them for. Those on the diagonal are right; the "
    taken += f"others are darkest at {class_plots.worst_share(classes):.1f} % of a class's images."
    return [
        *_figure(class_plots.accuracy(classes), f"{known}. The axis is cut.", size),
        *_figure(class_plots.confusion(classes), taken, size),
    ]


def _class_tables(classes: dict) -> list[dict]:
    names, images, top1, focus = (classes[key] for key in ("names", "images", "top1", "focus"))
    worst, best = per_class.worst_first(top1[focus]), []
    if len(names) > per_class.MATRIX:
        worst, best = per_class.some(worst, top1[focus])
    rows = [[names[c], f"{images[c]:,}", *(per_class.cell(of[c]) for of in top1.values())] for c in (*worst, *best)]
    which = f"the {len(worst)} worst of {focus} and its {len(best)} best" if best else f"the worst of {focus} first"
    known = {"title": "Every class", "header": ["class", "images", *top1], "rows": rows, "text": 1}
    known |= {"caption": f"Top-1 in percent of each class at the last epoch, mean over seeds; {which}."}
    rows = [
        [names[a], names[b], f"{count:,}", per_class.cell(per_class.percent(count, images[a]))]
        for a, b, count in per_class.confused(classes["run"]["classes"])
    ]
    taken = {"title": "Most confused", "header": ["true class", "taken for", "images", "share"], "rows": rows, "text": 2}
    taken |= {"caption": f"What {_student(classes)}, confuses most; shares in percent of the true class's images."}
    return [known, taken] if rows else [known]


def _student(classes: dict) -> str:
    return f"{classes['run']['arm']} of seed {classes['run']['seed']}, the best of its arm by the last epoch"


def _arm_tables(summary: dict) -> list[dict]:
    caption = "Top-1 in percent of each arm. All arms share epochs, batches and the base distiller."
    header = ["arm", "teacher and schedule", "last", "best", "seeds"]
    rows = phrases.arm_rows(summary)
    return [{"caption": caption, "header": header, "rows": rows, "text": 2}] if rows else []


def _run_table(summary: dict) -> list[dict]:
    rows = [
        [
            run["arm"],
            str(run["seed"]),
            f"{run['top1_last']:.2f}",
            f"{run['top1_best']:.2f}",
            ", ".join(f"{end:.2f}" for end in run["stage_ends"]),
            phrases.duration(run["seconds"]),
            f"{run['images_per_second']:,.0f}",
        ]
        for run in summary["runs"]
    ]
    header = ["arm", "seed", "last", "best", "stage ends", "time", "images/s"]
    table = {"caption": "Top-1 in percent of each arm and seed.", "header": header, "rows": rows, "text": 1}
    return [{"title": "Every run", "table": table}] if rows else []


def _teacher_tables(summary: dict) -> list[dict]:
    header = ["teacher", "width", "params", "MACs", "last", "best"]
    rows = phrases.teacher_rows(summary)
    return [{"caption": "Top-1 in percent of each teacher.", "header": header, "rows": rows, "text": 1}] if rows else []


def _environment_tables(summary: dict) -> list[dict]:
    spent = [
        [f"{kind} teacher", f"{t['epochs']:g}", f"{t['steps']:,}", t["seconds"], t["images_per_second"]]
        for kind, t in summary["teachers"].items()
    ]
    for name in summary["arms"]:
        runs = [run for run in summary["runs"] if run["arm"] == name]
        epochs = f"{runs[0]['curve'][-1]['epoch']:g}" if runs[0]["curve"] else "-"
        each = (phrases.stat([run[key] for run in runs])["mean"] for key in ("seconds", "images_per_second"))
        spent.append([name, epochs, f"{runs[0]['plan'][-1]['end']:,}", *each])
    spent = [[*cells, phrases.duration(seconds), f"{rate:,.0f}"] for *cells, seconds, rate in spent]
    environment = {**summary["environment"], "time of all training": phrases.duration(summary["seconds"])}
    rows = [[key, str(value)] for key, value in environment.items()]
    header = ["training", "epochs", "steps", "time", "images/s"]
    caption = "Time of each training, mean over seeds."
    times = [{"caption": caption, "header": header, "rows": spent, "text": 1}] if spent else []
    return [*times, {"caption": "What it ran on.", "header": ["package or fact", "value"], "rows": rows, "text": 2}]
