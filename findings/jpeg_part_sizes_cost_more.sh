#!/usr/bin/env bash
# libjpeg-turbo 3 (in turbojpeg 0.0.2): a JPEG decoded at 7/8, 3/4 or 5/8 of its size takes longer than one decoded whole.
#
# The library decodes at any eighth from 1/8 to 2, and less is asked of it at less: half of the pixels at 5/8. But vector
# instructions are written for the transforms to 8x8, 4x4, 2x2 and 1x1 pixels alone; of seven, six and five a side they are plain C,
# and that costs more than the pixels save. Guess before running: time falls with the pixels that are left, as at a half.
# Who meets it: whoever speeds up an input pipeline by the smallest scale that still covers a random crop, as `DCT scaling` is
# described. Halves, quarters and eighths pay (Pillow's draft mode and OpenCV's reduced reading have no others); between them,
# decoding whole and resizing is faster.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check turbojpeg==0.0.2 numpy==2.4.6 pillow==12.3.0
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import importlib.util
import io
import sys
import time

import numpy as np
import PIL.Image

path = importlib.util.find_spec("turbojpeg").origin
lib = ctypes.CDLL(path)  # whose symbols are those of the library that is linked into it
lib.tj3Init.restype = ctypes.c_void_p


class Scale(ctypes.Structure):
    _fields_ = (("num", ctypes.c_int), ("denom", ctypes.c_int))


lib.tj3DecompressHeader.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
lib.tj3SetScalingFactor.argtypes = (ctypes.c_void_p, Scale)
lib.tj3Decompress8.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)

rng = np.random.default_rng(0)
small = PIL.Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
file = io.BytesIO()
small.resize((512, 384), PIL.Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
encoded, state, out = file.getvalue(), lib.tj3Init(1), np.empty(512 * 384 * 3, np.uint8)
scales = {"1": (1, 1), "7/8": (7, 8), "3/4": (3, 4), "5/8": (5, 8), "1/2": (1, 2), "3/8": (3, 8), "1/4": (1, 4)}
least = dict.fromkeys(scales, float("inf"))
for _ in range(9):
    for name, (num, denom) in scales.items():
        begun = time.process_time()
        for _ in range(40):
            assert lib.tj3DecompressHeader(state, encoded, len(encoded)) == 0
            assert lib.tj3SetScalingFactor(state, Scale(num, denom)) == 0
            assert lib.tj3Decompress8(state, encoded, len(encoded), out.ctypes.data, 3 * 512 * num // denom, 0) == 0
        least[name] = min(least[name], time.process_time() - begun)
ratios = {name: seconds / least["1"] for name, seconds in least.items()}
for name, ratio in ratios.items():
    num, denom = scales[name]
    print(f"at {name}: {(num / denom) ** 2:.2f} of the pixels, {ratio:.2f} of the time")
if not min(ratios["7/8"], ratios["3/4"], ratios["5/8"]) > 1.1 > 1 > max(ratios["1/2"], ratios["1/4"]):
    sys.exit("scaled decoding takes other times now")
PYTHON
# Seen, on an AMD EPYC with AVX-512:
# at 1: 1.00 of the pixels, 1.00 of the time
# at 7/8: 0.77 of the pixels, 2.00 of the time
# at 3/4: 0.56 of the pixels, 1.61 of the time
# at 5/8: 0.39 of the pixels, 1.44 of the time
# at 1/2: 0.25 of the pixels, 0.83 of the time
# at 3/8: 0.14 of the pixels, 0.96 of the time
# at 1/4: 0.06 of the pixels, 0.75 of the time
