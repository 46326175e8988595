"""Folders of images as people leave them: read as another walk reads them, or refused in one sentence.

How to run all of it: see `fuzzing`.
"""

import contextlib
import itertools
import re
import tempfile
from pathlib import Path

import fuzz_images
import fuzz_trees
import fuzzing
import numpy as np
import pytest

from pwkd_jax import data
from pwkd_jax.data import soundness


def _load(root: Path, tree: dict):
    streaming = data.Streaming(tree["size"], resize=5, workers=0) if tree["size"] else None
    d = data.load("folder", str(root), tree["train"], tree["test"], streaming=streaming)
    soundness.check(d.train, d.test, d.num_classes, d.classes, ("data.data_dir", "data.test_split"), tree["train"])
    return d


def _batches(d) -> tuple[list[int], list[int]]:
    """(labels of the test images, those of a training batch) of streams, all decoded."""
    tested = []
    for batch in d.test.eval_batches(4):
        assert batch["image"].shape[1:] == d.image_shape
        tested += batch["label"][batch["mask"] > 0].tolist()
    step = data.batches(d.train, len(d.train), 0)
    batch = step(0)
    assert sorted(batch["index"].tolist()) == list(range(len(d.train)))
    return tested, batch["label"].tolist()


def _left_out(said: str, split: str) -> int:
    lines = [line for line in said.splitlines() if line.startswith(f"warning: split '{split}': ")]
    return sum(int(re.match(r"warning: split '.*?': (\d+) files", line)[1]) for line in lines if "left out" in line)


def _same_images(split, folders: dict[str, Path]) -> None:
    """The pixels of a split in RAM are Pillow's, class by class; 16-bit samples and colour models are of other tests."""
    for label, folder in enumerate(folders.values()):
        contents = [path.read_bytes() for path in fuzz_trees.images_below(folder)[0]]
        if not {*contents} <= {*fuzz_images.kinds()[0].values()}:
            continue
        wanted, found = [fuzz_images.pixels(c) for c in contents], list(split.images[split.labels == label])
        if len(wanted) == 1:  # of several, rounding may change the order
            assert np.abs(found[0].astype(int) - wanted[0]).max() <= 1
        assert len(found) == len(wanted) and abs(sum(map(np.mean, found)) - sum(map(np.mean, wanted))) <= len(found)


def folders_read(tree: dict, capsys) -> str:
    with tempfile.TemporaryDirectory() as home:
        root = Path(home) / "data set"
        root.mkdir()
        fuzz_trees.write(root, tree["entries"])
        capsys.readouterr()
        for split in ("train", tree["test"]):
            fuzzing.refused(lambda split=split: data.many_sizes("folder", str(root), split))
        found, text = fuzzing.refused(lambda: _load(root, tree))
        said = capsys.readouterr().err
        assert "Traceback" not in said
        labels = None
        if found and tree["size"]:
            labels, text = fuzzing.refused(lambda: _batches(found))
        flat = any(path.endswith("/") for path in tree["entries"])
        if text:
            must = _must_accept(root, tree)
            assert not must, f"refused, though nothing is wrong: {text}"
            return "refused"
        assert not (wrong := _must_refuse(root, tree, flat)), f"accepted, though {wrong}"
        _check(root, tree, found, labels, said)
        return "read"


def _check(root: Path, tree: dict, found, labels, said: str) -> None:
    for name, split, own in (("train", found.train, labels and labels[1]), (tree["test"], found.test, labels and labels[0])):
        if name in ("all", "test/cat", "") or (name == "train" and tree["train"] != "train"):
            continue
        if f"{name}/" in tree["entries"]:
            given, meant = sorted(found.classes[x] for x in split.labels), tree["entries"][f"{name}/"]
            assert meant is None or given == sorted(meant.values()), (given, meant)
            continue
        folders = fuzz_trees.classes_of(root / name)
        assert list(folders) == list(found.classes)
        wanted = fuzz_trees.counts(root / name)
        assert np.bincount(split.labels, minlength=len(folders)).tolist() == list(wanted.values())
        if own is not None:
            assert sorted(own) == sorted(split.labels.tolist())
        others = sum(fuzz_trees.images_below(folder)[1] for folder in folders.values())
        loose = [p for p in (root / name).iterdir() if not p.is_dir() and not fuzz_trees.litter(p.name)]
        assert _left_out(said, name) == others + len(loose)
        if not tree["size"]:
            _same_images(split, folders)


def _facts(root: Path, tree: dict):
    """[(classes' counts, contents)] of both splits, None where one is not SPLIT/CLASS/IMAGE."""
    found = []
    for name in ("train", tree["test"]):
        if name not in fuzz_trees.SPLITS or not (root / name).is_dir() or not (folders := fuzz_trees.classes_of(root / name)):
            return None
        paths = [p for folder in folders.values() for p in fuzz_trees.images_below(folder)[0]]
        contents = []
        for path in paths:
            with contextlib.suppress(OSError):
                contents.append(path.read_bytes())
        found.append((fuzz_trees.counts(root / name), contents, len(paths) - len(contents)))
    return found


def _must_accept(root: Path, tree: dict) -> bool:
    facts = _facts(root, tree)
    if tree["entries"].get("right list/"):
        return True
    if facts is None or any(path.endswith("/") for path in tree["entries"]) or tree["train"] == "train[:50%]":
        return False
    plain = {c for group in fuzz_images.kinds()[: 2 if tree["size"] else 1] for c in group.values()}
    return (
        facts[0][0].keys() == facts[1][0].keys() and len(facts[0][0]) > 1 and all(min(f[0].values()) > 0 for f in facts)
        and all(c in plain for f in facts for c in f[1]) and not any(f[2] for f in facts)
    )  # fmt: skip


def _must_refuse(root: Path, tree: dict, flat: bool) -> str:
    facts = _facts(root, tree)
    if flat:
        return "the list of classes is wrong" if tree["entries"].get("wrong list/") else ""
    if facts is None:
        return "a split is not there" if tree["test"] in ("nope", "", "test/cat") else ""
    (train, seen, gone), (test, tested, lost) = facts
    if train.keys() != test.keys():
        return "classes differ"
    if len(train) < 2:
        return "there is one class"
    if min(*train.values(), *test.values()) == 0:
        return "a class is empty"
    read = tested if tree["train"] != "train" else seen + tested
    if any(fuzz_images.pixels(c) is None for c in read) or lost or (gone and tree["train"] == "train"):
        return "an image cannot be read"
    shapes = {fuzz_images.pixels(c).shape for c in read}
    return "sizes differ" if len(shapes) > 1 and not tree["size"] else ""


@pytest.mark.parametrize("examples", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_folders_are_read_or_refused(examples, capsys):
    def folders(tree: dict) -> str:
        return folders_read(tree, capsys)

    tally = fuzzing.run(folders, fuzz_trees.trees(), examples, capsys, 30)
    assert min(tally["read"], tally["refused"]) > examples / 10


def test_every_kind_of_file_is_read_or_refused(tmp_path, capsys):
    """One among good ones, in RAM and streamed."""
    groups = zip(("good", "other", "deep", "broken"), fuzz_images.kinds(), strict=True)
    each = [f"{group} {kind}" for group, kinds in groups for kind in kinds]
    for kind, size in itertools.product(each, (0, 4)):
        entries = {f"{s}/{c}/1.png": "good png RGB" for s in ("train", "test") for c in ("cat", "dog")}
        with fuzzing.within(20):
            tree = {"entries": entries | {"train/dog/2.tif": kind}, "train": "train", "test": "test", "size": size}
            folders_read(tree, capsys)
