"""What a model has to be, whoever wrote it: tried on abstract images, so a mistake is one sentence before anything compiles.

A model of your own is called as `model(images [B, H, W, C] float, train=True or False)`. It has float parameters, returns
logits [B, classes] or `models.Outputs`, and what else it keeps (a collection of its own) has the same shapes after a step as
before.

It may take one argument more, for methods that let one network's later stages read another's map (`models.again`): in
`model(maps, train, start=i)` with i above 0, `maps` stand in the place of the i-th of its `stages`, and what comes after runs
and is returned: Outputs with the later `stages`. A true attribute `signed` says that its `stages` pass no ReLU.
"""

import dataclasses
import functools
import inspect
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models import again, image_sizes, sight

CALL = "it is called as model(images, train=True or False)"
RIGHT = "it should return logits [images, classes], or pwkd_jax.Outputs(logits, ...)"


def check(model: Any, image_shape: tuple[int, ...], key: str, num_classes: int = 0) -> None:
    """UserError, beginning with `key`, unless `model` can be trained on images [H, W, C] of so many classes (0: not known).

    Of a family of this package only what depends on the images is asked; of a model of your own everything above.
    """
    model, shape = _plain(model, key), tuple(image_shape)
    if bad := _unhashable(model):
        raise UserError(f"{key}: the field '{bad[0]}' of {_name(model)} is a {bad[1]}, which cannot be hashed; make it a tuple")
    try:
        if models.ours(model):
            classes = getattr(model, "num_classes", num_classes)
            image_sizes.check(*sight.inner(model, shape))
        else:
            classes = _own(model, shape)
    except models.WidthError:
        raise
    except UserError as e:
        raise UserError(f"{key}: {e}") from e
    if num_classes and classes != num_classes:
        raise UserError(
            f"{key}: {_name(model)} gives {classes} logits an image, and the data have {num_classes} classes; its last layer "
            "should have num_classes features"
        )


def _unhashable(model: nn.Module) -> tuple[str, str] | None:
    """(name, type) of a field by which the compiled programs of a model cannot be found again."""
    for f in dataclasses.fields(model):
        value = getattr(model, f.name, None)
        try:
            hash(None if f.name == "parent" else value)
        except TypeError:
            return f.name, type(value).__name__
    return None


def _plain(model: Any, key: str) -> nn.Module:
    while hasattr(model, "model") and not isinstance(model, nn.Module):
        model = model.model  # what `precision` and `batch_norm_folding` put around it
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise UserError(f"{key}: {model.__name__} is a class; give a module made of it, as in {model.__name__}()")
    if not isinstance(model, nn.Module):
        raise UserError(f"{key}: a {type(model).__name__} is no model; it should be a module of flax.linen")
    return model


def _name(model: nn.Module) -> str:
    return type(model).__name__


@functools.lru_cache(maxsize=256)
def _own(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """The classes that a user's model tells apart. Raises UserError for what it does wrong."""
    _takes_train(model)
    size = "x".join(map(str, image_shape))
    with _explained(model, f"on images of {size}", train=False):
        variables = models.abstract(model, image_shape)
    _variables(model, variables)
    with _explained(model, f"on images of {size} with train=False", train=False):
        out, _ = models.traced(model, variables, image_shape, train=False)
    classes, given = _outputs(model, out, size, 2), models.as_outputs(out)
    with _explained(model, f"on images of {size} with train=True", train=True):
        out, kept = models.traced(model, variables, image_shape, train=True, key=models.draws(model, image_shape))
    if _outputs(model, out, size, 2) != classes:
        raise UserError(f"{_name(model)} returns logits of another shape with train=True; both should be of one")
    _kept(model, variables, kept)
    _resumes(model, variables, given, size)
    return classes


def _resumes(model: nn.Module, variables: dict, given: models.Outputs, size: str) -> None:
    """UserError unless a model that takes `start` goes on from each of its stages' maps."""
    if not again.resumes(model):
        return
    for i, x in enumerate(given.stages, start=1):
        with _explained(model, f"from the map of its stage {i} on (start={i})", train=False):
            run = functools.partial(models.forward, model, train=False, start=i)
            later = jax.eval_shape(lambda v, x, run=run: run(v, x)[0], variables, x)
        maps = [tuple(getattr(m, "shape", ())) for m in later.stages]
        if (later.logits.shape, maps) != (given.logits.shape, [m.shape for m in given.stages[i:]]):
            raise UserError(
                f"{_name(model)} returns other shapes with start={i} than from images of {size}; it should return the same "
                "logits and the stages after that one"
            )


def _takes_train(model: nn.Module) -> None:
    found = inspect.signature(model.__call__).parameters
    if "train" in found or any(p.kind is p.VAR_KEYWORD for p in found.values()):
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [k for k, p in found.items() if p.default is p.empty and p.kind in kinds and k != "train"]
        if needed[1:]:
            raise UserError(f"{_name(model)} cannot be called without '{needed[1]}'; {CALL}")
        return
    raise UserError(
        f"{_name(model)} takes {', '.join(found) or 'nothing'}; {CALL}: name the argument "
        "that tells training from evaluation 'train'"
    )


class _explained:
    """Context that makes of what a user's model raises a UserError that names the model and the exception."""

    def __init__(self, model: nn.Module, where: str, train: bool):
        self.model, self.where, self.train = model, where, train

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return False
        name = _name(self.model)
        if isinstance(error, flax.errors.InvalidRngError) and not self.train:
            raise UserError(
                f"{name} draws random numbers with train=False; give its dropout deterministic=not train, so that evaluation "
                "draws none"
            ) from error
        if isinstance(error, flax.errors.ModifyScopeVariableError) and not self.train:
            raise UserError(f"{name} changes a variable with train=False; it should do so in training alone") from error
        raise UserError(f"{name} fails {self.where} ({models.reason(error)}); mend its __call__") from error


def _variables(model: nn.Module, variables: dict) -> None:
    if not jax.tree.leaves(variables.get("params", {})):
        raise UserError(f"{_name(model)} has no parameters, so there is nothing to train; it should be a model with layers")
    for path, leaf in flatten_dict(variables).items():
        where = "/".join(map(str, path))
        if isinstance(leaf, tuple):  # what `sow` makes
            raise UserError(
                f"{_name(model)} adds to its collection '{path[0]}' with every step; it should keep the same arrays, and `sow` "
                "into 'intermediates' alone"
            )
        if not hasattr(leaf, "shape"):
            found = type(leaf).__name__
            raise UserError(f"{_name(model)} keeps '{where}', a {found}; its collections should hold arrays alone")
        if path[0] == "params" and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"{_name(model)} has {leaf.dtype} in '{where}'; parameters should be float32")
        if 0 in leaf.shape:
            raise UserError(
                f"{_name(model)} leaves nothing of these images: '{where}' is {list(leaf.shape)}; give it larger ones"
            )


def _outputs(model: nn.Module, out: Any, size: str, images: int) -> int:
    """The classes of abstract outputs of so many images. Raises UserError."""
    name, given = _name(model), models.as_outputs(out)
    logits = given.logits
    if not hasattr(logits, "shape"):
        what = f"a {type(out).__name__}" if logits is out else f"logits that are a {type(logits).__name__}"
        raise UserError(f"{name} returns {what}; {RIGHT}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise UserError(f"{name} returns logits of {logits.dtype}, which have no gradient; they should be float32")
    if len(logits.shape) != 2 or logits.shape[0] != images or not logits.shape[1]:
        raise UserError(f"{name} returns logits of shape {list(logits.shape)} for {images} images; {RIGHT}")
    for field in ("stages", "preact", "pooled", "stem", "final"):
        value = getattr(given, field)
        if field in ("stages", "preact") and not isinstance(value, (tuple, list)):
            raise UserError(f"{name} returns '{field}' that is no tuple; it should be one of maps [images, H, W, C]")
        for x in () if value is None else value if isinstance(value, (tuple, list)) else (value,):
            shape = getattr(x, "shape", None)
            if shape is None or not shape or shape[0] != images:
                found = type(x).__name__ if shape is None else f"an array {list(shape)} for {images} images"
                raise UserError(f"{name} returns in '{field}' {found}; its first axis should be that of the images")
            if 0 in shape:
                raise UserError(f"{name} leaves nothing of images of {size}: '{field}' has {list(shape)}; give it larger ones")
    return logits.shape[1]


def _kept(model: nn.Module, before: dict, after: dict) -> None:
    """UserError unless a training step leaves collections as it found them, values apart."""
    for name, tree in after.items():
        old = jax.tree_util.tree_flatten_with_path(before.get(name, {}))
        new = jax.tree_util.tree_flatten_with_path(dict(tree))
        if jax.tree.structure(dict(before.get(name, {}))) != jax.tree.structure(dict(tree)):
            raise UserError(f"{_name(model)} makes other arrays of its collection '{name}'; a step should keep them")
        for (path, a), (_, b) in zip(old[0], new[0], strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                where = "/".join([name, *(str(p.key) for p in path)])
                raise UserError(
                    f"{_name(model)} makes of '{where}', which is {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}; "
                    "a step should leave its shape and type"
                )
