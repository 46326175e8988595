"""Several teachers that teach together: at each width the mean of their logits (You et al., KDD 2017), of any models."""

from collections.abc import Sequence

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models.ensemble import Ensemble, gather
from pwkd_jax.slimmable import Slimmable
from pwkd_jax.training.teacher import Teacher, as_teacher


def combine(teachers: Sequence, shares: Sequence[float] = ()) -> Teacher:
    """Trained teachers, or networks, as one of the widths that all of them have.

    shares: their parts of the mean, scaled to add up to 1; () equal ones. The card of a width is that of the first teacher,
    with what all of them are under "ensemble". Raises UserError where images, classes or normalisation differ, where they have
    no width in common, or shares are not positive.
    """
    found = [as_teacher(teacher) for teacher in teachers]
    if len(found) < 2:
        raise UserError(f"teachers: {len(found)} cannot be combined; give two or more")
    parts = weighed(len(found), shares, "shares")
    widths = sorted(set.intersection(*({*teacher.variables} for teacher in found)), reverse=True)
    if not widths:
        own = "; ".join(", ".join(f"{w:g}" for w in teacher.widths) for teacher in found)
        raise UserError(f"teachers: have no width in common: {own}")
    first = found[0].cards[max(found[0].variables)]
    for teacher in found[1:]:
        refuse_unlike(first, teacher.cards[max(teacher.variables)], "teachers")
    net = joined([teacher.net for teacher in found], parts, widths)
    variables = {w: gather([models.whole(teacher.variables[w]) for teacher in found]) for w in widths}
    cards = {
        w: found[0].cards[w] | {"ensemble": [{**named(t.cards[w]), "share": p} for t, p in zip(found, parts, strict=True)]}
        for w in widths
    }
    return Teacher(net, variables, cards)


def joined(nets: Sequence[Slimmable], parts: Sequence[float], widths: Sequence[float]) -> Slimmable:
    """The networks of `nets` at each of `widths`, the widest first, as one that predicts."""
    members = {w: Ensemble(tuple(net.members[w] for net in nets), tuple(parts)) for w in widths}
    likes = {w: gather([models.whole(net.likes[w]) for net in nets]) for w in widths}
    return Slimmable(members, likes, tuple(widths), "switchable", False)


def weighed(count: int, shares: Sequence[float], key: str) -> list[float]:
    """`count` parts that add up to 1, in the ratio of `shares`; () are equal ones. Raises UserError, naming `key`."""
    given = list(shares) or [1.0] * count
    if len(given) != count or not all(0 < share < float("inf") for share in given):
        raise UserError(f"{key}: {tuple(shares)} is not possible; it should be () or {count} numbers above 0, one a teacher")
    return [share / sum(given) for share in given]


def refuse_unlike(one: dict, other: dict, key: str) -> None:
    """UserError for cards of networks that do not see the same images, or do not know the same classes."""
    for what in ("image_shape", "num_classes", "mean", "std"):
        a, b = one[what], other[what]
        alike = a == b if what in ("image_shape", "num_classes") else all(abs(x - y) <= 1e-3 for x, y in zip(a, b, strict=True))
        if not alike:
            raise UserError(f"{key}: differ in {what}: {a} of {one['model']}, and {b} of {other['model']}")


def named(card: dict) -> dict:
    return {key: card[key] for key in ("model", "width")}
