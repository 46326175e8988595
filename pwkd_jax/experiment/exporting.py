"""A trained model as weights, a card, and a program that needs jax alone; if asked for, an ONNX model and a page too."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from pwkd_jax import models, slimmable, storage, weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading, onnx_program, results
from pwkd_jax.models import precision
from pwkd_jax.reporting import model_card, summary
from pwkd_jax.storage import replace
from pwkd_jax.training import distributed
from pwkd_jax.weights import pytorch

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    target: str, out: Path, width: float | None, platforms: str, names: str, model: str, onnx: bool = False, card: bool = False
) -> list[Path]:
    """Write the files, by the first of several processes, and return their paths. onnx: model.onnx too; card: README.md too.
    Raises UserError, before anything is written unless the disk is at fault."""
    wanted = [p.strip() for p in platforms.split(",") if p.strip()]
    if not wanted or set(wanted) - {*PLATFORMS}:
        raise UserError(f"--platforms: '{platforms}' should be some of {', '.join(PLATFORMS)}")
    if onnx:
        onnx_program.refuse_missing()
    found, _ = distributed.together(lambda: loading.load(target, width, model))
    if names == "torch" and ("assisted" in found.card or not hasattr(found.model, "torch_names")):
        raise UserError(f"--names: '{found.card['model']}' has no PyTorch original to name its arrays after; use flax")
    kinds = ["stablehlo"] + ["onnx"] * onnx
    paths = [out / f"model.{kind}" for kind in ("safetensors", "json", *kinds)] + [out / "README.md"] * card

    def write() -> None:
        about = found.card | {"source": found.card["source"] | _known(target, found.card)}
        _write(found._replace(card=about), paths, wanted, names)

    distributed.decide(write)
    return paths


def _write(found: weights.Network, paths: Sequence[Path], wanted: Sequence[str], names: str) -> None:
    card, path = dict(found.card), paths[0]
    takes = {
        "input": f"uint8 [batch, {', '.join(map(str, card['image_shape']))}]",
        "output": f"float32 [batch, {card['num_classes']}], probabilities",
    }
    card.pop("onnx", None)  # of the file that an export is made from
    contents: dict[Path, bytes | str] = {path.with_suffix(".stablehlo"): bytes(program(found, wanted).serialize())}
    (lowered,) = contents
    card["program"] = {"file": lowered.name, "platforms": wanted, "jax": jax.__version__, **_sum(contents[lowered]), **takes}
    if (graph := path.with_suffix(".onnx")) in paths:
        contents[graph] = onnx_program.write(_probabilities(found), card["image_shape"], card["model"])
        card["onnx"] = {"file": graph.name, "opset": onnx_program.OPSET, **_sum(contents[graph]), **takes}
    if (page := path.with_name("README.md")) in paths:
        contents[page] = model_card.render(card, names)
    try:
        if page in contents and storage.exists(page) and storage.read_bytes(page) != contents[page].encode():
            raise UserError(f"--card: '{page}' is another one, or was edited; remove it, or write to another directory")
        # The JSON card last: where it stands, so do the others.
        for place, content in contents.items():
            replace(place, content)
        if names == "torch":
            weights.write_arrays(path, pytorch.to_torch(found.model, found.variables), card, "pt")
        else:
            weights.write(path, found.variables, card)
    except OSError as e:
        raise UserError(f"--out: '{path.parent}' cannot be written ({e.strerror})") from e


def _sum(content: bytes) -> dict:
    return {"sha256": hashlib.sha256(content).hexdigest()}


def _known(target: str, card: dict) -> dict:
    """What the run that `target` names has left to say of its network at that step, for the card's source: {"top1": percent on
    the test split, "teachers": [{"model", "widths"}] of a student, in the order of its stages}, each where it is known."""
    source, run = card["source"], storage.absolute(storage.path(target), straight=True)
    if run.name.isdigit() and run.parent.name == "checkpoints":
        run = run.parents[1]
    run = run.parent if run.name == "best" else run
    left = results.read(run / "result.json") if "run" in source and storage.is_folder(run) else None
    if left is None or storage.misfit(left, summary.STUDENT if "arm" in source else summary.TEACHER):
        return {}
    scores = {row["step"]: row["top1"] for row in left["curve"]}
    top1 = scores.get(source["steps"])
    if isinstance(top1, dict):
        top1 = top1.get(slimmable.width_key(card["width"]))
    found = {"top1": top1} if top1 is not None else {}
    taught: dict[str, list[float]] = {}
    for stage in left.get("plan", ()):
        if stage["widths"] and stage["start"] < source["steps"]:
            taught.setdefault(stage["teacher"], []).extend(stage["widths"])
    teachers = [
        {"model": its["model"], "widths": list(dict.fromkeys(widths))}
        for name, widths in taught.items()
        if (its := results.read(run.parents[2] / "teacher" / name / "result.json")) and "model" in its
    ]
    return found | ({"teachers": teachers} if teachers else {})


def _probabilities(found: weights.Network) -> Callable[[jax.Array], jax.Array]:
    """uint8 images [B, H, W, C] -> [B, classes]; the variables are numbers in what is traced of it."""
    variables = jax.tree.map(np.asarray, found.variables)

    def probabilities(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(found.logits(images, variables).astype(jnp.float32))

    return probabilities


def program(found: weights.Network, platforms: Sequence[str]) -> jax_export.Exported:
    """uint8 images [batch, H, W, C] -> probabilities float32 [batch, classes], the weights inside, any batch size.

    Sizes that contain the batch are int32 in the program, so a model of yours that takes a mean over 2^31 elements or more, of
    [batch, batch] say, is wrong there without an error (jax 0.10.2, findings/exported_mean_wraps.sh); divide by one axis at a
    time. The program has names of operations but no places in source code, which would differ from caller to caller, so that
    one network gives the same bytes whoever exports it.
    """
    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *found.card["image_shape"]), jnp.uint8)
    try:
        with _no_places():
            return jax_export.export(jax.jit(_probabilities(found)), platforms=platforms)(images)
    except (TypeError, ValueError, NotImplementedError) as e:
        plain = precision.plain(found.model)
        if models.ours(plain):
            raise
        raise UserError(
            f"'{found.card['model']}' cannot be exported for batches of any size ({models.reason(e)}); where it asks how many "
            "images there are, take x.shape[0], and neither len(x) nor int()"
        ) from e


@contextlib.contextmanager
def _no_places() -> Iterator[None]:
    key = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, key)
    jax.config.update(key, 0)
    try:
        yield
    finally:
        jax.config.update(key, before)
