"""Parts of JPEGs, decoded alone: the pixels of a whole decoding, and everything odd left to the general decoder."""

import concurrent.futures
import ctypes.util
import itertools

import cv2
import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_sample_images
from test_stream import encode, photo, pillow

from pwkd_jax.data import images, partial

SAMPLINGS = {"4:4:4": 0x111111, "4:2:2": 0x211111, "4:2:0": 0x221111, "4:1:1": 0x411111, "4:4:0": 0x121111}

needed = pytest.mark.skipif(partial.turbojpeg() is None, reason="needs TurboJPEG 3, as of pip install turbojpeg")


def drawn(height: int, width: int, sampling: str, progressive: bool = False, seed: int = 0) -> bytes:
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling], cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    return cv2.imencode(".jpg", photo(height, width, seed), options)[1].tobytes()


def check(encoded: bytes, size: tuple[int, int], reduce: int, *boxes: tuple[int, int, int, int]) -> None:
    expected = images.decode(encoded, reduce)  # which tests/test_stream.py holds against Pillow
    assert expected.shape[:2] == tuple(-(-side // reduce) for side in size)
    for top, left, height, width in boxes:
        found = partial.decode(encoded, size, reduce, top, left, height, width)
        assert found is not None
        np.testing.assert_array_equal(found, expected[top : top + height, left : left + width], err_msg=f"{top} {left}")


@needed
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_part_is_cut_from_the_whole_bit_for_bit(sampling, progressive):
    rng = np.random.default_rng(0)
    for size in ((61, 83), (32, 64), (1, 1), (7, 131), (90, 5)):
        encoded = drawn(*size, sampling, progressive)
        for reduce in (1, 2, 4, 8):
            rows, columns = (-(-side // reduce) for side in size)
            # Single pixels in all corners, whole borders, the image, and parts anywhere.
            boxes = [(top, left, 1, 1) for top in {0, rows - 1} for left in {0, columns - 1}]
            boxes += [(0, 0, 1, columns), (rows - 1, 0, 1, columns), (0, 0, rows, 1), (0, columns - 1, rows, 1)]
            boxes += [(0, 0, rows, columns)]
            for _ in range(12):
                top, left = int(rng.integers(rows)), int(rng.integers(columns))
                boxes += [(top, left, int(rng.integers(1, rows - top + 1)), int(rng.integers(1, columns - left + 1)))]
            check(encoded, size, reduce, *boxes)


@needed
def test_every_column_may_be_the_first_and_the_last():
    """Where colours are halved, the pixels beside a border take another rule; a part's borders are none of the image."""
    for sampling, size in itertools.product(("4:2:0", "4:2:2"), ((9, 34), (9, 35))):
        encoded = drawn(*size, sampling)
        check(encoded, size, 1, *((2, a, 5, b - a) for a, b in itertools.combinations(range(size[1] + 1), 2)))


@needed
def test_photographs_gray_images_and_camera_orientation():
    rng, exif = np.random.default_rng(1), PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, which is ignored
    for image, options in itertools.product(
        load_sample_images().images,
        ({"quality": 90}, {"mode": "L"}, {"progressive": True, "subsampling": 1, "exif": exif.tobytes()}),
    ):
        encoded = encode(image[: 400 + int(rng.integers(20)), : 600 + int(rng.integers(20))], **options)
        size = images.jpeg_header(encoded)[:2]
        for reduce in (1, 2):
            boxes = [images.random_crop(rng.random(41), *size, (0.08, 1.0)) for _ in range(6)]
            check(encoded, size, reduce, *(tuple(x // reduce for x in box) for box in boxes))


@needed
@pytest.mark.parametrize("size", [(300, 400), (61, 47), (500, 375)])
def test_training_images_are_the_same_without_the_library(size, monkeypatch):
    """Targets larger and smaller than the image, mirrored or not."""
    rng, found, calls = np.random.default_rng(2), [], []
    encoded = encode(photo(*size))
    numbers = rng.random((12, 41))
    real = partial.decode
    monkeypatch.setattr(partial, "decode", lambda *a: calls.append(real(*a) is not None) or real(*a))
    for library in (partial.turbojpeg, lambda: None):
        monkeypatch.setattr(partial, "turbojpeg", library)
        found.append([images.train_image(encoded, n, target, (0.08, 1.0), True) for n in numbers for target in (32, 96, 250)])
    assert calls == [True] * 36 + [False] * 36
    assert all(map(np.array_equal, *found))


@needed
def test_what_is_odd_is_left_to_the_general_decoder():
    good, size = drawn(60, 80, "4:2:0"), (60, 80)
    frame = good.index(b"\xff\xc0")
    odd = bytearray(good)
    odd[frame + 11] = 0x31  # three times as wide a brightness as colours
    for encoded in (encode(photo(60, 80), mode="CMYK"), encode(photo(60, 80), "PNG"), bytes(odd), b"", b"\xff\xd8\xff\xd9"):
        assert partial.decode(encoded, size, 1, 0, 0, 8, 8) is None
    assert partial.decode(good, (60, 81), 1, 0, 0, 8, 8) is None
    assert partial.decode(good + bytes(100), size, 1, 0, 0, 8, 8) is None  # where its end is not seen
    check(good, size, 1, (3, 5, 20, 30))


@needed
def test_a_cut_off_file_is_unreadable_whatever_part_is_asked_for(monkeypatch):
    """Also where the part lies before the cut; and so is one that is damaged where it is looked at."""
    encoded = drawn(200, 80, "4:2:0")
    with pytest.raises(images.Unreadable, match="truncated"):
        images._decode_part(encoded[:-900], (200, 80), 1, 0, 0, 8, 8)
    damaged = bytearray(encoded)
    middle = len(encoded) // 2
    damaged[middle : middle + 8] = b"\xff\xd9" * 4
    assert partial.decode(bytes(damaged), (200, 80), 1, 150, 0, 50, 80) is None
    np.testing.assert_array_equal(partial.decode(bytes(damaged), (200, 80), 1, 0, 0, 16, 80), pillow(encoded)[:16])
    check(encoded, (200, 80), 1, (150, 0, 50, 80))  # nothing is left of the failure


@needed
def test_threads_do_not_disturb_each_other():
    files = [drawn(120 + 8 * i, 160, "4:2:0", seed=i) for i in range(4)]
    expected = [pillow(f)[10:110, 20:150] for f in files]

    def same(i: int) -> bool:
        return all(
            np.array_equal(partial.decode(files[i], (120 + 8 * i, 160), 1, 10, 20, 100, 130), expected[i]) for _ in range(100)
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(4)))


def test_a_library_without_cropping_is_passed_over(monkeypatch):
    other = ctypes.util.find_library("c")
    assert other
    monkeypatch.setattr(partial, "_places", lambda: ["no such file", other])
    assert partial.turbojpeg.__wrapped__() is None
