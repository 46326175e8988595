"""The later stages of two networks, as FCFD and ScaleKD run them on another one's maps, for `models.again`. No torch here.

Stage i from 2 on is a 3x3 convolution `conv<i>`, batch norm by the batch (a student's) or by fixed numbers (a teacher's), ReLU.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.models import Outputs

EPS = 1e-5


def kernels(seed: int, shapes, images: int, classes: int) -> list[dict[str, np.ndarray]]:
    """{"conv2": [C2, C1, 3, 3], ..., "strong": logits of another view} of each network, in torch's layout."""
    made = []
    for number, stages in enumerate(shapes):
        rng = np.random.default_rng([seed, 17, number])
        made.append({f"conv{i}": rng.standard_normal((b, a, 3, 3)) / np.sqrt(9 * a)
                     for i, ((a, _), (b, _)) in enumerate(itertools.pairwise(stages), start=2)})  # fmt: skip
        made[-1]["strong"] = 2 * rng.standard_normal((images, classes))
    return made


class Later:
    """What `models.forward` takes for a model: from a stage's map on, or of another view, whose logits are given."""

    def __init__(self, strides: tuple[int, ...]):
        self.strides = strides  # of stage 2 on

    def __hash__(self) -> int:
        return hash(self.strides)

    def __eq__(self, other) -> bool:
        return isinstance(other, Later) and self.strides == other.strides

    def __call__(self, x, train, start):
        raise NotImplementedError

    def apply(self, variables, x, train=False, mutable=False, rngs=None, start=0):
        a, stages = variables["params"], []
        if not start:
            return (Outputs(a["strong"]), {}) if mutable else Outputs(a["strong"])
        for i, stride in enumerate(self.strides[start - 1 :], start=start + 1):
            kernel = jnp.transpose(a[f"conv{i}"], (2, 3, 1, 0))
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
            )
            if train:
                x = (x - jnp.mean(x, (0, 1, 2))) / jnp.sqrt(jnp.var(x, (0, 1, 2)) + EPS)
            x = jax.nn.relu(x * a[f"scale{i}"] + a[f"shift{i}"])
            stages.append(x)
        pooled = jnp.mean(x, (1, 2))
        logits = jnp.dot(pooled, a["kernel"].T, precision="highest") + a["bias"]
        out = Outputs(logits, tuple(stages), pooled=pooled, final=x)
        return (out, {}) if mutable else out
