"""Function-consistent feature distillation (Liu, Kan, Shan and Chen, ICLR 2023).

Two features that later layers read alike are alike: the student's map is put through the teacher's later stages, the
teacher's through the student's, and what comes out has to be what the teacher says itself.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import stage_pairs
from pwkd_jax.distillers.kd import kd_loss
from pwkd_jax.distillers.logits import above_zero, ramp, wide
from pwkd_jax.distillers.regressors import resized
from pwkd_jax.distillers.taps import need, network
from pwkd_jax.distillers.temperature import TEMPERATURE
from pwkd_jax.errors import UserError
from pwkd_jax.models import Outputs


def maps(outputs: Outputs) -> list[jax.Array]:
    """The stages' maps, the last one's place taken by the map that the classifier reads; float32 at least."""
    return [wide(x) for x in (*outputs.stages[:-1], outputs.final)]


def appearance(found: list[jax.Array], targets: list[jax.Array]) -> jax.Array:
    """Sum over maps [B, H, W, C] of mean((found - target)^2), and over the last ones' vectors, pooled after ReLU."""
    pairs = list(zip(found, targets, strict=True))
    pooled = [jnp.mean(nn.relu(x), axis=(1, 2)) for x in pairs[-1]]
    return sum(jnp.mean((a - b) ** 2) for a, b in (*pairs, pooled))


class Bridge(nn.Module):
    """[B, H, W, C] to [B, *size, features]: 3x3 convolution (4x4 transposed where the map is doubled), batch norm and, unless
    `signed`, leaky ReLU of slope 0.1."""

    features: int
    size: tuple[int, int]
    signed: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = resized("FCFD", x, self.features, self.size, side=3, kernel_init=kernel_init)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name="norm")(x)
        return x if self.signed else nn.leaky_relu(x, 0.1)


class FCFD(nn.Module):
    """KD + KD of mixed networks + feature_weight * ramp * `appearance`, beside full cross entropy.

    A mixed network is one network's first i stages, a `Bridge`, and the other's later stages; of those for every i, either way
    round, `paths` are drawn at each step. Appearance is that of the student's bridged maps and of all maps that the teacher
    makes of them in those paths. Defaults are the authors' for resnet32x4 to resnet8x4; ShuffleNets have T = 8. Their ramp is
    (epoch + 1) / 20; ours, of a stage's epochs, grows with every step. Theirs runs the teacher by the batch's
    statistics, ours by its own. Those that the student's later stages have of the teacher's maps are not kept.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    temperature: float = TEMPERATURE
    feature_weight: float = 5.0
    paths: int = 2
    ramp_epochs: float = 20.0
    reruns = True

    def __post_init__(self):
        above_zero(temperature=self.temperature)
        if self.paths < 0:
            raise UserError(f"paths: {self.paths} is not possible; it should be 0 or more mixed networks a step")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("FCFD", student, teacher, "final", "stages", stages=2)
        stage_pairs("FCFD", student, teacher)
        itself, frozen = network("FCFD", "student", student, True), network("FCFD", "teacher", teacher, True)
        own, taught = maps(student), maps(teacher)
        count = len(own) - 1
        here = [self._bridge(f"to_teacher{i}", s, t, frozen.signed and i <= count)
                for i, (s, t) in enumerate(zip(own, taught, strict=True), start=1)]  # fmt: skip
        there = [self._bridge(f"to_student{i}", taught[i - 1], own[i - 1], itself.signed) for i in range(1, count + 1)]
        key = self.make_rng("distiller")

        def kd(logits: jax.Array) -> jax.Array:
            return kd_loss(logits, teacher.logits, self.temperature)

        def taught_on(i: int):
            out = frozen(here[i - 1], start=i)
            return kd(out.logits), appearance(maps(out), taught[i:])

        def studied_on(i: int):
            out = itself(there[i - 1], start=i, key=key)
            return kd(out.logits), jnp.zeros((), taught[-1].dtype)

        routes = list(itertools.product((taught_on, studied_on), range(1, count + 1)))
        mixed, features = jnp.zeros((), taught[-1].dtype), appearance(here, taught)
        for (go, i), drawn in zip(routes, drawn_paths(self.make_rng("distiller"), len(routes), self.paths), strict=True):
            nothing = jnp.zeros((), taught[-1].dtype)
            # What is not drawn is not computed.
            said, alike = jax.lax.cond(drawn, lambda go=go, i=i: go(i), lambda x=nothing: (x, x))
            mixed, features = mixed + said, features + alike
        logits = kd(student.logits)
        loss = logits + mixed + self.feature_weight * ramp(progress.epoch, self.ramp_epochs) * features
        return loss, {"logits": logits, "mixed": mixed, "features": features}

    def _bridge(self, name: str, x: jax.Array, like: jax.Array, signed: bool) -> jax.Array:
        return Bridge(like.shape[-1], like.shape[1:3], signed, name=name)(x)


def drawn_paths(key: jax.Array, count: int, paths: int) -> jax.Array:
    """[count] bool: which `paths` of them are drawn, all where they are fewer."""
    return jnp.zeros(count, bool).at[jax.random.permutation(key, count)[:paths]].set(True)
