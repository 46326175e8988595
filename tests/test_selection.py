"""Chosen by validation images: their split, the best weights beside the last, and an early end; stopped runs choose alike."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import identical
from test_commands import TINY
from test_training import Tiny
from test_weights import error

import pwkd_jax as pwkd
from pwkd_jax import config, data, evaluate, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition
from pwkd_jax.training import loop, selection, student
from pwkd_jax.training.writers import read_rows

SPLITS = ["--config.data.train_split=stratified(train[:120], 75%)",
          "--config.data.validation_split=stratified(train[:120], 75%:)"]  # fmt: skip
OPTIONS = [*TINY, *SPLITS, "--config.arms=pwkd", "--config.evaluation.every=2 steps", "--config.checkpoint.every=1000 steps",
           "--config.seeds=2"]  # fmt: skip


def result(workdir: Path, run: str) -> dict:
    return json.loads((workdir / run / "result.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("selection") / "w"
    assert train.main([*OPTIONS, f"--workdir={workdir}"]) == 0
    return workdir


def test_three_splits_share_no_image(run):
    made = definition.prepare(config.load(OPTIONS)[0])
    dataset = made.dataset
    assert (len(dataset.train), len(dataset.validation)) == (90, 30) or len(dataset.train) + len(dataset.validation) == 120
    images = [{x.tobytes() for x in split.images} for split in (dataset.train, dataset.validation, dataset.test)]
    whole = data.load("digits", train_split="train[:120]").train
    assert images[0] | images[1] == {x.tobytes() for x in whole.images} and not images[0] & images[1]
    assert set(np.unique(dataset.validation.labels)) == set(range(10))
    facts = json.loads((run / "data.json").read_text())
    assert set(facts["digests"]) == {"train", "test", "validation"}


def test_the_best_weights_are_kept_beside_the_last(run, capsys):
    for seed in (0, 1):
        place = f"students/pwkd/seed{seed}"
        rows = [row for row in read_rows(run / place / "metrics.jsonl") if "validation_top1" in row]
        scores = [row["validation_top1"] for row in rows]
        best = rows[int(np.argmax(scores))]  # the first of equals
        found = result(run, place)
        assert found["selected"] == {key: best[key] for key in ("step", "validation_top1", "top1")}
        assert found["top1_last"] == rows[-1]["top1"]
        kept = {int(p.name) for p in (run / place / "checkpoints").iterdir() if p.name.isdigit()}
        assert {best["step"], 24} <= kept and len(kept) <= 5  # stage end, the latest two, and the best
        scored = evaluate.evaluate(f"{run}/{place}/best")
        assert scored["top1"] == pytest.approx(best["top1"])
        held_out = evaluate.evaluate(f"{run}/{place}/best", split="stratified(train[:120], 75%:)")
        assert held_out["top1"] == pytest.approx(best["validation_top1"])
    report = (run / "report.html").read_text()
    assert "+ its weights that were best on validation (extra)" in report
    assert any(result(run, f"students/pwkd/seed{seed}")["selected"]["step"] < 24 for seed in (0, 1))
    assert "kept no best weights" in error(evaluate.main, run / "teacher/slimmable/best", capsys=capsys)


def test_the_teacher_is_scored_on_them_too(run):
    row = read_rows(run / "teacher/slimmable/metrics.jsonl")[-1]
    assert {"validation_top1_0.5", "validation_top1_1", "top1_1"} <= set(row)


def test_students_together_have_each_its_best(run, tmp_path):
    options = ["--config.student.batches=shared", f"--config.teacher.run={run}"]
    for how in ("none", "unroll"):
        assert train.main([*OPTIONS, *options, f"--config.student.together={how}", f"--workdir={tmp_path}/{how}"]) == 0
    for seed in (0, 1):
        place = f"students/pwkd/seed{seed}"
        apart, joined = (result(tmp_path / how, place)["selected"] for how in ("none", "unroll"))
        assert apart == pytest.approx(joined)
        scores = [evaluate.evaluate(f"{tmp_path}/{how}/{place}/best")["top1"] for how in ("none", "unroll")]
        assert scores[0] == pytest.approx(scores[1])


def test_patience_ends_the_last_stage(run, tmp_path, monkeypatch):
    options = [*OPTIONS, "--config.evaluation.patience=2", "--config.seeds=1", f"--config.teacher.run={run}"]
    options += ["--config.student.duration=96 steps"]
    assert train.main([*options, f"--workdir={tmp_path}/w"]) == 0
    place = tmp_path / "w/students/pwkd/seed0"
    rows = [row for row in read_rows(place / "metrics.jsonl") if "validation_top1" in row]
    last = [row for row in rows if row["step"] > 48]
    best = max(last, key=lambda row: (row["validation_top1"], -row["step"]))
    end = rows[-1]["step"]
    assert 48 < end < 96 and end == best["step"] + 4
    # Not a step sooner: before it, no two evaluations in a row were without a better one.
    for count in range(1, len(last)):
        assert not selection.over(last[:count], [selection.KEY], 2, 48)
    found = result(tmp_path / "w", "students/pwkd/seed0")
    assert found["steps"] == end and found["top1_last"] == rows[-1]["top1"] and len(found["stage_ends"]) == 2
    summary = json.loads((tmp_path / "w/summary.json").read_text())
    assert summary["runs"][0]["selected"]["step"] == selection.best(rows)

    # One that was stopped after every save ends in the same rows and bits.
    from pwkd_jax.training import loop, preemption

    saves = []
    whole = loop.Checkpoints.save

    def stopping(self, step, state, note=None):
        whole(self, step, state, note)
        if self._directory and "pwkd" in str(self._directory) and len(saves) < 3 and step not in saves:
            saves.append(step)
            raise preemption.Preempted

    monkeypatch.setattr(loop.Checkpoints, "save", stopping)
    for _ in range(3):
        assert train.main([*options, f"--workdir={tmp_path}/again"]) == 75
    assert train.main([*options, f"--workdir={tmp_path}/again"]) == 0 and len(saves) == 3
    again = [row for row in read_rows(tmp_path / "again/students/pwkd/seed0/metrics.jsonl") if "validation_top1" in row]
    for one, other in zip(rows, again, strict=True):
        assert {k: v for k, v in one.items() if k not in ("seconds", "images_per_second")} == {
            k: v for k, v in other.items() if k not in ("seconds", "images_per_second")
        }
    assert identical(*(result(tmp_path / w, "students/pwkd/seed0")["selected"] for w in ("w", "again")))


def test_a_library_s_student_has_its_best_state(tmp_path):
    rng = np.random.default_rng(0)

    def drawn(count):
        labels = rng.integers(0, 3, count)
        images = rng.integers(0, 90, (count, 4, 4, 1)) + 40 * labels[:, None, None, None]
        return images.astype(np.uint8), labels

    task = pwkd.task(drawn(64), validation=drawn(30))  # and no test images
    net = pwkd.make_slimmable(Tiny, (0.5, 1.0), (4, 4, 1), num_classes=3)
    taught = pwkd.train_teacher(net, task, duration=8, batch_size=8, label="")
    assert {"validation_top1_0.5", "validation_top1_1"} <= set(taught.rows[-1]) and "top1_1" not in taught.rows[-1]
    cadence = loop.Cadence(50, 2, 100, False)
    found = pwkd.distil(Tiny(width=0.5, num_classes=3), taught, task, duration=24, batch_size=8, directory=tmp_path / "run",
                        label="", cadence=cadence)  # fmt: skip
    best = selection.best(found.rows)
    assert int(found.best[0].step) == best
    top1 = task.validator(found.model, student.variables(found.best[0]))["top1"]
    assert top1 == max(row["validation_top1"] for row in found.rows if "validation_top1" in row)


@pytest.mark.parametrize(("rows", "expected"), [
    ([], None), ([{"step": 2, "top1": 5.0}], None),
    ([{"step": 2, "validation_top1": 5.0}, {"step": 4, "validation_top1": 7.0}, {"step": 6, "validation_top1": 7.0}], 4),
])  # fmt: skip
def test_the_first_of_equals_is_the_best(rows, expected):
    assert selection.best(rows) == expected


def test_what_cannot_be_chosen_by_is_refused(tmp_path, capsys):
    sentence = error(train.main, *TINY, "--config.evaluation.patience=3", f"--workdir={tmp_path}/w", capsys=capsys)
    assert "evaluation.patience: 3 is not possible; it should be 0 without a data.validation_split" in sentence
    for part, other in (("train[:50]", "data.train_split"), ("test[:50]", "data.test_split")):
        options = [*TINY, f"--config.data.validation_split={part}", "--config.data.train_split=train[:96]"]
        with pytest.raises(UserError, match=rf"data\.validation_split: '.*' shares images with {other}"):
            definition.prepare(config.load([*options, "--config.data.test_split=test"])[0])
