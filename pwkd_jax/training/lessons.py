"""What the students of one arm learn, whether they train by themselves (`distil`) or beside other arms (`study`)."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from pwkd_jax.distillers import Distillation
from pwkd_jax.stages import Stage
from pwkd_jax.training import averaging, optimizers, students_together
from pwkd_jax.training import student as students
from pwkd_jax.training.outcome import judged, judged_as_trained
from pwkd_jax.training.state import State
from pwkd_jax.training.task import Task
from pwkd_jax.training.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Of one student, or of `several`, whose state is then stacked. task: where they are scored. reset, connectors: see
    `student.enter_stage`."""

    student: nn.Module
    plan: Sequence[Stage]
    distillation: Distillation | None
    teacher: Teacher | None
    task: Task
    rule: optimizers.Rule
    several: students_together.Several | None = None
    reset: Sequence[str] = ()
    connectors: str = "leading"

    def enter(self, state: State, fresh: Callable[[], State]) -> State:
        """The state with which a stage after the first begins. fresh: gives the initial one."""
        init = jax.vmap(self.rule.direction.init) if self.several else self.rule.direction.init
        return students.enter_stage(state, fresh, init, self.reset, self.connectors)

    def evaluate(self, state: State) -> dict[str, float]:
        """The scores of the student, or of each under a name of its own."""
        if not self.several:
            return self._scores(state)
        members = [self.task.place(students_together.member(state, i)) for i in range(self.several.count)]
        return students_together.names([self._scores(m) for m in members])

    def _scores(self, state: State) -> dict[str, float]:
        of = self.student, self.distillation, self.plan, self.teacher, state
        found = self.task.scores(*judged(*of))
        if "top1" in found and averaging.averages(state):
            found["raw_top1"] = self.task.scores(*judged_as_trained(*of))["top1"]
        return found
