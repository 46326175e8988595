"""What a trained network makes of image files: a class and its probability for each, the files of folders among them."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path

import numpy as np
import PIL.Image

from pwkd_jax import storage
from pwkd_jax.data import image_files, images
from pwkd_jax.data.depth import Unreadable
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import scoring


def predict(
    target: str, paths: Sequence[str], *, width: float | None = None, model: str = "", batch_size: int = 64, top: int = 5,
    resize: int | None = None,
) -> list[dict]:  # fmt: skip
    """[{"file", "top": [{"class", "probability"}, ...], the likeliest first}] of image files and of those in folders, in the
    order of their names; of a file that cannot be read {"file", "error"}.

    target: see `scoring.KINDS`. class: its name, or its number where the network knows no names. An image that has the
    network's own size is taken as it is; of any other the shorter side becomes `resize` pixels, by default as the network was
    judged in training, and the centre is cut out. Raises UserError.
    """
    for name, value in (("--batch-size", batch_size), ("--top", top)):
        if value < 1:
            raise UserError(f"{name}: {value} is not possible; it should be at least 1")
    network, files = scoring.open_target(target, width, model), find(paths)
    names = network.data.get("classes") or range(network.num_classes)
    shorter = _shorter(network, resize)
    rows = []
    with futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            found = list(pool.map(lambda file: _image(file, network.image_shape, shorter), part))
            batch = np.zeros((batch_size, *network.image_shape), np.uint8)  # one shape, one program
            for row, image in enumerate(found):
                if not isinstance(image, Unreadable):
                    batch[row] = image
            chances = np.exp(np.asarray(_whole(network, batch), np.float64))
            rows += [_row(*each, names, top) for each in zip(part, found, chances, strict=False)]
    return rows


def find(paths: Sequence[str]) -> list[str]:
    """The image files that paths name, those below folders too. Raises UserError for a path without any."""
    files: list[str] = []
    for text in paths:
        path = storage.path(text)
        if not storage.exists(path):
            raise UserError(f"{text}: there is no such file or folder; give image files, or folders of them")
        inside = _inside(path) if storage.is_folder(path) else [str(path)]
        if not inside:
            raise UserError(f"{text}: there is no image in this folder ({', '.join(image_files.SUFFIXES)})")
        files += inside
    return files


def _inside(folder: Path) -> list[str]:
    if isinstance(folder, Path):
        return image_files.below(folder)[0]
    # Of a bucket by names alone: to look into each object would read it.
    return [str(folder / name) for name in sorted(storage.listed(folder)) if name.lower().endswith(image_files.SUFFIXES)]


def as_csv(rows: Sequence[dict]) -> str:
    """file, class, probability, then the next classes and probabilities, and what was wrong with a file."""
    most = max((len(row.get("top", ())) for row in rows), default=1)
    kinds = [f"{kind}{'' if i == 0 else f'_{i + 1}'}" for i in range(most) for kind in ("class", "probability")]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", *kinds, "error"])
    for row in rows:
        cells = [x for one in row.get("top", ()) for x in (one["class"], f"{one['probability']:.6f}")]
        table.writerow([row["file"], *cells, *[""] * (len(kinds) - len(cells)), row.get("error", "")])
    return text.getvalue()


def as_json(rows: Sequence[dict]) -> str:
    return json.dumps(list(rows), indent=1) + "\n"


def lines(rows: Sequence[dict]) -> Iterator[str]:
    for row in rows:
        if "error" in row:
            yield f"{row['file']}: cannot be read ({row['error']})"
        else:
            yield f"{row['file']}: " + ", ".join(f"{one['class']} {100 * one['probability']:.1f} %" for one in row["top"])


def _shorter(network: scoring.Scored, resize: int | None) -> int:
    size, known = min(network.image_shape[:2]), network.data
    streamed = known.get("image_size", 0)
    shorter = resize or (known.get("resize") or round(streamed * 8 / 7) if streamed else 0) or size
    if shorter < size:
        raise UserError(f"--resize: {shorter} pixels are fewer than the {size} that are cropped from them")
    return shorter


def _image(file: str, shape: tuple[int, ...], shorter: int) -> np.ndarray | Unreadable:
    """uint8 [H, W, C]."""
    try:
        encoded = storage.read_bytes(storage.path(file))
        image = images.decode(encoded)
        if image.shape[:2] != tuple(shape[:2]):
            if shape[0] != shape[1]:
                raise UserError(f"{file}: is {_size(image.shape)} pixels, and this network takes {_size(shape)} alone")
            image = images.test_image(encoded, shape[0], shorter)
    except OSError as e:
        return Unreadable(e.strerror or type(e).__name__)
    except Unreadable as e:
        return e
    if shape[2] == 1:
        image = np.asarray(PIL.Image.fromarray(image).convert("L"))[..., None]
    return image


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[:2]))


def _whole(network: scoring.Scored, batch: np.ndarray):
    """Log-probabilities of a batch, padded to whole devices."""
    missing = -len(batch) % network.devices
    return network.log_probabilities(np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)]))


def _row(file: str, image: np.ndarray | Unreadable, chances: np.ndarray, names: Sequence, top: int) -> dict:
    if isinstance(image, Unreadable):
        return {"file": file, "error": str(image)}
    best = np.argsort(-chances, kind="stable")[:top]
    return {"file": file, "top": [{"class": names[i], "probability": float(chances[i])} for i in best]}
