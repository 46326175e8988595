"""A trained model as files that need nothing of this project: weights, a card, and a program.

    python -m pwkd_jax.export runs/digits/students/pwkd/seed0 --out exported
    python -m pwkd_jax.export runs/digits/teacher/slimmable --width 0.5 --out exported --onnx --card

writes exported/model.safetensors, model.json and model.stablehlo. The program takes uint8 images [batch, H, W, C] of any
batch size, normalises them itself and gives probabilities [batch, classes]; with jax alone:

    import jax, jax.export
    program = jax.export.deserialize(bytearray(open("exported/model.stablehlo", "rb").read()))
    probabilities = program.call(images)

--onnx adds model.onnx, which takes and gives the same in other runtimes, and --card a README.md for people, in the form of the
Hugging Face Hub, of what the card knows.

On several machines the same command runs on each, and the first one writes. Exits with code 2 and one sentence on a mistake.
"""

import argparse
import sys
from collections.abc import Sequence

from pwkd_jax import storage
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.experiment import loading
from pwkd_jax.experiment.exporting import export
from pwkd_jax.training import distributed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.export", description=__doc__.partition("\n")[0])
    parser.add_argument("target", help=loading.KINDS)
    parser.add_argument("--out", required=True, help="the directory to write")
    parser.add_argument("--width", type=float, help="of a slimmable teacher; its widest by default")
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help="that the program should run on: cpu, cuda, rocm, tpu")
    parser.add_argument("--names", choices=("flax", "torch"), default="flax",
                        help="of the arrays; torch: those, and the layouts, of the model's PyTorch original")  # fmt: skip
    parser.add_argument("--model", default="", help="module:Name, where a file's model is your own")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too; needs pip install onnx")
    parser.add_argument("--card", action="store_true", help="write README.md too, a model card for people")
    try:
        options = parser.parse_args(distributed.start(sys.argv[1:] if arguments is None else arguments))
        paths = export(**vars(options) | {"out": storage.path(options.out, "--out")})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        distributed.leave(error)
        raise
    print("\n".join(f"{path} ({storage.size(path):,} bytes)" for path in paths))
    return 0






if __name__ == "__main__":
    sys.exit(run_command(main))
