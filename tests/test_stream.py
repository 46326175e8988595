"""Images of many sizes: decoding, crops, batches that depend on seed and step alone, unreadable images, folders, labels."""

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import types
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from test_data import _tfds

from pwkd_jax import config, data, evaluate, train
from pwkd_jax.data import folder, images, partial, prefetch, records, stream
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition

PLAIN = data.Streaming(16, resize=20, workers=0)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes with some grain, as photographs are: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    smooth = np.asarray(PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)


def ramp(height: int, width: int) -> np.ndarray:
    """Red grows with x and green with y, both from 0 to 200 over the image; blue is 100."""
    x, y = 200 * (np.arange(width) + 0.5) / width, 200 * (np.arange(height) + 0.5) / height
    return np.stack(np.broadcast_arrays(x[None], y[:, None], 100.0), axis=-1).round().astype(np.uint8)


def encode(image, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(encoded)).convert("RGB"))


# Decoding.


@pytest.mark.parametrize(
    "kind, mode, options",
    [
        ("JPEG", "RGB", {"quality": 90}), ("JPEG", "RGB", {"quality": 75, "subsampling": 0}),
        ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "L", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
    ],
)  # fmt: skip
def test_pixels_are_pillows(kind, mode, options):
    for height, width in ((53, 71), (64, 48), (1, 9)):
        encoded = encode(photo(height, width), kind, mode, **options)
        found = images.decode(encoded)
        assert found.dtype == np.uint8 and found.shape == (height, width, 3)
        np.testing.assert_array_equal(found, pillow(encoded))
        if kind == "JPEG":
            assert images.jpeg_header(encoded) == (height, width, {"RGB": 3, "L": 1, "CMYK": 4}[mode])


def test_cmyk_by_its_formula():
    """Adobe's files hold the inverse of ink: Pillow turns it round when it writes and when it reads."""
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:] = (255, 0, 51, 102)  # no red at all; (255 - 51) and (255 - 0) times (255 - 102) / 255 of the others
    buffer = io.BytesIO()
    PIL.Image.frombytes("CMYK", (16, 16), ink.tobytes()).save(buffer, "JPEG", quality=100)
    assert b"Adobe" in buffer.getvalue()
    expected = [(255 - c) * (255 - 102) / 255 for c in (255, 0, 51)]
    assert np.abs(images.decode(buffer.getvalue()).reshape(-1, 3) - expected).max() <= 2


def test_orientation_is_ignored_and_content_decides():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = photo(20, 30)
    turned = encode(image, exif=exif.tobytes())
    assert images.jpeg_header(turned) == (20, 30, 3)
    np.testing.assert_array_equal(images.decode(turned), images.decode(encode(image)))
    assert images.jpeg_header(encode(image, "PNG")) is None


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_pixels_are_pillows_draft(reduce):
    for mode, options in (("RGB", {}), ("L", {}), ("RGB", {"progressive": True})):
        encoded = encode(photo(131, 90), "JPEG", mode, **options)
        image = PIL.Image.open(io.BytesIO(encoded))
        image.draft("RGB", (image.width // reduce, image.height // reduce))
        found = images.decode(encoded, reduce)
        assert found.shape == (math.ceil(131 / reduce), math.ceil(90 / reduce), 3)
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("encoded", [b"", b"no image", encode(photo(60, 80))[:900], encode(photo(60, 80), "PNG")[:5000]])
def test_what_is_no_whole_image_is_unreadable(encoded):
    with pytest.raises(images.Unreadable):
        images.decode(encoded)
    with pytest.raises(images.Unreadable) as e:
        images.train_image(encoded, np.full(41, 0.5), 16, (0.08, 1.0), False)
    assert "\n" not in str(e.value) and "0x" not in str(e.value)


# Crops.


def test_random_crops_are_uniform_in_area_ratio_and_place():
    """All fit here (the longest side is at most sqrt(0.5 * 4 / 3) = 0.82 of the image's), so nothing bends the draw."""
    rng, size, count = np.random.default_rng(0), 4000, 20_000
    crops = np.array([images.random_crop(rng.random(41), size, size, (0.08, 0.5)) for _ in range(count)], float)
    top, left, height, width = crops.T
    area, ratio = height * width / size**2, np.log(width / height) / np.log(4 / 3)
    down, right = top / (size - height), left / (size - width)
    for values, low, high in ((area, 0.08, 0.5), (ratio, -1, 1), (down, 0, 1), (right, 0, 1)):
        # Kolmogorov's distance to the uniform distribution: 1.95 / sqrt(n) has probability 0.001.
        ordered = (np.sort(values) - low) / (high - low)
        assert np.abs(ordered - (np.arange(count) + 0.5) / count).max() < 1.95 / count**0.5
    assert np.abs(np.corrcoef([area, ratio, down, right]) - np.eye(4)).max() < 0.03


def test_random_crops_by_hand():
    numbers = np.full(41, 0.5)
    # Area the mean of 0.08 and 1, ratio 1: the square root of 0.54 * 400 * 500; the middle of 401 - 329 and 501 - 329 places.
    assert images.random_crop(numbers, 400, 500, (0.08, 1.0)) == (36, 86, 329, 329)
    # Nine draws of the whole area at ratio 3/4, which is too high for a square image; the tenth fits.
    numbers[:36] = np.tile((0.999, 0, 0.5, 0.5), 9)
    assert images.random_crop(numbers, 400, 500, (0.08, 1.0)) == (36, 86, 329, 329)
    numbers[36] = numbers[32]
    numbers[37] = 0
    # None of ten: the largest central crop of a ratio between 3/4 and 4/3.
    assert images.random_crop(numbers, 500, 500, (0.08, 1.0)) == (0, 0, 500, 500)
    assert images.random_crop(numbers, 100, 1000, (0.9, 1.0)) == (0, 433, 100, 133)
    assert images.random_crop(numbers, 1000, 90, (0.9, 1.0)) == (440, 0, 120, 90)


@pytest.mark.parametrize("shape", [(90, 120), (300, 400), (700, 530), (1600, 1300), (40, 50)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_crop_shows_its_place_at_any_scale_of_decoding(shape, kind):
    """On a ramp of known slope every pixel says where it comes from; a crop off by one of its own pixels would show."""
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    encoded, rng, size = encode(ramp(*shape), kind, **options), np.random.default_rng(0), 64
    for _ in range(6):
        numbers = rng.random(41)
        top, left, height, width = images.random_crop(numbers, *shape, (0.3, 1.0))
        x = (left + (np.arange(size) + 0.5) * width / size) * 200 / shape[1]
        y = (top + (np.arange(size) + 0.5) * height / size) * 200 / shape[0]
        for flip in (False, True):
            found = images.train_image(encoded, numbers, size, (0.3, 1.0), flip).astype(float)
            assert found.shape == (size, size, 3)
            expected = x[::-1] if flip and numbers[40] < 0.5 else x
            reduce = max(r for r in (1, 2, 4, 8) if r == 1 or (kind == "JPEG" and min(height, width) // r >= size))
            # Half a pixel of the image as it was decoded, on its steeper side: the edges of a reduced crop are rounded.
            edge = 100 * (reduce if reduce > 1 else 0) / min(shape)
            for channel, place in ((0, expected), (1, y[:, None]), (2, 100)):
                off = found[..., channel] - place
                # Single pixels: JPEG's own error. All together: that of the place; a pixel is 200 / shape.
                assert np.abs(off).max() < 4.5 + 2 * edge and abs(off.mean()) < 0.5 + edge


def test_large_images_are_decoded_small(monkeypatch):
    asked = []
    real = images.decode
    monkeypatch.setattr(partial, "turbojpeg", lambda: None)
    monkeypatch.setattr(images, "decode", lambda encoded, reduce=1: asked.append(reduce) or real(encoded, reduce))
    numbers = np.full(41, 0.5)  # a square crop of 0.54 of the area
    for side, reduce in ((40, 1), (86, 1), (90, 2), (176, 4), (349, 8), (800, 8)):
        images.train_image(encode(ramp(side, side)), numbers, 32, (0.08, 1.0), False)
        assert asked[-1] == reduce, side
    for side, reduce in ((79, 1), (80, 2), (160, 4), (320, 8)):
        images.test_image(encode(ramp(side, side)), 32, 40)
        assert asked[-1] == reduce, side


@pytest.mark.parametrize("shape", [(75, 100), (100, 75), (300, 451), (30, 20)])
def test_central_crops_are_torchvisions(shape):
    found = images.test_image(encode(ramp(*shape), "PNG"), 56, 64).astype(float)
    scale = 64 / min(shape)
    height, width = (64, int(scale * shape[1])) if shape[0] <= shape[1] else (int(scale * shape[0]), 64)
    top, left = round((height - 56) / 2), round((width - 56) / 2)
    assert found.shape == (56, 56, 3)
    np.testing.assert_allclose(found[..., 0], np.tile((left + np.arange(56) + 0.5) * 200 / width, (56, 1)), atol=3)
    np.testing.assert_allclose(found[..., 1].T, np.tile((top + np.arange(56) + 0.5) * 200 / height, (56, 1)), atol=3)


def test_shrinking_takes_the_mean():
    image = photo(64, 96)
    np.testing.assert_allclose(
        images.resize(image, 16, 24).astype(float), image.reshape(16, 4, 24, 4, 3).mean((1, 3)), atol=0.501
    )


def test_fast_shrinking_looks_at_all_that_it_replaces():
    """Columns in turn black and white: gray where the mean is taken, and where two of at most two are read."""
    stripes = np.zeros((60, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    np.testing.assert_allclose(images.resize(stripes, 40, 64, fast=True), 127.5, atol=1)
    # Of four columns, two white ones in the middle, which are all that two neighbours are.
    pairs = np.roll(np.repeat(stripes, 2, 1)[:, :128], 1, 1)
    np.testing.assert_allclose(images.resize(pairs, 10, 32, fast=True), 127.5, atol=1)


def test_random_numbers_depend_on_seed_and_position():
    found = np.array([stream.uniform(seed, position)[0] for seed in (0, 1) for position in range(2000)])
    assert found.shape == (4000, 41) and found.min() >= 0 and found.max() < 1
    assert len(np.unique(found)) == found.size
    np.testing.assert_allclose(found.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(found.std(0), 12**-0.5, atol=0.02)
    # Pinned: a resumed run must find them again after an upgrade of numpy.
    pinned = (0.28192974668277615, 0.2276747201006375)
    np.testing.assert_allclose(stream.uniform(3, 5_000_000_000)[0, :2], pinned, rtol=0, atol=1e-15)


# Batches.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """train/CLASS and validation/CLASS of 23 and 9 images of many sizes."""
    home = tmp_path_factory.mktemp("images")
    number = 0
    for split, counts in (("train", (12, 11)), ("validation", (5, 4))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (home / split / name).mkdir(parents=True)
            for i in range(count):
                number += 1
                kind = "PNG" if i % 4 == 3 else "JPEG"
                image = photo(24 + 7 * i, 40 + 5 * (i % 3), seed=number)
                (home / split / name / f"{i:02d}.{'JPEG' if i % 2 else 'jpg'}").write_bytes(encode(image, kind))
    return home


def load(root, **options) -> data.Dataset:
    return data.load("folder", str(root), "train", "validation", 0, dataclasses.replace(PLAIN, **options))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_folder_is_read_as_it_is_laid_out(root):
    d = load(root)
    assert (d.name, d.num_classes, d.image_shape, len(d.train), len(d.test)) == ("folder", 2, (16, 16, 3), 23, 9)
    np.testing.assert_array_equal(d.train.labels, [0] * 12 + [1] * 11)
    assert d.train.labels.dtype == np.int32
    cut = data.load("folder", str(root), "train[:5]+train[20:]", "train[50%:]", 0, PLAIN)
    np.testing.assert_array_equal(cut.train.labels, [0] * 5 + [1] * 3)
    split, classes = data.load_split("folder", str(root), "validation", streaming=PLAIN)
    assert (len(split), classes) == (9, 2)


@pytest.mark.parametrize("batch_size", [8, 12, 60])
def test_order_is_the_pipelines_and_hosts_share_it(root, batch_size):
    """The indices are those of data in RAM; the crops of 2 and 4 hosts are the rows of one host's."""
    split = load(root, flip=True).train
    ram = data.Pipeline(data.Split(np.zeros((23, 1, 1, 1), np.uint8), split.labels), batch_size, 7)
    whole = data.batches(split, batch_size, 7)
    hosts = {n: [data.batches(split, batch_size, 7, p, n) for p in range(n)] for n in (2, 4)}
    seen = []
    for step in range(-(-46 // batch_size)):
        batch = whole(step)
        assert batch.keys() == {"image", "label", "index"}
        assert batch["image"].shape == (batch_size, 16, 16, 3) and batch["image"].dtype == np.uint8
        for key in ("index", "label"):
            np.testing.assert_array_equal(batch[key], ram(step)[key])
        for parts in hosts.values():
            rows = [part(step) for part in parts]
            assert same(batch, {key: np.concatenate([r[key] for r in rows]) for key in batch})
        seen.append(batch["index"])
    seen = np.concatenate(seen)
    for epoch in range(2):  # every image once an epoch
        np.testing.assert_array_equal(np.sort(seen[23 * epoch : 23 * epoch + 23]), np.arange(23))


def test_a_crop_is_the_one_of_its_position(root):
    """By another road: the file, the permutation and the numbers of the position, each from its own function."""
    d, seed, step, batch_size = load(root, flip=True, scale=(0.2, 0.9)), 3, 4, 10
    batch = data.batches(d.train, batch_size, seed)(step)
    files = sorted((root / "train").glob("*/*"))
    for row in range(batch_size):
        position = step * batch_size + row
        index = data.pipeline.permutation(seed, position // 23, 23)[position % 23]
        expected = images.train_image(files[index].read_bytes(), stream.uniform(seed, position)[0], 16, (0.2, 0.9), True)
        assert batch["index"][row] == index
        np.testing.assert_array_equal(batch["image"][row], expected)


def test_any_step_may_be_the_first(root):
    split = load(root, flip=True).train
    straight = data.batches(split, 6, 0)
    known = [straight(step) for step in range(7)]
    assert not np.array_equal(known[0]["image"], data.batches(split, 6, 1)(0)["image"])
    for start in (3, 6):
        resumed = data.batches(split, 6, 0)
        assert all(same(resumed(step), known[step]) for step in range(start, 7))
    jumping = data.batches(split, 6, 0)
    assert all(same(jumping(step), known[step]) for step in (5, 0, 1, 1, 4, 3))
    # A circle of batches is those steps over and over, without a new start.
    ring = data.batches(split, 6, 0, cycle=3)
    for _ in range(2):
        assert all(same(ring(step), known[step]) for step in range(3))


@pytest.mark.parametrize("batch_size", [4, 8, 12])
def test_evaluation_sees_every_image_once(root, batch_size):
    split = load(root).test
    files = sorted((root / "validation").glob("*/*"))
    whole = list(data.eval_batches(split, batch_size))
    assert len(whole) == -(-9 // batch_size)
    for count in (1, 2, 4):
        hosts = [list(data.eval_batches(split, batch_size, p, count)) for p in range(count)]
        assert {len(batches) for batches in hosts} == {len(whole)}
        for number, batch in enumerate(whole):
            parts = [batches[number] for batches in hosts]
            assert same(batch, {key: np.concatenate([p[key] for p in parts]) for key in batch})
    rows = {key: np.concatenate([b[key] for b in whole]) for key in whole[0]}
    real = rows["mask"] == 1
    np.testing.assert_array_equal(np.flatnonzero(real), np.arange(9))
    np.testing.assert_array_equal(rows["index"][real], np.arange(9))
    np.testing.assert_array_equal(rows["label"][real], split.labels)
    for i, file in enumerate(files):
        np.testing.assert_array_equal(rows["image"][i], images.test_image(file.read_bytes(), 16, 20))
    assert not rows["image"][~real].any() and not rows["label"][~real].any() and not rows["mask"][~real].any()
    # An evaluation that is broken off does not shift the next.
    next(iter(data.eval_batches(split, batch_size)))
    assert all(same(a, b) for a, b in zip(whole, data.eval_batches(split, batch_size), strict=True))


def test_workers_change_nothing_and_their_errors_are_sentences(root, tmp_path):
    """Whole batches by 1 and 2 processes, from a step in the middle; then one that meets a broken image."""
    alone = load(root, flip=True)
    known = [data.batches(alone.train, 5, 0)(step) for step in range(2, 7)]
    scored = list(data.eval_batches(alone.test, 4))
    for workers in (1, 2):
        d = load(root, flip=True, workers=workers)
        batches = data.batches(d.train, 5, 0)
        held = [batches(step) for step in range(2, 7)]  # more than lie in shared memory at once: each is the reader's own
        assert all(same(a, b) for a, b in zip(held, known, strict=True))
    assert all(same(a, b) for a, b in zip(scored, data.eval_batches(d.test, 4), strict=True))
    bad = broken(root, tmp_path, "train/dog/03.JPEG")
    with pytest.raises(UserError, match=r"^data.unreadable: file \S+03.JPEG cannot be decoded \("):
        for step in range(5):
            data.batches(load(bad, workers=1).train, 23, 0)(step)


def test_a_worker_that_dies_and_too_little_shared_memory_are_sentences(root, monkeypatch):
    before = multiprocessing.active_children()
    batches = data.batches(load(root, workers=1).train, 4, 0)
    batches(0)
    for child in multiprocessing.active_children():
        if child not in before:
            child.kill()
    with pytest.raises(UserError, match=r"^data.workers: a process that decodes images stopped \(.*data.workers=0"):
        for step in range(1, 9):
            batches(step)
    monkeypatch.setattr(prefetch.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    if os.path.isdir("/dev/shm"):
        with pytest.raises(UserError, match=r"^data.workers: 2 processes need \d+ MiB of shared memory"):
            data.batches(load(root, workers=2).train, 4, 0)(0)


def children(before: list) -> list:
    return [child for child in multiprocessing.active_children() if child not in before]


def test_workers_stay_a_batch_ahead_and_leave_nothing_behind(tmp_path):
    """Two places a worker: what is made is what was read and four more. Closed while the workers wait for room."""

    class Logged:  # here, so that a worker need not import this file
        path, shape = str(tmp_path), (2, 3)

        def __call__(self, number, out=None):
            out[...] = number
            open(f"{self.path}/{number}", "w").close()
            return {"image": out, "label": np.full(2, number)}

    before = multiprocessing.active_children()
    reader = prefetch.Reader(Logged(), 2)
    for step in range(3):
        assert (reader(step)["image"] == step).all()
    until = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 3 + 4 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    assert sorted(map(int, os.listdir(tmp_path))) == list(range(3 + 4))
    assert len(children(before)) == 2
    begun, name = time.monotonic(), reader._ring._name
    reader.close()
    assert time.monotonic() - begun < 20 and not children(before)  # Grain kills after 25 seconds what does not end
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(name)


KILLED = """
import os, sys
import numpy as np
from pwkd_jax.data import prefetch

class Numbers:
    shape = (2, 3)
    def __call__(self, number, out=None):
        out[...] = number
        return {"image": out, "label": np.full(2, os.getpid())}

if __name__ == "__main__":
    reader = prefetch.Reader(Numbers(), 1)
    print(reader(0)["label"][0], reader._ring._name, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_parent_leaves_no_workers_and_no_shared_memory(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, str(tmp_path / "killed.py")], stdout=subprocess.PIPE, env=environment, check=False)
    worker, name = done.stdout.decode().split()
    assert done.returncode == -9
    until = time.monotonic() + 60
    while time.monotonic() < until and (alive(int(worker)) or attached(name)):
        time.sleep(0.1)
    assert not alive(int(worker)) and not attached(name)


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        # Nobody here may have waited for it yet.
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def attached(name: str) -> bool:
    """Whether the segment is there still, without becoming one of those that have it."""
    return os.path.exists(f"/dev/shm/{name.strip('/')}")


# Unreadable images.


def broken(root, tmp_path, *names: str):
    """A copy of `root` in which these files are cut short."""
    copy = tmp_path / "broken"
    shutil.copytree(root, copy)
    for name in names:
        (copy / name).write_bytes((copy / name).read_bytes()[:300])
    return copy


def test_unreadable_training_images_are_replaced_named_and_counted(root, tmp_path, capsys):
    # In the order of their names: 11 and 12 are the last cat and the first dog; after both comes 13.
    bad = broken(root, tmp_path, "train/cat/11.JPEG", "train/dog/00.jpg")
    files = sorted((root / "train").glob("*/*"))
    good, found = load(root), load(bad, unreadable=0.1)
    expected, batches = data.batches(good.train, 5, 0), data.batches(found.train, 5, 0)
    replaced = 0
    for step in range(10):
        a, b = expected(step), batches(step)
        for row in range(5):
            if a["index"][row] not in (11, 12):
                assert all(np.array_equal(a[k][row], b[k][row]) for k in a)
                continue
            replaced += 1
            assert (b["index"][row], b["label"][row]) == (13, 1)
            numbers = stream.uniform(0, step * 5 + row)[0]
            image = images.train_image(files[13].read_bytes(), numbers, 16, (0.08, 1.0), False)
            np.testing.assert_array_equal(b["image"][row], image)
    assert replaced >= 4 and found.train.skipped.keys() == {11, 12}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(re.match(r"warning: file \S+ cannot be decoded \(.+\); the next readable", x) for x in lines)
    assert "(2 of at most 2 such images)" in lines[1]
    # Hosts and another start meet the same replacements.
    halves = [data.batches(load(bad, unreadable=0.1).train, 10, 0, p, 2) for p in range(2)]
    whole = data.batches(load(bad, unreadable=0.1).train, 10, 0)(3)
    assert same(whole, {k: np.concatenate([h(3)[k] for h in halves]) for k in whole})


def test_beyond_the_share_training_stops(root, tmp_path, capsys):
    bad = broken(root, tmp_path, "train/cat/11.JPEG", "train/cat/02.jpg", "validation/dog/01.JPEG")

    def refusal(**options) -> str:
        with pytest.raises(UserError) as e:
            batches = data.batches(load(bad, **options).train, 5, 0)
            for step in range(10):
                batches(step)
        return str(e.value)

    assert re.match(r"data.unreadable: file \S+train/cat/\S+ cannot be decoded \(.+\); copy or prepare it again", refusal())
    assert refusal(unreadable=0.05).startswith("data.unreadable: more than the 1 images that data.unreadable allows: file ")
    with pytest.raises(UserError, match=r"^data.test_split: file \S+dog/01.JPEG cannot be decoded .* no test image may"):
        list(data.eval_batches(load(bad, unreadable=0.5).test, 4))


# Folders.


def test_links_hidden_and_other_files(root, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "dog").symlink_to(root / split / "dog")  # a folder elsewhere
        (tmp_path / split / "cat").mkdir()
        (tmp_path / split / "cat" / "b.PNG").symlink_to(root / "train" / "cat" / "03.JPEG")
        (tmp_path / split / "cat" / "notes.txt").write_text("no image")
        (tmp_path / split / "cat" / "._b.png").write_text("a Mac was here")
        (tmp_path / split / "cat" / "deeper.jpg").mkdir()
        (tmp_path / split / ".DS_Store").write_text("")
        (tmp_path / split / ".cache").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "README.txt").write_text("")
    found, classes = folder.scan(str(tmp_path))
    assert classes == ["cat", "dog"] and {s: len(f) for s, f in found.items()} == {"train": 12, "validation": 5}
    (tmp_path / "train" / "cat" / "c.jpg").symlink_to(tmp_path / "gone.jpg")
    d = load(tmp_path)
    assert len(d.train) == 13
    with pytest.raises(UserError, match=r"c.jpg cannot be decoded \(No such file or directory\)"):
        data.batches(d.train, 13, 0)(0)


def test_folders_that_are_not_laid_out_right(root, tmp_path):
    def refusal(**arguments) -> str:
        with pytest.raises(UserError) as e:
            data.load(**{"name": "folder", "data_dir": str(tmp_path), "test_split": "validation", **arguments})
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "'' is not a folder; with data.name=folder give the one that holds SPLIT/CLASS/IMAGE" in refusal(data_dir="")
    assert "holds no SPLIT/CLASS folders of images" in refusal()
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert refusal().endswith(f"train/cat holds no images; their suffixes are {', '.join(folder.SUFFIXES)}")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(encode(photo(8, 8), "PNG"))
    assert refusal() == "data.test_split: data set 'folder' has no split 'validation'; it has train"
    for name in ("cat", "dgo"):
        (tmp_path / "validation" / name).mkdir(parents=True)
        (tmp_path / "validation" / name / "1.png").write_bytes(encode(photo(8, 9), "PNG"))
    assert f"class 'dgo' is in {tmp_path}/validation but not in {tmp_path}/train" in refusal()
    assert "it says 7, but data set 'folder' has 2 classes" in refusal(data_dir=str(root), num_classes=7)
    differ = r"data.image_size: file \S+ is 31x45x3 and others are 24x40x3; images of many sizes are streamed"
    assert re.search(differ, refusal(data_dir=str(root)))
    with pytest.raises(UserError, match=r"^data.image_size: 16 is not possible for 'digits'"):
        data.load("digits", streaming=PLAIN)


def test_a_folder_of_one_size_lies_in_ram(tmp_path):
    pixels = {(s, c, i): photo(8, 9, seed=hash((s, c, i)) % 1000) for s in ("a", "b") for c in "xy" for i in range(3)}
    for (split, name, i), image in pixels.items():
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / split / name / f"{i}.png").write_bytes(encode(image, "PNG"))
    d = data.load("folder", str(tmp_path), "a", "b")
    assert isinstance(d.train, data.Split) and d.image_shape == (8, 9, 3)
    np.testing.assert_array_equal(d.train.images, [pixels["a", c, i] for c in "xy" for i in range(3)])
    np.testing.assert_array_equal(d.test.labels, [0, 0, 0, 1, 1, 1])
    assert not data.many_sizes("folder", str(tmp_path))
    (tmp_path / "a" / "x" / "1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^data.data_dir: file \S+x/1.png cannot be decoded \(cannot identify image file\)"):
        data.load("folder", str(tmp_path), "a", "b")


# TFDS.


def tfds(tmp_path, train, shards: int = 2):
    """A prepared data set of `train` (encoded, label) pairs and one test image."""
    parts = [train[i * len(train) // shards : (i + 1) * len(train) // shards] for i in range(shards)]
    return _tfds(tmp_path, {"train": parts, "test": [[(encode(photo(30, 30)), 0)]]}, shape=(None, None, 3))


def test_tfds_records_and_labels_without_decoding(tmp_path, monkeypatch, capsys):
    encoded = [encode(photo(20 + 3 * i, 50, seed=i), "PNG" if i % 3 else "JPEG") for i in range(11)]
    labels = np.array([i * 3 % 5 for i in range(11)], np.int32)
    home = tfds(tmp_path, list(zip(encoded, labels.tolist(), strict=True)))
    d = data.load("toy", home, "train[2:]+train[:1]", "test", 0, PLAIN)
    assert (d.num_classes, d.image_shape, len(d.train)) == (5, (16, 16, 3), 10) and data.many_sizes("toy", home)
    chosen = [*range(2, 11), 0]
    batch = data.batches(d.train, 10, 0)(0)
    np.testing.assert_array_equal(batch["label"], labels[chosen][batch["index"]])
    for row, index in enumerate(batch["index"]):
        expected = images.train_image(encoded[chosen[index]], stream.uniform(0, row)[0], 16, (0.08, 1.0), False)
        np.testing.assert_array_equal(batch["image"][row], expected)

    def never(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(images, "decode", never)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capsys.readouterr()
    np.testing.assert_array_equal(d.train.labels, labels[chosen])
    assert d.train.labels.dtype == np.int32 and "reading the labels of 10 images once" in capsys.readouterr().err
    # Kept beside the data set: the next one reads no record.
    monkeypatch.setattr(records.Records, "read", never)
    again = data.load("toy", home, "train[2:]+train[:1]", "test", 0, PLAIN)
    np.testing.assert_array_equal(again.train.labels, labels[chosen])
    with pytest.raises(AssertionError):
        _ = data.load("toy", home, "train[1:]", "test", 0, PLAIN).train.labels


def test_labels_are_cached_for_the_user_where_the_data_set_cannot_be_written(tmp_path, monkeypatch):
    home = tfds(tmp_path / "data", [(encode(photo(9, 9)), i) for i in range(4)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = records.storage.replace

    def replace(path, content):
        if not path.is_relative_to(tmp_path / "cache"):
            raise PermissionError(13, "Permission denied")
        real(path, content)

    monkeypatch.setattr(records.storage, "replace", replace)
    np.testing.assert_array_equal(data.load("toy", home, streaming=PLAIN).train.labels, np.arange(4))
    [kept] = (tmp_path / "cache" / "pwkd_jax").iterdir()
    kept.write_bytes(kept.read_bytes()[:20])  # torn: read anew
    np.testing.assert_array_equal(data.load("toy", home, streaming=PLAIN).train.labels, np.arange(4))


def test_tfds_mistakes_are_named_by_record(tmp_path):
    good = encode(photo(20, 20))
    home = tfds(tmp_path, [(good, 0), (good, 1), (b"junk", 2), (good, 9)])

    def refusal(spec: str, **options) -> str:
        with pytest.raises(UserError) as e:
            d = data.load("toy", home, spec, "test", 0, dataclasses.replace(PLAIN, **options))
            data.batches(d.train, 4, 0)(0)
        return str(e.value)

    where = f"{tmp_path}/toy/1.0.0"
    assert refusal("train[:3]").startswith(
        f"data.unreadable: record 2 of split 'train' in {where} cannot be decoded (cannot identify image file)"
    )
    assert refusal("train[3:]") == (
        f"data.num_classes: record 3 of split 'train' in {where} has label 9; with 5 classes labels are 0 to 4"
    )
    shard = next((tmp_path / "toy" / "1.0.0").glob("*train*00001-of-00002"))
    kept = shard.read_bytes()
    shard.write_bytes(kept[: len(kept) // 3])
    assert re.match(r"data.unreadable: record \d of split 'train' in \S+ cannot be decoded \(", refusal("train[:3]"))
    shard.unlink()
    assert refusal("train") == f"data.data_dir: file {shard} is missing; prepare or copy the data set again"


# Configs and commands.


def arguments(root, *overrides: str) -> list[str]:
    common = (
        "data.name=folder", f"data.data_dir={root}", "data.test_split=validation", "data.crop_padding=0", "data.image_size=16",
        "data.resize=20", "data.mean=(0.5,0.5,0.5)", "data.std=(0.25,0.25,0.25)", "data.flip=true", "data.workers=0",
        "teacher.model=test_training:Tiny", "student.model=test_training:Tiny", "student.width=0.5", "seeds=1",
        "teacher.widths=(0.5,1.0)", "teacher.duration=4 steps", "student.duration=4 steps", "teacher.batch_size=16",
        "student.batch_size=16", "evaluation.every=4 steps", "arms=pwkd",
    )  # fmt: skip
    return ["--config=configs/digits.py", *(f"--config.{o}" for o in (*common, *overrides))]


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("data.crop_padding=1", "data.crop_padding: 1 is not possible; it should be 0 where data.image_size streams"),
        ("data.mean=()", "data.mean: "),
        ("student.same_crop=false", "student.same_crop: False is not possible; it should be true where data.image_size"),
        ("data.resize=15", "data.resize: 15 is not possible; it should be 0 (8/7 of it) or at least data.image_size, which"),
        ("data.scale=(0.5,0.2)", "data.scale: (0.5, 0.2) is not possible; it should be the smallest and the largest part"),
        ("data.scale=(0.0,1.0)", "data.scale: "),
        ("data.workers=-2", "data.workers: -2 is not possible; it should be -1 (one a core)"),
        ("data.unreadable=1.0", "data.unreadable: 1.0 is not possible; it should be in [0, 1)"),
        ("data.image_size=-1", "data.image_size: -1 is not possible"),
    ],
)
def test_contradictions_are_refused_by_name(root, override, sentence):
    given = [override] if override != "data.mean=()" else [override, "data.std=()"]
    with pytest.raises(UserError) as e:
        config.load(arguments(root, *given))
    assert str(e.value).startswith(sentence) and "\n" not in str(e.value)


def test_labels_of_the_whole_split_only_where_a_distiller_asks(root, monkeypatch):
    def never(self):
        raise AssertionError("the labels were read")

    with monkeypatch.context() as m:
        m.setattr(folder.Files, "labels", never)
        made = [definition.wants_labels(config.load(arguments(root, f"student.distiller.name={name}"))[0])
                for name in ("kd", "kd+at", "crd", "kd+crd")]  # fmt: skip
    assert made == [False, False, True, True]
    assert definition.wants_labels(config.load(["--config=configs/digits.py"])[0])
    for name in ("kd", "crd"):
        c = config.load(arguments(root, f"student.distiller.name={name}"))[0]
        batch = definition.prepare(c).batches(8, 0)(0)
        assert ("dataset_label" in batch) == (name == "crd")
    np.testing.assert_array_equal(batch["dataset_label"], [0] * 12 + [1] * 11)


def test_streamed_images_train_and_are_scored(root, tmp_path, capsys):
    where = f"--workdir={tmp_path / 'w'}"
    extra = ("teacher.calibration.images=20", "teacher.calibration.batch_size=8")
    assert train.main([*arguments(root, *extra), where]) == 0
    facts = json.loads((tmp_path / "w" / "data.json").read_text())
    assert (facts["train_images"], facts["test_images"], facts["image_shape"]) == (23, 9, [16, 16, 3])
    last = json.loads((tmp_path / "w" / "students" / "pwkd" / "seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluate.evaluate(str(tmp_path / "w" / "students" / "pwkd" / "seed0"), workers=0)
    assert (found["images"], found["top1"]) == (9, pytest.approx(last["top1"]))
    # A file says no size for a data set of many: it is what the model takes.
    file = str(tmp_path / "w" / "teacher" / "slimmable" / "width_1.safetensors")
    capsys.readouterr()
    line = [file, "--data=folder", f"--data-dir={root}", "--split=validation", "--workers=0", "--model=test_training:Tiny"]
    assert evaluate.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9
    for more, sentence in ((["--image-size=24"], "has 24x24x3 images"), (["--resize=8"], "--resize: 8 pixels are fewer")):
        assert evaluate.main([*line, *more]) == 2
        assert sentence in capsys.readouterr().err


def test_an_unreadable_image_stops_training_in_one_sentence(root, tmp_path, capsys):
    bad = broken(root, tmp_path, *(f"train/dog/{i:02d}.{'JPEG' if i % 2 else 'jpg'}" for i in range(11)))
    assert train.main([*arguments(bad), f"--workdir={tmp_path / 'w'}"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: data.unreadable: file ") and "Traceback" not in err


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (64, 73), (32, 37)])
def test_the_test_images_shorter_side_goes_with_their_size(size, shorter):
    assert data.Streaming(size).shorter == shorter and data.Streaming(size, resize=300).shorter == 300
