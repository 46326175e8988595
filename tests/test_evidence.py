"""The README's results are those of the committed summaries, and the config beside them is the one that gave them."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pwkd_jax import config
from pwkd_jax.experiment import shared_teachers, sweep

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "configs/evidence/results"
KEPT = RESULTS / "teacher"
SPEC = importlib.util.spec_from_file_location("evidence_page", ROOT / "configs/evidence/page.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)
README = (ROOT / "README.md").read_text()
# The tables of the evidence stand in the README, that of a recipe's options on a page of its own.
PAGES = README + (ROOT / "configs/evidence/options.md").read_text()
TEXT = " ".join(README.split())

TABLES = {
    "evidence": lambda: page.table(page.summaries()), "first": lambda: page.table(page.other("first")),
    "again": page.again_table, "screening": page.screening_table, "confirmation": page.confirmation_table,
    "options": page.options_table,
}  # fmt: skip


def _summaries(folder: str) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))}


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_have_the_tables_of_the_summaries(name):
    assert re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", PAGES, re.DOTALL)[1] == TABLES[name]()


def test_every_summary_is_of_a_commit():
    for path in [p for folder in ("", "kd", "first", "again", "screening", "confirmation", "options") for p in
                 (RESULTS / folder).glob("*.json")]:  # fmt: skip
        found = json.loads(path.read_text())
        assert found["environment"]["git_dirty"] is False and found["config"]["data"]["data_dir"] == "", path


@pytest.mark.parametrize(("file", "held_out"), [("screening", True), ("confirmation", False), ("options", True)])
def test_points_of_a_sweep_are_what_its_file_says(file, held_out):
    """Nothing is chosen by test images, what is confirmed has seeds of its own, and every point has a result."""
    points = {p.name: p for p in sweep.load(ROOT / f"configs/evidence/{file}.toml", RESULTS) if p.group}
    found = _summaries(file)
    assert found.keys() == points.keys()
    chosen = [name for name in page.screened() if name != "base"][:3]
    assert file != "confirmation" or sorted(found) == sorted(chosen)
    for name, summary in found.items():
        settings, _ = config.load([w.replace("configs/evidence/", f"{ROOT}/configs/evidence/", 1) if w.startswith("--config=")
                                   else w for w in points[name].arguments])  # fmt: skip
        _same(settings, summary, {"data.data_dir", "teacher.run", "data.resize"})
        assert (settings.data.test_split == "train[45000:]") == held_out
        assert {run["seed"] for run in summary["runs"]} == set(range(settings.seed, settings.seed + settings.seeds))
        assert (settings.seed >= 100) == (file == "confirmation")


def test_the_teacher_that_is_kept_is_the_one_that_taught():
    for name in ("slimmable", "standard"):
        kept = json.loads((KEPT / f"teacher/{name}/result.json").read_text())
        taught = [part["teachers"][name] for part in (*page.parts(), page.other("again")["kd"]) if name in part["teachers"]]
        assert taught and all(teacher["curve"] == kept["curve"] for teacher in taught)


def test_the_teacher_that_is_kept_teaches_every_method():
    facts = json.loads((KEPT / "data.json").read_text())
    for method in ("kd", "dkd", "at"):
        settings, _ = config.load([f"--config={ROOT}/configs/evidence/cifar10.py:{method}", f"--config.teacher.run={KEPT}"])
        shared_teachers.check(settings, facts, ["slimmable", "standard"])


def test_the_sentences_about_kd_are_of_its_summaries():
    for kd in (page.summaries()["kd"], page.other("first")["kd"]):
        ours, theirs = (page.last(kd, arm) for arm in ("pwkd", page.gain(kd)[0]))
        # Computed by a library of its own, from the numbers alone.
        found = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        between = f"95 % interval {found.low:+.2f} to {found.high:+.2f}"
        assert f"{np.mean(ours - theirs):+.2f} points from its better control, {between}" in TEXT
        widths = sorted(kd["teachers"]["slimmable"]["widths"], key=lambda w: w["width"])
        widths = [f"{w['top1_last']:.1f}" for w in widths]
        assert f"({', '.join(widths[:-1])} and {widths[-1]} % at its widths)" in TEXT


def test_the_committed_summaries_are_of_the_committed_configs():
    """But for what may change in a workdir: the arms that have run so far, and where the data lay."""
    methods = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    of_kd = [("kd", part) for part in (*page.parts(), page.other("first")["kd"])]
    for method, summary in itertools.chain(methods.items(), of_kd):
        settings, _ = config.load([f"--config={ROOT}/configs/evidence/cifar10.py:{method}"])
        _same(settings, summary, {"arms", "data.data_dir", "teacher.run", "data.resize"})
        assert {len(arm["runs"]) for arm in summary["arms"].values()} == {settings.seeds}
    assert set(page.summaries()["kd"]["arms"]) == set(config.load([f"--config={ROOT}/configs/evidence/cifar10.py:kd"])[0].arms)


def _same(settings, summary: dict, may_differ: set[str]) -> None:
    """Of the keys that both know. data.resize is of streamed images, which these are not."""
    now, then = dict(config.leaves(settings)), dict(config.leaves(type(settings)(summary["config"])))
    differ = {k for k in then if k in now and json.loads(json.dumps(now[k])) != json.loads(json.dumps(then[k]))}
    assert differ <= may_differ, differ
