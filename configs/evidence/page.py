"""The evidence as tables and a picture, made from the files below results: summary.json of the experiments as they ended (but
for data.data_dir, emptied), and explained/kd.json of explain.py.

    python configs/evidence/page.py                  kd/*.json and METHOD.json, arms and methods in Markdown, as in the README
    python configs/evidence/page.py --first          first/kd.json, arms of kd under another training of the teacher
    python configs/evidence/page.py --again          again/kd.json, cells of kd that ran a second time, on another machine
    python configs/evidence/page.py --screening      screening/VARIANT.json
    python configs/evidence/page.py --confirmation   confirmation/VARIANT.json
    python configs/evidence/page.py --options        options/NAME.json, those of a recipe one by one
    python configs/evidence/page.py --picture FILE   draw them too

A gain is pwkd minus a control, seed by seed; its interval is the 95 % one of Student's t over the seeds.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

HERE = Path(__file__).parent
ORDER = ("alone", "kd_standard", "kd_whole", "kd_whole_cyclic", "pwkd", "pwkd_reversed", "pwkd_random")
COLOURS = {"kd_whole": "#007a5e", "kd_whole_cyclic": "#0068b5", "pwkd": "#cc4e00", "pwkd_reversed": "#8a4fbf"}
CONTROLS = ("kd_whole", "kd_whole_cyclic")


def parts() -> list[dict]:
    """The summaries of kd under the teacher that is kept: some arms ran on one machine, some on another."""
    return [json.loads(path.read_text()) for path in sorted((HERE / "results" / "kd").glob("*.json"))]


def summaries() -> dict[str, dict]:
    """{method: summary}, kd first, all its arms as one."""
    kd = {"arms": {}, "runs": []}
    for part in parts():
        kd = part | {"arms": kd["arms"] | part["arms"], "runs": kd["runs"] + part["runs"]}
    return {"kd": kd} | {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}


def other(name: str) -> dict[str, dict]:
    """{"kd": summary} of results/first or results/again."""
    return {"kd": json.loads((HERE / "results" / name / "kd.json").read_text())}


def again_table() -> str:
    """The cells of kd that ran again, and where each of their seeds came to."""
    here, there = summaries()["kd"], other("again")["kd"]
    rows = ["| KD | all seeds | the same seeds then | again |", "|---|---|---|---|"]
    for arm in (arm for arm in ORDER if arm in there["arms"]):
        ours, theirs = last(here, arm), last(there, arm)
        each = [" ".join(f"{s:.2f}" for s in scores) for scores in (ours[: len(theirs)], theirs)]
        rows.append(f"| `{arm}` | {ours.mean():.2f} ± {ours.std(ddof=1):.2f} | {' | '.join(each)} |")
    return "\n".join(rows)


def last(summary: dict, arm: str) -> np.ndarray:
    """Top-1 of the last epoch by seed [seeds], in percent."""
    return np.array([run["top1_last"] for run in sorted(summary["arms"][arm]["runs"], key=lambda run: run["seed"])])


def interval(differences: np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of paired differences."""
    n = len(differences)
    return float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))


def gain(summary: dict, arm: str = "pwkd", against: str = "") -> tuple[str, float, float]:
    """(control, mean, half width): `arm` minus `against`, by default the better by mean of the two controls of pwkd."""
    against = against or max((c for c in CONTROLS if c in summary["arms"]), key=lambda c: last(summary, c).mean())
    return against, *interval(last(summary, arm) - last(summary, against))


def table(found: dict[str, dict]) -> str:
    """Every arm of kd, then every method's gain."""
    kd = found["kd"]
    rows = ["| KD | top-1, % | over `kd_whole`, points | over `kd_whole_cyclic`, points | n |", "|---|---|---|---|---|"]
    for arm in ORDER:
        if arm not in kd["arms"]:
            continue
        scores = last(kd, arm)
        cells = [f"`{arm}`", f"{scores.mean():.2f} ± {scores.std(ddof=1):.2f}"]
        for control in CONTROLS:
            if arm == control or control not in kd["arms"]:
                cells.append("")
            else:
                _, mean, half = gain(kd, arm, control)
                cells.append(f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})")
        rows.append(f"| {' | '.join([*cells, str(len(scores))])} |")
    if len(found) > 1:
        rows += ["", "| method | `kd_whole` | `kd_whole_cyclic` | `pwkd` | `pwkd` over its better control | n |",
                 "|---|---|---|---|---|---|"]  # fmt: skip
        rows += [_row(method, summary) for method, summary in found.items()]
    return "\n".join(rows)


def screened() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{variant: (pwkd, kd_whole) by seed} of the screening, the greatest mean gain first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results" / "screening").glob("*.json"))}
    pairs = {
        # A variant of the stages alone has the kd_whole of `base`.
        name: (last(summary, "pwkd"), last(summary if "kd_whole" in summary["arms"] else found["base"], "kd_whole"))
        for name, summary in found.items()
    }
    return dict(sorted(pairs.items(), key=lambda item: -(item[1][0] - item[1][1]).mean()))


def screening_table() -> str:
    """Every variant of the screening that ran."""
    rows = ["| variant | `kd_whole` | `pwkd` | `pwkd` minus `kd_whole` | n |", "|---|---|---|---|---|"]
    for name, (ours, theirs) in screened().items():
        mean, half = interval(ours - theirs)
        between = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
        rows.append(f"| `{name}` | {theirs.mean():.2f} | {ours.mean():.2f} | {between} | {len(ours)} |")
    return "\n".join(rows)


def confirmed() -> dict[str, dict]:
    """{variant: summary} of the confirmation, in the order of the screening."""
    found = {path.stem: json.loads(path.read_text()) for path in (HERE / "results" / "confirmation").glob("*.json")}
    return {name: found[name] for name in screened() if name in found}


def confirmation_table() -> str:
    """Every variant that was confirmed, or was not."""
    head = "| variant | `kd_whole` | `kd_whole_cyclic` | `pwkd` | `pwkd` over its better control | n |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(_row(name, summary) for name, summary in confirmed().items())])


def options_table() -> str:
    """Every option of options.toml that was tried by itself, in its order, against the same without it, seed by seed."""
    found = {path.stem: json.loads(path.read_text()) for path in (HERE / "results" / "options").glob("*.json")}
    variants = tomllib.loads((HERE / "options.toml").read_text())["grid"]["variant"]
    head = "| option | `alone` or `kd_whole` | over `plain` or `kd`, points | `pwkd` | over that of `kd` |"
    rows = [head, "|---|---|---|---|---|"]
    for name in (v["name"] for v in variants if v["name"] in found):
        base, cells = "kd" if name.startswith("kd") else "plain", []
        for arm in (arm for arm in ("alone", "kd_whole", "pwkd") if arm in found[name]["arms"]):
            scores, without = last(found[name], arm), last(found[base], arm)
            mean, half = interval(scores - without)
            between = f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})" if name != base else ""
            cells += [f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}", between]
        rows.append(f"| `{name}` | {' | '.join([*cells, '', ''][:4])} |")
    return "\n".join(rows)


def _row(name: str, summary: dict) -> str:
    """Both controls and pwkd, with the gain of the latter."""
    _, mean, half = gain(summary)
    scores = [last(summary, arm) for arm in (*CONTROLS, "pwkd")]
    cells = [f"{s.mean():.2f} ± {s.std(ddof=1):.2f}" for s in scores]
    cells += [f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})", str(len(scores[0]))]
    return f"| `{name}` | {' | '.join(cells)} |"


def picture(found: dict[str, dict], path: Path) -> None:
    """Accuracy and calibration of the teacher by width, the students while they train, whom they end up like; arms, the gain by
    method, and that of every variant that was screened."""
    kd, explained = found["kd"], json.loads((HERE / "results" / "explained" / "kd.json").read_text())
    figure = Figure(figsize=(12, 7), layout="constrained")
    (by_width, curves, alike), (arms, gains, screening) = figure.subplots(2, 3)
    widths = kd["teachers"]["slimmable"]["widths"]
    by_width.plot([w["width"] for w in widths], [w["top1_last"] for w in widths], "o-", color="#0068b5", label="top-1")
    errors = [explained["teacher"][f"{w['width']:g}"]["calibration_error"] for w in widths]
    beside = by_width.twinx()
    beside.plot([w["width"] for w in widths], errors, "s--", color="#777777")
    beside.set(ylabel="calibration error, % (dashed)", ylim=(0, None))
    by_width.set(title="teacher", xlabel="width", ylabel="top-1, %")
    for arm, colour in COLOURS.items():
        if arm not in explained["arms"]:
            continue
        like = explained["arms"][arm]["like"]
        alike.plot([float(w) for w in like], [like[w]["agreement"] for w in like], "o-", color=colour, label=arm, markersize=3)
    alike.set(title="whom students resemble", xlabel="teacher's width", ylabel="agreement at the end, %")
    alike.legend(frameon=False, fontsize=7)
    for arm, colour in list(COLOURS.items())[:3]:
        runs = [run["curve"] for run in kd["runs"] if run["arm"] == arm]
        steps = [point["epoch"] for point in runs[0]]
        scores = np.array([[point["top1"] for point in run] for run in runs])
        curves.plot(steps, scores.mean(0), "o-", color=colour, label=arm, markersize=3)
        curves.fill_between(steps, scores.min(0), scores.max(0), color=colour, alpha=0.15)
    curves.set(title="students, mean and range", xlabel="epoch")
    curves.legend(frameon=False, fontsize=7)
    shown = [arm for arm in ORDER if arm in kd["arms"]][::-1]
    scores = [last(kd, arm) for arm in shown]
    arms.errorbar([s.mean() for s in scores], shown, xerr=[s.std(ddof=1) for s in scores], fmt="o", color="#333333", capsize=3)
    arms.set(title="last top-1, %, mean and std")
    each = {"kd, first teacher": other("first")["kd"], **found}
    each |= {f"kd, {name.replace('_', ' ')}": summary for name, summary in confirmed().items()}
    _gains(gains, {name: gain(summary)[1:] for name, summary in reversed(each.items())})
    gains.set_title("pwkd minus its better control,\npoints, 95 % interval", fontsize=9)
    variants = {f"{name}": interval(ours - theirs) for name, (ours, theirs) in screened().items()}
    _gains(screening, dict(reversed(variants.items())))
    screening.set_title("screening: pwkd minus kd_whole,\npoints, three seeds, 95 % interval", fontsize=9)
    screening.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=110)


def _gains(axes, each: dict[str, tuple[float, float]]) -> None:
    """{row: (mean, half width of its interval)} as points with bars."""
    axes.axvline(0, color="#999999", linewidth=0.8)
    means, halves = zip(*each.values(), strict=True)
    axes.errorbar(means, list(each), xerr=halves, fmt="o", color="#cc4e00", capsize=3)
    axes.margins(y=0.3 if len(each) < 6 else 0.05)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--picture", type=Path)
    tables = {"first": lambda: table(other("first")), "again": again_table, "screening": screening_table,
              "confirmation": confirmation_table, "options": options_table}  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    for name in tables:
        which.add_argument(f"--{name}", dest="which", action="store_const", const=name)
    options = parser.parse_args(arguments)
    print(tables[options.which]() if options.which else table(summaries()))
    if options.picture:
        picture(summaries(), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
