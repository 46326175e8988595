"""The README's results are those of the committed summaries, and the config beside them is the one that gave them."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
from scipy import stats

from pwkd_jax import config
from pwkd_jax.experiment import shared_teachers

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("evidence_page", ROOT / "configs/evidence/page.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)


def test_the_readme_has_the_tables_of_the_summaries():
    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- evidence -->\n(.*?)\n<!-- end of evidence -->", text, re.DOTALL)[1]
    assert found == page.table(page.summaries())


def test_the_readme_has_the_table_of_the_screening():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"<!-- screening -->\n(.*?)\n<!-- end of screening -->", text, re.DOTALL)[1] == page.screening_table()
    for path in (ROOT / "configs/evidence/results/screening").glob("*.json"):
        summary = json.loads(path.read_text())
        assert summary["config"]["data"]["test_split"] == "train[45000:]" and summary["environment"]["git_dirty"] is False


def test_the_readme_has_the_table_of_the_teacher_that_is_kept():
    text, kept = (ROOT / "README.md").read_text(), ROOT / "configs/evidence/results/teacher/teacher/slimmable"
    assert re.search(r"<!-- again -->\n(.*?)\n<!-- end of again -->", text, re.DOTALL)[1] == page.table(page.again())
    summary, result = page.again()["kd"], json.loads((kept / "result.json").read_text())
    assert summary["teachers"]["slimmable"]["curve"] == result["curve"] and summary["environment"]["git_dirty"] is False
    widths = [f"{w['top1_last']:.1f}" for w in sorted(result["widths"], key=lambda w: w["width"])]
    assert f"({', '.join(widths[:-1])} and {widths[-1]} % at its widths)" in " ".join(text.split())


def test_the_teacher_that_is_kept_teaches_every_method():
    kept = ROOT / "configs/evidence/results/teacher"
    facts = json.loads((kept / "data.json").read_text())
    for method in ("kd", "dkd", "at"):
        settings, _ = config.load([f"--config={ROOT}/configs/evidence/cifar10.py:{method}", f"--config.teacher.run={kept}"])
        shared_teachers.check(settings, facts, ["slimmable"])


def test_the_sentence_on_the_first_screen_is_that_of_kd():
    text = " ".join((ROOT / "README.md").read_text().split())
    kd = page.summaries()["kd"]
    ours, theirs = (page.last(kd, arm) for arm in ("pwkd", page.gain(kd)[0]))
    # Computed by a library of its own, from the numbers alone.
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    between = f"95 % interval {interval.low:+.2f} to {interval.high:+.2f}"
    assert f"{np.mean(ours - theirs):+.2f} points from its better control, {between}" in text
    widths = [f"{w['top1_last']:.1f}" for w in kd["teachers"]["slimmable"]["widths"]]
    assert f"({', '.join(widths[:-1])} and {widths[-1]} % at its widths)" in text


def test_the_committed_summaries_are_of_the_committed_configs():
    """But for what may change in a workdir: the arms that have run so far, and where the data lay."""
    for method, summary in page.summaries().items():
        settings, _ = config.load([f"--config={ROOT}/configs/evidence/cifar10.py:{method}"])
        now = dict(config.leaves(settings))
        then = dict(config.leaves(type(settings)(summary["config"])))
        differ = {k for k in then if k in now and json.loads(json.dumps(now[k])) != json.loads(json.dumps(then[k]))}
        # resize is of streamed images, which these are not
        assert differ <= {"arms", "data.data_dir", "teacher.run", "data.resize"}, (method, differ)
        assert {len(arm["runs"]) for arm in summary["arms"].values()} == {settings.seeds}
        assert summary["environment"]["git_dirty"] is False
