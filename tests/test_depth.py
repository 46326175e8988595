"""Images deeper than 8 bits: scaled by their type, their header or a key, and refused where none says what is white."""

import io
import struct

import cv2
import numpy as np
import PIL.Image
import pytest
from test_stream import PLAIN, encode, photo

from pwkd_jax import config, data
from pwkd_jax.data import depth, images, soundness
from pwkd_jax.errors import UserError

RAMP = np.arange(1024).reshape(32, 32)  # 0 to 1023


def pil(array: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def opencv(array: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def packed(bits: int) -> bytes:
    """A TIFF of 8x8 samples of so many bits without gaps, from 0 to nearly all of them."""
    values = np.arange(64) << (bits - 6)
    body = int("".join(f"{v:0{bits}b}" for v in values), 2).to_bytes(8 * bits, "big")
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 1), (273, 122), (277, 1), (278, 8), (279, len(body))]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + struct.pack("<I", 0) + body


@pytest.mark.parametrize(
    "encoded, shift",
    [
        (pil((RAMP * 64).astype(np.uint16), "PNG"), 2), (pil((RAMP * 64).astype(np.uint16), "TIFF"), 2),
        (opencv(np.dstack([RAMP * 64] * 3).astype(np.uint16), ".png"), 2),
        (b"P5\n# made\n32 32\n1023\n" + RAMP.astype(">u2").tobytes(), 2),
        (b"P5 32 32 65535\n" + (RAMP * 64).astype(">u2").tobytes(), 2),
    ],
)  # fmt: skip
def test_types_and_headers_that_say_it(encoded, shift):
    found = images.decode(encoded)
    assert found.dtype == np.uint8 and found.shape == (32, 32, 3)
    assert np.abs(found - (RAMP >> shift)[..., None].astype(int)).max() <= 1


def test_sixteen_bits_keep_the_pixels_they_had():
    """Those of OpenCV's own reduction to 8 bits, which rounds colours in TIFF and cuts the rest."""
    drawn = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    for suffix, array in ((".png", drawn), (".tif", drawn), (".png", drawn[..., 0]), (".tif", drawn[..., 0])):
        encoded = opencv(array, suffix)
        want = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(images.decode(encoded), want)


def test_packed_bits_and_few_values_of_a_pnm():
    for bits in (10, 12, 14):
        np.testing.assert_array_equal(images.decode(packed(bits))[..., 0], np.arange(64).reshape(8, 8) * 4)
    gray = b"P5 4 4 15\n" + bytes(range(16))
    np.testing.assert_array_equal(images.decode(gray)[..., 1], np.arange(16).reshape(4, 4) * 17)


UNSAID = {
    "float32": pil((RAMP / 1023).astype(np.float32), "TIFF"),
    "int32": pil((RAMP * 1000).astype(np.int32), "TIFF"),
    "uint16": pil((RAMP * 4).astype(np.uint16), "TIFF"),  # of a 12-bit camera
    "float64": opencv(RAMP / 1023, ".tif"),
    "int16": opencv((RAMP - 512).astype(np.int16), ".tif"),
    "uint16 PNG": pil((RAMP * 4).astype(np.uint16), "PNG"),
    "float32 colours": opencv(np.dstack([RAMP / 1023] * 3).astype(np.float32), ".tif"),
}
RANGES = {"float32": (0, 1), "int32": (0, 1023000), "uint16": (0, 4092), "float64": (0, 1), "int16": (-512, 511),
          "uint16 PNG": (0, 4092), "float32 colours": (0, 1)}  # fmt: skip


@pytest.mark.parametrize("kind", UNSAID)
def test_what_says_nothing_is_refused_and_scaled_by_the_key(kind):
    with pytest.raises(depth.Unscaled, match=f"^its {kind.split()[0]} values, .* to .*; give both in data.pixel_range, as in"):
        images.decode(UNSAID[kind])
    found = images.decode(UNSAID[kind], 1, RANGES[kind])
    want = np.rint(RAMP * 255 / 1023)
    assert np.abs(found - want[..., None]).max() <= 1 and (found.min(), found.max()) == (0, 255)
    for function in (lambda r: images.train_image(UNSAID[kind], np.full(41, 0.5), 32, (1.0, 1.0), False, None, r),
                     lambda r: images.test_image(UNSAID[kind], 32, 32, r)):  # fmt: skip
        assert function(RANGES[kind]).max() > 240
        with pytest.raises(images.Unreadable):
            function(())


def test_values_beyond_the_range_are_cut_and_broken_ones_refused():
    array = np.array([[-1.0, 0.0], [1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(images.decode(pil(array, "TIFF"), 1, (0, 1))[..., 0], [[0, 0], [255, 255]])
    np.testing.assert_array_equal(images.decode(pil(array, "TIFF"), 1, (1, 0))[..., 0], [[255, 255], [0, 0]])
    array[0, 0] = np.nan
    with pytest.raises(images.Unreadable, match="not a number"):
        images.decode(pil(array, "TIFF"), 1, (0, 1))
    with pytest.raises(images.Unreadable, match="all become one"):
        images.decode(UNSAID["float32"], 1, (0, 65535))
    with pytest.raises(images.Unreadable):
        images.decode(UNSAID["float32"][:200], 1, (0, 1))


def test_black_frames_and_bytes_are_as_they_were():
    assert not images.decode(pil(np.zeros((4, 4), np.uint16), "PNG")).any()
    image = photo(9, 12)
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(images.decode(encode(image, kind), 1, (0, 65535)), image)


def deep_folder(home, encoded: bytes, suffix: str = "tif"):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (home / split / name).mkdir(parents=True)
            for i in range(2):
                (home / split / name / f"{i}.{suffix}").write_bytes(encoded)
    return str(home)


def test_a_folder_names_the_file_and_takes_the_key(tmp_path):
    root = deep_folder(tmp_path, UNSAID["uint16"])
    with pytest.raises(UserError, match=r"^data.pixel_range: file \S+train/cat/0.tif is no image of bytes, and its uint16"):
        data.load("folder", root)
    d = data.load("folder", root, pixel_range=(0, 4092))
    assert (d.train.images.min(), d.train.images.max()) == (0, 255)
    with pytest.raises(UserError, match=r"^data.unreadable: file \S+ cannot be decoded \(its uint16 .* data.pixel_range"):
        data.batches(data.load("folder", root, streaming=PLAIN).train, 2, 0)(0)
    with pytest.raises(UserError, match=r"^data.pixel_range: file \S+train/cat/0.tif is no image of bytes, and its uint16"):
        soundness.check(data.load("folder", root, streaming=PLAIN).train, None, 2)
    streamed = data.load("folder", root, streaming=data.Streaming(32, resize=32, workers=0, pixel_range=(0, 4092)))
    assert next(iter(data.eval_batches(streamed.test, 4)))["image"].max() == 255


@pytest.mark.parametrize("streaming", [None, data.Streaming(32, resize=32, workers=0)])
def test_a_set_that_uses_a_sliver_is_warned_of(tmp_path, capsys, streaming):
    d = data.load("folder", deep_folder(tmp_path, pil((RAMP // 64).astype(np.uint8), "PNG"), "png"), streaming=streaming)
    soundness.check(d.train, d.test, 2)
    assert capsys.readouterr().err.startswith("warning: no pixel of the training images is above 15 of 255")


@pytest.mark.parametrize("given, right", [("(0,1)", "() unless data.name is 'folder'"), ("(1,1)", ""), ("(1,)", "() or the")])
def test_a_range_that_is_none(given, right):
    more = [] if "unless" in right else ["--config.data.name=folder"]
    with pytest.raises(UserError, match=r"^data.pixel_range: .* is not possible; it should be ") as e:
        config.load(["--config=configs/digits.py", f"--config.data.pixel_range={given}", *more])
    assert right in str(e.value)
