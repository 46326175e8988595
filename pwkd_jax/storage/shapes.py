"""The shape of plain data, compared with what was meant."""

from typing import Any


def misfit(value: Any, shape: Any, where: str = "") -> str:
    """What keeps plain data from having the shape that `record` describes, as a phrase; '' where it has it."""
    if isinstance(shape, tuple):
        faults = [misfit(value, one, where) for one in shape]
        return "" if "" in faults else faults[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        wanted = {key.removesuffix("?"): inner for key, inner in shape.items() if key != "*"}
        if lacks := [key for key in shape if key != "*" and key[-1] != "?" and key not in value]:
            return f"it lacks '{where}{lacks[0]}'"
        inside = {key: wanted.get(key, shape.get("*", object)) for key in value}
        return next((f for key, inner in inside.items() if (f := misfit(value[key], inner, f"{where}{key}."))), "")
    if isinstance(shape, list) and isinstance(value, list):
        return next((f for i, x in enumerate(value) if (f := misfit(x, shape[0], f"{where}{i}."))), "")
    kind = type(value)
    right = shape is object or value is shape is None or kind is shape or (kind is int and shape is float)
    if right and (not isinstance(value, (int, float)) or shape is object or abs(value) < 2**1023):
        return ""
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", None: "null"}
    what = names[shape] if not isinstance(shape, (dict, list)) else "a list" if isinstance(shape, list) else "an object"
    name = f"'{where[:-1]}'" if where else "it"
    return f"{name} is {value!r:.40}, not {what}"
