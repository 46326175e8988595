"""Borrowed teachers, and a sweep from its file to its report."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import identical
from test_commands import TINY, final

from pwkd_jax import distillers, report, sweep, train

KEYS = dict(override.removeprefix("--config.").split("=", 1) for override in TINY[1:])


def toml(grid: str, *more: str, **replaced: str) -> str:
    fixed = {**KEYS, **replaced}
    lines = "\n".join(f"'{key}' = '{value}'" for key, value in fixed.items() if key not in grid)
    return f"config = 'configs/digits.py'\n{''.join(more)}[grid]\n{grid}\n[set]\n{lines}\n"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A workdir that trains its own teacher, ordinary and slimmable."""
    workdir = tmp_path_factory.mktemp("own") / "w"
    assert train.main([*TINY, "--config.arms=kd_standard,pwkd", f"--workdir={workdir}"]) == 0
    return workdir


def test_a_borrowed_teacher_teaches_the_same_bits(own, tmp_path):
    lender, borrower = tmp_path / "lender", tmp_path / "borrower"
    arms = "--config.arms=kd_standard,pwkd"
    assert train.main([*TINY, arms, "--config.seeds=0", f"--workdir={lender}"]) == 0
    assert not (lender / "students").exists() and json.loads((lender / "summary.json").read_text())["runs"] == []
    assert train.main([*TINY, arms, f"--config.teacher.run={lender}", f"--workdir={borrower}"]) == 0
    assert not list(borrower.glob("teacher/*/checkpoints"))  # it was not trained again
    for arm in ("kd_standard", "pwkd"):
        a, b = (final(w, f"students/{arm}/seed0", 24) for w in (own, borrower))
        assert identical(a, b)
    a, b = (json.loads((w / "summary.json").read_text())["teachers"] for w in (lender, borrower))
    assert a == b


def test_a_finished_teacher_is_read_from_its_files(own):
    """A new arm in a finished workdir learns from the weights on disk."""
    before = {p: p.stat().st_mtime_ns for p in own.glob("teacher/*/*")}
    assert train.main([*TINY, "--config.arms=kd_standard,pwkd,kd_whole", f"--workdir={own}"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in own.glob("teacher/*/*")}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config.teacher.run=nowhere"], "teacher.run: 'nowhere' is not a workdir"),
        (["--config.teacher.schedule.peak=0.2"], r"was trained with teacher.schedule.peak = 0.1, not 0.2"),
        (["--config.data.crop_padding=2"], r"was trained with data.crop_padding = 1, not 2"),
    ],
)
def test_another_teacher_is_refused(own, arguments, sentence, tmp_path, capsys):
    line = [*TINY, f"--config.teacher.run={own}", "--config.arms=pwkd", *arguments, f"--workdir={tmp_path / 'w'}"]
    assert train.main(line) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: [^\n]*{sentence}[^\n]*\n", error), error
    assert not (tmp_path / "w").exists()


def test_a_teacher_that_is_not_finished_is_refused(tmp_path, capsys):
    assert train.main([*TINY, "--config.arms=alone", f"--workdir={tmp_path / 'alone'}"]) == 0
    line = [*TINY, f"--config.teacher.run={tmp_path / 'alone'}", "--config.arms=pwkd", f"--workdir={tmp_path / 'w'}"]
    assert train.main(line) == 2
    assert "holds no finished slimmable teacher; train it there first" in capsys.readouterr().err


GRID = "'student.distiller.name' = ['kd']\narms = ['kd_whole', 'pwkd']\nseed = [0, 1]"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(file, root) of a finished sweep: split by arms and seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.toml").write_text(toml(GRID))
    assert sweep.main([str(folder / "tiny.toml"), f"--root={folder / 'r'}", "--run=all"]) == 0
    return folder / "tiny.toml", folder / "r"


def test_points_share_one_teacher(swept):
    file, root = swept
    points = sweep.load(file, root)
    assert [p.name for p in points[:2]] == ["teachers/test_training_Tiny", "kd-kd_whole-seed=0"] and len(points) == 5
    assert len({(root / p.name / "teacher/slimmable/width_1.safetensors").read_bytes() for p in points}) == 1
    assert len(list(root.rglob("teacher/*/checkpoints"))) == 1


def test_the_report_puts_arms_and_seeds_together(swept, capsys):
    _, root = swept
    assert report.main([str(root)]) == 0
    text = capsys.readouterr().out
    results = json.loads((root / "results.json").read_text())
    assert [row["point"] for row in results["rows"]] == ["kd"] and results["unfinished"] == []
    for row in results["rows"]:
        each = {
            (arm, seed): json.loads((root / f"{row['point']}-{arm}-seed={seed}" / "summary.json").read_text())["runs"][0]
            for arm in ("kd_whole", "pwkd") for seed in (0, 1)
        }  # fmt: skip
        scores = {key: run["top1_last"] for key, run in each.items()}
        for arm, stat in row["arms"].items():
            values = [scores[arm, 0], scores[arm, 1]]
            assert stat == {"mean": statistics.fmean(values), "std": statistics.stdev(values), "n": 2}
            assert f"{stat['mean']:.2f} ± {stat['std']:.2f}" in text
        assert row["gain"]["per_seed"] == {str(s): scores["pwkd", s] - scores["kd_whole", s] for s in (0, 1)}
        teacher = json.loads((root / "teachers/test_training_Tiny/summary.json").read_text())["teachers"]["slimmable"]
        assert row["teacher_top1"] == teacher["widths"][-1]["top1_last"] and f"{row['teacher_top1']:.2f}" in text
    lines = list(csv.DictReader((root / "results.csv").read_text().splitlines()))
    assert [(r["student.distiller.name"], r["arm"]) for r in lines] == [
        ("kd", arm) for arm in ("kd_whole", "pwkd")
    ]
    assert float(lines[0]["mean"]) == results["rows"][0]["arms"]["kd_whole"]["mean"]
    assert "Sweep tiny" in (root / "report.html").read_text()


@pytest.mark.slow
def test_a_split_sweep_equals_one_experiment(swept, tmp_path):
    _, root = swept
    assert train.main([*TINY, "--config.arms=pwkd", "--config.seeds=2", f"--workdir={tmp_path / 'w'}"]) == 0
    a, b = final(tmp_path / "w", "students/pwkd/seed1", 24), final(root / "kd-pwkd-seed=1", "students/pwkd/seed1", 24)
    assert identical(a, b)


def test_unfinished_points_are_named(swept, capsys):
    _, root = swept
    hidden = root / "kd-pwkd-seed=1" / "summary.json"
    content = hidden.read_text()
    hidden.unlink()
    try:
        assert report.main([str(root)]) == 0
        assert "Unfinished: 1 point" in capsys.readouterr().out
        assert json.loads((root / "results.json").read_text())["unfinished"] == ["kd-pwkd-seed=1"]
        assert "kd-pwkd-seed=1" in (root / "report.html").read_text()
    finally:
        hidden.write_text(content)


def test_a_point_before_its_teacher_says_so(tmp_path, capsys):
    (tmp_path / "s.toml").write_text(toml("arms = ['pwkd']"))
    assert sweep.main([str(tmp_path / "s.toml"), f"--root={tmp_path / 'r'}", "--run=1"]) == 2
    assert "teacher.run" in capsys.readouterr().err
    assert report.main([str(tmp_path / "r")]) == 2
    assert "no point of this sweep is finished yet" in capsys.readouterr().err


def test_list_count_and_dry_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "s.toml").write_text(toml("'student.width' = [0.25, 0.5]\n'data.mean' = [[0.5]]\n'data.std' = [[0.2]]"))
    monkeypatch.setattr(train, "main", lambda _: pytest.fail("a dry run trains nothing"))
    arguments = [str(tmp_path / "s.toml"), f"--root={tmp_path / 'r'}"]

    def said(*what: str) -> str:
        assert sweep.main([*arguments, *what]) == 0
        return capsys.readouterr().out

    assert said("--count") == "3\n" and said("--count=teachers") == "1\n" and said("--count=students") == "2\n"
    assert "1 teachers and 2 points" in said()
    listed = said("--list").splitlines()
    assert len(listed) == 3 and said("--run=2", "--dry-run").splitlines() == [listed[2]]
    assert said("--run=students", "--dry-run").splitlines() == listed[1:]
    assert "--config.student.width=0.5" in listed[2] and "'--config.data.mean=(0.5,)'" in listed[2]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "text, sentence",
    [
        (toml("'student.distiller.name' = ['kd', 'nope']"), "point nope: student.distiller.name: there is no distiller 'nope'"),
        (toml("'student.widht' = [0.5]"), r"point widht=0.5: --config.student.widht: there is no key"),
        (toml("'student.width' = [0.5, 2]"), "point width=2: student.width: 2.0 is not possible"),
        (toml("'student.width' = 0.5"), "grid.student.width should be a list"),
        (toml("'student.width' = [0.5, 0.5]"), "two points are called 'width=0.5'"),
        (toml("seed = [0, 1]", seeds="2"), r"points seed=0 and seed=1 both run alone with seed 1; set seeds = 1"),
        (toml("arms = ['alone']", "grids = 1\n"), "'grids' is not known"),
        ("config = 'configs/digits.py'\n", r"needs config, .*\[grid\]"),
        ("config = 'configs/cifar100.py:{pair}'\n[grid]\narms = ['pwkd']", r"names \{pair\}, which is not in \[grid\]"),
        ("config = ", "is not TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(text, sentence, tmp_path, capsys):
    (tmp_path / "s.toml").write_text(text)
    assert sweep.main([str(tmp_path / "s.toml"), f"--root={tmp_path / 'r'}", "--run=all"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: [^\n]*{sentence}[^\n]*\n", error), error
    assert not (tmp_path / "r").exists()
    assert sweep.main([str(tmp_path / "none.toml")]) == 2


def test_tables_in_a_list_set_several_keys(tmp_path):
    pairs = "pair = [{name = 'a', 'student.width' = 0.25}, {name = 'b', 'student.width' = 0.5, 'teacher.loss' = 'inplace'}]"
    (tmp_path / "s.toml").write_text(toml(pairs).replace("'student.width' = '0.5'\n", ""))
    points = sweep.load(tmp_path / "s.toml", tmp_path)
    assert [p.name for p in points] == ["teachers/test_training_Tiny", "teachers/test_training_Tiny-2", "a", "b"]
    assert "--config.teacher.loss=inplace" in points[3].arguments


def test_the_sweep_of_methods_has_them_all():
    points = sweep.load(Path("configs/sweeps/methods.toml"), Path("root"))
    named = [p.axes["student.distiller.name"] for p in points if p.group]
    # But those that only a teacher of the student's own channels can teach.
    assert sorted(named) == sorted({*distillers.BUILTIN} - {"fsp", "kdsvd"})


def test_the_sweeps_that_come_with_it_are_right(capsys):
    for name in ("digits", "cifar100"):
        assert sweep.main([f"configs/sweeps/{name}.toml"]) == 0
    assert "4 teachers and 150 points" in capsys.readouterr().out
