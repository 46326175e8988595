"""The teachers of other workdirs that teach beside an experiment's own (`student.teachers`)."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from pwkd_jax import models, slimmable, storage, weights
from pwkd_jax.errors import UserError
from pwkd_jax.models import precision
from pwkd_jax.models.ensemble import gather
from pwkd_jax.slimmable import Slimmable
from pwkd_jax.training import several_teachers
from pwkd_jax.training.teacher import Teacher

KEY = "student.teachers"


@dataclasses.dataclass(frozen=True)
class Fellows:
    """Of one of the own teachers, slimmable or standard: those beside it. net: all of them as one, by width."""

    runs: tuple[str, ...]
    models: tuple[str, ...]
    net: Slimmable
    variables: tuple[dict[float, dict], ...]

    def with_own(self, own: Teacher, place: Callable[[Any], Any]) -> Teacher:
        """All of them, `own` first, their variables put where they teach by place(tree)."""
        found = {w: gather([models.whole(own.variables[w]), *(place(v[w]) for v in self.variables)]) for w in self.net.table}
        return Teacher(self.net, found, own.cards, own.rows)


def find(config: ConfigDict, facts: dict, name: str, own: Slimmable) -> Fellows:
    """Those of the teacher `name`. Raises UserError for a workdir without it, or one of other images or classes."""
    c, nets, kept, named = config.student, [own], [], []
    parts = several_teachers.weighed(1 + len(c.teachers), c.teacher_shares, "student.teacher_shares")
    for run in c.teachers:
        directory = storage.path(run, KEY) / "teacher" / name
        if not storage.exists(directory / "result.json"):
            raise UserError(f"{KEY}: '{run}' holds no finished {name} teacher; train it there first")
        variables, members, likes = {}, {}, {}
        for width in own.table:
            path = directory / f"width_{slimmable.width_key(width)}.safetensors"
            if not storage.exists(path):
                raise UserError(f"{KEY}: the {name} teacher of '{run}' has no width {width:g}, at which this one's teaches")
            read, card = weights.read(path, config.teacher.model)
            weights.refuse_another(path, card, card["model"], width, facts)
            theirs, ours = card.get("classes"), facts.get("classes")
            if theirs and ours and theirs != ours:
                raise UserError(f"{KEY}: '{run}' knows other classes than these data have, or in another order")
            variables[width] = models.whole(read)
            members[width] = precision.wrap(weights.build(card), config.dtype, config.batch_norm_group)
            likes[width] = models.abstract(members[width], tuple(facts["image_shape"]))
        nets.append(Slimmable(members, likes, own.table, "switchable", False))
        kept.append(variables)
        named.append(card["model"])
    return Fellows(tuple(c.teachers), tuple(named), several_teachers.joined(nets, parts, own.table), tuple(kept))
