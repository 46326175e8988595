"""Images whose samples are no bytes: what is black in them and what is white.

The type of 16-bit samples says it, the header of a PNM file and the bits of a packed TIFF do; floats and whole numbers of other
types do not, nor do 16-bit samples that end below a sixteenth of their range, as those of a 12-bit camera: there
`data.pixel_range` says it, or the image is refused, for it would come out black or white.
"""

import io
import re

import numpy as np
import PIL.Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# At most so many of the 255 steps from black to white are left of samples that use a sliver of their range.
SLIVER = 16

_PNM = re.compile(rb"P[2356]\s+(?:#[^\n]*\n\s*)*\d+\s+(?:#[^\n]*\n\s*)*\d+\s+(?:#[^\n]*\n\s*)*(\d+)\s")
_BITS, _FORMAT = 258, 339  # of TIFF: BitsPerSample and SampleFormat, 1 for whole numbers without a sign


class Unreadable(Exception):
    """Bytes that are no whole image, or say no colours; its text is the reason, as part of a sentence."""


class Unscaled(Unreadable):
    """An image that does not say what is black and white in it; its text is a sentence about it."""


def is_deep(encoded: bytes) -> bool:
    """Whether the header of an image announces samples other than bytes from 0 to 255."""
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return encoded[24:25] == b"\x10"
    if encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _deep_tiff(encoded)
    match = _PNM.match(encoded[:1000])
    return bool(match) and int(match[1]) != 255


def _deep_tiff(encoded: bytes) -> bool:
    try:
        tags = ImageFileDirectory_v2(encoded[: 16 if encoded[2:3] == b"+" or encoded[3:4] == b"+" else 8])
        file = io.BytesIO(encoded)
        file.seek(tags.next)
        tags.load(file)
        return max(tags.get(_BITS, (1,))) > 8 or any(f != 1 for f in tags.get(_FORMAT, (1,)))
    except Exception:  # a torn header: the decoders say what is wrong
        return False


def decode(encoded: bytes, cv2, pixel_range: tuple[float, ...] = ()) -> np.ndarray:
    """RGB uint8 [H, W, 3] of an image that `is_deep`. pixel_range: (black, white) in its own units, or ().

    Raises Unreadable where the bytes are no whole image, Unscaled where they do not say what is black and white.
    """
    samples = _rgb(_samples(encoded, cv2))
    low, high = float(np.min(samples)), float(np.max(samples))
    if pixel_range:
        image = _scaled(samples, *pixel_range)
        if low < high and np.ptp(image) == 0:
            raise Unscaled(
                f"its {samples.dtype} values, {low:g} to {high:g}, all become one between black and white of data.pixel_range, "
                f"{pixel_range[0]:g} and {pixel_range[1]:g}; give those of its own scale"
            )
        return image
    if (match := _PNM.match(encoded[:1000])) and int(match[1]) != 65535:
        return _scaled(samples, 0, int(match[1]))
    if samples.dtype == np.uint8:
        return samples
    if samples.dtype == np.uint16 and (match or samples.max() >= SLIVER << 8 or not samples.any()):
        return _cut(samples, encoded, cv2)
    raise Unscaled(
        f"its {samples.dtype} values, {low:g} to {high:g}, do not say what is black and white; give both in data.pixel_range, "
        f"as in {'(0.0,1.0)' if samples.dtype.kind == 'f' else '(0,4095)'}"
    )


def _samples(encoded: bytes, cv2) -> np.ndarray:
    """[H, W] or RGB or RGBA [H, W, C] as they are stored, of any type."""
    try:
        samples = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        samples = None
    if samples is not None:
        colours = samples.ndim == 3 and samples.shape[-1] in (3, 4)
        return samples[..., [2, 1, 0, 3][: samples.shape[-1]]] if colours else samples
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image)
    except Exception as e:  # Pillow's readers raise of everything
        raise Unreadable((str(e).strip() or type(e).__name__).splitlines()[0].partition(" <_io")[0]) from None


def _cut(samples: np.ndarray, encoded: bytes, cv2) -> np.ndarray:
    """16 bits to 8 as OpenCV does it, whose rounding differs between formats; it leaves out the packed bits of some TIFFs."""
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return (samples >> 8).astype(np.uint8) if image is None else image


def _scaled(samples: np.ndarray, black: float, white: float) -> np.ndarray:
    """uint8 of the same shape: 0 at black, 255 at white, rounded, and cut beyond them."""
    values = (samples.astype(np.float64) - black) * (255 / (white - black))
    if np.isnan(values).any():
        raise Unreadable("some of its values are not a number")
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _rgb(samples: np.ndarray) -> np.ndarray:
    if samples.ndim == 2:
        return np.repeat(samples[..., None], 3, axis=-1)
    if samples.shape[-1] in (1, 2):  # gray, and gray with transparency
        return np.repeat(samples[..., :1], 3, axis=-1)
    if samples.shape[-1] > 4:
        raise Unreadable(f"it has {samples.shape[-1]} channels, which are no colours")
    return np.ascontiguousarray(samples[..., :3])
