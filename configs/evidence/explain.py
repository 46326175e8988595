"""What might explain an experiment's arms: how good and how sure the teacher's sub-networks are, and whom students resemble.

    python configs/evidence/explain.py runs/evidence/kd runs/evidence/two/kd --data-dir /where/tfds/sets/lie

Writes results/explained/kd.json beside it, of the test split and the arms of these workdirs, which share a teacher:
{"teacher": {width: S}, "arms": {arm: {"seeds": n, "own": S, "like": {width: A}}}}; S: top1, nll, calibration_error as
`evaluate` gives them; A: agreement and divergence of the students with that sub-network. Those of arms are means over seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from pwkd_jax import data
from pwkd_jax.experiment import loading
from pwkd_jax.training import scores
from pwkd_jax.training.evaluation import predictor

HERE = Path(__file__).parent


def predictions(target: Path, width: float | None, images: np.ndarray, size: int = 500) -> np.ndarray:
    """Log-probabilities [N, classes] of what training left at `target`."""
    found = predictor(loading.load(str(target), width)[0])[0]
    return np.concatenate([np.asarray(found(images[i : i + size])) for i in range(0, len(images), size)])


def own(values: dict[str, np.ndarray]) -> dict[str, float]:
    return {key: scores.summary(values)[key] for key in ("top1", "nll", "calibration_error")}


def explain(workdir: Path, folder: str) -> dict:
    """See above."""
    config = json.loads((workdir / "config.json").read_text())
    widths = sorted(config["teacher"]["widths"])
    split, _ = data.load_split(config["data"]["name"], folder, config["data"]["test_split"])
    teachers = {w: predictions(workdir / "teacher/slimmable", w, split.images) for w in widths}
    result = {"teacher": {f"{w:g}": own(scores.per_image(t, split.labels)) for w, t in teachers.items()}, "arms": {}}
    for arm in sorted(p for p in (workdir / "students").iterdir() if p.is_dir()):
        students = [predictions(p, None, split.images) for p in sorted(arm.glob("seed*"))]
        each = [own(scores.per_image(s, split.labels)) for s in students]
        like = {
            f"{w:g}": _mean([
                {key: scores.summary(scores.per_image(s, split.labels, t))[key] for key in ("agreement", "divergence")}
                for s in students
            ])
            for w, t in teachers.items()
        }  # fmt: skip
        result["arms"][arm.name] = {"seeds": len(students), "own": _mean(each), "like": like}
    return result


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([values[key] for values in found])) for key in found[0]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    parser.add_argument("--data-dir", default="")
    options = parser.parse_args(arguments)
    first, *more = (explain(workdir, options.data_dir) for workdir in options.workdirs)
    for found in more:
        assert found["teacher"] == first["teacher"], "another teacher"
        first["arms"] |= found["arms"]
    path = HERE / "results" / "explained" / f"{options.workdirs[0].name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(first, indent=1) + "\n")
    print(json.dumps(first, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
