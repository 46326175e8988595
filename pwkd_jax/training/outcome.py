"""What distillation leaves: a student that predicts, and what it is judged by."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from pwkd_jax import storage, weights
from pwkd_jax.distillers import Distillation
from pwkd_jax.errors import UserError
from pwkd_jax.stages import Stage
from pwkd_jax.training import averaging, distributed
from pwkd_jax.training import student as students
from pwkd_jax.training.state import State
from pwkd_jax.training.teacher import Teacher
from pwkd_jax.weights import Network


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained student. model, variables: what predicts, its own network unless its distiller has the last word on its logits.
    rows: what was logged. state: the last one, of several students stacked. snapshots: the states at stage ends that were
    kept. best: the state that was best on the task's validation images, of several students one for each; [] without."""

    model: Any
    variables: dict
    card: dict
    rows: list[dict]
    state: State
    snapshots: list[State]
    best: list[State] = dataclasses.field(default_factory=list)

    @property
    def network(self) -> Network:
        """What predicts, with the card that says how its images are normalised."""
        return Network(self.model, self.variables, self.card)

    def __repr__(self) -> str:
        name, width = self.card["model"], self.card["width"]
        return f"Student({name} at width {width:g}, {self.card['parameters']:,} parameters, {len(self.rows)} rows)"

    def logits(self, images: jax.Array) -> jax.Array:
        """Logits [B, classes] of uint8 images [B, H, W, C], or of float ones as it was trained on."""
        return self.network.logits(images)

    def save(self, path: str | Path) -> None:
        """Write FILE.safetensors and its card. Raises UserError for a student that predicts through its teacher, and
        OSError."""
        if Path(path).suffix != ".safetensors":
            raise UserError(f"{path}: should be a name ending in .safetensors")
        if isinstance(self.model, students.Assisted):
            raise UserError(f"{path}: this student predicts through its distiller, which weights alone do not hold")
        variables = distributed.fetch(self.variables)
        if distributed.primary():
            weights.write(storage.path(path), variables, self.card)


def judged(
    student: nn.Module, distillation: Distillation | None, plan: Sequence[Stage], teacher: Teacher | None, state: State
) -> tuple[Any, dict]:
    """(model, variables) whose logits count: the student's, unless its distiller has the last word on them, of the weights that
    count, see `averaging.outcome`."""
    return judged_as_trained(student, distillation, plan, teacher, averaging.outcome(state))


def judged_as_trained(
    student: nn.Module, distillation: Distillation | None, plan: Sequence[Stage], teacher: Teacher | None, state: State
) -> tuple[Any, dict]:
    """The same of the weights that are trained, where a mean of them counts."""
    if distillation is None or not distillation.predicts:
        return student, students.variables(state)
    width = max(next(s for s in plan if int(state.step) <= s.end).widths)
    model = students.Assisted(student, teacher.net.members[width], distillation, width)
    return model, model.variables(state, teacher.variables[width])
