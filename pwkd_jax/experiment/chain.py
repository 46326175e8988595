"""Chains of teacher's assistants: each network learns from the one before it (TAKD, Mirzadeh et al. 2020), or from all those
before it (as in DGKD, Son et al. 2021, here by the mean of their logits).

In a file of `sweep`, chain = ["resnet56", "resnet32", "resnet20"] in place of [grid]: the first is trained as a teacher, each
next one is the student of its own experiment, a link, and the teacher of the one after.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from pwkd_jax.errors import UserError


class Link(NamedTuple):
    """name: of its workdir. overrides: config keys. assistant: (run of the link before, folder to export it to); None for the
    first."""

    name: str
    overrides: dict[str, Any]
    assistant: tuple[str, str] | None


def links(path: Path, models: Any, dense: bool, fixed: dict[str, Any], seed: int, root: Path) -> list[Link]:
    """The experiments of a chain of `models`, the largest first, with the keys `fixed` in every one. seed: of the first
    student, the config's. Raises UserError."""
    if not isinstance(models, list) or len(models) < 3 or not all(isinstance(m, str) for m in models):
        raise UserError(f"{path}: chain should name three models or more, the largest first, as in "
                        '["resnet56", "resnet32", "resnet20"]')  # fmt: skip
    for key in ("teacher.model", "student.model", "teacher.weights", "student.teachers"):
        if key in fixed:
            raise UserError(f"{path}: set.{key}: the chain sets it; leave it away")
    arm = fixed.get("arms", ["kd_standard"])
    arm = arm[0] if isinstance(arm, list) and len(arm) == 1 else arm
    if not isinstance(arm, str) or arm == "alone":
        raise UserError(f"{path}: set.arms should be one arm that has a teacher, as in [\"kd_standard\"] or [\"pwkd\"]")
    found = []
    for i, (teacher, student) in enumerate(itertools.pairwise(models), start=1):
        overrides = fixed | {"teacher.model": teacher, "student.model": student, "arms": [arm]}
        if i < len(models) - 1:
            # An assistant teaches at a width of 1, and one of it is enough.
            overrides |= {"seeds": 1, "student.width": 1.0}
        assistant = None
        if found:
            before = root / found[-1].name
            assistant = (str(before / f"students/{arm}/seed{fixed.get('seed', seed)}"), str(before / "assistant"))
            overrides["teacher.weights"] = f"{assistant[1]}/model.safetensors"
            if dense:
                overrides["student.teachers"] = [str(root / link.name) for link in found]
        found.append(Link(f"{i}-{student.replace(':', '.')}", overrides, assistant))
    return found
