"""Layer-wise learning-rate decay: layers far from the classifier, which a pretrained network should keep, learn more slowly.

Howard and Ruder 2018; with fine-tuned transformers since BEiT (Bao et al. 2022): the last layer learns at the schedule's rate,
each one before it at `decay` times that of the next.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pwkd_jax import models


def layers(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, int]:
    """{name of a part at the top of the model's parameters: number of its layer, from 0, the last being the classifier's}.

    A layer is a module with a matrix or a convolution in it, in the order of computation for images [H, W, C]; a norm belongs
    to the layer before it, and parameters of the model itself, such as a class token, to the first one. Found by shapes alone.
    """
    while not isinstance(model, nn.Module):
        model = model.model  # what `precision` puts around it
    seen: list[str] = []

    def watch(run, args, kwargs, context):
        path = context.module.path
        if path and path[0] not in seen:
            seen.append(path[0])
        return run(*args, **kwargs)

    variables = models.abstract(model, image_shape)
    with nn.intercept_methods(watch):
        models.traced(model, variables, image_shape, train=False)
    params = variables["params"]
    number, found = -1, dict.fromkeys(params, 0)
    for name in (n for n in seen if n in params):
        number += any(leaf.ndim >= 2 for leaf in jax.tree.leaves(params[name]))
        found[name] = max(number, 0)
    return found


def scales(params: Any, layers: dict[str, int], decay: float) -> Any:
    """A float for every array of a state's parameters: decay ** (layers between its own and the last); 1 for what is not
    the network's."""
    last = max(layers.values())

    def one(path, _) -> float:
        keys = [entry.key for entry in path]
        part = None if keys[0] in ("distiller", "online") else next((key for key in keys if key in layers), None)
        return 1.0 if part is None else decay ** (last - layers[part])

    return jax.tree_util.tree_map_with_path(one, params)


def scaled(direction: optax.GradientTransformation, layers: dict[str, int], decay: float) -> optax.GradientTransformation:
    """`direction`, see `optimizers.optimizer`, of which each layer takes its part; its weight decay too."""

    def update(grads, state, params=None):
        found, state = direction.update(grads, state, params)
        return jax.tree.map(lambda d, scale: d * jnp.asarray(scale, d.dtype), found, scales(params, layers, decay)), state

    return optax.GradientTransformation(direction.init, update)
