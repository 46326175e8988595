"""Partial to whole knowledge distillation (arXiv 2109.12507) with width-slimmable teachers, in JAX and Flax.

What a notebook needs, in the order of use; nothing is imported before it is asked for:

    task, load_data, Batches, batches, augment, normalise           images: arrays, any iterable of batches, named data sets
    make_slimmable, take, mask, sandwich_loss                       a teacher of your own Flax module, read at a width
    train_teacher, load_teacher                                     trained by the sandwich rule, frozen, kept
    stage_plan, even_plan, cycles, learning_rate                    who teaches when, and at which learning rate
    distil, fit_distiller, create_distiller                         any student, any distiller, or its loss in your own loop
    score, save, load, create_model, apply_model                    what came of it

`python -m pwkd_jax.train` and the other commands call the same functions.
"""

TYPE_CHECKING = False  # for those who read types and run nothing; `typing` would cost more than all the rest here
if TYPE_CHECKING:
    from pwkd_jax.data import Batches as Batches
    from pwkd_jax.data import Dataset as Dataset
    from pwkd_jax.data import augment as augment
    from pwkd_jax.data import batches as batches
    from pwkd_jax.data import load as load_data
    from pwkd_jax.data import normalise as normalise
    from pwkd_jax.distillers import Distillation as Distillation
    from pwkd_jax.distillers import Progress as Progress
    from pwkd_jax.distillers import create as create_distiller
    from pwkd_jax.errors import UserError as UserError
    from pwkd_jax.experiment.loading import open_network as load
    from pwkd_jax.models import Outputs as Outputs
    from pwkd_jax.models import apply as apply_model
    from pwkd_jax.models import channels as channels
    from pwkd_jax.models import create as create_model
    from pwkd_jax.slimmable import Slimmable as Slimmable
    from pwkd_jax.slimmable import make_slimmable as make_slimmable
    from pwkd_jax.slimmable import mask as mask
    from pwkd_jax.slimmable import sandwich_loss as sandwich_loss
    from pwkd_jax.slimmable import take as take
    from pwkd_jax.stages import Stage as Stage
    from pwkd_jax.stages import cycles as cycles
    from pwkd_jax.stages import even as even_plan
    from pwkd_jax.stages import plan as stage_plan
    from pwkd_jax.training.distil import Student as Student
    from pwkd_jax.training.distil import distil as distil
    from pwkd_jax.training.distil import fit as fit_distiller
    from pwkd_jax.training.evaluation import score as score
    from pwkd_jax.training.schedules import learning_rate as learning_rate
    from pwkd_jax.training.task import Task as Task
    from pwkd_jax.training.task import task as task
    from pwkd_jax.training.teacher import Teacher as Teacher
    from pwkd_jax.training.teacher import load_teacher as load_teacher
    from pwkd_jax.training.teacher import train_teacher as train_teacher
    from pwkd_jax.weights import Network as Network
    from pwkd_jax.weights import save as save

__version__ = "0.1.0"

# {module: {name here: name there, '' the same}}, so that `import pwkd_jax` costs nothing; a test holds it to the lines above.
_HOMES = {
    "data": {"Batches": "", "Dataset": "", "augment": "", "batches": "", "load_data": "load", "normalise": ""},
    "distillers": {"Distillation": "", "Progress": "", "create_distiller": "create"},
    "errors": {"UserError": ""},
    "experiment.loading": {"load": "open_network"},
    "models": {"Outputs": "", "apply_model": "apply", "channels": "", "create_model": "create"},
    "slimmable": {"Slimmable": "", "make_slimmable": "", "mask": "", "sandwich_loss": "", "take": ""},
    "stages": {"Stage": "", "cycles": "", "even_plan": "even", "stage_plan": "plan"},
    "training.distil": {"Student": "", "distil": "", "fit_distiller": "fit"},
    "training.evaluation": {"score": ""},
    "training.schedules": {"learning_rate": ""},
    "training.task": {"Task": "", "task": ""},
    "training.teacher": {"Teacher": "", "load_teacher": "", "train_teacher": ""},
    "weights": {"Network": "", "save": ""},
}
_PUBLIC = {name: (module, there or name) for module, names in _HOMES.items() for name, there in names.items()}

__all__ = [
    "Batches", "Dataset", "Distillation", "Network", "Outputs", "Progress", "Slimmable", "Stage", "Student", "Task",
    "Teacher", "UserError", "apply_model", "augment", "batches", "channels", "create_distiller", "create_model", "cycles",
    "distil", "even_plan", "fit_distiller", "learning_rate", "load", "load_data", "load_teacher", "make_slimmable", "mask",
    "normalise", "sandwich_loss", "save", "score", "stage_plan", "take", "task", "train_teacher",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pwkd_jax' has no attribute '{name}'")
    import importlib

    module, there = _PUBLIC[name]
    value = globals()[name] = getattr(importlib.import_module(f"pwkd_jax.{module}"), there)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
