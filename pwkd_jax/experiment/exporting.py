"""A trained model as weights, a card, and a program that needs jax alone."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from pwkd_jax import weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading
from pwkd_jax.storage import replace
from pwkd_jax.training import distributed
from pwkd_jax.weights import pytorch

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(target: str, out: Path, width: float | None, platforms: str, names: str, model: str) -> list[Path]:
    """Write the three files, by the first of several processes, and return their paths. Raises UserError."""
    wanted = [p.strip() for p in platforms.split(",") if p.strip()]
    if not wanted or set(wanted) - {*PLATFORMS}:
        raise UserError(f"--platforms: '{platforms}' should be some of {', '.join(PLATFORMS)}")
    found, _ = distributed.together(lambda: loading.load(target, width, model))
    if names == "torch" and ("assisted" in found.card or not hasattr(found.model, "torch_names")):
        raise UserError(f"--names: '{found.card['model']}' has no PyTorch original to name its arrays after; use flax")
    path = out / "model.safetensors"
    paths = [path, path.with_suffix(".json"), out / "model.stablehlo"]
    distributed.decide(lambda: _write(found, paths, wanted, names))
    return paths


def _write(found: weights.Network, paths: Sequence[Path], wanted: Sequence[str], names: str) -> None:
    path, _, lowered = paths
    content = bytes(program(found, wanted).serialize())
    card = found.card | {"program": {
        "file": lowered.name, "platforms": wanted, "jax": jax.__version__,
        "sha256": hashlib.sha256(content).hexdigest(),
        "input": f"uint8 [batch, {', '.join(map(str, found.card['image_shape']))}]",
        "output": f"float32 [batch, {found.card['num_classes']}], probabilities",
    }}  # fmt: skip
    try:
        # The card last: where it stands, so do the others.
        replace(lowered, content)
        if names == "torch":
            weights.write_arrays(path, pytorch.to_torch(found.model, found.variables), card, "pt")
        else:
            weights.write(path, found.variables, card)
    except OSError as e:
        raise UserError(f"--out: '{path.parent}' cannot be written ({e.strerror})") from e


def program(found: weights.Network, platforms: Sequence[str]) -> jax_export.Exported:
    """uint8 images [batch, H, W, C] -> probabilities float32 [batch, classes], the weights inside, any batch size.

    Sizes that contain the batch are int32 in the program, so a model of yours that takes a mean over 2^31 elements or more, of
    [batch, batch] say, is wrong there without an error (jax 0.10.2, findings/exported_mean_wraps.sh); divide by one axis at a
    time. The program has names of operations but no places in source code, which would differ from caller to caller, so that
    one network gives the same bytes whoever exports it.
    """
    variables = jax.tree.map(np.asarray, found.variables)

    def probabilities(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(found.logits(images, variables).astype(jnp.float32))

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *found.card["image_shape"]), jnp.uint8)
    with _no_places():
        return jax_export.export(jax.jit(probabilities), platforms=platforms)(images)


@contextlib.contextmanager
def _no_places() -> Iterator[None]:
    key = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, key)
    jax.config.update(key, 0)
    try:
        yield
    finally:
        jax.config.update(key, before)
