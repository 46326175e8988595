"""What happens to files: cut, bits flipped, spliced, exchanged for another of their kind; and to JSON, fields edited."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

PLACES = st.integers(0, 9999).map(lambda n: n / 10_000)
VALUES = (None, True, False, 0, -1, 1, 3, 0.5, 1e400, float("nan"), 2**70, "", "x", "0.5", "../..", [], [0], ["a"], [[]], {},
          {"a": 1}, "é\u0000", -0.0)  # fmt: skip
WAYS = ("cut", "cut", "flip", "flip", "flip", "splice", "exchange", "exchange", "longer", "zeros", "empty", "missing", "folder",
        "text", "inside")  # fmt: skip
EDITS = ("drop", "rename", "value", "value", "value", "kind")


@st.composite
def damages(draw, text: bool = False) -> dict:
    """What `damaged` does to a file. text: it is JSON, whose fields may change too."""
    how = draw(st.sampled_from(WAYS + ("field",) * 14 * text))
    found = {"how": how, "at": draw(PLACES), "to": draw(PLACES)}
    found |= {"size": draw(st.integers(1, 64)), "bit": draw(st.integers(0, 7))}
    if how == "field":
        edit = st.tuples(PLACES, st.sampled_from(EDITS), st.sampled_from(VALUES))
        found["edits"] = [draw(edit) for _ in range(draw(st.sampled_from((1, 1, 1, 2))))]
    return found


def damaged(content: bytes, other: bytes, damage: dict) -> bytes | None:
    """The file after it; other: another file of its kind. None: it is gone."""
    at, to, size = int(damage["at"] * len(content)), int(damage["to"] * len(other)), damage["size"]
    match damage["how"]:
        case "cut":
            return content[:at]
        case "flip":
            return content[:at] + bytes([content[at] ^ 1 << damage["bit"]]) + content[at + 1 :] if content else content
        case "splice":
            return content[:at] + other[to : to + size] + content[at + size :]
        case "inside":
            return content[:at] + content[at + size :]
        case "exchange":
            return other
        case "longer":
            return content + other[:size]
        case "zeros":
            return content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]
        case "empty":
            return b""
        case "text":
            return b"<html>404: not found</html>\n"
        case "field":
            value = json.loads(content)
            for edit in damage["edits"]:
                value = edited(value, *edit)
            return json.dumps(value).encode()
    return None


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, x in inner for p in _places(x, (*path, key))]


def edited(value: Any, at: float, how: str, new: Any) -> Any:
    """JSON with one field dropped, renamed, or of another value or kind; of short paths as often as of long ones."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places:
        return new
    depths = sorted({len(p) for p in places})
    depth = depths[int(at * len(depths))]
    those = [p for p in places if len(p) == depth]
    *way, last = those[int(at * len(depths) % 1 * len(those))]
    holder = value
    for key in way:
        holder = holder[key]
    if how == "drop":
        del holder[last]
    elif how == "rename" and isinstance(holder, dict):
        holder[f"{last}_"] = holder.pop(last)
    elif how == "kind":
        old = holder[last]
        holder[last] = str(old) if isinstance(old, (int, float)) else [old] if isinstance(old, str) else {"0": old}
    else:
        holder[last] = new
    return value
