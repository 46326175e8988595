"""python -m pwkd_jax.predict: classes of image files, as evaluate counts them."""

import csv
import json

import numpy as np
import PIL.Image
import pytest
from test_commands import TINY

from pwkd_jax import data, export, predict, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading, predicting


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "w"
    assert train.main([*TINY, "--config.arms=alone", f"--workdir={workdir}"]) == 0
    return workdir / "students/alone/seed0"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Test images of the digits as files: right in a folder, and below it."""
    folder = tmp_path_factory.mktemp("photos")
    split, _ = data.load_split("digits", "", "test[:9]")
    (folder / "more").mkdir()
    for i, image in enumerate(split.images):
        PIL.Image.fromarray(image[..., 0]).save((folder if i < 6 else folder / "more") / f"{i}.png")
    return folder, split.images


def test_classes_are_those_of_the_network(student, photos, tmp_path, capsys):
    folder, images = photos
    out = tmp_path / "classes.json"
    assert predict.main([str(student), str(folder), "--top=3", "--batch-size=4", f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}: 9 images\n"
    rows = json.loads(out.read_text())
    assert [row["file"] for row in rows] == [str(folder / f"{i}.png") for i in range(6)] + [
        str(folder / "more" / f"{i}.png") for i in range(6, 9)
    ]
    logits = np.asarray(loading.open_network(student).logits(images), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row, chance in zip(rows, chances, strict=True):
        best = np.argsort(-chance)[:3]
        assert [one["class"] for one in row["top"]] == best.tolist()
        np.testing.assert_allclose([one["probability"] for one in row["top"]], chance[best], rtol=1e-4)
    assert predict.main([str(student), str(folder / "0.png")]) == 0
    first = rows[0]["top"][0]
    assert capsys.readouterr().out == f"{folder / '0.png'}: {first['class']} {100 * first['probability']:.1f} %\n"


def test_a_program_predicts_the_same_and_other_sizes_are_fitted(student, photos, tmp_path, capsys):
    folder, _ = photos
    assert export.main([str(student), f"--out={tmp_path / 'out'}", "--platforms=cpu"]) == 0
    large = tmp_path / "large.png"
    PIL.Image.open(folder / "0.png").resize((40, 24)).convert("RGB").save(large)
    capsys.readouterr()
    known = []
    for target in (student, tmp_path / "out/model.stablehlo"):
        assert predict.main([str(target), str(folder / "0.png"), str(large), f"--out={tmp_path / 'x.csv'}"]) == 0
        rows = list(csv.DictReader((tmp_path / "x.csv").open()))
        assert [r["file"] for r in rows] == [str(folder / "0.png"), str(large)] and all(r["error"] == "" for r in rows)
        assert 0 < float(rows[1]["probability"]) <= 1
        known.append([(r["class"], r["probability"][:6]) for r in rows])
    assert known[0] == known[1]


def test_what_cannot_be_read_is_a_row_without_a_class(student, photos, tmp_path, capsys):
    folder, _ = photos
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    assert predict.main([str(student), str(tmp_path / "bad.jpg"), str(folder / "0.png"), f"--out={tmp_path / 'x.csv'}"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"{tmp_path / 'bad.jpg'}: cannot be read (") and said.out.endswith("x.csv: 1 images\n")
    assert (tmp_path / "x.csv").read_text().splitlines()[1].startswith(f"{tmp_path / 'bad.jpg'},,,")
    assert predict.main([str(student), str(tmp_path / "bad.jpg")]) == 2
    (tmp_path / "empty").mkdir()
    for arguments, sentence in (
        ([str(tmp_path / "none.png")], "there is no such file or folder"), ([str(tmp_path / "empty")], "there is no image in"),
        ([str(folder), "--out=x.txt"], "should be a name ending in .csv or .json"), ([str(folder), "--top=0"], "--top: 0"),
        ([str(folder), "--resize=4"], "--resize: 4 pixels are fewer than the 8"), ([str(folder), "--width=0.3"], "--width: "),
    ):  # fmt: skip
        capsys.readouterr()
        assert predict.main([str(student), *arguments]) == 2
        assert sentence in (said := capsys.readouterr().err) and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(UserError, match=r"--batch-size: 0 is not possible"):
        predicting.predict(str(student), [str(folder)], batch_size=0)
