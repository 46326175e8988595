"""Sources, the step-addressed pipeline and augmentation. TFDS directories are written here by hand, without TensorFlow."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from pwkd_jax import data
from pwkd_jax.data import digits
from pwkd_jax.errors import UserError

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared" / "data" / "tfds"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent; it is no part of the repository")


# Writing a TFDS directory: protobuf wire format of tf.train.Example, JSON metadata, one array_record file a shard.


def _varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def _example(**values: bytes | int) -> bytes:
    entries = b""
    for key, value in values.items():
        feature = _field(1, _field(1, value)) if isinstance(value, bytes) else _field(3, _field(1, _varint(value)))
        entries += _field(1, _field(1, key.encode()) + _field(2, feature))
    return _field(1, entries)


def _encode(image: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, kind)
    return buffer.getvalue()


CONNECTOR = "tensorflow_datasets.core.features."
IMAGE = CONNECTOR + "image_feature.Image"
LABEL = CONNECTOR + "class_label_feature.ClassLabel"


def _tfds(root, splits, name="toy", version="1.0.0", classes=5, shape=(4, 4, 3), image="image", file_format="array_record"):
    """splits: {name: [[(encoded image, label), ...] for each shard]}. Returns `root` as a string, for data_dir."""
    folder = root / name / version
    folder.mkdir(parents=True)
    for split, shards in splits.items():
        for i, records in enumerate(shards):
            path = folder / f"{name.split('/')[0]}-{split}.{file_format}-{i:05d}-of-{len(shards):05d}"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for encoded, label in records:
                writer.write(_example(**{image: encoded, "label": label}))
            writer.close()
    dimensions = [str(d) if d else "-1" for d in shape]
    features = {
        image: {
            "pythonClassName": IMAGE,
            "image": {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": dimensions}},
        },
        "label": {"pythonClassName": LABEL, "classLabel": {"numClasses": str(classes)}},
    }
    features = {
        "pythonClassName": CONNECTOR + "features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    info = {
        "name": name.split("/")[0],
        "version": version,
        "fileFormat": file_format,
        "moduleName": "__main__",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(records)) for records in shards],
            }
            for split, shards in splits.items()
        ],
    }
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(root)


def _images(n, shape=(4, 4, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def _records(images, labels=None):
    labels = np.arange(len(images)) % 5 if labels is None else labels
    return [(_encode(x), int(y)) for x, y in zip(images, labels, strict=True)]


def _two(train=None, test=None):
    """Two splits of a few images, each in one shard unless given."""
    return {"train": train or [_records(_images(6))], "test": test or [_records(_images(3, seed=1))]}


def _refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        data.load(*args, **kwargs)
    text = str(e.value)
    assert "\n" not in text and not text.endswith("."), "one sentence, printed as it is"
    return text


# Sources: digits.


@pytest.mark.parametrize("where", (digits.FILE, "moved.csv.gz"))
def test_digits_are_the_bundled_images_split_by_position(where, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr(digits, "FILE", where)
    d = data.load("digits")
    bunch = load_digits()
    assert (d.name, d.num_classes, d.image_shape) == ("digits", 10, (8, 8, 1))
    assert d.train.images.shape == (1198, 8, 8, 1) and d.test.images.shape == (599, 8, 8, 1)
    for split, positions in (
        (d.train, [i for i in range(1797) if i % 3 != 2]),
        (d.test, [i for i in range(1797) if i % 3 == 2]),
    ):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.labels, bunch.target[positions])
        np.testing.assert_array_equal(np.rint(split.images[..., 0] * (16 / 255)), bunch.images[positions])
        assert split.images.min() == 0 and split.images.max() == 255


def test_digits_pinned():
    d = data.load("digits")
    assert np.bincount(d.train.labels).tolist() == [115, 119, 114, 129, 123, 121, 127, 119, 111, 120]
    assert np.bincount(d.test.labels).tolist() == [63, 63, 63, 54, 58, 61, 54, 60, 63, 60]
    assert (int(d.train.images.sum()), int(d.test.images.sum())) == (5968590, 2985211)


def test_digits_slices():
    d = data.load("digits")
    cut = data.load("digits", train_split="train[:100]+train[200:300]", test_split="test[-10%:]")
    np.testing.assert_array_equal(cut.train.images, np.concatenate([d.train.images[:100], d.train.images[200:300]]))
    np.testing.assert_array_equal(cut.train.labels, np.concatenate([d.train.labels[:100], d.train.labels[200:300]]))
    np.testing.assert_array_equal(cut.test.images, d.test.images[-60:])
    # A validation split carved from the training images.
    held = data.load("digits", train_split="train[:90%]", test_split="train[90%:]")
    assert len(held.train) + len(held.test) == 1198
    np.testing.assert_array_equal(held.test.images, d.train.images[1078:])


# Sources: TFDS.


def test_tfds_round_trip_over_shards_and_slices(tmp_path):
    images, labels = _images(11), np.arange(11) % 5
    records = _records(images, labels)
    root = _tfds(tmp_path, _two(train=[records[:4], records[4:5], records[5:]]))
    d = data.load("toy", root)
    assert (d.name, d.num_classes, d.image_shape, len(d.test)) == ("toy", 5, (4, 4, 3), 3)
    assert d.train.images.dtype == np.uint8 and d.train.labels.dtype == np.int32
    np.testing.assert_array_equal(d.train.images, images)
    np.testing.assert_array_equal(d.train.labels, labels)
    np.testing.assert_array_equal(d.test.images, _images(3, seed=1))
    cut = data.load("toy", root, "train[3:6]+train[9:]", "train[:50%]", num_classes=5)
    np.testing.assert_array_equal(cut.train.images, images[[3, 4, 5, 9, 10]])
    np.testing.assert_array_equal(cut.train.labels, labels[[3, 4, 5, 9, 10]])
    np.testing.assert_array_equal(cut.test.images, images[:6])
    whole = data.load("toy", root, "all", "test")
    assert len(whole.train) == 14


def test_tfds_more_records_than_one_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources, "_CHUNK", 4)
    images = _images(11)
    records = _records(images)
    d = data.load("toy", _tfds(tmp_path, _two(train=[records[:6], records[6:]])), "train[1:]")
    np.testing.assert_array_equal(d.train.images, images[1:])


def test_tfds_grayscale(tmp_path):
    images = _images(6, (5, 4, 1))
    root = _tfds(tmp_path, {"train": [_records(images)]}, shape=(5, 4, 1))
    d = data.load("toy", root, "train", "train[:2]")
    assert d.image_shape == (5, 4, 1)
    np.testing.assert_array_equal(d.train.images, images)


def test_tfds_newest_version_config_and_default_directory(tmp_path, monkeypatch):
    for version, n in (("2.9.0", 4), ("2.10.0", 5), ("1.0.0", 6)):
        _tfds(tmp_path, {"train": [_records(_images(n))]}, version=version)
    _tfds(tmp_path, {"train": [_records(_images(7))]}, name="toys/small")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    size = lambda name: len(data.load(name, "", "train", "train").train)  # noqa: E731
    assert [size("toy"), size("toy:2.9.0"), size("toys/small"), size("toys/small:1.0.0")] == [5, 4, 7, 7]
    assert "toy has no version 3.0.0; it has 1.0.0, 2.9.0, 2.10.0" in _refusal("toy:3.0.0")
    assert _refusal("toys").startswith("data.name: 'toys' comes in configs, add one: toys/small")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no"))
    assert _refusal("toy") == (
        f"data.data_dir: it is empty, and TFDS's default directory {tmp_path}/no does not exist; "
        "give the folder in which TFDS prepared 'toy'"
    )


@needs_shared
def test_shared_cifar10():
    d = data.load("cifar10", str(SHARED), "train[:300]", "test[100:150]")
    assert (d.num_classes, d.image_shape, len(d.train), len(d.test)) == (10, (32, 32, 3), 300, 50)
    assert set(d.train.labels) == set(range(10))
    assert 0.3 < d.train.images.mean() / 255 < 0.6
    again = data.load("cifar10", str(SHARED), "train[100:300]", "test[100:150]")
    np.testing.assert_array_equal(again.train.images, d.train.images[100:])


@needs_shared
def test_shared_tiny_imagenet():
    d = data.load("tiny_imagenet100_32", str(SHARED), "train[:200]", "validation[:100]")
    assert (d.num_classes, d.image_shape, len(d.train), len(d.test)) == (100, (32, 32, 3), 200, 100)
    assert _refusal("tiny_imagenet100_32", str(SHARED)) == (
        "data.test_split: data set 'tiny_imagenet100_32' has no split 'test'; it has train, validation"
    )


def test_imports_stay_small(tmp_path):
    """Digits need no tfds, and nothing here ever needs TensorFlow."""
    root = _tfds(tmp_path, _two())
    program = (
        "import sys; from pwkd_jax import data; data.load('digits'); assert 'tensorflow_datasets' not in sys.modules;"
        f"data.load('toy', {root!r}); data.load('digits', train_split='train[:9]'); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPO, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


# Sources: mistakes.


@pytest.mark.parametrize("spec", ["train[", "train[x:]", "train[3]", "all[3:]", "", "train+", "train[200%:]", "train[::2]"])
def test_malformed_split(spec):
    assert _refusal("digits", train_split=spec).startswith(f"data.train_split: '{spec}' is not a split; write a name")


def test_split_mistakes(tmp_path):
    assert _refusal("digits", test_split="validation") == (
        "data.test_split: data set 'digits' has no split 'validation'; it has test, train"
    )
    assert _refusal("digits", train_split="train[:10] + tran[:5]") == (
        "data.train_split: data set 'digits' has no split 'tran'; it has test, train"
    )
    assert _refusal("digits", train_split="train[:2000]") == (
        "data.train_split: 'train[:2000]' reaches beyond the images of data set 'digits', which has test 599, train 1198"
    )
    for spec in ("train[:0]", "train[50:20]", "train[1198:]"):
        assert _refusal("digits", train_split=spec).startswith(f"data.train_split: '{spec}' of data set 'digits' is empty")
    root = _tfds(tmp_path, {"train": [_records(_images(2))], "test": [[]]})
    assert _refusal("toy", root).startswith("data.test_split: 'test' of data set 'toy' is empty")
    assert _refusal("toy", root, test_split="val").startswith("data.test_split: data set 'toy' has no split 'val'")


def test_wrong_number_of_classes(tmp_path):
    assert data.load("digits", num_classes=10).num_classes == 10
    assert _refusal("digits", num_classes=100) == (
        "data.num_classes: it says 100, but data set 'digits' has 10 classes; set it to 0 to take the data set's own"
    )
    root = _tfds(tmp_path, _two())
    assert "it says 6, but data set 'toy' has 5 classes" in _refusal("toy", root, num_classes=6)


def test_number_of_classes_from_the_config_where_the_data_set_has_none(tmp_path):
    root = _tfds(tmp_path, _two())
    path = tmp_path / "toy/1.0.0/features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["label"] = {
        "pythonClassName": CONNECTOR + "scalar.Scalar",
        "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
    }
    path.write_text(json.dumps(features))
    assert _refusal("toy", root).startswith("data.num_classes: data set 'toy' does not say how many classes it has")
    assert data.load("toy", root, num_classes=7).num_classes == 7
    assert "record 4 of split 'train'" in _refusal("toy", root, num_classes=4)


@pytest.mark.parametrize("label", [5, -1])
def test_label_out_of_range(tmp_path, label):
    labels = [0, 1, 2, label, 4, 0]
    root = _tfds(tmp_path, _two(train=[_records(_images(6), labels)]))
    assert _refusal("toy", root) == (
        f"data.num_classes: record 3 of split 'train' in {root}/toy/1.0.0 has label {label}; with 5 classes labels are 0 to 4"
    )
    assert len(data.load("toy", root, "train[:3]+train[4:]").train) == 5


def test_missing_directories(tmp_path):
    root = _tfds(tmp_path, _two())
    assert _refusal("toy", f"{root}/no") == (
        f"data.data_dir: directory {root}/no does not exist; give the folder in which TFDS prepared 'toy'"
    )
    assert _refusal("cifar10", root) == (
        f"data.name: {root} holds no prepared data set 'cifar10' (it holds toy); nothing is downloaded here, so prepare "
        "it first (python -m pwkd_jax.prepare -h) or correct data.data_dir"
    )
    assert _refusal("toy", f"{root}/toy/1.0.0") == (
        f"data.data_dir: {root}/toy/1.0.0 is one version of a data set; give the folder that holds 'toy', "
        "its parent's parent (with a TFDS config, one more)"
    )
    assert _refusal("../toy", root).startswith("data.name: '../toy' is not a data set's name")


def test_no_random_access(tmp_path):
    root = _tfds(tmp_path, _two(), file_format="tfrecord")
    assert _refusal("toy", root) == (
        f"data.data_dir: {root}/toy/1.0.0 is stored as tfrecord, but random access needs array_record; "
        f"convert it with python -m pwkd_jax.prepare tfrecord {tmp_path}/toy/1.0.0"
    )


def test_a_template_of_files_that_is_lost(tmp_path):
    root = _tfds(tmp_path, _two())
    path = tmp_path / "toy/1.0.0/dataset_info.json"
    path.write_text(path.read_text().replace("filepathTemplate", "filepathTemplate_"))
    assert _refusal("toy", root).startswith(f"data.data_dir: {root}/toy/1.0.0 is not a readable TFDS data set (")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_broken_metadata(tmp_path, file):
    root = _tfds(tmp_path, _two())
    (tmp_path / "toy/1.0.0" / file).write_text("{")
    assert _refusal("toy", root).startswith(f"data.data_dir: {root}/toy/1.0.0 is not a readable TFDS data set (")


def test_features_are_named(tmp_path):
    root = _tfds(tmp_path, _two(), image="picture")
    assert _refusal("toy", root) == "data.name: data set 'toy' has no feature 'image'; it has label, picture"


def test_image_feature_must_be_uint8(tmp_path):
    root = _tfds(tmp_path, _two())
    path = tmp_path / "toy/1.0.0/features.json"
    path.write_text(path.read_text().replace('"uint8"', '"uint16"'))
    assert _refusal("toy", root) == (
        "data.name: feature 'image' of data set 'toy' is uint16 of shape (4, 4, 3), but must be uint8 [height, width, channels]"
    )


def test_undecodable_image_is_named_by_its_record(tmp_path):
    """The number counts from the start of the stored split, whatever the slice, shard and fetch."""
    images = _images(300)
    records = _records(images)
    records[271] = (_encode(images[271], "jpeg")[:150], 0)  # cut short
    records[290] = (b"not an image", 0)
    root = _tfds(tmp_path, _two(train=[records[:100], records[100:]]))
    want = f"data.data_dir: record {{}} of split 'train' in {root}/toy/1.0.0 cannot be decoded ("
    assert _refusal("toy", root).startswith(want.format(271))
    assert _refusal("toy", root, "train[5:8]+train[260:]").startswith(want.format(271))
    text = _refusal("toy", root, "train[272:]")
    assert text == want.format(290) + "cannot identify image file); prepare or copy the data set again"
    np.testing.assert_array_equal(data.load("toy", root, "train[:271]").train.images, images[:271])


def test_images_of_several_sizes(tmp_path):
    mixed = [*_records(_images(3)), *_records(_images(1, (4, 6, 3)))]
    root = _tfds(tmp_path, _two(train=[mixed]), shape=(None, None, 3))
    assert _refusal("toy", root) == (
        "data.name: images of data set 'toy' differ in size: record 3 of split 'train' is 4x6x3, others are 4x4x3; "
        "all must have one size, or be streamed at a data.image_size"
    )
    root = _tfds(tmp_path / "b", _two(test=[_records(_images(2, (4, 6, 3)))]), shape=(None, None, 3))
    assert _refusal("toy", root) == (
        "data.name: images of data set 'toy' are 4x4x3 in 'train' but 4x6x3 in 'test'; all must have one size, "
        "or be streamed at a data.image_size"
    )


def test_missing_truncated_and_short_shards(tmp_path):
    records = _records(_images(30))
    shards = [records[:10], records[10:20], records[20:]]
    root = _tfds(tmp_path, _two(train=shards))
    shard = tmp_path / "toy/1.0.0/toy-train.array_record-00001-of-00003"
    whole = shard.read_bytes()

    shard.unlink()
    start = f"data.data_dir: file {shard}"
    assert _refusal("toy", root).startswith(f"{start} is missing at record 10 of split 'train' (")
    assert len(data.load("toy", root, "train[:10]+train[20:]").train) == 20, "a partial copy serves what it has"

    for size in (0, 65535, 65536, 100_000, len(whole) - 1):  # at 65536 the reader returns empty records
        shard.write_bytes(whole[:size])
        assert _refusal("toy", root).startswith(f"{start} cannot be read at record 10 of split 'train' (")

    shard.write_bytes(whole)
    info = tmp_path / "toy/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('["10", "10", "10"]', '["10", "12", "10"]'))
    assert _refusal("toy", root).startswith(f"{start} cannot be read at record 20 of split 'train' (")


# The pipeline.


def _split(n, shape=(2, 2, 1)):
    """Image i is filled with i, label i % 7: rows that do not belong together show."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1), (n, *shape)).copy()
    return data.Split(images, (np.arange(n) % 7).astype(np.int32))


def _same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k])


def test_batch_contents():
    batch = data.Pipeline(_split(50), 8, seed=0)(3)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((8, 2, 2, 1), np.uint8),
        "label": ((8,), np.int32),
        "index": ((8,), np.int32),
    }
    np.testing.assert_array_equal(batch["image"][:, 1, 1, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] % 7)


@pytest.mark.parametrize("n, batch_size", [(50, 8), (50, 50), (7, 20), (24, 8)])
def test_every_image_once_an_epoch(n, batch_size):
    """Also where the batch does not divide the split or is larger than it: epochs are cut from the stream, not padded."""
    pipeline, epochs = data.Pipeline(_split(n), batch_size, seed=1), 5
    steps = -(-epochs * n // batch_size)
    stream = np.concatenate([pipeline(s)["index"] for s in range(steps)])[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(n), (epochs, 1)))
    assert len({tuple(order) for order in stream}) == epochs, "each epoch has its own order"


def test_pipeline_is_a_pure_function_of_seed_and_step():
    split = _split(50)
    forward = data.Pipeline(split, 12, seed=3)
    batches = [forward(s) for s in range(40)]
    backward = data.Pipeline(split, 12, seed=3)
    for s in reversed(range(40)):
        _same(backward(s), batches[s])
    for s in (0, 39, 4, 4):  # a resumed run asks for its step first
        _same(data.Pipeline(split, 12, seed=3)(s), batches[s])
        _same(forward(s), batches[s])
    other = data.Pipeline(split, 12, seed=4)
    assert any((other(s)["index"] != batches[s]["index"]).any() for s in range(2))


def test_order_is_pinned():
    """Resuming after an upgrade of numpy or of this package must not change the batches."""
    pipeline = data.Pipeline(_split(10), 10, seed=0)
    assert [pipeline(s)["index"].tolist() for s in (0, 1)] == [[3, 2, 1, 8, 6, 0, 7, 4, 5, 9], [7, 4, 5, 1, 9, 8, 6, 2, 0, 3]]


def test_large_steps_do_not_overflow():
    split = _split(10)
    step = 10**12
    pipeline = data.Pipeline(split, 4096, seed=0)
    _same(pipeline(np.int64(step)), pipeline(step))
    np.testing.assert_array_equal(np.bincount(pipeline(np.int32(2**31 - 1))["index"], minlength=10) // 400, 1)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_hosts_together_get_the_one_host_batch(count):
    split = _split(50)
    one = data.Pipeline(split, 12, seed=3)
    hosts = [data.Pipeline(split, 12, seed=3, process_index=p, process_count=count) for p in range(count)]
    for s in (0, 4, 9, 33):  # 4 straddles two epochs
        parts = [h(s) for h in hosts]
        _same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, one(s))
    evals = [list(data.eval_batches(split, 12, p, count)) for p in range(count)]
    for parts, whole in zip(zip(*evals, strict=True), data.eval_batches(split, 12), strict=True):
        _same({k: np.concatenate([p[k] for p in parts]) for k in whole}, whole)


@pytest.mark.parametrize("build", [lambda s: data.Pipeline(s, 10, 0, 0, 4), lambda s: data.eval_batches(s, 10, 0, 4)])
def test_batch_size_must_divide_by_hosts(build):
    sentence = r"^batch_size: 10 images cannot be shared equally by 4 processes; use a multiple of 4$"
    with pytest.raises(UserError, match=sentence):
        build(_split(50))


@pytest.mark.parametrize("n, batch_size", [(50, 8), (48, 8), (5, 8)])
def test_eval_covers_every_image_once(n, batch_size):
    split = _split(n)
    split.images[:] += 1  # so that zeros are padding
    split.labels[:] += 1
    batches = list(data.eval_batches(split, batch_size))
    assert len(batches) == -(-n // batch_size)
    for b in batches:
        assert b["image"].shape == (batch_size, 2, 2, 1) and b["image"].dtype == np.uint8
        assert b["label"].dtype == b["index"].dtype == np.int32 and b["mask"].dtype == np.float32
    image, label, index, mask = (np.concatenate([b[k] for b in batches]) for k in ("image", "label", "index", "mask"))
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < n)
    np.testing.assert_array_equal(image[:n], split.images)
    np.testing.assert_array_equal(label[:n], split.labels)
    np.testing.assert_array_equal(index[:n], np.arange(n))
    assert not image[n:].any() and not label[n:].any() and not index[n:].any()
    np.testing.assert_array_equal(split.images[0], 1), "the split itself is untouched"


# Augmentation.


def _candidates(image, padding, flip):
    """{bytes of a possible result: (dy, dx, flipped)}, by plain numpy."""
    h, w, c = image.shape
    padded = np.zeros((h + 2 * padding, w + 2 * padding, c), image.dtype)
    padded[padding : padding + h, padding : padding + w] = image
    out = {}
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            crop = padded[dy : dy + h, dx : dx + w]
            out[crop.tobytes()] = (dy, dx, False)
            if flip:
                out[np.ascontiguousarray(crop[:, ::-1]).tobytes()] = (dy, dx, True)
    return out


@pytest.mark.parametrize("padding, flip", [(2, True), (2, False), (0, True)])
def test_augmented_images_are_the_possible_crops_equally_often(padding, flip):
    batch = 3000
    images = np.random.default_rng(0).integers(1, 256, (batch, 5, 6, 3), np.uint8)
    out = np.asarray(data.augment(jax.random.key(0), jnp.asarray(images), padding, flip))
    assert out.dtype == np.uint8 and out.shape == images.shape
    counts = {}
    for x, y in zip(images, out, strict=True):
        outcomes = _candidates(x, padding, flip)
        drawn = outcomes[y.tobytes()]  # KeyError: no crop of this image
        counts[drawn] = counts.get(drawn, 0) + 1
    kinds = (2 * padding + 1) ** 2 * (1 + flip)
    assert len(counts) == kinds
    expected = batch / kinds
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi2 < kinds - 1 + 5 * (2 * (kinds - 1)) ** 0.5  # 5 standard deviations


def test_augment_jit_and_position():
    images, key = jnp.asarray(_images(64, (8, 8, 3))), jax.random.key(7)
    out = data.augment(key, images, 4, True)
    jitted = jax.jit(data.augment, static_argnums=(2, 3))(key, images, 4, True)
    np.testing.assert_array_equal(out, jitted)
    np.testing.assert_array_equal(data.augment(key, images[:24], 4, True), out[:24])
    assert (np.asarray(data.augment(jax.random.key(8), images, 4, True)) != out).any()
    same = data.augment(key, jnp.broadcast_to(images[:1], images.shape), 4, True)
    assert len({np.asarray(x).tobytes() for x in same}) > 30, "each image draws its own numbers"


def test_augment_off_returns_the_input():
    images = jnp.asarray(_images(4))
    np.testing.assert_array_equal(data.augment(jax.random.key(0), images, 0, False), images)


def test_normalise():
    images = _images(4)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    out = data.normalise(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32 and out.shape == images.shape
    np.testing.assert_allclose(out, (images / 255.0 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"^data.std: 1 numbers for images of 3 channels; give one a channel$"):
        data.normalise(jnp.asarray(images), mean, (0.2,))
    with pytest.raises(UserError, match=r"^data.mean: 3 numbers for images of 1 channels"):
        data.normalise(jnp.asarray(images[..., :1]), mean, std)  # would broadcast to 3 channels


def test_channel_statistics():
    images = _images(300, (40, 100, 3)) // np.array([1, 2, 5], np.uint8)  # more than one block of pixels
    mean, std = data.channel_statistics(images)
    assert all(type(x) is float for x in (*mean, *std))
    np.testing.assert_allclose(mean, images.reshape(-1, 3).mean(axis=0) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, images.reshape(-1, 3).std(axis=0) / 255, rtol=1e-12)
    out = np.asarray(data.normalise(jnp.asarray(images), mean, std), np.float64).reshape(-1, 3)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-5)
    images[..., 1] = 9
    with pytest.raises(UserError, match=r"^data.std: channel 1 of the training images never varies"):
        data.channel_statistics(images)
