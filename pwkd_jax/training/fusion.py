"""Feature fusion online distillation (FFSD): the students of one program teach a leader, and each other, while they train.

Li, Lin, Wang, Wu, Wu, Shao and Ji, AAAI 2022, arXiv 2103.14473, as its authors' code (SJLeo/FFSD) has it. Of S students the
last is the leader and the others, K = S - 1, are common ones. All hear the labels, and:

    a common one       the others, as in `mutual`; from the second on, also the one before it, by its last map: the diversity
                       loss, and self-distillation from that map with its attention turned around
    the fusion module  the labels and the mean of the common students' logits, from their last maps side by side
    the leader         the fusion module's logits and last map; through a module of its own, the maps that were fused; and
                       self-distillation from the fused map

Maps are compared by attention, the mean of squares over channels, at length 1. Self-distillation compares each earlier map of
a student with what its self-distillation module makes of a last map; that module learns, beside, to find the student's own
earlier maps in its last one. The three weights rise over the first epochs, which count over all stages of a plan.

Every student's state holds a copy of all modules, so that states stack; it trains those that it uses, and the fusion module is
the leader's. One optimiser, with its learning rate and decay, trains all, where the authors give the fusion module a decay of
1e-5 and the self-distillation modules Adam, which the size of a loss means nothing to. Those lead from each map to the one
before, of any size and channels, where theirs double the size and halve the channels. Batch norm keeps the biased variance, as
everywhere here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pwkd_jax import models, slimmable
from pwkd_jax.distillers.feature_maps import normalise
from pwkd_jax.distillers.logits import kl, log_softmax, wide
from pwkd_jax.errors import UserError
from pwkd_jax.models import Outputs, compute
from pwkd_jax.training.fusion_modules import Back, Fuse, Unfuse
from pwkd_jax.training.mutual import Mutual

# Of a map's pixels a third is least attended to, which has to be one at least.
PIXELS = 3


@dataclasses.dataclass(frozen=True)
class Fusion:
    """students: all of them. temperature: of every divergence, with its square before it. diversity: weight of what a common
    student hears of the one before it. fused: of the maps that the leader hears. self_distillation: of the loss that trains the
    modules of that name. warmup: epochs over which these three weights rise."""

    students: int
    temperature: float = 2.0
    diversity: float = 1e-5
    fused: float = 10.0
    self_distillation: float = 1000.0
    warmup: int = 5

    def init(self, key: jax.Array, out: Outputs) -> tuple[dict, dict]:
        """(params, statistics) of a student's modules: {name: tree}, for outputs like these, abstract or not."""
        last, common = out.stages[-1].shape[1:], self.students - 1
        inputs = {"fuse": (*last[:2], common * last[2]), "unfuse": last, "back": last}
        made = {}
        for i, (name, module) in enumerate(modules_of(out, common).items()):
            made[name] = module.init(jax.random.fold_in(key, i), jnp.zeros((1, *inputs[name])), False)
        return tuple({name: dict(tree.get(kind, {})) for name, tree in made.items()} for kind in ("params", "batch_stats"))

    def said(self, out: Outputs) -> tuple[jax.Array, jax.Array]:
        """What the others see of a student: logits [B, classes] and its last map [B, H, W, C]."""
        return out.logits, out.stages[-1]

    def scale(self, epoch: jax.Array) -> jax.Array | float:
        """Of the three weights in an `epoch`, a fraction: exp(-5 (1 - e / warmup)^2) in the e-th, counted from 1."""
        if not self.warmup:
            return 1.0
        part = jnp.minimum((jnp.floor(epoch) + 1) / self.warmup, 1.0)
        return jnp.exp(-5 * (1 - part) ** 2)

    def __call__(
        self, params: dict, statistics: dict, index, out: Outputs, everyone: tuple, labels: jax.Array, epoch: jax.Array
    ) -> tuple[jax.Array, dict, dict[str, jax.Array]]:
        """(loss, statistics, metrics) of student `index`, an int or an array. everyone: what `said` gives, of all [students,
        ...]; no gradient flows back into it. labels: [B], or soft [B, classes].

        The loss has the value of what the student hears, and also the gradient of what its modules learn by.
        """
        logits, maps = (x[:-1] for x in jax.lax.stop_gradient(everyone))
        own, maps = tuple(wide(x) for x in out.stages), wide(maps)
        modules, scale = modules_of(out, len(maps)), self.scale(epoch)

        def run(name: str, x: jax.Array, train: bool):
            with compute.layers():
                variables = {"params": params[name], "batch_stats": statistics[name]}
                found, new = modules[name].apply(variables, x, train, mutable=["batch_stats"])
            return found, {name: new.get("batch_stats", {})}

        def back(hint: jax.Array) -> tuple[jax.Array, jax.Array, dict]:
            """(self-distillation of the student by a last map, loss of its module, statistics)."""
            taught = jax.lax.stop_gradient(run("back", hint, False)[0])
            made, kept = run("back", jax.lax.stop_gradient(own[-1]), True)
            return distance(own, taught), self.self_distillation * imitation(made, jax.lax.stop_gradient(own)), kept

        def towards(taught: jax.Array, z: jax.Array) -> jax.Array:
            return softened(taught, z, self.temperature)

        # Each gives (divergence, maps, self-distillation, loss of the modules, statistics).
        def first():
            off = Mutual(1.0, self.temperature)(out.logits, logits)
            return off, *[jnp.zeros_like(off)] * 3, statistics

        def later():
            before = maps[index - 1]
            off = Mutual(1.0, self.temperature)(out.logits, logits)
            own_way, learnt, kept = back(diverse(before))
            weight = scale * self.diversity
            return off, weight * diversity(own[-1], before), weight * own_way, scale * learnt, statistics | kept

        def leader():
            side_by_side = jnp.moveaxis(maps, 0, 3).reshape(*maps.shape[1:4], -1)
            (z, fused), kept = run("fuse", side_by_side, True)
            learnt = jnp.mean(slimmable.cross_entropy(z, labels)) + towards(jnp.mean(wide(logits), 0), z)
            z, fused = jax.lax.stop_gradient((z, fused))
            unfused, more = run("unfuse", own[-1], True)
            own_way, taught, most = back(fused)
            heard = distance(own[-1:], [fused]) + distance([unfused], [side_by_side])
            weight, kept = scale * self.fused, statistics | kept | more | most
            return towards(z, out.logits), weight * heard, weight * own_way, learnt + scale * taught, kept

        roles = first, later, leader
        if isinstance(index, int):
            found = roles[0 if index == 0 else 2 if index == self.students - 1 else 1]()
        else:
            found = jax.lax.switch(jnp.where(index == self.students - 1, 2, jnp.minimum(index, 1)), roles)
        *heard, learnt, kept = found
        values = dict(zip(("online_logits", "online_maps", "online_self"), heard, strict=True)) | {"online_modules": learnt}
        return sum(heard) + (learnt - jax.lax.stop_gradient(learnt)), kept, values


def modules_of(out: Outputs, common: int) -> dict:
    """The modules of a student whose outputs are like these, with so many common students."""
    features = out.stages[-1].shape[-1]
    back = Back(tuple(x.shape[1:] for x in out.stages[:-1]))
    return {"fuse": Fuse(features, out.logits.shape[-1]), "unfuse": Unfuse(common * features), "back": back}


def softened(taught: jax.Array, own: jax.Array, temperature: float) -> jax.Array:
    """T^2 KL(taught || own) of logits [B, classes], a mean over the batch."""
    return temperature**2 * jnp.mean(kl(log_softmax(taught, temperature), log_softmax(own, temperature)))


def attention(x: jax.Array) -> jax.Array:
    """[B, H * W]: the mean over channels of a map's squares [B, H, W, C]."""
    return jnp.mean(x * x, axis=-1).reshape(len(x), -1)


def _off(x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean square of what rows [B, D] of length 1 differ by."""
    x, y = (normalise(z.reshape(len(z), -1)) for z in (x, y))
    return jnp.mean((x - y) ** 2)


def distance(own, taught) -> jax.Array:
    """The sum over pairs of maps of how far their attention differs; maps of `own` beyond the last of `taught` have no pair."""
    return sum((_off(attention(x), attention(y)) for x, y in zip(own, taught, strict=False)), jnp.zeros(()))


def imitation(made, own) -> jax.Array:
    """What trains a self-distillation module, by the maps that it made: how far they, and their attention, differ."""
    return distance(made, own) + sum((_off(x, y) for x, y in zip(made, own, strict=False)), jnp.zeros(()))


def turned(taught: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a map [B, H, W, C] (its attention at length 1 turned around [B, H * W], that attention, its length [B, 1]).

    Where a pixel has more than the third that has least, it gets the length less its own; where it has less, its own. The
    length is that before the attention was brought to 1, as the authors have it.
    """
    seen = attention(taught)
    length = jnp.sqrt(jnp.sum(seen * seen, axis=-1, keepdims=True))
    seen = normalise(seen)
    least = seen.shape[-1] // PIXELS
    edge = jnp.sort(seen, axis=-1)[:, least - 1 : least]
    return (length / 2 - seen) * jnp.sign(seen - edge) + length / 2, seen, length


def diversity(own: jax.Array, before: jax.Array) -> jax.Array:
    """How far a map's attention, at length 1, differs from that of the student before it, turned around."""
    return jnp.mean((normalise(attention(own)) - turned(before)[0]) ** 2)


def diverse(before: jax.Array) -> jax.Array:
    """The map [B, H, W, C] of the student before, moved at every pixel, in all channels alike, towards its attention turned
    around."""
    target, seen, length = turned(before)
    return before + ((target - seen) * length / before.shape[-1]).reshape(*before.shape[:3], 1)


def check(model, image_shape: tuple[int, ...]) -> None:
    """UserError for a student without the maps that are fused here, found by shapes alone for images [H, W, C]."""
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    variables = models.abstract(model, image_shape)
    out = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], variables, images)
    if not out.stages:
        raise UserError("student.online: 'fusion' fuses 'stages', which the student's model does not return; choose another")
    height, width = out.stages[-1].shape[1:3]
    if height * width < PIXELS:
        raise UserError(
            f"student.online: 'fusion' needs {PIXELS} pixels or more in the student's last map, which has {height * width}; "
            "choose a model that shrinks images less, or larger images"
        )
