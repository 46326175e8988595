"""The classes of image files, by a trained model, an exported program or a converted file.

    python -m pwkd_jax.predict runs/photos/students/pwkd/seed0 cat.jpg holidays/
    python -m pwkd_jax.predict exported holidays/ --out classes.csv       # or .json; all with their probabilities

Folders are searched for images, their folders too. An image of another size than the network's is resized and cropped as test
images were in training. Files that cannot be read are named, and are rows without a class. Exits with code 2 and one sentence
on a mistake, or where no file could be read; with 1 where only some could not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from pwkd_jax import storage
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.experiment import predicting, scoring


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("target", help=scoring.KINDS)
    parser.add_argument("paths", nargs="+", help="image files, and folders of them")
    parser.add_argument("--out", help="the file to write, .csv or .json; by default lines are printed")
    parser.add_argument("--top", type=int, default=1, help="how many classes of each image, the likeliest first")
    parser.add_argument("--width", type=float, help="of a slimmable teacher; its widest by default")
    parser.add_argument("--resize", type=int, help="the shorter side before the centre is cut out; by default as in training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--model", default="", help="module:Name, where a file's model is your own")
    options = vars(parser.parse_args(arguments))
    logging.set_verbosity(logging.ERROR)
    out = options.pop("out")
    try:
        place = storage.path(out, "--out") if out else None
        if place and place.suffix not in (".csv", ".json"):
            raise UserError(f"--out: '{out}' should be a name ending in .csv or .json")
        rows = predicting.predict(**options)
        if place:
            _write(place, predicting.as_csv(rows) if place.suffix == ".csv" else predicting.as_json(rows))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bad = [row for row in rows if "error" in row]
    for line in predicting.lines(bad):
        print(line, file=sys.stderr)
    print(f"{out}: {len(rows) - len(bad)} images" if out else "\n".join(predicting.lines(r for r in rows if r not in bad)))
    return 2 if len(bad) == len(rows) else int(bool(bad))


def _write(place: Path, content: str) -> None:
    try:
        storage.replace(place, content)
    except OSError as error:
        raise UserError(f"--out: '{place}' cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
