"""Image files of every kind that folders hold, good, odd and broken, each made once: {kind: content}."""

import functools
import io
import struct
import zlib

import numpy as np
import PIL.Image


def _picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def _saved(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def _good(size: tuple[int, int]) -> dict[str, bytes]:
    first = PIL.Image.fromarray(_picture(*size, 0))
    second = PIL.Image.fromarray(_picture(*size, 1))
    found = {f"png {mode}": _saved(first.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    clear = first.convert("P")
    found["png P with a clear colour"] = _saved(clear, "PNG", transparency=3)
    found["tiff PA"] = _saved(first.convert("P"), "TIFF")
    found |= {f"jpeg {mode}": _saved(first.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    found |= {f"tiff {mode}": _saved(first.convert(mode), "TIFF") for mode in ("1", "L", "RGB", "RGBA", "CMYK", "YCbCr")}
    found |= {kind.lower(): _saved(first, kind) for kind in ("BMP", "WEBP", "PPM", "JPEG2000")}
    found["gif"] = _saved(first.convert("P"), "GIF")
    found["gif of two"] = _saved(first, "GIF", save_all=True, append_images=[second], loop=0)
    found["webp of two"] = _saved(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    found["tiff of two"] = _saved(first, "TIFF", save_all=True, append_images=[second])
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    found["jpeg turned"] = _saved(first, "JPEG", exif=turned)
    found["png turned"] = _saved(first, "PNG", exif=turned)
    found["webp turned"] = _saved(first, "WEBP", exif=turned, lossless=True)
    found["tiff turned"] = _saved(first, "TIFF", tiffinfo={0x0112: 6})
    return found


def _deep(size: tuple[int, int]) -> dict[str, bytes]:
    ramp = np.linspace(0, 65535, size[0] * size[1]).reshape(size)
    found = {"png I;16": _saved(PIL.Image.fromarray(ramp.astype(np.uint16)), "PNG")}
    found["tiff I;16"] = _saved(PIL.Image.fromarray(ramp.astype(np.uint16)), "TIFF")
    found["tiff I"] = _saved(PIL.Image.fromarray(ramp.astype(np.int32)), "TIFF")
    found["tiff F"] = _saved(PIL.Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF")
    found["tiff F with nan"] = _saved(PIL.Image.fromarray(np.full(size, np.nan, np.float32)), "TIFF")
    found["png I;16 of 12 bits"] = _saved(PIL.Image.fromarray((ramp / 17).astype(np.uint16)), "PNG")
    found["pgm of 16 bits"] = b"P5 %d %d 65535\n" % (size[1], size[0]) + ramp.astype(">u2").tobytes()
    found["ppm of 4 bits"] = b"P6 %d %d 15\n" % (size[1], size[0]) + bytes(size[0] * size[1] * 3)
    return found


def _broken(good: dict[str, bytes]) -> dict[str, bytes]:
    found = {"empty": b"", "one byte": b"\xff", "text": b"not an image\n", "zeros": bytes(300)}
    each = "png RGB", "jpeg RGB", "tiff RGB", "bmp", "webp", "gif", "jpeg turned", "ppm", "jpeg2000", "tiff I;16", "png I;16"
    for kind in each:
        whole = good[kind]
        found[f"half of {kind}"] = whole[: len(whole) // 2]
        found[f"start of {kind}"] = whole[:20]
        found[f"nearly {kind}"] = whole[:-3]
    png, jpeg, bmp, ppm = good["png RGB"], good["jpeg RGB"], good["bmp"], good["ppm"]
    found["flipped png"] = png[:40] + bytes([png[40] ^ 0xFF]) + png[41:]
    at = jpeg.index(b"\xff\xc0") + 5
    found |= {f"png of {w}x{h}": _png_header(w, h) for w, h in ((20000, 20000), (2**31 - 1, 2**31 - 1), (0, 8), (10**6, 2))}
    found["jpeg of 65535x65535"] = jpeg[:at] + b"\xff" * 4 + jpeg[at + 4 :]
    found["jpeg of 0x0"] = jpeg[:at] + b"\0" * 4 + jpeg[at + 4 :]
    found["bmp of 2^31"] = bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:]
    found["bmp of -1"] = bmp[:18] + struct.pack("<ii", -1, -1) + bmp[26:]
    found["gif of 65535"] = good["gif"][:6] + b"\xff" * 4 + good["gif"][10:]
    found["ppm of 10^9"] = b"P6 1000000000 1000000000 255\n" + ppm[-30:]
    found["ppm of 99999"] = b"P6 99999 99999 255\n" + ppm[-30:]
    found["ppm of words"] = b"P6 wide high 255\n"
    tiff = good["tiff RGB"]
    found["tiff without end"] = tiff[:4] + struct.pack("<I", 8) + tiff[8:]
    found["tiff far away"] = tiff[:4] + struct.pack("<I", 2**32 - 1) + tiff[8:]
    return found


@functools.cache
def kinds() -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """(good of 8x8, good of 6x9, deep of 8x8, broken)."""
    good = _good((8, 8))
    deep = _deep((8, 8))
    return good, _good((6, 9)), deep, _broken(good | deep)


@functools.cache
def pixels(content: bytes) -> np.ndarray | None:
    """What Pillow reads, RGB uint8; None where it refuses."""
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None
