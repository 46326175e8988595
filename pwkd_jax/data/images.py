"""One image of any size, from its encoded bytes to the square of pixels that a network takes, on the host.

Decoding is OpenCV's, which gives the pixels of Pillow bit for bit at twice its speed; what OpenCV cannot read, and JPEGs
of four colours, go to Pillow itself. Of a JPEG that is trained on, `partial` decodes the crop alone where it can. As with
Pillow and TensorFlow the orientation in a camera's metadata is ignored.
"""

import io
import math

import numpy as np
import PIL.Image

from pwkd_jax.data import depth, partial
from pwkd_jax.data.depth import Unreadable
from pwkd_jax.errors import UserError

RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
NUMBERS = 41  # random numbers of one training image: four for each of ten tries, and one for the flip


def opencv():
    """OpenCV without threads of its own: processes share the cores, and its pool would make each of them slower."""
    try:
        import cv2
    except ImportError as e:
        raise UserError(f"data.image_size: streaming needs opencv-python-headless, which cannot be imported ({e})") from e
    if cv2.getNumThreads() > 1:
        cv2.setNumThreads(0)
    return cv2


def jpeg_header(encoded: bytes) -> tuple[int, int, int] | None:
    """(height, width, colours) of a JPEG, from its frame header; None for anything else."""
    if encoded[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 < len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame headers, SOF0 to SOF15
            height, width = (int.from_bytes(encoded[i : i + 2], "big") for i in (at + 5, at + 7))
            return height, width, encoded[at + 9]
        # Any number of bytes 0xFF may fill the room before a marker; the markers without a length come later.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return None


def decode(encoded: bytes, reduce: int = 1, pixel_range: tuple[float, ...] = ()) -> np.ndarray:
    """RGB uint8 [H, W, 3] of any format that OpenCV or Pillow knows by its content; of several pictures in it, the first.

    reduce: 1, 2, 4 or 8, a JPEG only: decoded at so small a part of its size, [ceil(H / reduce), ceil(W / reduce), 3], by
    smaller inverse transforms; what that costs falls nearly as its pixels do. pixel_range: (black, white) of samples that
    are no bytes, see `depth`. Raises Unreadable.
    """
    cv2 = opencv()
    if depth.is_deep(encoded):
        return depth.decode(encoded, cv2, pixel_range)
    header = jpeg_header(encoded)
    if encoded and (header is None or header[2] != 4):
        # OpenCV's names of the reduced modes contain the bit of BGR, which excludes that of RGB.
        scale = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
                 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}[reduce]  # fmt: skip
        try:
            flags = scale | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        except cv2.error:
            image = None
        if image is not None:
            return image
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            if reduce > 1:
                image.draft("RGB", (image.width // reduce, image.height // reduce))
            return np.asarray(image.convert("RGB"))
    except Exception as e:  # Pillow's readers raise of everything
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].partition(" <_io")[0]
        raise Unreadable(reason if encoded else "no bytes") from None


def random_crop(numbers: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of Inception's random crop, as torchvision's RandomResizedCrop draws it.

    numbers: at least 40, uniform in [0, 1). Its area is uniform in `scale` times the image's, the logarithm of its ratio
    of width to height uniform between those of RATIO, its place uniform. A draw that does not fit is repeated up to ten
    times; after that it is the largest central crop of a ratio in RATIO.
    """
    for area, ratio, down, right in numbers[:40].reshape(10, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _reduction(height: int, width: int, size: int) -> int:
    """The smallest part at which height and width are still at least `size`. Not of the eighths between, which libjpeg-turbo
    knows and takes longer for than for the whole (findings/jpeg_part_sizes_cost_more.sh)."""
    return next((s for s in (8, 4, 2) if min(height, width) // s >= size), 1)


def resize(image: np.ndarray, height: int, width: int, fast: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """`image` at another size: the mean of the pixels covered where it shrinks, bilinear where it grows.

    INTER_AREA weighs every pixel, as Pillow's and torchvision's resampling does; INTER_LINEAR reads four neighbours whatever
    the factor, so that an image shrunken much is full of aliases. To enlarge, INTER_AREA would repeat pixels.
    fast: linear down to a quarter of the pixels too, where the four that it reads are as many as it replaces, as TensorFlow's
    recipes do; it takes a third of the time (tests/bench/input.py), and reduced decoding leaves a JPEG mostly such factors.
    """
    cv2 = opencv()
    by = (image.shape[0] / height, image.shape[1] / width)
    area = min(by) >= 1 and (not fast or by[0] * by[1] > 4)
    return cv2.resize(image, (width, height), out, interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR)


def _decode_part(
    encoded: bytes, size: tuple[int, int], reduce: int, top: int, left: int, height: int, width: int
) -> np.ndarray:  # fmt: skip
    """These rows and columns of a JPEG of `size`, as whole pixels of the image decoded at 1 / reduce of it."""
    rows, columns = (-(-side // reduce) for side in size)
    top, left, height, width = (round(x / reduce) for x in (top, left, height, width))
    bottom, right = min(top + height, rows), min(left + width, columns)
    if (part := partial.decode(encoded, size, reduce, top, left, bottom - top, right - left)) is not None:
        return part
    image = decode(encoded, reduce)
    if image.shape[:2] != (rows, columns):
        raise Unreadable("its header and its pixels differ in size")
    return image[top:bottom, left:right]


def train_image(
    encoded: bytes, numbers: np.ndarray, size: int, scale: tuple[float, float], flip: bool, out: np.ndarray | None = None,
    pixel_range: tuple[float, ...] = (),
) -> np.ndarray:  # fmt: skip
    """A random crop of an encoded image, resized and perhaps mirrored: uint8 [size, size, 3].

    numbers: NUMBERS of them, uniform in [0, 1), which alone decide what is random. The crop is drawn first, and a JPEG
    decoded at a half, quarter or eighth where the crop then still has `size` pixels each way. out: written and returned where
    given. pixel_range: see `decode`. Raises Unreadable.
    """
    header = jpeg_header(encoded)
    image = None if header else decode(encoded, 1, pixel_range)
    height, width = header[:2] if header else image.shape[:2]
    if not height or not width:
        raise Unreadable("its header gives no size")
    top, left, h, w = random_crop(numbers, height, width, scale)
    if image is None:
        image = _decode_part(encoded, (height, width), _reduction(h, w, size), top, left, h, w)
    else:
        image = image[top : top + h, left : left + w]
    image = resize(image, size, size, fast=True, out=out)
    return opencv().flip(image, 1, image) if flip and numbers[40] < 0.5 else image  # last, when it is smallest and at hand


def test_image(encoded: bytes, size: int, shorter: int, pixel_range: tuple[float, ...] = ()) -> np.ndarray:
    """The central `size` x `size` pixels after the shorter side became `shorter`: uint8 [size, size, 3].

    The longer side becomes int(shorter * longer side / shorter side), as in torchvision. Raises Unreadable.
    """
    header = jpeg_header(encoded)
    image = decode(encoded, _reduction(*header[:2], shorter)) if header else decode(encoded, 1, pixel_range)
    height, width = header[:2] if header else image.shape[:2]
    if height <= width:
        height, width = shorter, int(shorter * width / height)
    else:
        height, width = int(shorter * height / width), shorter
    image = resize(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]
