"""The variables that training starts from, of weights that were given: as they are, or with a classifier begun anew."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from pwkd_jax import models, slimmable, storage, weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment.naming import naming
from pwkd_jax.models import channel_order, precision, sight
from pwkd_jax.training import freezing

Path = tuple[str, ...]  # of an array in the variables


def other_classes(known: Sequence[str], given: Sequence[str]) -> str:
    """How the classes that a network knows differ from those of data, as a phrase."""
    if sorted(known) == sorted(given):
        at = next(i for i, (a, b) in enumerate(zip(known, given, strict=True)) if a != b)
        return f"knows class {at} as '{known[at]}', where these data have '{given[at]}'"
    missing = [name for name in given if name not in known] or [name for name in known if name not in given]
    return f"and these data do not share the class '{missing[0]}'" + (f" and {len(missing) - 1} more" if missing[1:] else "")


def given(config: ConfigDict, facts: dict, who: str, model: nn.Module) -> dict:
    """The variables in the file of `who`.weights, for `model`. Raises UserError where they do not fit this experiment."""
    c = config[who]
    with naming(f"{who}.weights"):
        variables, card = weights.read(storage.path(c.weights, f"{who}.weights"), c.model)
    shape, head = tuple(facts["image_shape"]), _head(c, facts, model)
    like = models.abstract(model, shape)
    if c.head == "new":
        variables = _with(variables, like, _fresh(model, shape, config.seed, head))
    elif card["num_classes"] != facts["num_classes"]:
        raise UserError(
            f"{who}.weights: {c.weights} knows {card['num_classes']} classes, and these data have {facts['num_classes']}; "
            f"{who}.head=new begins the classifier anew"
        )
    weights.refuse_misfits(f"{who}.weights: {c.weights}", c.model, weights.mismatches(variables, like))
    theirs, ours = card.get("classes"), facts.get("classes")
    if c.head == "keep" and theirs and ours and theirs != ours:
        raise UserError(
            f"{who}.weights: {c.weights} {other_classes(theirs, ours)}; use weights of these classes, or {who}.head=new"
        )
    wants = sight.wanted(card)
    seen = (c.mean, c.std) if who == "teacher" and c.mean else (facts["mean"], facts["std"])
    if any(abs(a - b) > 1e-3 for own, now in zip(wants, seen, strict=True) for a, b in zip(own, now, strict=True)):
        mean, std = (f"({','.join(f'{x:.4f}' for x in values)})" for values in wants)
        also = " (teacher.mean and teacher.std, where the student's differ)" if who == "teacher" else ""
        raise UserError(
            f"{who}.weights: {c.weights} was trained on images normalised by another mean or std; set data.mean={mean} and "
            f"data.std={std}{also}, or leave both away"
        )
    return variables


def normalisation(config: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) by which the images of given weights were normalised, the teacher's first; None without any."""
    for who in ("teacher", "student"):
        if config[who].weights and not (who == "teacher" and config.teacher.mean):
            with naming(f"{who}.weights"):
                card = weights.read(storage.path(config[who].weights, f"{who}.weights"), config[who].model)[1]
            print(f"note: images are normalised as those of {config[who].weights} were; data.mean and data.std change that")
            return tuple(map(tuple, sight.wanted(card)))
    return None


def _head(c: ConfigDict, facts: dict, model: nn.Module) -> set[Path]:
    """The paths of the classifier's arrays: those whose shape depends on the number of classes."""
    shape = tuple(facts["image_shape"])
    plain = precision.plain(model)
    more = models.create(c.model, width=getattr(c, "width", 1.0), num_classes=facts["num_classes"] + 1)
    a, b = (flatten_dict(models.abstract(m, shape)) for m in (plain, sight.alike(plain, more)))
    return {path for path in a if path not in b or a[path].shape != b[path].shape}


def _fresh(model: nn.Module, shape: tuple[int, ...], seed: int, head: set[Path]) -> dict[Path, np.ndarray]:
    """Those arrays as training from scratch would begin them; the rest of the network is not computed."""

    @jax.jit
    def make(key: jax.Array) -> dict:
        made = flatten_dict(model.init(key, jnp.zeros((1, *shape)), train=False))
        return {"/".join(path): made[path] for path in head}

    return {tuple(name.split("/")): np.asarray(x) for name, x in make(jax.random.key(seed)).items()}


def _with(variables: dict, like: dict, head: dict[Path, np.ndarray]) -> dict:
    """`variables` with the classifier `head` in place of their own, whichever arrays that had."""
    wanted, found = flatten_dict(like), flatten_dict(variables)
    kept = {path: x for path, x in found.items() if path not in head and (path in wanted or not _beside(path, head))}
    return unflatten_dict(kept | head)


def _beside(path: Path, head: dict[Path, np.ndarray]) -> bool:
    """Whether an array lies in a layer of the classifier, such as a bias that the new one has not."""
    return any(path[:-1] == other[:-1] for other in head)


def fixed(config: ConfigDict, facts: dict, who: str, model: nn.Module) -> tuple[str, ...]:
    """The parts that `who`.freeze names, for `training.freezing`; trunk: all but the classifier. Raises UserError."""
    c = config[who]
    if not c.freeze:
        return ()
    like = models.abstract(model, tuple(facts["image_shape"]))
    head = _head(c, facts, model) if "trunk" in c.freeze else set()
    trunk = ["/".join(path[1:]) for path in flatten_dict(like) if path[0] == "params" and path not in head]
    norms = ["/".join(path[1:-1]) for path in flatten_dict(like) if path[0] == "batch_stats"]
    freezing.check(f"{who}.freeze", [name for name in c.freeze if name != "trunk"], like)
    return tuple(part for name in c.freeze for part in (dict.fromkeys([*trunk, *norms]) if name == "trunk" else [name]))


def ordered(teacher: ConfigDict, net: slimmable.Slimmable, whole: dict, shape: tuple[int, ...]) -> dict:
    """Those of a teacher's widest network with its channels in order of importance, the most important first."""
    if net.widest != 1:
        raise UserError("teacher.weights: are those of width 1, which should then be one of teacher.widths")
    if teacher.order == "none" or len(net.widths) == 1:
        return whole
    return channel_order.order(precision.plain(net.members[1.0]), whole, shape, net.likes[net.widths[-1]], teacher.order)
