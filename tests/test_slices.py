"""Slices of every class by itself, and test images of classes that no training image has."""

import json

import numpy as np
import pytest
from test_data import _images, _records, _tfds
from test_stream import PLAIN, encode, photo

import pwkd_jax as pwkd
from pwkd_jax import data, train
from pwkd_jax.data import slices, soundness
from pwkd_jax.errors import UserError


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """train/CLASS of four classes of 10 images, image i of class c filled with 20 c + i + 40."""
    home = tmp_path_factory.mktemp("ordered")
    for label, name in enumerate("abcd"):
        (home / "train" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.full((8, 8, 3), 20 * label + i + 40, np.uint8)
            (home / "train" / name / f"{i}.png").write_bytes(encode(pixels, "PNG"))
    return str(home)


def pixels(split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_parts_of_each_class_are_disjoint_and_whole(ordered):
    for seed in ("", ", seed=0", ", seed=7"):
        d = data.load("folder", ordered, f"stratified(train, 80%{seed})", f"stratified(train, 80%:{seed})")
        np.testing.assert_array_equal(np.bincount(d.train.labels), [8] * 4)
        np.testing.assert_array_equal(np.bincount(d.test.labels), [2] * 4)
        assert sorted(pixels(d.train) + pixels(d.test)) == [20 * c + i + 40 for c in range(4) for i in range(10)]
        assert pixels(d.train) == sorted(pixels(d.train)), "in the stored order"
    folds = [data.load_split("folder", ordered, f"stratified(train, {k}%:{k + 20}%, seed=1)")[0] for k in range(0, 100, 20)]
    assert sorted(x for fold in folds for x in pixels(fold)) == sorted(pixels(data.load_split("folder", ordered, "train")[0]))
    other = data.load_split("folder", ordered, "stratified(train, 20%)")[0]
    assert pixels(other) != pixels(folds[0]) and len(other) == 8


def test_the_draw_is_pinned():
    """A run that goes on after an upgrade has to find the images that it began with."""
    part = slices.stratified("data.train_split", "stratified(train, 40%)")
    assert slices.choose(np.repeat([0, 1], 5), part).tolist() == [1, 2, 6, 9]


def test_small_classes_and_odd_shares():
    labels = np.array([0] * 100 + [1] * 1 + [2] * 3)
    for text, counts in (("7%", [7, 1, 1]), ("7%:", [93, 0, 2]), ("50%", [50, 1, 2]), (":99.5%", [100, 1, 3])):
        found = slices.choose(labels, slices.stratified("k", f"stratified(train, {text})"))
        assert np.bincount(labels[found], minlength=3).tolist() == counts, text


def test_every_source_has_it(tmp_path, ordered):
    d = data.load("digits", train_split="stratified(train+test, 50%)", test_split="stratified(train+test, 50%:)")
    assert len(d.train) + len(d.test) == 1797
    assert np.abs(np.bincount(d.train.labels) - np.bincount(d.test.labels)).max() <= 1
    labels = np.repeat([0, 1, 2], 6)
    records = _records(_images(18), labels)
    root = _tfds(tmp_path, {"train": [records[:7], records[7:]]}, classes=3)
    cut = "stratified(train, 50%)", "stratified(train, 50%:)"
    d = data.load("toy", root, *cut)
    np.testing.assert_array_equal(d.train.labels, np.repeat([0, 1, 2], 3))
    both = {x.tobytes() for x in np.concatenate([d.train.images, d.test.images])}
    assert both == {x.tobytes() for x in _images(18)}
    streamed = data.load("toy", root, *cut, 0, PLAIN)
    np.testing.assert_array_equal(streamed.train.labels, d.train.labels)
    np.testing.assert_array_equal(data.load("folder", ordered, *cut, 0, PLAIN).test.labels, np.repeat(range(4), 5))


@pytest.mark.parametrize(
    "spec",
    ["stratified(train)", "stratified(train, 80)", "stratified(train, 120%)", "stratified(train, 50%:20%)", "stratified train",
     "stratified(train, 80%, seed=x)", "stratified(, 80%)", "stratified(train, :)", "stratified(train, 50% 60%)",
     "stratified(train, 50%, seed=99999999999999999999)"],
)  # fmt: skip
def test_malformed_parts(spec):
    with pytest.raises(UserError, match=r"^data.train_split: '.*' is not a part of each class; write stratified\(train, 80%\)"):
        data.load("digits", train_split=spec)


def test_mistakes_within_are_those_of_slices():
    with pytest.raises(UserError, match=r"^data.train_split: data set 'digits' has no split 'trian'; it has test, train$"):
        data.load("digits", train_split="stratified(trian, 80%)")


def test_lengths_without_labels():
    shards = {"train": [1000], "test": [10]}
    for spec, want in (("train[:30]", 30), ("stratified(train, 80%)", 800), ("stratified(train[:500]+test, 80%:)", 102)):
        assert slices.length("k", spec, "toy", shards) == want


# Classes that are tested and not taught.


def line(root, *more: str) -> list[str]:
    keys = ("data.name=folder", f"data.data_dir={root}", "data.crop_padding=0", "teacher.model=test_training:Tiny",
            "student.model=test_training:Tiny", "seeds=1", "teacher.widths=(0.5,1.0)", "teacher.duration=2 steps",
            "student.duration=2 steps", "teacher.batch_size=8", "student.batch_size=8", "arms=kd_whole")  # fmt: skip
    return ["--config=configs/digits.py", *(f"--config.{k}" for k in (*keys, *more))]


@pytest.mark.parametrize("more", [(), ("data.image_size=8", "data.resize=8", "data.mean=(0.5,0.5,0.5)",
                                       "data.std=(0.2,0.2,0.2)", "data.workers=0")])  # fmt: skip
def test_a_sorted_split_cut_in_two_is_refused(ordered, tmp_path, capsys, more):
    cut = ("data.train_split=train[:75%]", "data.test_split=train[75%:]")
    assert train.main([*line(ordered, *cut, *more), f"--workdir={tmp_path / 'w'}"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: data.test_split: class 'd' of the test images (10 of 10) has no training image in 'train[:75%]', as where a "
        "sorted split is cut in two; cut one by class: data.train_split='stratified(train, 80%)', "
        "data.test_split='stratified(train, 80%:)'"
    )
    assert not (tmp_path / "w").exists()


def test_what_is_offered_trains(ordered, tmp_path):
    cut = ("data.train_split=stratified(train, 80%)", "data.test_split=stratified(train, 80%:)")
    assert train.main([*line(ordered, *cut), f"--workdir={tmp_path / 'w'}"]) == 0
    facts = json.loads((tmp_path / "w" / "data.json").read_text())
    assert (facts["train_images"], facts["test_images"]) == (32, 8)


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(UserError) as e:
        soundness.check(*arguments, **keywords)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_streamed_records_are_looked_at(tmp_path, monkeypatch):
    labels = np.repeat([0, 1, 2, 3], 12)
    records = [(encode(photo(12, 12)), int(y)) for y in labels]
    root = _tfds(tmp_path, {"train": [records]}, classes=4, shape=(None, None, 3))
    monkeypatch.setattr(soundness, "_CHUNK", 5)
    d = data.load("toy", root, "train[:50%]", "train[50%:]", 0, PLAIN)
    assert refusal(d.train, d.test, 4, keys=("data.name", "data.test_split")).startswith(
        "data.test_split: classes 2, 3 of the test images (24 of 24) have no training image, as where"
    )
    d = data.load("toy", root, "train[:40]", "train[10:38]", 0, PLAIN)
    soundness.check(d.train, d.test, 4)


def test_arrays_are_looked_at(capsys):
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), np.uint8)
    labels = np.repeat([0, 1, 2], 10)
    with pytest.raises(UserError, match=r"^class 2 of the test images \(10 of 15\) has no training image, as where a sorted"):
        pwkd.task((images[:15], labels[:15]), test=(images[15:], labels[15:]), num_classes=3)
    with pytest.raises(UserError, match=r"^num_classes: there is a single class, which any network gets right"):
        pwkd.task((images, labels * 0))
    assert pwkd.task((images, labels), test=(images[20:], labels[20:])).num_classes == 3
    assert capsys.readouterr().err == ""
    pwkd.task((images // 16, labels))
    assert "no pixel of the training images is above 15 of 255" in capsys.readouterr().err
    assert soundness.check(data.Batches([(images, labels)]), data.Split(images, labels), 3) is None
