"""Scores of a trained model, an exported program or a converted file on any data set, alone or beside its teacher.

    python -m pwkd_jax.evaluate runs/digits/students/pwkd/seed0 --teacher runs/digits/teacher/slimmable
    python -m pwkd_jax.evaluate resnet32x4.safetensors --data cifar100 --data-dir /my/tfds
    python -m pwkd_jax.evaluate exported/model.stablehlo --data digits --json      # or exported/model.onnx
    python -m pwkd_jax.evaluate resnet50.safetensors --data folder --data-dir /my/photos --split validation
    python -m pwkd_jax.evaluate runs/mine/students/pwkd/seed0 --per-class --confusion=confusion.csv

Images of many sizes are streamed: shorter side to --resize pixels, then the central --image-size. On several machines the same
command runs on each, they share the images, and the first one prints; who is who is said as for `train`.

Prints top-1, top-5, negative log-likelihood, calibration error, images a second and, with --teacher, agreement (how often both
choose one class) and divergence, the mean KL(teacher || student). --per-class adds, for each class, images,
top-1 (recall), precision, the other class that it is most often taken for, and the teacher's top-1. Exits with code 2 and one
sentence on a mistake.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from absl import logging

from pwkd_jax.errors import UserError, run_command
from pwkd_jax.experiment.scoring import KINDS, evaluate
from pwkd_jax.reporting import per_class
from pwkd_jax.training import distributed, scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("target", help=KINDS)
    parser.add_argument("--width", type=float, help="of a slimmable teacher; its widest by default")
    parser.add_argument("--teacher", help="another of the same kinds, to compare with")
    parser.add_argument("--teacher-width", type=float)
    parser.add_argument("--data", help="digits, folder or a TFDS name; by default what it was trained on")
    parser.add_argument("--data-dir", help="where TFDS sets lie, or the folder")
    parser.add_argument("--copy", default="", help="where --data-dir is on gs://: the folder into which it is copied once")
    parser.add_argument("--split", help="as in test or validation[:1000]; by default the experiment's test split, or test")
    parser.add_argument("--image-size", type=int, help="0: images of one size, in RAM; by default as it was trained, or what "
                        "the model takes where the data set has images of many sizes")  # fmt: skip
    parser.add_argument("--resize", type=int, help="by default as it was trained, or 8/7 of the image size")
    parser.add_argument("--workers", type=int, default=-1, help="processes that decode streamed images; -1: one a core")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--model", default="", help="module:Name, where a file's model is your own")
    parser.add_argument("--per-class", action="store_true", help="the classes one by one; of many the worst and the best, with "
                        "--json all of them")  # fmt: skip
    parser.add_argument("--confusion", default="", metavar="FILE.csv", help="write how many images of each class (rows) are "
                        "taken for each (columns)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax warn of things that a user here cannot act on
    try:
        options = parser.parse_args(distributed.start(sys.argv[1:] if arguments is None else arguments))
        result = evaluate(**{key: value for key, value in vars(options).items() if key != "json"})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        distributed.leave(error)
        raise
    print(json.dumps(result, indent=2) if options.json else text(result))
    return 0


def text(result: dict) -> str:
    """The result in lines."""
    rows = [
        ("top-1", f"{result['top1']:.2f} %", ""),
        *([("top-5", f"{result['top5']:.2f} %", "")] if result["num_classes"] > 5 else []),
        ("NLL", f"{result['nll']:.4f} nats", ""),
        ("calibration error", f"{result['calibration_error']:.2f} %", f"{scores.BINS} bins"),
    ]
    if teacher := result.get("teacher"):
        rows += [
            ("agreement", f"{result['agreement']:.2f} %", f"with {teacher['target']}, top-1 {teacher['top1']:.2f} %"),
            ("divergence", f"{result['divergence']:.4f} nats", "mean KL(teacher || student)"),
        ]
    rows.append(("images a second", f"{result['images_per_second']:,.0f}", "after the first batch"))
    lines = [f"{result['target']}: {result['model']}", f"{result['data']}, {result['split']}: {result['images']} images"]
    lines += [f"  {name:<18}{value:>14}  {note}".rstrip() for name, value, note in rows]
    if "confusion" in result:
        lines.append(f"confusion matrix: {result['confusion']}")
    if "classes" in result:
        lines += ["", per_class.table(result["classes"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
