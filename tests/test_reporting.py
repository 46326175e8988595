"""The summary's numbers, its round trip and refusals, the text tables, the pages and the report command."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pwkd_jax import report
from pwkd_jax.errors import UserError
from pwkd_jax.reporting import page, phrases, plots, summary

STEPS = 920
WIDTHS = (0.25, 0.5, 0.75, 1.0)
# Last top-1 of seeds 0, 1, 2.
LAST = {
    "alone": (95.0, 95.4, 95.2),
    "kd_standard": (96.0, 96.2, 96.1),
    "kd_whole": (96.0, 96.3, 95.7),
    "kd_whole_cyclic": (96.1, 96.4, 95.8),
    "pwkd": (96.4, 96.5, 96.0),
    "pwkd_reversed": (95.5, 95.6, 95.1),
    "pwkd_random": (96.2, 96.2, 96.2),
}


def plan(arm, widths=WIDTHS):
    ends = [STEPS * (i + 1) // len(widths) for i in range(len(widths))]
    each = {
        "alone": [[]],
        "kd_standard": [[1.0]],
        "kd_whole": [[1.0]],
        "kd_whole_cyclic": [[1.0]] * len(widths),
        "pwkd": [[w] for w in widths],
        "pwkd_reversed": [[w] for w in reversed(widths)],
        "pwkd_random": [list(widths)] * len(widths),
    }[arm]
    if len(each) == 1:
        ends = [STEPS]
    kind = {"alone": "none", "kd_standard": "standard"}.get(arm, "slimmable")
    starts = [0, *ends[:-1]]
    return [{"teacher": kind, "widths": w, "start": s, "end": e} for w, s, e in zip(each, starts, ends, strict=True)]


def run(arm, seed, last, widths=WIDTHS):
    """A run that learns as runs do: fast at first, back a little at each restart of the learning rate."""
    rng = np.random.default_rng([seed, len(arm)])
    stages = plan(arm, widths)
    curve, rates = [], []
    for step in range(0, STEPS, 4):
        stage = next(s for s in stages if s["start"] <= step < s["end"])
        done = (step - stage["start"]) / (stage["end"] - stage["start"])
        rate = 0.05 * (1 + math.cos(math.pi * done))
        rates.append((step, rate))
        if step % 44 == 40:
            noise = rng.normal(0, 6 * rate)
            top1 = last - 40 * math.exp(-step / 80) - 20 * rate * (1 - step / STEPS) + noise
            row = {"step": step, "epoch": step / 23, "learning_rate": rate, "train_loss": 2.0 / (1 + step)}
            curve.append({**row, "top1": min(top1, 100.0)})
    curve.append({**curve[-1], "step": STEPS, "epoch": STEPS / 23, "top1": last})
    ends = [last - 0.4 * (len(stages) - 1 - i) for i in range(len(stages))]
    snapshots = [{"members": m, "top1": last + 0.1 * (m - 1)} for m in range(1, len(stages) + 1)]
    return {
        "arm": arm,
        "seed": seed,
        "plan": stages,
        "cycles": [(s["start"], s["end"]) for s in stages],
        "top1_last": last,
        "top1_best": last + 0.3,
        "stage_ends": ends,
        "ensemble": snapshots if len(stages) > 1 else [],
        "curve": curve,
        "learning_rates": rates,
        "seconds": 31.5,
        "images_per_second": 1834.2,
    }


def teachers(slimmable=(96.1, 97.0, 97.5, 97.8), standard=97.9):
    costs = [(470_000, 67_900_000), (1_870_000, 271_000_000), (4_190_000, 609_400_000), (7_430_000, 1_083_000_000)]
    rows = [
        {"width": w, "params": p, "macs": m, "top1_last": t, "top1_best": t + 0.2}
        for w, (p, m), t in zip(WIDTHS, costs, slimmable, strict=True)
    ]
    shared = {"curve": [], "steps": 900, "epochs": 40.0, "seconds": 130.0, "images_per_second": 500.0}
    return {
        "slimmable": {"model": "resnet32x4", "widths": rows, **shared},
        "standard": {"model": "resnet32x4", "widths": [{**rows[-1], "top1_last": standard}], **shared},
    }


def parts(last=LAST, **changes):
    """What training hands to `summary.build`; last: {arm: last top-1 of each seed}."""
    return {
        "name": "digits",
        "config": {"name": "digits", "seeds": 3, "student": {"model": "resnet8x4", "widths": (0.25, 1.0), "peak": 0.1}},
        "environment": {
            **dict.fromkeys(("pwkd_jax", "python", "jax", "jaxlib", "flax", "optax"), "1.2.3"),
            **{"orbax-checkpoint": "0.12.8", "numpy": "2.4.6", "device": "cpu", "device_count": 1},
            **{"git_commit": "0123abc", "git_dirty": True},
        },
        "data": {
            **{"name": "digits", "train_images": 1437, "test_images": 360, "num_classes": 10},
            "image_shape": (8, 8, 1),
        },
        "teachers": teachers(),
        "student": {"model": "resnet8x4", "params": 1_230_000, "macs": 177_000_000},
        "runs": [run(arm, seed, value) for arm, values in last.items() for seed, value in enumerate(values)],
        "seconds": 1234.5,
        "ensemble_members": 3,
        **changes,
    }


def build(last=LAST, **changes):
    return summary.build(**parts(last, **changes))


def pages(html):
    """Fails unless the page stands alone and each of its pictures is well-formed and named."""
    # What is between tags may say anything once it is escaped; tags and the style may load nothing.
    tags = re.sub(r">[^<]*<", "><", html)
    assert not re.search(r"<(script|link|img|iframe|object)|\bon\w+=|(src|href)=[\"'](?!#)", tags)
    assert "<script" not in html and not re.search(r"@import|url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html)
    assert {a or b for a, b in targets} <= set(ids)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert ElementTree.fromstring(svg).get("aria-label")
    return html


def command(*arguments, cwd):
    environment = {"PATH": "", "PYTHONPATH": str(Path(report.__file__).parents[1]), "MPLCONFIGDIR": str(cwd)}
    line = [sys.executable, "-m", "pwkd_jax.report", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60)


def close(found, mean, std, n):
    assert found["n"] == n
    assert found["mean"] == pytest.approx(mean)
    assert found["std"] == (None if std is None else pytest.approx(std))


def test_means_and_sample_standard_deviations():
    arms = build()["arms"]
    assert list(arms) == list(LAST)
    # 96.4, 96.5, 96.0: mean 96.3, deviations 0.1, 0.2, -0.3, so the variance is 0.14 / 2.
    close(arms["pwkd"]["top1_last"], 96.3, math.sqrt(0.07), 3)
    close(arms["pwkd"]["top1_best"], 96.6, math.sqrt(0.07), 3)
    close(arms["pwkd"]["stage_ends"][0], 95.1, math.sqrt(0.07), 3)
    close(arms["pwkd"]["ensemble"], 96.5, math.sqrt(0.07), 3)
    assert arms["pwkd"]["ensemble"]["members"] == 3
    assert arms["kd_whole"]["ensemble"] is None
    assert arms["pwkd"]["runs"][1] == {"seed": 1, "top1_last": 96.5, "top1_best": 96.8}


def test_gain_is_over_the_better_control_seed_by_seed():
    gain = build()["gain"]
    whole = gain["partial_to_whole"]
    assert whole["against"] == "kd_whole_cyclic" and whole["note"] is None and gain["reason"] is None
    # 0.3, 0.1, 0.2.
    close(whole, 0.2, 0.1, 3)
    assert whole["per_seed"] == pytest.approx({"0": 0.3, "1": 0.1, "2": 0.2})
    # 0.4, 0.3, -0.1: deviations 0.2, 0.1, -0.3.
    close(gain["over_kd_standard"], 0.2, math.sqrt(0.07), 3)


def test_a_negative_gain_stays_negative():
    found = build({**LAST, "pwkd": (95.0, 95.1, 94.9), "kd_whole": (97.0, 97.0, 97.0)})
    close(found["gain"]["partial_to_whole"], -2.0, 0.1, 3)
    assert found["gain"]["partial_to_whole"]["against"] == "kd_whole"
    # SciPy's own interval of these differences.
    low, high = stats.ttest_1samp([-2.0, -1.9, -2.1], 0).confidence_interval(0.95)
    between = f"{low:+.2f} to {high:+.2f}: more than chance"
    assert f"-2.00 points over 3 seeds, 95 % interval of the differences seed by seed {between}" in phrases.headline(found)


def test_headline_says_when_nothing_can_be_told():
    low, high = stats.ttest_1samp([0.3, 0.1, 0.2], 0).confidence_interval(0.95)
    assert f"seed by seed {low:+.2f} to {high:+.2f}: not distinguishable" in phrases.headline(build()) and low < 0
    within = build({"kd_whole": (96.0, 96.2), "kd_whole_cyclic": (95.0, 95.0), "pwkd": (96.3, 96.0)})
    assert "its better control kd_whole: +0.05 points over 2 seeds" in phrases.headline(within)
    assert "not distinguishable" in phrases.headline(within)
    same = build({"kd_whole": (96.0, 96.2), "pwkd": (96.0, 96.2)})
    assert "+0.00 to +0.00: not distinguishable" in phrases.headline(same)
    one = phrases.headline(build({"kd_whole": (96.0,), "kd_whole_cyclic": (96.1,), "pwkd": (96.5,)}))
    assert "pwkd 96.50 against 96.10" in one and "+0.40 points over 1 seed;" in one and "told from chance" in one


def test_gain_with_missing_arms_and_seeds():
    only = build({"kd_whole": (96.0, 96.0), "pwkd": (96.5, 96.7, 90.0)})["gain"]["partial_to_whole"]
    close(only, 0.6, math.sqrt(0.02), 2)
    assert only["note"] == "kd_whole_cyclic did not run; pwkd and kd_whole share only 2 seeds"
    for last, reason in (
        ({"kd_whole": (96.0,)}, "pwkd did not run"),
        ({"pwkd": (96.0,), "alone": (95.0,)}, "neither kd_whole nor kd_whole_cyclic ran"),
    ):
        found = build(last)
        assert found["gain"] == {"partial_to_whole": None, "reason": reason, "over_kd_standard": None}
        assert reason in summary.table(found)
    apart = parts({"pwkd": (96.0,), "kd_whole": (95.0,)})
    apart["runs"][1]["seed"] = 7
    assert summary.build(**apart)["gain"]["reason"] == "pwkd and its better control share no seed"


def test_one_seed_has_no_standard_deviation():
    close(build({"alone": (95.0,)})["arms"]["alone"]["top1_last"], 95.0, None, 1)


def test_each_arm_and_seed_once():
    twice = parts({"alone": (95.0,)})
    with pytest.raises(ValueError, match="once"):
        summary.build(**{**twice, "runs": twice["runs"] * 2})


@pytest.mark.parametrize(
    ("slimmable", "standard", "said"),
    [
        ((96.1, 97.0, 97.5, 97.8), 97.9, []),
        ((96.1, 97.0, 96.9, 97.8), 97.9, ["less accurate at width 0.75 (96.90 %) than at 0.5 (97.00 %)"]),
        ((96.1, 97.0, 97.5, 97.8), 98.9, ["(97.80 %) is more than 1 point under the standard teacher (98.90 %)"]),
        ((95.1, 97.0, 97.5, 97.8), 97.9, ["width 0.25 (95.10 %), is below the student trained alone (95.20 %)"]),
    ],
)
def test_warnings_of_the_teacher_gates(slimmable, standard, said):
    found = build(teachers=teachers(slimmable, standard))["warnings"]
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))


def test_who_guesses_is_said_to_have_learnt_nothing():
    given = parts({"alone": (10.4, 11.0), "pwkd": (14.0, 15.0)}, teachers=teachers((9.9, 50.0, 60.0, 70.0), 80.0))
    given["data"] |= {"num_classes": 10, "test_images": 3600}  # a guess: 10 +- 0.5
    found = [line for line in summary.build(**given)["warnings"] if "learnt nothing" in line]
    assert [line.partition(", no better")[0] for line in found] == [
        "The slimmable teacher at width 0.25 ends at 9.90 %", "The student of alone ends at 10.70 %"]  # fmt: skip
    assert "teacher.schedule.peak" in found[0] and "student.duration" in found[1] and "10 classes" in found[0]


def test_warnings_without_what_they_compare():
    bad = teachers((90.0, 97.0, 97.5, 97.8), 99.9)
    assert build({"pwkd": (96.0,)}, teachers={"slimmable": bad["slimmable"]})["warnings"] == []
    assert build(teachers={"standard": bad["standard"]})["warnings"] == []


def test_round_trip(tmp_path):
    given = parts()
    given["runs"][0]["curve"][0]["train_loss"] = float("nan")
    given["runs"][0]["top1_last"] = np.float64(given["runs"][0]["top1_last"])
    given["environment"]["device_count"] = np.int32(8)
    built = summary.build(**given)
    summary.write(built, tmp_path)
    assert summary.read(tmp_path) == summary.read(tmp_path / "summary.json") == built
    assert built["runs"][0]["curve"][0]["train_loss"] is None
    assert (built["format"], built["version"]) == ("pwkd_jax.summary", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "summary.json"]


def test_numbers_outlive_a_broken_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "report", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summary.write(build(), tmp_path)
    assert summary.read(tmp_path)["name"] == "digits"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist: give the work directory"),
        ("{", "is not JSON"),
        ("[]", 'its "format" should be "pwkd_jax.summary"'),
        ('{"format": "other"}', 'its "format" should be "pwkd_jax.summary"'),
        ('{"format": "pwkd_jax.summary", "version": "1"}', "has version '1'"),
        ('{"format": "pwkd_jax.summary", "version": 2}', "has version 2, and this pwkd_jax reads up to 1"),
        ('{"format": "pwkd_jax.summary", "version": 1, "name": "x"}', "lacks config, environment"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_read_refuses(tmp_path, text, said):
    file = tmp_path / "summary.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        summary.read(tmp_path)
    assert str(file) in str(error.value) and said in str(error.value)


def test_table():
    text = summary.table(build(teachers=teachers((95.1, 97.0, 96.9, 97.8), 99.0), name="a long name " * 20))
    assert max(map(len, text.splitlines())) <= 100
    assert set(text) - set("±") <= set(map(chr, range(128)))
    assert re.search(r"slimmable +0\.25 +0\.47 M +67\.9 M +95\.10 +95\.30", text)
    assert re.search(r"pwkd +slimmable 0\.25 > 0\.5 > 0\.75 > 1, 4 cycles +96\.30 ± 0\.26 +96\.60 ± 0\.26 +3", text)
    assert re.search(r"\+ ensemble of its last 3 \(extra\) +96\.50 ± 0\.26 +- +3", text)
    assert "+0.20 points over 3 seeds, 95 % interval" in " ".join(text.split()) and text.count("Warning: ") == 3


def test_table_folds_long_plans():
    widths = tuple((i + 1) / 16 for i in range(16))
    runs = [run(arm, 0, 96.0, widths) for arm in ("pwkd", "pwkd_random", "kd_whole_cyclic")]
    found = build(runs=runs)
    assert max(map(len, summary.table(found).splitlines())) <= 100
    assert "0.9375" in summary.table(found)
    pages(page.report(found))


def test_table_without_anything():
    text = summary.table(build({}, teachers={}))
    assert "teacher and schedule" not in text and "pwkd did not run" in text


@pytest.mark.parametrize(
    ("number", "said"),
    [(812, "812"), (47e3, "47.0 k"), (47e4, "0.47 M"), (67.9e6, "67.9 M"), (1083e6, "1083 M"), (12.3e9, "12.3 G")],
)
def test_counts(number, said):
    assert phrases.count(number) == said


def test_durations():
    assert [phrases.duration(s) for s in (12.4, 200, 18_120)] == ["12 s", "3 min 20 s", "5 h 02 min"]


def test_plans_in_words():
    said = {arm: phrases.plan(plan(arm), plan(arm)) for arm in LAST}
    assert said["alone"] == "no teacher, 1 cycle"
    assert said["kd_standard"] == "standard teacher, 1 cycle"
    assert said["kd_whole_cyclic"] == "slimmable 1, 4 cycles"
    assert said["pwkd_reversed"] == "slimmable 1 > 0.75 > 0.5 > 0.25, 4 cycles"
    assert said["pwkd_random"] == "slimmable 0.25|0.5|0.75|1 at random, 4 cycles"


def test_page():
    html = pages(page.report(build()))
    assert html.count("<svg") == 6
    assert "pwkd 96.30 ± 0.26 against 96.10 ± 0.30 for its better control kd_whole_cyclic: +0.20 points" in html
    assert "prefers-color-scheme: dark" in html and "arXiv 2109.12507" in html
    assert "&#34;peak&#34;: 0.1" in html and "0123abc" in html


def test_page_is_the_same_each_time():
    assert page.report(build()) == page.report(build())


@pytest.mark.parametrize("last", [{}, {"alone": (95.0,)}, {"pwkd": (100.0, 100.0)}, {"kd_whole": (0.0,)}])
@pytest.mark.parametrize("kinds", [(), ("slimmable",), ("standard",)])
def test_page_without_everything(last, kinds):
    pages(page.report(build(last, teachers={kind: teachers()[kind] for kind in kinds})))


def test_page_of_one_stage_and_one_width():
    found = teachers()
    found["slimmable"]["widths"] = found["slimmable"]["widths"][-1:]
    one = {**run("pwkd", 0, 96.0, (1.0,)), "ensemble": [{"members": 1, "top1": 96.0}], "curve": []}
    built = build(runs=[one], teachers=found)
    pages(page.report(built))
    assert plots.stage_ends(built) == plots.ensembles(built) == plots.curves(built) == ""


def test_hostile_words_are_escaped():
    evil = '<script>alert("$x$")</script>'
    changes = {"name": evil, "config": {evil: evil}, "student": {"model": evil, "params": 1, "macs": 1}}
    changes["data"] = {**parts()["data"], "name": evil}
    changes["environment"] = {evil: evil}
    found = build(**changes)
    assert "&lt;script&gt;" in pages(page.report(found))
    named = {evil: found, "other": build()}
    assert "&lt;script&gt;" in pages(page.comparison(named, report.differing(named)))


def test_pictures_leave_nothing_behind():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.arms(build())
    assert dict(matplotlib.rcParams) == before
    assert "import matplotlib.pyplot" not in Path(plots.__file__).read_text()


def test_compare():
    one = build()
    config = {"name": "digits", "seeds": 5, "student": {"model": "resnet8x4", "peak": 0.2, "widths": [0.25, 1.0]}}
    two = build({"pwkd": (95.0,), "kd_whole": (96.0,)}, config={**config, "new": None})
    named = report.name({"runs/a": one, "runs/b": two})
    assert list(named) == ["digits (runs/a)", "digits (runs/b)"]
    assert report.differing(named) == [
        ["seeds", "3", "5"],
        ["student.peak", "0.1", "0.2"],
        ["new", "(not set)", "null"],
    ]
    text = report.compare(named)
    assert re.search(r"pwkd +96\.30 ± 0\.26 +95\.00\n", text)
    assert re.search(r"gain +\+0\.20 \(-0\.05 to \+0\.45\) +-1\.00\n", text)
    assert "Config keys that differ: seeds, student.peak, new" in text
    html = pages(page.comparison(named, report.differing(named)))
    assert "student.peak" in html and "digits (runs/b)" in html and "-1.00 points over 1 seed" in html
    many = report.compare({f"run {i}": one for i in range(12)})
    assert max(map(len, many.splitlines())) <= 100 and "[12]" in many
    assert "The configs do not differ." in pages(page.comparison({"a": one, "b": one}, []))
    assert list(report.name({"a": one, "b": build(name="other")})) == ["digits", "other"]


def test_a_reader_that_left_costs_no_traceback(tmp_path):
    """As in `| head`."""
    (tmp_path / "summary.json").write_text(json.dumps(build()))
    line = [sys.executable, "-m", "pwkd_jax.report", str(tmp_path)]
    process = subprocess.Popen(line, cwd=Path(report.__file__).parents[1], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.close()
    assert process.wait(120) == 141 and process.stderr.read() == ""
    process.stderr.close()


def test_command(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(build(name=name)))
    one = command("a", cwd=tmp_path)
    assert (one.returncode, one.stderr) == (0, "")
    assert "kd_whole_cyclic" in one.stdout and str(Path("a", "report.html")) in one.stdout
    pages((tmp_path / "a" / "report.html").read_text(encoding="utf-8"))
    two = command("a", "b", cwd=tmp_path)
    assert (two.returncode, two.stderr) == (0, "")
    pages((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    wrong = command("a", "c", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert re.fullmatch(r"error: c does not exist: [^\n]*\n", wrong.stderr)


def test_command_mistakes(tmp_path, capsys):
    summary.write(build({}), tmp_path)
    for arguments, said in (
        ([tmp_path, tmp_path / "."], "is given twice"),
        ([tmp_path, "--out", tmp_path / "summary.json" / "x.html"], "x.html cannot be written ("),
    ):
        assert report.main(list(map(str, arguments))) == 2
        assert re.fullmatch(rf"error: [^\n]*{re.escape(said)}[^\n]*\n", capsys.readouterr().err)
    with pytest.raises(SystemExit) as stop:
        report.main([])
    assert stop.value.code == 2


def test_command_imports_no_jax():
    code = "import sys, pwkd_jax.report; sys.exit('jax' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    root = str(Path(report.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
