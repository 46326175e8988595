"""Data on a bucket: what a run needs of them is copied onto a disk once, checked, and continued where it was stopped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_data
from array_record.python import array_record_module
from PIL import Image
from test_commands import TINY

from pwkd_jax import data, evaluate, prepare, storage, train
from pwkd_jax.data import copies
from pwkd_jax.errors import UserError

SPECS = {"data.train_split": "train", "data.test_split": "test"}


@pytest.fixture
def photos(bucket, tmp_path):
    """(a folder of images, the same on a bucket with a split more)."""
    place = storage.path(f"gs://bucket/{tmp_path.name}/photos")
    rng = np.random.default_rng(0)
    for split in ("train", "test", "more"):
        for name in ("ant", "bee"):
            for i in range(8):
                file = tmp_path / "photos" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(file)
                storage.replace(place / split / name / f"{i}.png", file.read_bytes())
    storage.replace(place / "about.txt", "by hand")
    return tmp_path / "photos", place


def gets(ask) -> list[str]:
    return [name for name in ask("counts") if name.startswith("GET") and name.endswith(".png")]


def test_images_are_copied_once_and_again_where_they_changed(photos, bucket, tmp_path, capsys):
    folder, place = photos
    found = data.copied("folder", str(place), str(tmp_path / "ssd"), SPECS)
    assert found == str(tmp_path / "ssd" / "bucket" / tmp_path.name / "photos")
    assert f"copying 33 files, 0.00 GB, from {place} to {found}\n" in capsys.readouterr().err
    assert sorted(p.name for p in Path(found).iterdir() if p.name[0] != ".") == ["about.txt", "test", "train"]
    own, copy = (data.load("folder", str(where)) for where in (folder, found))
    for split in ("train", "test"):
        assert np.array_equal(getattr(own, split).images, getattr(copy, split).images)
    bucket("forget")
    assert data.copied("folder", str(place), str(tmp_path / "ssd"), SPECS) == found
    assert not gets(bucket) and capsys.readouterr().err == ""
    storage.replace(place / "train" / "ant" / "3.png", (folder / "train" / "bee" / "3.png").read_bytes())
    data.copied("folder", str(place), str(tmp_path / "ssd"), SPECS)
    assert gets(bucket) == [f"GET {tmp_path.name}/photos/train/ant/3.png"]
    assert (Path(found) / "train/ant/3.png").read_bytes() == (folder / "train/bee/3.png").read_bytes()


def test_a_run_of_data_on_a_bucket_is_that_of_the_same_on_a_disk(photos, bucket, tmp_path, capsys):
    """Also where the workdir goes on with data that moved there; an evaluation brings its own split."""
    folder, place = photos
    options = [TINY[0], *(o for o in TINY[1:] if "_split" not in o), "--config.data.name=folder", "--config.arms=alone",
               "--config.student.duration=8 steps", f"--workdir={tmp_path / 'w'}"]  # fmt: skip
    there = [f"--config.data.data_dir={place}", f"--config.data.copy={tmp_path / 'ssd'}"]
    assert train.main([*options, f"--config.data.data_dir={folder}"]) == 0
    assert train.main([*options, *there, "--config.seeds=2"]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "ssd")
    assert evaluate.main([str(tmp_path / "w/students/alone/seed1"), f"--copy={tmp_path / 'again'}"]) == 0
    error = capsys.readouterr().err
    assert f"copying 17 files, 0.00 GB, from {place} to {tmp_path / 'again'}" in error and "warning" not in error


def test_a_copy_goes_on_where_it_was_stopped(bucket, tmp_path, monkeypatch):
    """Half a file, a whole one that nobody wrote down, and a damaged one."""
    monkeypatch.setattr(copies, "_CHUNK", 1000)
    place, target = storage.path(f"gs://bucket/{tmp_path.name}/d"), tmp_path / "ssd" / "bucket" / tmp_path.name / "d"
    content = {name: np.random.default_rng(i).bytes(4500) for i, name in enumerate(("half", "whole", "bad"))}
    for name, value in content.items():
        storage.replace(place / "train" / name, value)
    storage.replace(target / "train" / "half.part", content["half"][:2300])
    storage.replace(target / "train" / "whole", content["whole"])
    storage.replace(target / "train" / "bad.part", content["half"][:2300])
    bucket("forget")
    data.copied("folder", str(place), str(tmp_path / "ssd"), SPECS)
    asked = bucket("counts")
    assert {name: (target / "train" / name).read_bytes() for name in content} == content
    reads = [asked.get(f"GET {tmp_path.name}/d/train/{name}", 0) for name in ("half", "whole", "bad")]
    assert reads == [3, 0, 3 + 5]
    assert set(json.loads((target / ".copied.json").read_text())) == {f"train/{name}" for name in content}
    assert not list(target.rglob("*.part"))


def test_of_a_tfds_set_the_newest_version_and_the_splits_asked_for(bucket, tmp_path):
    place = storage.path(f"gs://bucket/{tmp_path.name}")
    files = [f"1.9.0/{n}" for n in ("dataset_info.json",)]
    files += [f"1.10.0/{n}" for n in ("dataset_info.json", "features.json", "label.labels.txt")]
    files += [f"1.10.0/mine-{split}.array_record-0000{i}-of-00002" for split in ("train", "test", "extra") for i in (0, 1)]
    for file in files:
        storage.replace(place / "mine" / file, file)
    for name, version, count in (("mine", "1.10.0", 7), ("mine:1.9.0", "1.9.0", 1)):
        found = Path(data.copied(name, str(place), str(tmp_path / version), SPECS))
        there = sorted(p.relative_to(found).as_posix() for p in found.rglob("*") if p.is_file() and p.name[0] != ".")
        assert there == sorted(f"mine/{f}" for f in files if f.startswith(version) and "extra" not in f) and len(there) == count
    with pytest.raises(UserError, match=r"holds no prepared data set 'yours' \(it holds mine\)"):
        data.copied("yours", str(place), str(tmp_path), SPECS)


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["cifar100", "--data-dir=gs://bucket/x"], "'gs://bucket/x' is a bucket; give a folder of this machine too"),
        (["tfrecord", "x", "--out=gs://bucket/x"], "'gs://bucket/x' is a bucket; give a folder of this machine too"),
        (["cifar100", "--data-dir=gs://bucket/x", "--disk=gs://bucket/y"], "is a bucket; give a folder of this machine too"),
        (["cifar100", "--data-dir=x", "--disk=y"], "is for a bucket, and --data-dir is none"),
        (["cifar100", "--data-dir=s3://bucket/x"], "'s3://bucket/x' is an address that is not known here"),
    ],
)
def test_data_sets_are_made_on_a_disk(line, sentence, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(line) == 2
    assert sentence in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_data_set_is_sent_to_a_bucket_and_what_lacks_is_sent_again(bucket, tmp_path, capsys):
    disk, place = tmp_path / "disk", f"gs://bucket/{tmp_path.name}/sets"
    train, test = (test_data._records(test_data._images(n, seed=seed)) for n, seed in ((20, 0), (6, 1)))
    test_data._tfds(disk, {"train": [train[:5], train[5:]], "test": [test]}, name="cifar10", version="3.0.2")
    line = ["cifar10", f"--data-dir={place}", f"--disk={disk}"]

    def sent() -> set[str]:
        bucket("forget")
        assert prepare.main(line) == 0
        return {name.rpartition("/")[2] for name in bucket("counts") if name.startswith("POST")}

    files = {p.name for p in (disk / "cifar10/3.0.2").iterdir()}
    assert sent() == files and len(files) == 5
    assert f"--config.data.name=cifar10 --config.data.data_dir={place}" in capsys.readouterr().out
    assert sent() == set()
    folder = storage.path(f"{place}/cifar10/3.0.2")
    storage.remove(folder / "dataset_info.json")  # as of a command that was stopped before its end
    storage.replace(folder / "cifar10-train.array_record-00000-of-00002", b"something else")
    assert sent() == {"dataset_info.json", "cifar10-train.array_record-00000-of-00002"}
    there = data.load("cifar10", data.copied("cifar10", place, str(tmp_path / "ssd"), SPECS))
    here = data.load("cifar10", str(disk))
    assert np.array_equal(there.train.images, here.train.images) and np.array_equal(there.test.labels, here.test.labels)


def test_records_are_read_where_they_lie(bucket, tmp_path, monkeypatch, capsys):
    """All but the reader itself, which speaks to Google's servers alone: here it opens what the emulator holds."""
    train, test = (test_data._records(test_data._images(n, seed=seed)) for n, seed in ((40, 0), (12, 1)))
    test_data._tfds(tmp_path, {"train": [train[:15], train[15:]], "test": [test]})
    place = storage.path(f"gs://bucket/{tmp_path.name}/tfds")
    for file in (p for p in tmp_path.rglob("*") if p.is_file()):
        storage.replace(place / file.relative_to(tmp_path).as_posix(), file.read_bytes())
    real, opened = array_record_module.ArrayRecordReader, []

    def reader(name, **options):
        opened.append(str(name))
        file = tmp_path / f"fetched{len(opened)}"
        file.write_bytes(storage.read_bytes(storage.path(str(name))))
        return real(str(file), **options)

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", reader)
    monkeypatch.setattr(copies, "_not_in_place", lambda name: "")
    for spec in ("train[5:30]", "stratified(train, 50%)"):
        found, local = (data.load("toy", str(where), spec) for where in (place, tmp_path))
        for a, b in ((found.train, local.train), (found.test, local.test)):
            assert np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
    assert len({name for name in opened if name.startswith("gs://bucket/")}) == 3
    assert any(n.startswith(".labels-") for n in storage.names(place / "toy/1.0.0"))
    storage.remove(place / "toy/1.0.0/toy-test.array_record-00000-of-00001")
    with pytest.raises(UserError, match=r"file gs://bucket/.*toy-test.array_record-00000-of-00001 is missing"):
        data.load("toy", str(place), streaming=data.Streaming(4, resize=4))


def test_what_cannot_be_copied_is_said_in_a_sentence(photos, bucket, tmp_path, monkeypatch, capsys):
    _, place = photos
    for name, reason in (("folder", "images of a folder are not"), ("toy", "array_record reads Google's own servers only")):
        with pytest.raises(UserError, match=rf"data\.data_dir: .* is not a folder of .*, and {reason}.*; give data\.copy=DIR"):
            data.load(name, str(place))
    with monkeypatch.context() as m:
        m.delenv("STORAGE_EMULATOR_HOST")
        m.setattr(copies.importlib.metadata, "version", lambda name: "0.8.1")
        with pytest.raises(UserError, match=r"array_record 0\.8\.1 does not read buckets, as 0\.8\.6 does"):
            data.load("toy", str(place))
    (tmp_path / "file").write_text("")
    for name, where, sentence in (("folder", "gs://bucket/x", r"data\.copy: 'gs://bucket/x' is not a folder of this machine"),
                                  ("folder", tmp_path / "file", r"data\.copy: '.*' cannot be written")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            data.copied(name, str(place), str(where), SPECS)
    with pytest.raises(UserError, match=r"there is nothing at 'gs://bucket/void'"):
        data.copied("folder", "gs://bucket/void", str(tmp_path), SPECS)
    usage = copies.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(copies.shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(UserError, match=r"has 0\.0 GB free, and 0\.0 GB are to be copied there; give another folder"):
            data.copied("folder", str(place), str(tmp_path / "full"), SPECS)
    listed = storage.listed
    with monkeypatch.context() as m:
        m.setattr(storage, "listed", lambda p: {n: e._replace(crc32c="AAAAAA==") for n, e in listed(p).items()})
        with pytest.raises(UserError, match=r"comes with another checksum than the bucket gives for it"):
            data.copied("folder", str(place), str(tmp_path / "bad"), SPECS)
    capsys.readouterr()
    bucket("refuse?code=403")
    try:
        options = ["--config.data.name=folder", f"--config.data.data_dir={place}", f"--config.data.copy={tmp_path}"]
        assert train.main([TINY[0], *(o for o in TINY[1:] if "_split" not in o), *options, f"--workdir={tmp_path / 'w'}"]) == 2
    finally:
        bucket("refuse?code=0")
    error = capsys.readouterr().err
    assert error == f"error: {place}: cannot be read or written (access is forbidden: not yours)\n"
    assert not (tmp_path / "w").exists()
