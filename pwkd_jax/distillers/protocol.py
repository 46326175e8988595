"""What a distiller of your own has to be, tried on abstract outputs: a mistake is one sentence before anything compiles."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from pwkd_jax import models
from pwkd_jax.errors import UserError

CALL = "it is called as distiller(student, teacher, batch, progress)"
RESULT = "it should return (loss, metrics): a float scalar, the mean over the batch, and a dict, {} without any"


def rngs(key: jax.Array, draws: bool) -> dict[str, jax.Array]:
    """The random streams of one call. draws: besides "distiller" also any other, which Flax takes from "params"."""
    return {"distiller": key} | ({"params": jax.random.fold_in(key, 1)} if draws else {})


def takes(distiller: Any) -> None:
    """UserError unless it is a Flax module that takes four arguments."""
    name = type(distiller).__name__
    if not isinstance(distiller, nn.Module):
        name = distiller.__name__ if isinstance(distiller, type) else name
        raise UserError(f"student.distiller: '{name}' is no Flax module that was made; give one, as in {name}()")
    if models.ours(distiller):
        return
    methods = ["__call__", *(["initial"] if getattr(distiller, "initial_epochs", 0.0) > 0 else [])]
    for method in methods:
        if not callable(getattr(distiller, method, None)):
            raise UserError(f"student.distiller: {name} has no method '{method}'; {CALL}")
        found = inspect.signature(getattr(distiller, method))
        try:
            found.bind(None, None, None, None)
        except TypeError as e:
            own = ", ".join(found.parameters) or "nothing"
            raise UserError(f"student.distiller: {name}.{method} takes {own}; {CALL}") from e


@contextlib.contextmanager
def explained(distiller: nn.Module, student: models.Outputs, teacher: models.Outputs) -> Iterator[None]:
    """Context that makes of what a user's distiller raises a UserError; and of ours where the logits cannot be compared."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if isinstance(e, KeyError) and e.args and e.args[0] in ("index", "dataset_label"):
            raise
        name = type(distiller).__name__
        if not models.ours(distiller):
            said = f"student.distiller: {name} fails ({models.reason(e)}); mend its __call__, or choose another pair"
            raise UserError(said) from e
        if student.logits.shape != teacher.logits.shape:
            own, taught = student.logits.shape[-1], teacher.logits.shape[-1]
            raise UserError(
                f"student.distiller: {name} compares logits, and the student has {own} classes and the teacher {taught}; "
                "teach by features, or by a teacher of the same classes"
            ) from e
        raise


def arrays(distiller: nn.Module, like: dict) -> None:
    """UserError unless a distiller's abstract variables are arrays: what `sow` makes grows with every step."""
    for path, leaf in flatten_dict(like).items():
        if not hasattr(leaf, "shape"):
            raise UserError(
                f"student.distiller: {type(distiller).__name__} adds to its collection '{path[0]}' with every step; it should "
                "keep the same arrays, and return what it wants to show as metrics"
            )


class _Mixed(dict):
    """A batch of mixed images, which have no label and no place of their own."""

    def __getitem__(self, key):
        if key in ("label", "index", "dataset_label"):
            raise UserError(key)
        return super().__getitem__(key)

def unlabelled(distiller: nn.Module, like: dict, inputs: tuple) -> None:
    """UserError for a method that reads which image, or of which class, each of its batch is: mixed ones are two.

    like: its abstract variables. inputs: abstract (student, teacher, batch, progress).
    """
    for method in ("__call__", *(["initial"] if getattr(distiller, "initial_epochs", 0.0) > 0 else [])):

        def run(variables, student, teacher, batch, progress, key, method=method):
            mutable = [name for name in variables if name != "params"]
            inputs = (student, teacher, _Mixed(batch, target=jnp.zeros(student.logits.shape)), progress)
            return distiller.apply(variables, *inputs, rngs=rngs(key, True), mutable=mutable, method=method)

        try:
            jax.eval_shape(run, like, *inputs, jax.eval_shape(lambda: jax.random.key(0)))
        except UserError as e:
            if str(e) not in ("label", "index", "dataset_label"):
                raise
            raise UserError(
                f"student.distiller: {type(distiller).__name__} reads batch['{e}'], and mixed images have two of each; leave "
                "student.mix.mixup and student.mix.cutmix away, or choose a method that compares networks alone, such as kd"
            ) from e


def check(distiller: nn.Module, like: dict, inputs: tuple) -> bool:
    """Whether a distiller draws from other random streams than its own. Raises UserError for what one's own does wrong.

    like: its abstract variables. inputs: abstract (student, teacher, batch, progress).
    """
    if models.ours(distiller):
        return False
    draws = False
    for method in ("__call__", *(["initial"] if getattr(distiller, "initial_epochs", 0.0) > 0 else [])):
        with explained(distiller, *inputs[:2]):
            try:
                found, kept = _run(distiller, like, inputs, method, draws)
            except flax.errors.InvalidRngError:
                draws = True
                found, kept = _run(distiller, like, inputs, method, draws)
        _result(type(distiller).__name__, found, inputs[2]["label"].shape[0])
        _state(type(distiller).__name__, {k: v for k, v in like.items() if k != "params"}, dict(kept))
    if hasattr(distiller, "predict"):
        with explained(distiller, *inputs[:2]):
            logits = jax.eval_shape(lambda v, *pair: distiller.apply(v, *pair, method="predict"), like, *inputs[:2])
        if getattr(logits, "shape", None) != inputs[0].logits.shape:
            raise UserError(
                f"student.distiller: {type(distiller).__name__}.predict gives {_what(logits)}; it should give logits "
                f"{list(inputs[0].logits.shape)}"
            )
    return draws


def _run(distiller: nn.Module, like: dict, inputs: tuple, method: str, draws: bool) -> tuple:
    def run(variables, inputs, key):
        mutable = [name for name in variables if name != "params"]
        return distiller.apply(variables, *inputs, rngs=rngs(key, draws), mutable=mutable, method=method)

    return jax.eval_shape(run, like, inputs, jax.eval_shape(lambda: jax.random.key(0)))


def _what(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if hasattr(x, "shape") else f"a {type(x).__name__}"


def _result(name: str, found: Any, images: int) -> None:
    if hasattr(found, "shape"):
        raise UserError(f"student.distiller: {name} returns an array alone; {RESULT}")
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"{len(found)} values" if isinstance(found, tuple) else _what(found)
        raise UserError(f"student.distiller: {name} returns {what}; {RESULT}")
    loss, metrics = found
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise UserError(f"student.distiller: the loss of {name} is {_what(loss)}; {RESULT}")
    if not isinstance(metrics, dict):
        raise UserError(f"student.distiller: {name} returns {_what(metrics)} beside its loss; {RESULT}")
    for key, value in metrics.items():
        if getattr(value, "shape", None) not in ((), (images,)):
            raise UserError(
                f"student.distiller: the metric '{key}' of {name} is {_what(value)}; it should be a scalar, or one an image"
            )


def _state(name: str, before: dict, after: dict) -> None:
    shapes = [jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), dict(tree)) for tree in (before, after)]
    if shapes[0] != shapes[1]:
        changed = sorted(k for k in before.keys() | after.keys() if shapes[0].get(k) != shapes[1].get(k))
        raise UserError(
            f"student.distiller: {name} changes the shapes or types of its collection '{changed[0]}' with every step; a step "
            "should leave them as they were"
        )
