"""The communication of a compiled program, counted in its text.

On TPU a teacher's step with batch norm over the global batch has at most 2 * (batch-norm layers) + 1 all-reduces, whatever the
number of widths: a layer's statistics forward, their gradients backward, the parameters' gradients. With groups that lie on one
device there is one, the last (`training/device_gradients.py`). Other compilers merge less; count on the target.
"""

import math
import re

import jax.numpy as jnp

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

# `%name = TYPE kind(operands)`; an asynchronous one is a -start, which counts, and a -done, which does not.
_CALL = re.compile(rf"=\s+(?P<type>.*?)\s(?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<shape>[\d,]*)\]")
_DTYPES = {"pred": 1} | {
    short: jnp.dtype(name).itemsize
    for short, name in {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "s64": "int64",
                        "s32": "int32", "s16": "int16", "s8": "int8", "u64": "uint64", "u32": "uint32", "u16": "uint16",
                        "u8": "uint8", "c64": "complex64"}.items()
}  # fmt: skip


def collectives(compiled) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes of their results on one device)} of a compiled program, or of its text.

    One that carries a tuple of arrays counts once, with the bytes of all; one in a loop's body counts once, not once a turn.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if not (call := _CALL.search(line)):
            continue
        arrays = [
            _DTYPES.get(a["dtype"], 0) * math.prod(int(n) for n in a["shape"].split(",") if n)
            for a in _ARRAY.finditer(call["type"])
        ]
        # Of these the -start gives (operands, results, ...); an all-reduce-start gives its results alone.
        if call["start"] and call["kind"] in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :] if call["kind"] == "all-gather" else arrays[1:2]
        count, size = found.get(call["kind"], (0, 0))
        found[call["kind"]] = (count + 1, size + sum(arrays))
    return found
