"""Several trained networks as one, which only predicts: its logits are the mean of theirs."""

import dataclasses
from typing import Any

import jax

from pwkd_jax import models


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """members: networks, as models have them; shares: what each adds to the mean, in all 1.

    Variables are those of the members by their number, below each collection: {"params": {"0": tree, "1": tree}, ...}. Outputs
    are logits alone, so methods that read features refuse it.
    """

    members: tuple[Any, ...]
    shares: tuple[float, ...]

    def init(self, rngs: jax.Array, images: jax.Array, train: bool = False) -> dict:
        return gather([m.init(jax.random.fold_in(rngs, i), images, train=train) for i, m in enumerate(self.members)])

    def apply(self, variables: dict, images: jax.Array, train: bool = False) -> models.Outputs:
        if train:
            raise ValueError("an ensemble of trained networks predicts, and is not trained")
        own = spread(variables, len(self.members))
        logits = [models.apply(m, v, images, train=False)[0].logits for m, v in zip(self.members, own, strict=True)]
        return models.Outputs(sum(share * z for share, z in zip(self.shares, logits, strict=True)))


def gather(each: list[dict]) -> dict:
    """An ensemble's variables, of its members'."""
    names = dict.fromkeys(name for variables in each for name in variables)
    return {name: {str(i): variables.get(name, {}) for i, variables in enumerate(each)} for name in names}


def spread(variables: dict, count: int) -> list[dict]:
    """The inverse of `gather`."""
    return [{name: tree.get(str(i), {}) for name, tree in variables.items()} for i in range(count)]
