"""Folders of images as people leave them: a strategy for plans, {path: kind of entry}, what writes them, and another walk."""

import os
from collections import Counter
from pathlib import Path

import fuzz_images
from hypothesis import strategies as st

CLASSES = ("cat", "dog", "big cat", "big", "ä", "1", "2", "10", "0", "a.b", "images", "Cat", "a,b", "-x", "%s", "[x]", "x.png")
SPLITS = ("train", "test", "val", "my test")
NAMES = ("1.png", "2.png", "3.PNG", "a b.jpg", "ü.jpeg", "x", "y.gif", "1.jpg", "z.tiff", "w.webp", "n.xyz", "p.ppm",
    "-.bmp", "a.png.png", "s.JFIF")
LITTER = (".DS_Store", "Thumbs.db", "._1.png", "desktop.ini", ".hidden.png", "__MACOSX/1.png", ".ipynb_checkpoints/1.png")
STRAY = ("notes.txt", "README", "list.csv", "clip.mp4", "weights.bin", "labels.txt", "train.txt", "1.xml")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _files(draw, odd: bool) -> dict[str, str]:
    good, other, deep, broken = fuzz_images.kinds()
    found = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=0 if odd else 1, max_size=3, unique=True)):
        found[name] = "good " + draw(st.sampled_from(sorted(good)))
    if odd:
        name = draw(st.sampled_from(NAMES[:4]))
        kinds = (("other", other), ("deep", deep), ("broken", broken), ("broken", broken))
        what, those = draw(st.sampled_from(kinds))
        choice = st.sampled_from(("text", "deeper", "deeper still", "loop", "dangling", "dangling text", "link",
            "link to class", "fifo", "folder",
                                  what, what, what, "none", "stray", "litter"))  # fmt: skip
        match draw(choice):
            case "text":
                found["notes.txt"] = "text"
            case "deeper" | "deeper still" as where:
                found[f"{'sub' if where == 'deeper' else 'a/b/c'}/{name}"] = "good png RGB"
            case "loop":
                found["sub/again"] = "link .."
                found["sub/1.png"] = "good png L"
            case "dangling":
                found[name] = "link nowhere"
            case "dangling text":
                found["gone.txt"] = "link nowhere"
            case "link":
                found["linked.png"] = "link ../../outside.png"
            case "link to class":
                found["other"] = "link ../../elsewhere"
            case "fifo":
                found["pipe.png"] = "fifo"
                found["pipe"] = "fifo"
                found["to the pipe.png"] = "link pipe"
                found["to the device.png"] = "link /dev/zero"
            case "folder":
                found["folder.png"] = "folder"
            case "none":
                found.clear()
            case "stray":
                found[draw(st.sampled_from(STRAY))] = "text"
            case "litter":
                found[draw(st.sampled_from(LITTER))] = "good png RGB"
            case _:
                found[name] = f"{what} {draw(st.sampled_from(sorted(those)))}"
    return found


@st.composite
def trees(draw) -> dict:
    """{"entries": {path: kind}, "train", "test": split specifications, "size": 0 or pixels of streamed images}."""
    entries = {"outside.png": "good png RGB", "elsewhere/e.png": "good png RGB"}
    classes = draw(st.lists(st.sampled_from(CLASSES), min_size=1 if draw(st.integers(0, 9)) == 0 else 2, max_size=4,
        unique=True))
    odd = draw(st.integers(0, 4))  # how many oddities
    odds = [draw(st.sampled_from(("class", "class", "class", "split", "loose", "beside", "flat",
        "missing"))) for _ in range(odd)]
    splits = ["train", draw(st.sampled_from(("test", "test", "val", "my test")))]
    for split in splits:
        own = list(classes)
        if "split" in odds and draw(st.booleans()):
            own = draw(st.sampled_from((own[1:], [*own, "extra"], [*own[1:], "extra"], [])))
        for name in own:
            for file, kind in _files(draw, "class" in odds and draw(st.booleans())).items():
                entries[f"{split}/{name}/{file}"] = kind
            if not any(path.startswith(f"{split}/{name}/") for path in entries):
                entries[f"{split}/{name}"] = "folder"
        if "loose" in odds:
            entries[f"{split}/{draw(st.sampled_from(STRAY + LITTER))}"] = "text"
            if draw(st.booleans()):
                entries[f"{split}/loose.png"] = "good png RGB"
    if "beside" in odds:
        entries[draw(st.sampled_from(("runs/a/x.bin", "notes.txt", "val/bird/1.png", "empty/x/y/z.txt", "train2",
            "test/deep")))] = "text"
    if "missing" in odds:
        splits[1] = draw(st.sampled_from(("nope", "all", "train", "", "test/cat")))
    if "flat" in odds:
        entries = {path: kind for path, kind in entries.items() if not path.startswith(f"{splits[1]}/")}
        entries |= _flat(draw, splits[1] or "test", classes)
        if set(odds) != {"flat"} or len(classes) < 2 or splits[1] == "train":
            entries.pop("right list/", None)
    cut = draw(st.sampled_from(("", "", "", "", "stratified(train, 50%)", "train[:50%]")))
    return {"entries": entries, "train": "train" if entries.get("right list/") else cut or "train", "test": splits[1],
        "size": draw(st.sampled_from((0, 0, 4)))}


def _flat(draw, split: str, classes: list[str]) -> dict:
    """A split whose classes stand in a file, right or half right: content as bytes."""
    names = draw(st.lists(st.sampled_from(NAMES[:8]), min_size=1, max_size=4, unique=True))
    inner = draw(st.sampled_from(("", "images/")))
    mark = draw(st.sampled_from((" ", "\t", ",", ";", ", ")))
    given = [draw(st.sampled_from(classes)) for _ in names]
    rows = [f"{name}{mark}{label}" for name, label in zip(names, given, strict=True)]
    how = draw(st.sampled_from(("right", "right", "right", "stems", "list", "numbers", "short", "unknown", "twice", "header",
        "more", "blank", "bytes",
                                "boxes", "empty", "none", "folder", "crlf", "bom")))  # fmt: skip
    match how:
        case "stems":
            rows = [f"{Path(name).stem}{mark}{label}" for name, label in zip(names, given, strict=True)]
        case "list":
            rows = given
        case "numbers":
            rows = [f"{name}{mark}{i}" for i, name in enumerate(names)]
        case "short":
            rows = rows[1:]
        case "unknown":
            rows[0] = f"{names[0]}{mark}unknown"
        case "twice":
            rows.append(f"{names[0]}{mark}{classes[-1]}")
        case "header":
            rows.insert(0, f"image{mark}label")
        case "more":
            rows.append(f"absent.png{mark}{classes[0]}")
        case "blank":
            rows = ["", *rows, "  ", ""]
        case "bytes":
            rows = ["\udcff\udcfe\x00", *rows]
        case "boxes":
            rows = [f"{row}{mark if mark != ' ' else chr(9)}0\t32\t44" for row in rows]
        case "empty":
            rows = []
        case "none":
            rows = None
        case "folder":
            return {f"{split}/{name}": "good png RGB" for name in names} | {f"{split}/{split}_annotations.txt": "folder"}
        case "crlf":
            rows = [row + "\r" for row in rows]
        case "bom":
            rows[0] = "\ufeff" + rows[0]
    found: dict = {f"{split}/{inner}{name}": "good png RGB" for name in names}
    if rows is not None:
        found[f"{split}/{split}_annotations.txt"] = ("\n".join(rows) + "\n").encode(errors="surrogateescape")
        # What was meant; paths with a slash at their end are written nowhere.
        found[f"{split}/"] = dict(zip(names, given, strict=True)) if how != "numbers" else None
        different = how == "twice" and given[0] != classes[-1]
        found["wrong list/"] = different or how in ("short", "unknown", "empty", "bytes")
        clear = len({Path(name).stem for name in names}) == len(names) or how != "stems"
        found["right list/"] = clear and how in ("right", "stems", "header", "more", "blank", "boxes", "crlf", "bom")
    return found


def write(root: Path, entries: dict) -> None:
    good, other, deep, broken = fuzz_images.kinds()
    every = {"good": good, "other": other, "deep": deep, "broken": broken}
    for path, kind in entries.items():
        if path.endswith("/"):
            continue
        target = root / path
        if target.is_dir() or not _free(root, target):
            continue  # a name that is a folder's elsewhere in the plan
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(kind, bytes):
            target.write_bytes(kind)
        elif kind == "folder":
            target.mkdir()
        elif kind == "fifo":
            os.mkfifo(target)
        elif kind == "text":
            target.write_bytes(b"some words\n")
        elif kind.startswith("link "):
            if not os.path.lexists(target):
                target.symlink_to(kind.removeprefix("link "))
        else:
            group, _, name = kind.partition(" ")
            target.write_bytes(every[group][name])


def _free(root: Path, target: Path) -> bool:
    """Whether nothing on the way to `target` is a file."""
    inside = [p for p in target.parents if root in p.parents]
    return not target.is_symlink() and not any(p.is_file() or p.is_symlink() for p in inside)


# Another walk, from what the README says: all below a class's folder, links followed, litter left out.


def litter(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def images_below(folder: Path, above: tuple[str, ...] = ()) -> tuple[list[Path], int]:
    """(images, how many other files)."""
    if os.path.realpath(folder) in above:
        return [], 0
    images, others = [], 0
    for name in os.listdir(folder):
        path = folder / name
        if litter(name):
            continue
        if path.is_dir():
            more, odd = images_below(path, (*above, os.path.realpath(folder)))
            images, others = images + more, others + odd
        elif is_image(path):
            images.append(path)
        else:
            others += 1
    return images, others


def is_image(path: Path) -> bool:
    if path.exists() and not path.is_file():
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    return path.is_file() and path.read_bytes() in {c for group in fuzz_images.kinds()[:3] for c in group.values()}


def classes_of(split: Path) -> dict[str, Path]:
    return {name: split / name for name in sorted(os.listdir(split)) if not litter(name) and (split / name).is_dir()}


def counts(split: Path) -> Counter:
    return Counter({name: len(images_below(folder)[0]) for name, folder in classes_of(split).items()})
