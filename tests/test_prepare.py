"""python -m pwkd_jax.prepare: archives and TFRecord directories, made here by hand, against TFDS, Pillow and our own reader."""

import hashlib
import http.server
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from pwkd_jax import data, prepare
from pwkd_jax.data import cifar, download, tfds_writer
from pwkd_jax.errors import UserError

REPO = Path(__file__).parents[1]
SYNSETS = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()


def _run(*arguments, workers=1) -> int:
    return prepare.main([*map(str, arguments), f"--workers={workers}"])


def _refusal(capsys, *arguments) -> str:
    """The one sentence with which the command ends, after what it says of an earlier run."""
    capsys.readouterr()
    assert _run(*arguments) == 2
    captured = capsys.readouterr()
    *before, text = captured.err.splitlines()
    assert captured.out == "" and text.startswith("error: ") and all("were written before" in line for line in before)
    assert not text.endswith(".")
    return text


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _raw(folder: Path, split: str) -> list[bytes]:
    source = tfds.builder_from_directory(folder).as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    return list(source.__getitems__(range(len(source))))


def _values(record: bytes) -> dict:
    features = tf_example_pb2.Example.FromString(record).features.feature
    return {k: (f.bytes_list.value or f.int64_list.value)[0] for k, f in features.items()}


def _tar(members: dict[str, bytes], mode="w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _encoded(shape, mode="RGB", kind="jpeg", seed=0) -> bytes:
    channels = {"RGB": (3,), "CMYK": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, *channels), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels, mode).save(buffer, kind)
    return buffer.getvalue()


# CIFAR.


def _cifar(path: Path, name: str, train=20, test=10):
    """A small archive in the authors' layout; {split: (images [N, 32, 32, 3], labels [N, label bytes])}."""
    rng = np.random.default_rng(0)
    layout = cifar.LAYOUTS[name]
    counts = [classes for _, classes in layout.labels.values()]
    members, truth = {}, {}
    folder = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    for split, n in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        labels = np.stack([rng.integers(0, c, n) for c in counts], 1).astype(np.uint8)
        rows = np.concatenate([labels, images.reshape(n, -1)], 1)
        for file, part in zip(layout.splits[split], np.array_split(rows, len(layout.splits[split])), strict=True):
            members[f"{folder}/{file}"] = part.tobytes()
        truth[split] = images.transpose(0, 2, 3, 1), labels.astype(int)
    for key, (file, classes) in layout.labels.items():
        members[f"{folder}/{file}"] = "".join(f"{key} {i}\n" for i in range(classes)).encode() + b"\n"
    path.write_bytes(_tar(members, "w:gz"))
    return truth


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archives_become_tfds_directories(tmp_path, name, capsys):
    truth = _cifar(tmp_path / "small.tar.gz", name)
    assert _run(name, "--data-dir", tmp_path / "tfds", "--archive", tmp_path / "small.tar.gz", "--no-checksum") == 0
    out = capsys.readouterr().out
    classes = {"cifar10": 10, "cifar100": 100}[name]
    assert "train: 20 images" in out and "test: 10 images" in out and f"{classes} classes" in out
    assert f"--config.data.name={name} --config.data.data_dir={tmp_path / 'tfds'}" in out
    folder = tmp_path / "tfds" / name / "3.0.2"
    builder = tfds.builder_from_directory(folder)
    assert builder.info.features["label"].names == [f"label {i}" for i in range(classes)]
    loaded = data.load(name, str(tmp_path / "tfds"))
    for split, ours in (("train", loaded.train), ("test", loaded.test)):
        images, labels = truth[split]
        np.testing.assert_array_equal(ours.images, images)
        np.testing.assert_array_equal(ours.labels, labels[:, -1])
        examples = list(builder.as_data_source(split))
        assert [e["id"] for e in examples] == [f"{split}_{i:05d}".encode() for i in range(len(images))]
        np.testing.assert_array_equal([e["image"] for e in examples], images)
        if name == "cifar100":
            assert [e["coarse_label"] for e in examples] == labels[:, 0].tolist()
            assert builder.info.features["coarse_label"].names[19] == "coarse_label 19"
    assert all(_values(r)["image"].startswith(b"\x89PNG") for r in _raw(folder, "train"))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["3.0.2"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet2012"])
def test_features_and_version_are_those_of_tfds(tmp_path, name, monkeypatch):
    # TFDS's builder would look for its metadata on the network.
    monkeypatch.setattr(tfds.core.DatasetInfo, "initialize_from_bucket", lambda self: None)
    builder = tfds.builder_cls(name)(data_dir=tmp_path)
    if name == "imagenet2012":
        from pwkd_jax.data import imagenet

        ours, version = imagenet._features(), imagenet.VERSION
        assert ours["label"].names == builder.info.features["label"].names
    else:
        names = {key: [str(i) for i in range(n)] for key, (_, n) in cifar.LAYOUTS[name].labels.items()}
        ours, version = cifar._features(name, names), cifar.VERSION
    assert ours.to_json() == builder.info.features.to_json() and version == str(builder.version)


def test_cifar_archives_that_are_not_as_they_should_be(tmp_path, capsys):
    archive, out = tmp_path / "a.tar.gz", tmp_path / "tfds"
    _cifar(archive, "cifar100")
    command = ("cifar100", "--data-dir", out, "--archive", archive)
    assert "md5" in _refusal(capsys, *command) and "--no-checksum" in _refusal(capsys, *command)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert f"{archive}: is cut off" in _refusal(capsys, *command, "--no-checksum")
    archive.write_bytes(b"no archive at all")
    assert "no archive" in _refusal(capsys, *command, "--no-checksum")
    _cifar(archive, "cifar10")
    assert "lacks" in _refusal(capsys, *command, "--no-checksum")
    rows = np.full((2, 3074), 100, np.uint8)  # of classes that do not exist
    names = {f: "".join(f"{i}\n" for i in range(n)).encode() for f, n in cifar.LAYOUTS["cifar100"].labels.values()}
    archive.write_bytes(_tar({"train.bin": rows.tobytes(), "test.bin": rows.tobytes(), **names}, "w:gz"))
    assert "coarse_label 100" in _refusal(capsys, *command, "--no-checksum")
    archive.write_bytes(_tar({"train.bin": b"123", "test.bin": rows.tobytes(), **names}, "w:gz"))
    assert "no multiple of 3074" in _refusal(capsys, *command, "--no-checksum")
    archive.unlink()
    assert "cannot be read" in _refusal(capsys, *command, "--no-checksum")
    assert not out.exists(), "nothing is written"


def test_without_a_network_cifar_is_refused_in_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    text = _refusal(capsys, "cifar10", "--data-dir", tmp_path)
    assert "cifar-10-binary.tar.gz" in text and "cannot be downloaded" in text and "--archive" in text
    assert not (tmp_path / "cifar10").exists()


def test_directories_that_cannot_be_written(tmp_path, capsys):
    _cifar(tmp_path / "a.tar.gz", "cifar10")
    (tmp_path / "file").write_text("")
    command = ("cifar10", "--archive", tmp_path / "a.tar.gz", "--no-checksum", "--data-dir")
    assert "cannot be written (Not a directory)" in _refusal(capsys, *command, tmp_path / "file")
    taken = tmp_path / "tfds" / "cifar10" / "3.0.2"
    taken.mkdir(parents=True)
    assert f"{taken}: exists but is no TFDS data set" in _refusal(capsys, *command, tmp_path / "tfds")
    (taken / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    assert "stored as tfrecord" in _refusal(capsys, *command, tmp_path / "tfds")


# Downloads.


@pytest.fixture
def server():
    """(its address, the bytes it serves, what it was asked for); it breaks off after `limit` bytes of an answer."""
    content = random.Random(0).randbytes(3_000_000)
    asked, limit = [], [len(content)]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: limit[0]])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}/a.bin", content, asked, limit
        s.shutdown()


def test_a_download_goes_on_where_it_broke_off(tmp_path, server):
    url, content, asked, limit = server
    path, md5 = tmp_path / "new" / "a.bin", hashlib.md5(content).hexdigest()
    limit[0] = 1_200_000
    with pytest.raises(UserError, match="cannot be downloaded"):
        download.fetch(url, path, "md5", md5)
    assert not path.exists()
    limit[0] = len(content)
    download.fetch(url, path, "md5", md5)
    assert asked == [None, "bytes=1200000-"] and path.read_bytes() == content
    # Killed between the last byte and the renaming.
    path.rename(path.with_name("a.bin.part"))
    download.fetch(url, path, "md5", md5)
    assert path.read_bytes() == content and [p.name for p in path.parent.iterdir()] == ["a.bin"]
    # What arrives wrong is not kept.
    with pytest.raises(UserError, match="should have"):
        download.fetch(url, tmp_path / "b.bin", "md5", "0" * 32)
    assert not list(tmp_path.glob("b.bin*"))


# ImageNet.


@pytest.fixture(scope="module")
def ilsvrc(tmp_path_factory):
    """(train tar, validation tar, labels file, {file name: (bytes, synset)} of train, the same of validation)."""
    folder = tmp_path_factory.mktemp("ilsvrc")
    train, outer = {}, {}
    for c, synset in enumerate(SYNSETS[5:8]):
        inner = {}
        for i in range(6):
            mode = ("L", "CMYK", "RGB")[i] if i < 3 else "RGB"
            kind = "png" if (c, i) == (1, 3) else "jpeg"
            inner[f"{synset}_{i}.JPEG"] = _encoded((11 + 3 * i, 17 + 2 * c), mode, kind, seed=10 * c + i)
        outer[f"{synset}.tar"] = _tar(inner)
        train |= {name: (content, synset) for name, content in inner.items()}
    (folder / "train.tar").write_bytes(_tar(outer))
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 8)]
    content = {name: _encoded((12, 15), seed=100 + i) for i, name in enumerate(names)}
    labels = [SYNSETS[(5, 7, 6)[i % 3]] for i in range(7)]
    # The official tar is not in the order of names either.
    (folder / "val.tar").write_bytes(_tar({name: content[name] for name in reversed(names)}))
    (folder / "labels.txt").write_text("\n".join(labels) + "\n")
    validation = {name: (content[name], label) for name, label in zip(names, labels, strict=True)}
    return folder / "train.tar", folder / "val.tar", folder / "labels.txt", train, validation


def _imagenet(ilsvrc, data_dir, **changes):
    train, validation, labels = (changes.get(k, p) for k, p in zip(("train", "validation", "labels"), ilsvrc, strict=False))
    command = ["imagenet2012", "--data-dir", data_dir, "--train", train, "--validation", validation, "--no-checksum"]
    return [*command, "--labels", labels] if labels else command


@pytest.fixture(scope="module")
def prepared(ilsvrc, tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    assert _run(*_imagenet(ilsvrc, root)) == 0
    return root / "imagenet2012" / "5.1.0"


def test_imagenet_keeps_bytes_labels_and_names(ilsvrc, prepared):
    builder = tfds.builder_from_directory(prepared)
    assert builder.info.full_name == "imagenet2012/5.1.0" and builder.info.features["label"].names == SYNSETS
    for split, truth in (("train", ilsvrc[3]), ("validation", ilsvrc[4])):
        found = {}
        for record in _raw(prepared, split):
            values = _values(record)
            found[values["file_name"].decode()] = values["image"], SYNSETS[values["label"]]
        assert found == truth
        for example in builder.as_data_source(split):
            content = truth[example["file_name"].decode()][0]
            image = PIL.Image.open(io.BytesIO(content))
            # Decoders round differently where CMYK becomes RGB.
            tolerance = 2 if image.mode == "CMYK" else 0
            ours, theirs = example["image"].astype(int), np.asarray(image.convert("RGB")).astype(int)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    # Slices hold every class.
    assert len({e["label"] for e in builder.as_data_source("train[:50%]")}) == 3
    ours, classes = data.load_split("imagenet2012", str(prepared.parents[1]), "validation")
    assert classes == 1000 and ours.images.shape == (7, 12, 15, 3)
    by_name = sorted(zip([_values(r)["file_name"] for r in _raw(prepared, "validation")], ours.labels.tolist(), strict=True))
    assert [SYNSETS[label] for _, label in by_name] == ilsvrc[2].read_text().split()


def test_the_validation_labels_of_tfds_serve_where_their_number_fits(ilsvrc, tmp_path, capsys, monkeypatch):
    from pwkd_jax.data import imagenet

    assert "holds 7 images, but TFDS's list of the official ones has 50000" in _refusal(
        capsys, *_imagenet(ilsvrc, tmp_path, labels=None)
    )
    official = imagenet._packaged
    few = official(imagenet._VALIDATION)[:7]
    monkeypatch.setattr(imagenet, "_packaged", lambda path: few if path == imagenet._VALIDATION else official(path))
    assert _run(*_imagenet(ilsvrc, tmp_path, labels=None)) == 0
    folder = tmp_path / "imagenet2012" / "5.1.0"
    values = sorted((v["file_name"], v["label"]) for v in map(_values, _raw(folder, "validation")))
    assert [SYNSETS[label] for _, label in values] == few


def test_tars_that_are_not_as_they_should_be(ilsvrc, tmp_path, capsys):
    train, validation = ilsvrc[0].read_bytes(), ilsvrc[1].read_bytes()
    bad = tmp_path / "bad.tar"

    def refusal(content, **changes):
        bad.write_bytes(content)
        return _refusal(capsys, *_imagenet(ilsvrc, tmp_path / "tfds", **changes))

    with tarfile.open(ilsvrc[0]) as tar:
        inner = tar.getmembers()
    for end in (700, inner[1].offset, inner[1].offset_data + 600, inner[2].offset_data + inner[2].size):
        assert f"{bad}: is cut off" in refusal(train[:end], train=bad), end
    damaged = bytearray(train)
    damaged[inner[1].offset + 150] ^= 0xFF  # the header's checksum
    assert f"{bad}: is cut off" in refusal(damaged, train=bad)
    with tarfile.open(ilsvrc[1]) as tar:
        members = tar.getmembers()
    for end in (members[3].offset, members[3].offset_data + 5):
        assert f"{bad}: is cut off" in refusal(validation[:end], validation=bad)
    assert "no tar" in refusal(b"not a tar" * 200, validation=bad)
    one = _tar({"a.JPEG": b"x"})
    assert "n00000000.tar, which is none of ImageNet's" in refusal(_tar({"n00000000.tar": one}), train=bad)
    assert "a.JPEG occurs twice" in refusal(_tar({f"{s}.tar": one for s in SYNSETS[:2]}), train=bad)
    assert "a.JPEG is empty" in refusal(_tar({f"{SYNSETS[0]}.tar": _tar({"a.JPEG": b""})}), train=bad)
    assert "holds no images" in refusal(_tar({f"{SYNSETS[0]}.tar": _tar({})}), train=bad)
    assert "n00000000 in" in refusal(b"\n".join([b"n00000000"] * 7), labels=bad)
    assert "holds 7 images, but" in refusal(b"\n".join([SYNSETS[0].encode()] * 6), labels=bad)
    assert "is no file" in _refusal(capsys, *_imagenet(ilsvrc, tmp_path / "tfds", train=tmp_path / "absent"))
    official = [a for a in _imagenet(ilsvrc, tmp_path / "tfds") if a != "--no-checksum"]
    assert "ILSVRC2012_img_train.tar has 147897477120" in _refusal(capsys, *official)
    assert not (tmp_path / "tfds").exists(), "nothing is written"


def test_official_tars_are_checked_once(ilsvrc, tmp_path, capsys, monkeypatch):
    from pwkd_jax.data import imagenet

    official, sums = imagenet._packaged, [hashlib.sha256(p.read_bytes()).hexdigest() for p in ilsvrc[:2]]
    lines = [
        f"http://x/ILSVRC2012_img_{which}.tar {p.stat().st_size} {s}"
        for which, p, s in zip(("train", "val"), ilsvrc[:2], sums, strict=True)
    ]
    table = [lines]
    monkeypatch.setattr(imagenet, "_packaged", lambda path: table[0] if path == imagenet._CHECKSUMS else official(path))
    command = [a for a in _imagenet(ilsvrc, tmp_path) if a != "--no-checksum"]
    table[0] = [lines[0], lines[1].replace(sums[1], "0" * 64)]
    assert f"{ilsvrc[1]}: its sha256 is {sums[1]}" in _refusal(capsys, *command)
    table[0] = lines
    calls = []
    checksum = download.checksum
    monkeypatch.setattr(download, "checksum", lambda path, kind: (calls.append(path), checksum(path, kind))[1])
    assert _run(*command) == 0
    assert calls == [ilsvrc[1]], "the training tar was found right in the first run"


# TFRecord. Framing and checksum are written out here, from their definitions.


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = _crc32c(data)
    return struct.pack("<I", ((crc >> 15) + (crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def _framed(record: bytes) -> bytes:
    head = struct.pack("<Q", len(record))
    return head + _masked(head) + record + _masked(record)


def test_the_checksum_of_these_tests_is_crc32c():
    assert _crc32c(b"123456789") == 0xE3069283  # the check value of its standard


def _feature(value):
    if isinstance(value, int):
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))


@pytest.fixture
def tfrecord(tmp_path, prepared):
    """(an imagenet2012 as TFDS writes it, {file: its records}): three training shards and one of validation."""
    folder = tmp_path / "tfds" / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    for name in ("features.json", "label.labels.txt"):
        (folder / name).write_bytes((prepared / name).read_bytes())
    lengths, records = {"train": [3, 2, 3], "validation": [2]}, {}
    for split, of in lengths.items():
        for i, n in enumerate(of):
            shard = []
            for j in range(n):
                values = {"image": _encoded((5, 6), seed=i * 10 + j), "label": i + j, "file_name": f"{split}{i}{j}".encode()}
                feature = {k: _feature(v) for k, v in values.items()}
                shard.append(tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature)).SerializeToString())
            records[f"imagenet2012-{split}.tfrecord-{i:05d}-of-{len(of):05d}"] = shard
    for name, shard in records.items():
        (folder / name).write_bytes(b"".join(map(_framed, shard)))
    info = json.loads((prepared / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord", "downloadSize": "7"}
    about = {"numBytes": "9", "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    info["splits"] = [{"name": s, "shardLengths": list(map(str, of)), **about} for s, of in lengths.items()]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder, records


def test_tfrecord_becomes_array_record_with_the_same_bytes(tfrecord, tmp_path, capsys):
    folder, records = tfrecord
    before = _files(folder)
    assert _run("tfrecord", folder) == 0
    new = tmp_path / "tfds-array_record" / "imagenet2012" / "5.1.0"
    assert _files(folder) == before, "the source is only read"
    assert sorted(p.name for p in new.iterdir()) == sorted(
        [n.replace(".tfrecord-", ".array_record-") for n in records]
        + ["dataset_info.json", "features.json", "label.labels.txt"]
    )
    for split in ("train", "validation"):
        assert _raw(new, split) == [r for name, shard in records.items() if f"-{split}." in name for r in shard]
    info = json.loads((new / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record" and info["downloadSize"] == "7"
    assert (new / "features.json").read_bytes() == before["features.json"]
    out = capsys.readouterr().out
    assert f"--config.data.data_dir={tmp_path / 'tfds-array_record'} --config.data.test_split=validation" in out
    loaded = data.load("imagenet2012", str(tmp_path / "tfds-array_record"), test_split="validation")
    assert loaded.train.images.shape == (8, 5, 6, 3) and loaded.test.labels.tolist() == [0, 1]
    # Again, and in two processes.
    stamp = (new / "dataset_info.json").stat().st_mtime_ns
    assert _run("tfrecord", folder) == 0 and (new / "dataset_info.json").stat().st_mtime_ns == stamp
    assert "is there already" in capsys.readouterr().err
    assert _run("tfrecord", folder, "--out", tmp_path / "other", workers=2) == 0
    assert _files(tmp_path / "other" / "imagenet2012" / "5.1.0") == _files(new)


def test_tfrecords_that_are_not_as_they_should_be(tfrecord, tmp_path, capsys):
    folder, records = tfrecord
    path = folder / "imagenet2012-train.tfrecord-00001-of-00003"
    whole, first = path.read_bytes(), len(_framed(records[path.name][0]))
    new = tmp_path / "tfds-array_record" / "imagenet2012" / "5.1.0"

    def refusal(content):
        path.write_bytes(content)
        text = _refusal(capsys, "tfrecord", folder)
        assert f"{path}: " in text and not new.exists()
        assert not list(new.parent.glob("*/files/.*")), "nothing half-written"
        return text

    for position in (first + 3, first + 9, first + 40, len(whole) - 1):  # length, its checksum, bytes, their checksum
        damaged = bytearray(whole)
        damaged[position] ^= 1
        assert "record 1 has a wrong checksum" in refusal(damaged)
    for end in (first + 5, first + 30, len(whole) - 2):
        assert "record 1 is cut off" in refusal(whole[:end])
    assert "holds 1 records, but dataset_info.json says 2" in refusal(whole[:first])
    path.unlink()
    assert f"{path}: is missing" in _refusal(capsys, "tfrecord", folder)
    assert "give one of" in _refusal(capsys, "tfrecord", folder.parent)
    assert "no dataset_info.json" in _refusal(capsys, "tfrecord", tmp_path / "absent")
    path.write_bytes(whole)  # mended: what was written of the other files is not written again
    assert "holds the source itself" in _refusal(capsys, "tfrecord", folder, "--out", tmp_path / "tfds")
    capsys.readouterr()
    assert _run("tfrecord", folder) == 0
    assert "1 of 4 files were written before" in capsys.readouterr().err
    assert _raw(new, "train") == [r for name, shard in records.items() if "-train." in name for r in shard]
    assert "used as it is" in _refusal(capsys, "tfrecord", new, "--out", tmp_path / "again")


# Stopped, and run again.

# Runs the command in a process that kills itself without notice while it writes the shard number `at`.
_KILLED = """
import os, signal, sys
from pwkd_jax import prepare
from pwkd_jax.data import tfds_writer
from array_record.python import array_record_module as module

opened, Writer = [0], module.ArrayRecordWriter
class Killed:
    def __init__(self, *arguments):
        opened[0] += 1
        self.writer = Writer(*arguments)
    def write(self, record):
        self.writer.write(record)
        if opened[0] == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    def close(self):
        self.writer.close()
module.ArrayRecordWriter = Killed
sys.exit(prepare.main(sys.argv[2:]))
"""


def test_killed_and_run_again_it_finishes_with_the_same_bytes(tfrecord, tmp_path, capsys):
    folder, _ = tfrecord
    command = ["tfrecord", str(folder), "--out", str(tmp_path / "out"), "--workers=1"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, "3", *command], cwd=REPO, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    home = tmp_path / "out" / "imagenet2012"
    files = home / "incomplete.5.1.0" / "files"
    assert [p.name for p in home.iterdir()] == ["incomplete.5.1.0"], "nothing under its name yet"
    finished = {p: p.stat().st_mtime_ns for p in files.iterdir() if not p.name.startswith(".")}
    assert len(finished) == 2 and len(list(files.glob(".*"))) == 1
    with pytest.raises(UserError, match="holds no prepared data set"):
        data.load("imagenet2012", str(tmp_path / "out"))
    assert prepare.main(command) == 0
    assert "2 of 4 files were written before" in capsys.readouterr().err
    new = home / "5.1.0"
    assert {new / p.name: (new / p.name).stat().st_mtime_ns for p in finished} == {new / p.name: t for p, t in finished.items()}
    assert [p.name for p in home.iterdir()] == ["5.1.0"]
    assert prepare.main([*command[:3], str(tmp_path / "once")]) == 0
    assert _files(new) == _files(tmp_path / "once" / "imagenet2012" / "5.1.0")


def test_shards_of_other_images_are_not_taken_for_ones_own(ilsvrc, tmp_path, monkeypatch, capsys):
    describe = tfds_writer.describe

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(tfds_writer, "describe", stop)
        assert _run(*_imagenet(ilsvrc, tmp_path)) == 130
    assert "goes on from here" in capsys.readouterr().err
    other = tmp_path / "labels.txt"
    other.write_text("\n".join([SYNSETS[900]] * 7))
    assert tfds_writer.describe is describe and _run(*_imagenet(ilsvrc, tmp_path, labels=other)) == 0
    # The training images are the same, and stay.
    err = capsys.readouterr().err
    assert "1 files were made from other images or labels" in err and "1 of 2 files were written before" in err
    assert {_values(r)["label"] for r in _raw(tmp_path / "imagenet2012" / "5.1.0", "validation")} == {900}


def test_two_runs_at_once_and_a_disk_too_small(tfrecord, tmp_path, capsys, monkeypatch):
    folder, _ = tfrecord
    incomplete = tmp_path / "tfds-array_record" / "imagenet2012" / "incomplete.5.1.0"
    with tfds_writer.sole(incomplete):
        assert "another run is writing it now" in _refusal(capsys, "tfrecord", folder)
    usage = tfds_writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tfds_writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "0.0 GB free" in _refusal(capsys, "tfrecord", folder)


def test_a_disk_that_fills_up_is_one_sentence(tfrecord, tmp_path):
    folder, _ = tfrecord
    # The kernel refuses bytes beyond the limit as it does on a full disk; array_record files are 64 KiB at least.
    limited = (
        "import resource, sys; from pwkd_jax import prepare; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "sys.exit(prepare.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "tfrecord", str(folder), "--workers=1"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr
    files = tmp_path / "tfds-array_record" / "imagenet2012" / "incomplete.5.1.0" / "files"
    assert list(files.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_run():
    program = """
import multiprocessing, threading, time
from pwkd_jax.data import tfds_writer
def tell():
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    print(*(c.pid for c in children), flush=True)
threading.Thread(target=tell).start()
list(tfds_writer.run(time.sleep, [(100,), (100,)], [0, 0], 2))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, text=True)
    workers = list(map(int, parent.stdout.readline().split()))
    assert len(workers) == 2
    parent.kill()
    parent.wait()

    def running(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    until = time.monotonic() + 60
    while any(map(running, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(running, workers))


def test_shards_are_as_many_as_tfds_makes():
    assert len(tfds_writer.bounds(146 * 10**9, 1_281_167)) == 1024
    assert len(tfds_writer.bounds(6_700 * 10**6, 50_000)) == 64
    assert tfds_writer.bounds(1000, 7) == [(0, 7)]
    parts = tfds_writer.bounds(300 * 2**20, 1001)
    assert [a for a, _ in parts[1:]] == [b for _, b in parts[:-1]] and parts[0][0] == 0 and parts[-1][1] == 1001
    assert os.cpu_count() >= prepare._cores() >= 1


def test_a_number_of_workers_that_makes_no_sense(tmp_path, capsys):
    assert prepare.main(["tfrecord", str(tmp_path), "--workers=0"]) == 2
    assert "--workers: 0" in capsys.readouterr().err
