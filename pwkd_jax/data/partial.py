"""Part of a JPEG, decoded without the rest by libjpeg-turbo's own interface, where a library with it is installed.

A decoder has to undo the entropy coding of all rows down to the last one wanted, but may leave out what lies below, and the
inverse transforms, the enlarging of colours and their conversion of everything outside. The pixels are those of a whole
decoding bit for bit, for the neighbours that the enlarging of colours looks at are decoded too; so an installation with the
library and one without see the same images. The interface is TurboJPEG's third (version 3 of the library), which can crop.
"""

import ctypes
import functools
import importlib.machinery
import importlib.util
import sys
import threading
from pathlib import Path

import numpy as np

# Of turbojpeg.h, which promises to keep them.
_DECOMPRESS, _RGB = 1, 0
_SUBSAMPLING, _WIDTH, _HEIGHT = 4, 5, 6
_UNIT_WIDTH = (8, 16, 16, 8, 8, 32, 8)  # of a coded unit, by subsampling: 4:4:4, 4:2:2, 4:2:0, gray, 4:4:0, 4:1:1, 4:4:1
_NARROW = 8


class _Region(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("x", "y", "w", "h"))


class _Scale(ctypes.Structure):
    _fields_ = (("num", ctypes.c_int), ("denom", ctypes.c_int))


_ARGUMENTS = {
    "tj3Init": (ctypes.c_int,),
    "tj3Destroy": (ctypes.c_void_p,),
    "tj3Get": (ctypes.c_void_p, ctypes.c_int),
    "tj3DecompressHeader": (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t),
    "tj3SetScalingFactor": (ctypes.c_void_p, _Scale),
    "tj3SetCroppingRegion": (ctypes.c_void_p, _Region),
    "tj3Decompress8": (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
}


def _places() -> list[str]:
    """Where the library may be: in a conda environment, the system's folders, Homebrew's, the wheel turbojpeg."""
    name = "libturbojpeg.dylib" if sys.platform == "darwin" else "libturbojpeg.so.0"
    places = [str(Path(sys.prefix) / "lib" / name), name, f"/opt/homebrew/lib/{name}"]
    spec = importlib.util.find_spec("turbojpeg")
    # PyTurboJPEG's module has the same name, and is no library.
    if spec and spec.origin and spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        places.append(spec.origin)  # whose symbols are those of what it is linked to as well
    return places


@functools.cache
def turbojpeg() -> ctypes.CDLL | None:
    """TurboJPEG with cropping; None where none is installed."""
    for place in _places():
        try:
            found = ctypes.CDLL(place)
            for name, arguments in _ARGUMENTS.items():
                getattr(found, name).argtypes = arguments
        except (OSError, AttributeError):  # not there, or of version 2
            continue
        found.tj3Init.restype = ctypes.c_void_p
        found.tj3Destroy.restype = None
        return found
    return None


class _Decoder:
    """A state of the library, and memory that is used again, whose pages then need not be made anew; for one thread."""

    def __init__(self, lib: ctypes.CDLL):
        self.state, self._destroy = lib.tj3Init(_DECOMPRESS), lib.tj3Destroy
        self.memory = np.empty(0, np.uint8)

    def __del__(self):
        self._destroy(self.state)


_thread = threading.local()


def decode(
    encoded: bytes, size: tuple[int, int], reduce: int, top: int, left: int, height: int, width: int
) -> np.ndarray | None:
    """RGB uint8 [height, width, 3], a part of `images.decode(encoded, reduce)`; valid until the thread's next call.

    size: (height, width) that the header of the JPEG says. The part is given in pixels of the reduced image and lies in it.
    None where there is no library, or it does not do this file: damaged, of four colours, of odd subsampling. Damage below
    the part is not seen, but a file that is cut off is.
    """
    # The bytes FF D9 cannot be in coded pixels, so that they are here what ends an image.
    if (lib := turbojpeg()) is None or b"\xff\xd9" not in encoded[-64:]:
        return None
    if not hasattr(_thread, "decoder"):
        _thread.decoder = _Decoder(lib)
    own, length = _thread.decoder, len(encoded)
    state = own.state
    if lib.tj3DecompressHeader(state, encoded, length):
        return None
    kind = lib.tj3Get(state, _SUBSAMPLING)
    if not 0 <= kind < len(_UNIT_WIDTH) or (lib.tj3Get(state, _HEIGHT), lib.tj3Get(state, _WIDTH)) != size:
        return None
    # From where a unit begins, so that the pixel before the first is there, to one after the last; never a strip so narrow that
    # its colours are enlarged by another rule.
    unit, whole = _UNIT_WIDTH[kind] // reduce, -(-size[1] // reduce)
    first = max(min(left - 1, whole - _NARROW), 0) // unit * unit
    columns = min(max(left + width + 1, first + _NARROW), whole) - first
    if own.memory.size < height * columns * 3:
        own.memory = np.empty(height * columns * 3, np.uint8)
    # These fail for what is damaged too, which then goes to the general decoder.
    if (
        lib.tj3SetScalingFactor(state, _Scale(1, reduce))
        or lib.tj3SetCroppingRegion(state, _Region(first, top, columns, height))
        or lib.tj3Decompress8(state, encoded, length, own.memory.ctypes.data, 3 * columns, _RGB)
    ):
        return None
    return own.memory[: height * columns * 3].reshape(height, columns, 3)[:, left - first : left - first + width]
