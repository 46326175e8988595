"""A trained model as files that need nothing of this project: weights, a card, and a program.

    python -m pwkd_jax.export runs/digits/students/pwkd/seed0 --out exported
    python -m pwkd_jax.export runs/digits/teacher/slimmable --width 0.5 --out exported

writes exported/model.safetensors, model.json and model.stablehlo. The program takes uint8 images [batch, H, W, C] of any
batch size, normalises them itself and gives probabilities [batch, classes]; with jax alone:

    import jax, jax.export
    program = jax.export.deserialize(bytearray(open("exported/model.stablehlo", "rb").read()))
    probabilities = program.call(images)

Exits with code 2 and one sentence on a mistake.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export

from pwkd_jax import trained, weights
from pwkd_jax.errors import UserError
from pwkd_jax.files import replace
from pwkd_jax.weights import pytorch

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.export", description=__doc__.partition("\n")[0])
    parser.add_argument("target", help=trained.KINDS)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--width", type=float, help="of a slimmable teacher; its widest by default")
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help="that the program should run on: cpu, cuda, rocm, tpu")
    parser.add_argument("--names", choices=("flax", "torch"), default="flax",
                        help="of the arrays; torch: those, and the layouts, of the model's PyTorch original")  # fmt: skip
    parser.add_argument("--model", default="", help="module:Name, where a file's model is your own")
    options = parser.parse_args(arguments)
    try:
        paths = export(**vars(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{path} ({path.stat().st_size:,} bytes)" for path in paths))
    return 0


def export(target: str, out: Path, width: float | None, platforms: str, names: str, model: str) -> list[Path]:
    """Write the three files and return their paths. Raises UserError."""
    wanted = [p.strip() for p in platforms.split(",") if p.strip()]
    if not wanted or set(wanted) - {*PLATFORMS}:
        raise UserError(f"--platforms: '{platforms}' should be some of {', '.join(PLATFORMS)}")
    found = trained.load(target, width, model)
    if names == "torch" and ("assisted" in found.card or not hasattr(found.model, "torch_names")):
        raise UserError(f"--names: '{found.card['model']}' has no PyTorch original to name its arrays after; use flax")
    exported = program(found, wanted)
    card = found.card | {"program": {
        "file": "model.stablehlo", "platforms": wanted, "jax": jax.__version__,
        "input": f"uint8 [batch, {', '.join(map(str, found.card['image_shape']))}]",
        "output": f"float32 [batch, {found.card['num_classes']}], probabilities",
    }}  # fmt: skip
    path = out / "model.safetensors"
    try:
        # The card last: where it stands, so do the others.
        replace(out / "model.stablehlo", exported.serialize())
        if names == "torch":
            arrays = pytorch.to_torch(found.model, found.variables)
            replace(path, safetensors.numpy.save(arrays, {"format": "pt", "card": json.dumps(card)}))
            replace(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")
        else:
            weights.write(path, found.variables, card)
    except OSError as e:
        raise UserError(f"--out: '{out}' cannot be written ({e.strerror})") from e
    return [path, path.with_suffix(".json"), out / "model.stablehlo"]


def program(found: trained.Trained, platforms: Sequence[str]) -> jax_export.Exported:
    """uint8 images [batch, H, W, C] -> probabilities float32 [batch, classes], the weights inside, any batch size."""
    variables = jax.tree.map(np.asarray, found.variables)

    def probabilities(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(found.logits(variables, images).astype(jnp.float32))

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *found.card["image_shape"]), jnp.uint8)
    return jax_export.export(jax.jit(probabilities), platforms=platforms)(images)


if __name__ == "__main__":
    sys.exit(main())
