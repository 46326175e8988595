"""What a distiller asks of a pair, refused by name where a model does not have it."""

from pwkd_jax.errors import UserError
from pwkd_jax.models import Outputs
from pwkd_jax.models.again import Again


def need(method: str, student: Outputs, teacher: Outputs, *fields: str, stages: int = 0) -> None:
    """UserError unless both models return the `fields` of `models.Outputs`, and at least `stages` stage maps.

    Works on abstract outputs, so a pair is refused before anything is compiled.
    """
    for who, outputs in (("student", student), ("teacher", teacher)):
        for field in fields:
            value = getattr(outputs, field)
            if value is None or (isinstance(value, tuple) and not value):
                raise UserError(f"student.distiller: {method} needs '{field}', which the {who}'s model does not return")
        for field in ("stages", "preact"):
            if field in fields and len(getattr(outputs, field)) < stages:
                raise UserError(f"student.distiller: {method} needs {stages} maps in '{field}'; the {who} has fewer")


def network(method: str, who: str, outputs: Outputs, resumes: bool = False) -> Again:
    """The student or the teacher itself. resumes: whether it has to go on from a stage's map.

    Raises UserError where it cannot, or was not given.
    """
    if outputs.again is None:
        raise UserError(
            f"student.distiller: {method} runs the {who} once more, and was given its outputs alone; in a loop of your own put "
            "the network to them by pwkd_jax.models.again.attach"
        )
    if resumes and not outputs.again.resumes:
        raise UserError(
            f"student.distiller: {method} runs the {who} from the map of a stage on, and its model has no argument 'start', "
            "see pwkd_jax.models.contract; choose a built-in model, or another method"
        )
    return outputs.again
