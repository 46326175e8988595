"""Parts of a network that stay as training found them: weights without gradient or decay, batch norm as it predicts.

A part is named as its arrays are in parameters.txt, by shell patterns of a module or of a path: stem_*, stage1_block1/conv1.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax.errors import UserError


def frozen(path: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the module or array at `path` is, or lies in, one of the parts `names`."""
    parts = ["/".join(path[: i + 1]) for i in range(len(path))]
    return any(fnmatch.fnmatchcase(part, name) for part in parts for name in names)


def stopped(params: Any, names: Sequence[str]) -> Any:
    """A network's parameters, those of the parts without gradient."""
    if not names:
        return params
    flat = flatten_dict(params)
    return unflatten_dict({path: jax.lax.stop_gradient(x) if frozen(path, names) else x for path, x in flat.items()})


def kept(before: Any, after: Any, names: Sequence[str]) -> Any:
    """A network's parameters `after` a step, those of the parts as they were `before`: decay has no gradient to go by."""
    if not names:
        return after
    old, new = flatten_dict(before), flatten_dict(after)
    return unflatten_dict({path: old[path] if frozen(path, names) else x for path, x in new.items()})


@contextmanager
def as_predicting(names: Sequence[str]) -> Iterator[None]:
    """Within it, Flax's batch norm of the parts normalises by its running statistics, and leaves them as they are."""

    def intercept(run, args, kwargs, context):
        norm = isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"
        if norm and frozen(context.module.path, names):
            # Modules are frozen, but this one was made for the trace that is under way, and ends with it.
            object.__setattr__(context.module, "use_running_average", True)
        return run(*args, **kwargs)

    if not names:
        yield
        return
    with nn.intercept_methods(intercept):
        yield


def check(key: str, names: Sequence[str], variables: dict) -> None:
    """UserError for a name that is no part of the network whose variables, arrays or abstract, these are; or for all of it."""
    paths = list(flatten_dict(variables["params"]))
    for name in names:
        if not any(frozen(path, [name]) for path in paths):
            parts = ", ".join(dict.fromkeys(path[0] for path in paths))
            raise UserError(f"{key}: '{name}' is no part of this network; there are {parts}")
    if names and all(frozen(path, names) for path in paths):
        raise UserError(f"{key}: {tuple(names)} is all of the network; leave some of it to train")
