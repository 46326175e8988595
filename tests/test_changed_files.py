"""Files of a workdir that were edited, exchanged or cut: refused in a sentence that names the file, never read as another's."""

import json
import re
import shutil

import numpy as np
import pytest
from test_commands import TINY
from test_data import _images, _records, _tfds

from pwkd_jax import evaluate, report, storage, train
from pwkd_jax.data import records
from pwkd_jax.errors import UserError
from pwkd_jax.training import record
from pwkd_jax.training.writers import read_rows

PUPIL, TEACHER = "students/pwkd/seed0", "teacher/slimmable"
SHORT = [*TINY, "--config.arms=pwkd", "--config.teacher.duration=2 steps", "--config.student.duration=4 steps",
         "--config.log.every=1 steps"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("changed") / "work"
    assert train.main([*SHORT, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def work(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "work")


def change(path, *keys, to=None):
    """Set what lies at `keys` of a JSON file; without a value it goes."""
    found = json.loads(path.read_text())
    inner = found
    for key in keys[:-1]:
        inner = inner[key]
    if to is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    path.write_text(json.dumps(found))


def error(main, *arguments, capsys) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("warning: ", "reading "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "value, shape, fault",
    [
        ({"a": 1, "b": [{"c": 2.5}], "more": None}, {"a": int, "b": [{"c": float}]}, ""),
        ({"a": 1}, {"a": float, "b?": str}, ""), ({"a": None}, {"a": (float, None)}, ""),
        ({"x": {"y": 1}}, {"*": {"y": int}}, ""),
        ({"a": True}, {"a": int}, "'a' is True, not a whole number"),
        ({"a": 1.0}, {"a": int}, "'a' is 1.0, not a whole number"),
        ({"a": float("nan")}, {"a": float}, "'a' is nan, not a number"), ({"a": 10**400}, {"a": float}, "'a' is 1000"),
        ({}, {"a": int}, "it lacks 'a'"), ({"b": [{"c": 1}, {}]}, {"b": [{"c": int}]}, "it lacks 'b.1.c'"),
        ([], {}, "it is [], not an object"), ({"a": {}}, {"a": [int]}, "'a' is {}, not a list"),
        ({"a": "x"}, {"a": ({"y": int}, None)}, "'a' is 'x', not an object"),
    ],
)  # fmt: skip
def test_shapes(value, shape, fault):
    assert storage.misfit(value, shape).startswith(fault) and bool(storage.misfit(value, shape)) == bool(fault)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"<html>", None])
def test_what_is_no_record(content, tmp_path):
    if content is None:
        (tmp_path / "x.json").mkdir()
    else:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^'\S+x\.json' is not whole \([^\n]+\); bring it back as it was written$"):
        storage.record(tmp_path / "x.json", {})
    if content is not None:
        (tmp_path / record.FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"run\.json' is not whole"):
            record.claim(tmp_path, {"steps": 1})


@pytest.mark.parametrize(
    "file, keys, to, sentence",
    [
        (f"{PUPIL}/result.json", ("curve",), None, "it lacks 'curve'"),
        (f"{PUPIL}/result.json", ("top1_last",), "98", "'top1_last' is '98', not a number"),
        (f"{PUPIL}/result.json", ("seed",), 3, "is another run's, whose seed is 3 and not 0"),
        (f"{PUPIL}/result.json", ("plan", 0, "widths"), [1.0], "is another run's, whose plan is"),
        (f"{TEACHER}/result.json", ("widths", 0, "width"), 0.25, "is another run's, of other widths"),
        (f"{TEACHER}/result.json", ("model",), "resnet8", "is another run's, whose model is 'resnet8'"),
        ("config.json", ("teacher",), "wide", "config.json"),
        ("data.json", ("digests",), [], "'digests' is [], not an object"),
    ],
)
def test_records_that_were_edited_are_not_gone_on_with(file, keys, to, sentence, work, capsys):
    change(work / file, *keys, to=to)
    text = error(train.main, *SHORT, f"--workdir={work}", capsys=capsys)
    assert sentence in text and file.rpartition("/")[2] in text


@pytest.mark.parametrize(
    "file, keys, to",
    [
        ("data.json", ("num_classes",), "ten"), ("data.json", ("image_shape",), [8, 8]), ("data.json", ("mean",), []),
        ("data.json", ("std",), None), ("config.json", ("teacher", "widths"), [True]), ("config.json", ("student",), []),
        ("config.json", ("student", "distiller", "name"), ["kd"]), ("config.json", ("data", "std"), ["x"]),
    ],
)  # fmt: skip
def test_facts_that_were_edited_are_not_evaluated_by(file, keys, to, work, capsys):
    change(work / file, *keys, to=to)
    assert file in error(evaluate.main, work / PUPIL, capsys=capsys)


@pytest.mark.parametrize(
    "keys, to",
    [(("runs", 0, "top1_last"), "x"), (("runs", 0, "plan"), []), (("arms", "pwkd", "top1_last", "mean"), 99.0), (("arms",), {}),
     (("teachers", "slimmable", "widths"), []), (("runs", 0, "seed"), 7), (("gain", "reason"), 3), (("environment",), [])],
)  # fmt: skip
def test_summaries_that_were_edited(keys, to, work, capsys):
    change(work / "summary.json", *keys, to=to)
    assert "summary.json is not as training wrote it: " in error(report.main, work, capsys=capsys)


def test_a_teachers_weights_of_another_width(work, capsys):
    """Whole by its own checksum, and once read as the other width's."""
    shutil.copy(work / TEACHER / "width_1.safetensors", work / TEACHER / "width_0.5.safetensors")
    said = "width_0.5.safetensors: is of another network, whose width is 1.0 and not 0.5"
    assert said in error(evaluate.main, work / TEACHER, "--width=0.5", capsys=capsys)
    shutil.rmtree(work / "students")
    assert said in error(train.main, *SHORT, f"--workdir={work}", capsys=capsys)


def test_metrics_that_were_changed(work, capsys):
    path = work / PUPIL / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    assert len(whole) > 2
    (work / PUPIL / "result.json").unlink()
    for lines, sentence in (
        ([whole[0][:9] + "\n", *whole[1:]], "was changed in line 1 ("),
        ([whole[1], whole[0], *whole[2:]], "its steps do not rise"),
        (whole[:-1], "lacks the row of step 4"), ([*whole[:-1], whole[-1][:20]], "lacks the row of step 4"),
    ):  # fmt: skip
        path.write_text("".join(lines))
        text = error(train.main, *SHORT, f"--workdir={work}", capsys=capsys)
        assert sentence in text and "metrics.jsonl" in text and path.read_text() == "".join(lines)
    path.write_bytes(b"\xff" + "".join(whole).encode())
    with pytest.raises(UserError, match=r"metrics\.jsonl' cannot be read"):
        read_rows(path)
    path.write_text("".join(whole))
    assert train.main([*SHORT, f"--workdir={work}"]) == 0


def test_a_damaged_checkpoint_is_told_in_words(work, capsys):
    """Orbax says which objects it has in its registry."""
    (work / PUPIL / "checkpoints/4/state/_METADATA").unlink()
    text = error(evaluate.main, work / PUPIL, capsys=capsys)
    assert "checkpoints/4 is not a whole checkpoint (" in text and not re.search("<class|object at", text) and len(text) < 500


def test_kept_labels_know_whether_they_were_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _tfds(tmp_path, {"train": [_records(_images(6))]})
    reader = records.Records(tmp_path / "toy/1.0.0", [("train", 0, 6)])
    assert reader.labels().tolist() == [0, 1, 2, 3, 4, 0]
    [kept] = (tmp_path / "toy/1.0.0").glob(".labels-*")
    whole = kept.read_bytes()
    for place in (len(whole) - 6, len(whole) - 1, 0):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        np.testing.assert_array_equal(reader.labels(), [0, 1, 2, 3, 4, 0])
    assert kept.read_bytes() == whole
