"""Classes one by one: counted as scikit-learn counts them, by evaluate and at the end of a run, in tables, files and pages."""

import csv
import io
import json
import re

import jax
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from test_commands import TINY, pictures
from test_reporting import LAST, pages, parts
from test_training import SHAPE, Tiny, preprocess, split

from pwkd_jax import data, evaluate, export, report, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading
from pwkd_jax.reporting import class_plots, page, per_class, summary
from pwkd_jax.training import sharding
from pwkd_jax.training.evaluation import Evaluator

NAMES = ['a, "b"', "=1+1", "new\nline", "<b>猫 $x$"]


def drawn(classes: int, images: int = 400, seed: int = 0, absent: tuple = ()) -> tuple[np.ndarray, np.ndarray]:
    """(labels, predictions), half of which are right; of `absent` classes there is no image."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(classes) if c not in absent], images)
    return labels.astype(np.int32), np.where(rng.random(images) < 0.5, labels, rng.integers(0, classes - 1, images))


@pytest.mark.parametrize("classes", [2, 7, 80])
def test_rows_are_those_of_scikit_learn(classes):
    labels, predicted = drawn(classes, absent=(1,))
    _, teacher = drawn(classes, seed=1, absent=(1,))
    every, truth = range(classes), confusion_matrix(labels, predicted, labels=range(classes))
    np.testing.assert_array_equal(per_class.matrix(labels, predicted, classes), truth)
    recall, beside = (recall_score(labels, p, labels=every, average=None, zero_division=0) for p in (predicted, teacher))
    precision = precision_score(labels, predicted, labels=every, average=None, zero_division=0)
    rows = per_class.rows(labels, predicted, classes, (), teacher)
    for c, row in enumerate(rows):
        assert (row["class"], row["name"], row["images"]) == (c, None, truth[c].sum())
        assert row["precision"] == (pytest.approx(100 * precision[c]) if truth[:, c].sum() else None)
        if c == 1:
            assert row["top1"] is row["taken_for"] is row["teacher_top1"] is row["difference"] is None
            continue
        assert row["top1"] == pytest.approx(100 * recall[c]) and row["teacher_top1"] == pytest.approx(100 * beside[c])
        assert row["difference"] == pytest.approx(100 * (recall[c] - beside[c]), abs=1e-9)
        others = np.where(np.arange(classes) == c, 0, truth[c])
        if not others.any():
            assert row["taken_for"] is None
            continue
        taken = {"class": others.argmax(), "name": None, "images": others.max()}
        assert row["taken_for"] == {**taken, "share": pytest.approx(100 * others.max() / truth[c].sum())}


@pytest.mark.parametrize("classes", [3, 50, 51])
def test_what_a_run_keeps(classes):
    labels, predicted = drawn(classes, 3000)
    truth = confusion_matrix(labels, predicted, labels=range(classes))
    found = json.loads(json.dumps(per_class.counts(labels, predicted, classes)))
    assert per_class.fault(found) == "" and ("matrix" in found, "confused" in found) == (classes <= 50, classes > 50)
    assert found["images"] == truth.sum(1).tolist() and found["correct"] == np.diag(truth).tolist()
    wrong = truth - np.diag(np.diag(truth))
    most = sorted(((-n, *where) for where, n in np.ndenumerate(wrong) if n))[:20]
    assert [tuple(pair) for pair in per_class.confused(found)] == [(a, b, -n) for n, a, b in most]
    if classes <= 50:
        assert found["matrix"] == truth.tolist()


def test_many_classes_stay_small():
    """Of 20,000 classes a matrix would have 400 million numbers."""
    labels, predicted = drawn(20_000, 5000)
    assert len(json.dumps(per_class.counts(labels, predicted, 20_000))) < 150_000
    text = per_class.table(per_class.rows(labels, predicted, 20_000))
    assert len(text.splitlines()) == 3 + 20 + 1 + 5
    empty = 20_000 - len(np.unique(labels))
    assert f"... 19,975 more, {empty:,} of them without images; --json lists all ..." in text


def test_the_table_has_the_worst_first():
    labels = np.repeat([0, 1, 2], [4, 2, 3])
    predicted = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2])
    text = per_class.table(per_class.rows(labels, predicted, 4, ["ant", "bee", "cat\x1b[31m", "d" * 40], predicted))
    said = [re.split(r" {2,}", line) for line in text.splitlines()[3:]]
    assert said == [
        ["bee", r"cat\x1b[31m", "100.00", "2", "0.00", "0.00", "0.00", "+0.00"],
        ["ant", "bee", "25.00", "4", "75.00", "100.00", "75.00", "+0.00"],
        [r"cat\x1b[31m", "-", "-", "3", "100.00", "60.00", "100.00", "+0.00"],
        ["d" * 11 + "..." + "d" * 10, "-", "-", "0", "-", "-", "-", "-"],
    ]
    assert "\x1b" not in text and "the worst top-1 first" in text


def test_a_table_of_wide_names_keeps_to_its_columns():
    names = [f"{'猫' * 20}{i}" for i in range(30)]
    text = per_class.table(per_class.rows(*drawn(30), 30, names, drawn(30, seed=1)[1]))
    assert max(map(per_class.columns, text.splitlines())) <= 110
    assert per_class.shown("猫" * 20, 10) == "猫猫...猫" and per_class.shown("a" * 10, 10) == "a" * 10


HOSTILE = ["plain", "a,b", 'say "x"', "two\nlines", "back\rtwo", "=HYPERLINK(1)", "+1", "-1", "@x", "\ttab", "", " ", "'",
           "ü猫", "\udcff"]  # fmt: skip


def test_a_csv_of_any_names_is_read_again():
    counted = np.arange(len(HOSTILE) ** 2).reshape(len(HOSTILE), -1)
    text = per_class.as_csv(counted, HOSTILE)
    (_, *columns), *rows = csv.reader(io.StringIO(text.encode("utf-8").decode("utf-8"), newline=""))
    expected = [f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t", "\r") and name else name for name in HOSTILE]
    assert columns == [row[0] for row in rows] == [*expected[:-1], r"\udcff"]
    assert [list(map(int, row[1:])) for row in rows] == counted.tolist()
    assert [line.split(",")[0] for line in per_class.as_csv(np.eye(2, dtype=int)).splitlines()[1:]] == ['"0"', '"1"']


def damaged(**changes) -> str:
    return per_class.fault(per_class.counts(*drawn(3, 50), 3) | changes)


def test_counts_that_do_not_fit_are_said():
    good = per_class.counts(*drawn(3, 50), 3)
    assert damaged() == per_class.fault(None) == ""
    for correct in (good["correct"][:2], [10**400, 0, 0], [-1, 0, 0]):
        assert "more images are right" in damaged(correct=correct)
    for matrix in (good["matrix"][:2], [row[:2] for row in good["matrix"]], [[50, 0, 0]] * 3, [[]] * 3):
        assert "does not count each image once" in damaged(matrix=matrix)
    assert "counts others as right" in damaged(matrix=[row[::-1] for row in good["matrix"]])
    for pair in ([0, 0, 1], [0, 3, 1], [0, 1], [0, 1, 10**400], [0, 1, 0], [-1, 1, 1]):
        assert "is no pair of classes" in damaged(confused=[pair])


@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_evaluator_gives_each_image_its_class_once(batch_size):
    images, model = split(37), Tiny()
    variables = dict(model.init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32)))
    logits = np.asarray(model.apply(variables, preprocess(None, images.images)).logits)
    evaluator = Evaluator(sharding.make_mesh(), images, batch_size, lambda x: preprocess(None, x))
    labels, predicted = evaluator.predictions(model, variables)
    np.testing.assert_array_equal(labels, images.labels)
    np.testing.assert_array_equal(predicted, logits.argmax(-1))


# The commands.


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """(workdir, folder) of students and a teacher of four classes whose names would break a careless table."""
    folder = tmp_path_factory.mktemp("data")
    for part in ("train", "test"):
        for n, name in enumerate(NAMES):
            pictures(folder, part, name, 8 + n, 10 + 50 * n)
    workdir = tmp_path_factory.mktemp("trained") / "w"
    options = [TINY[0], *(o for o in TINY[1:] if "_split" not in o), "--config.data.name=folder",
               f"--config.data.data_dir={folder}", "--config.arms=kd_whole,pwkd"]  # fmt: skip
    assert train.main([*options, f"--workdir={workdir}"]) == 0
    return workdir, folder, options


def expected(folder, target) -> np.ndarray:
    """The confusion matrix by scikit-learn of the logits outside evaluation."""
    images, _ = data.load_split("folder", str(folder), "test")
    logits = np.asarray(loading.open_network(target).logits(images.images))
    return confusion_matrix(images.labels, logits.argmax(-1), labels=range(4))


def test_evaluate_lists_the_classes_and_writes_the_matrix(work, tmp_path, capsys):
    workdir, folder, _ = work
    student, teacher = workdir / "students/pwkd/seed0", workdir / "teacher/slimmable"
    truth, beside, names = expected(folder, student), expected(folder, teacher), sorted(NAMES)
    out = tmp_path / "new" / "x.csv"
    line = [str(student), f"--teacher={teacher}", "--per-class", f"--confusion={out}", "--batch-size=5"]
    assert evaluate.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["confusion"] == str(out) and [row["name"] for row in found["classes"]] == names
    for c, row in enumerate(found["classes"]):
        assert row["images"] == truth[c].sum() and row["top1"] == pytest.approx(100 * truth[c, c] / truth[c].sum())
        assert row["teacher_top1"] == pytest.approx(100 * beside[c, c] / truth[c].sum())
    (_, *header), *rows = csv.reader(out.open(newline=""))
    assert header == [row[0] for row in rows] == ["'" + n if n[0] == "=" else n for n in names]
    np.testing.assert_array_equal([list(map(int, row[1:])) for row in rows], truth)
    # In words, and of a slice in which the last classes have no images.
    first = truth[0].sum()
    assert evaluate.main([*line, f"--split=test[:{first}]"]) == 0
    text = capsys.readouterr().out
    assert f"confusion matrix: {out}" in text and "4 classes, the worst top-1 first" in text
    assert len(re.findall(r" 0 +- ", text)) == 3 and r"new\nline" in text
    assert evaluate.main([str(student)]) == 0
    assert "classes, the worst" not in capsys.readouterr().out


def test_programs_and_streamed_folders_have_the_same_classes(work, tmp_path, capsys):
    workdir, folder, _ = work
    student = str(workdir / "students/pwkd/seed0")
    whole = evaluate.evaluate(student, per_class=True)["classes"]
    assert evaluate.evaluate(student, per_class=True, image_size=8, resize=8, workers=0)["classes"] == whole
    assert export.main([student, f"--out={tmp_path}", "--platforms=cpu", "--model=test_training:Tiny"]) == 0
    program = {"data": "folder", "data_dir": str(folder), "split": "test"}
    assert evaluate.evaluate(str(tmp_path / "model.stablehlo"), per_class=True, **program)["classes"] == whole


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("table.txt", "'{}' should be a name ending in .csv"),
        ("folder.csv", "'{}' is a folder; give the name of a file"),
        ("file/x.csv", "'{}' cannot be written (File exists)"),
    ],
)
def test_a_file_that_cannot_be_is_refused(given, sentence, work, tmp_path, capsys):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    place = tmp_path / given
    assert evaluate.main([str(work[0] / "students/pwkd/seed0"), f"--confusion={place}"]) == 2
    assert capsys.readouterr().err == f"error: --confusion: {sentence.format(place)}\n"


def test_a_run_ends_with_what_evaluate_finds(work):
    workdir, folder, _ = work
    for run in ("students/pwkd/seed0", "students/kd_whole/seed0", "teacher/slimmable"):
        found, truth = json.loads((workdir / run / "result.json").read_text()), expected(folder, workdir / run)
        last = found["top1_last"] if "arm" in found else found["widths"][-1]["top1_last"]
        assert found["classes"]["matrix"] == truth.tolist()
        assert sum(found["classes"]["correct"]) / len_of(found) == pytest.approx(last / 100)
    html = pages((workdir / "report.html").read_text())
    assert "<h2>Classes</h2>" in html and "&lt;b&gt;猫 $x$" in html and "<b>猫" not in html


def len_of(found: dict) -> int:
    return sum(found["classes"]["images"])


def test_results_of_before_are_read_and_left_out(work, capsys):
    """Last of the tests that use this workdir, for it takes the counts out of it."""
    workdir, _, options = work

    def rewrite(run: str, change) -> None:
        path = workdir / run / "result.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    rewrite("students/kd_whole/seed0", lambda found: found.pop("classes"))
    assert train.main([*options, f"--workdir={workdir}"]) == 0
    html = (workdir / "report.html").read_text()
    assert "<h2>Classes</h2>" in html and "Without kd_whole, of which some runs are of before classes were counted." in html
    for run in ("students/pwkd/seed0", "teacher/slimmable"):
        rewrite(run, lambda found: found.pop("classes"))
    assert train.main([*options, f"--workdir={workdir}"]) == 0
    assert "<h2>Classes</h2>" not in (workdir / "report.html").read_text()
    assert report.main([str(workdir)]) == 0
    rewrite("students/pwkd/seed0", lambda found: found.update(classes={"images": [1, 1, 1, 1], "correct": [2, 0, 0, 0]}))
    capsys.readouterr()
    assert train.main([*options, f"--workdir={workdir}"]) == 2
    assert "result.json' is not as it was written: of some class more images are right than" in capsys.readouterr().err


# The report.


def counted(classes: int, names=(), arms=LAST) -> dict:
    given = parts({arm: LAST[arm] for arm in arms})
    for seed, own in enumerate((*given["runs"], *given["teachers"].values())):
        own["classes"] = per_class.counts(*drawn(classes, seed=seed, absent=(2,)), classes)
    given["data"] |= {"num_classes": classes, "classes": list(names)}
    return summary.build(**given)


def test_means_over_seeds_and_the_best_student():
    found = per_class.of_summary(counted(4))
    assert list(found["top1"]) == ["slimmable teacher", "standard teacher", *LAST] and found["focus"] == "pwkd"
    assert (found["run"]["arm"], found["run"]["seed"]) == ("pwkd", 1)  # 96.4, 96.5, 96.0
    assert found["names"] == ["0", "1", "2", "3"] and found["top1"]["pwkd"][2] is None
    at = 3 * list(LAST).index("pwkd")
    each = [recall_score(*drawn(4, seed=at + s, absent=(2,)), labels=[0], average="micro") for s in range(3)]
    sizes = [np.sum(drawn(4, seed=at + s, absent=(2,))[0] == 0) for s in range(3)]
    assert found["top1"]["pwkd"][0] == pytest.approx(100 * np.average(each, weights=sizes))
    assert per_class.of_summary(counted(4, arms=("kd_whole", "alone")))["focus"] == "alone"
    assert per_class.of_summary(summary.build(**parts())) is None


@pytest.mark.parametrize("classes", [2, 12, 13, 50, 51, 1000])
def test_pages_of_few_classes_and_of_many(classes):
    found = counted(classes, [f"<i>{'猫' * (c % 12)}-- $x_{c}$ &\\1" for c in range(classes)])
    html = pages(page.report(found))
    drawn_too = html.count('id="confusion-'), html.count('id="class-accuracy-')
    assert all(drawn_too) if classes <= 50 else not any(drawn_too)
    assert ("--per-class --json" in html) == (classes > 50) and "<i>" not in html
    assert "darkest at" in html or classes > 50
    # Many a class has no image here, and none is divided by nothing.
    assert not re.search(r"\bnan\b", html)


def test_a_page_of_any_names_is_written(tmp_path):
    names = [*HOSTILE, "\x01\x1b", "]]>", "-->"]
    summary.write(counted(len(names), names), tmp_path)
    html = pages((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert r"two\nlines" in html and r"\udcff" in html and "\x1b" not in html and "--&gt;" in html


def test_a_student_without_mistakes_has_a_picture():
    given = parts({"pwkd": (100.0,)})
    labels = np.repeat(np.arange(3), 5)
    given["runs"][0]["classes"] = per_class.counts(labels, labels, 3)
    given["data"]["num_classes"] = 3
    html = pages(page.report(summary.build(**given)))
    assert "none for another" in html and "Most confused" not in html


def test_labels_of_the_picture_have_room():
    """As much as matplotlib takes to draw them, and for a character of two columns as much as for its M."""
    for name in ("W" * 20, "iii", "airplane"):
        figure = Figure(dpi=72)
        text = figure.text(0, 0, name, fontsize=class_plots.FONT)
        inches = text.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / 72
        assert inches <= class_plots._room([name, "i"]) <= inches + 0.3
    assert class_plots._room(["猫猫"]) >= class_plots._room(["MM"])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s["runs"][0]["classes"]["images"].pop(), "counted another number of classes"),
        (lambda s: s["runs"][0]["classes"].update(correct=[10**9] * 4), "more images are right"),
        (lambda s: s["teachers"]["standard"]["classes"]["matrix"].reverse(), "does not count each image once"),
        (lambda s: s["runs"][0].update(classes=[]), "'runs.0.classes' is [], not an object"),
        (lambda s: s["runs"][0]["classes"].update(confused=[["a", 1, 2]]), "'runs.0.classes.confused.0.0' is 'a', not a whole"),
        (lambda s: s["data"].update(classes=[1]), "'data.classes.0' is 1, not text"),
    ],
)
def test_summaries_with_wrong_classes_are_refused(change, said, tmp_path):
    found = counted(4)
    change(found)
    (tmp_path / "summary.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="is not as training wrote it: ") as error:
        summary.read(tmp_path)
    assert said in str(error.value)
