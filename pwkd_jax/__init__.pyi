"""Types of the names that `__init__.py` imports when they are asked for."""

from pwkd_jax.data import Batches as Batches
from pwkd_jax.data import Dataset as Dataset
from pwkd_jax.data import Mixing as Mixing
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
from pwkd_jax.slimmable import take as take
from pwkd_jax.stages import Stage as Stage
from pwkd_jax.stages import cycles as cycles
from pwkd_jax.stages import even as even_plan
from pwkd_jax.stages import plan as stage_plan
from pwkd_jax.training.distil import distil as distil
from pwkd_jax.training.distil import fit as fit_distiller
from pwkd_jax.training.evaluation import score as score
from pwkd_jax.training.loop import Cadence as Cadence
from pwkd_jax.training.outcome import Student as Student
from pwkd_jax.training.sandwich import sandwich_loss as sandwich_loss
from pwkd_jax.training.schedules import learning_rate as learning_rate
from pwkd_jax.training.several_teachers import combine as combine
from pwkd_jax.training.task import Task as Task
from pwkd_jax.training.task import task as task
from pwkd_jax.training.teacher import Teacher as Teacher
from pwkd_jax.training.teacher import load_teacher as load_teacher
from pwkd_jax.training.teacher import train_teacher as train_teacher
from pwkd_jax.weights import Network as Network
from pwkd_jax.weights import save as save

__version__: str

__all__ = [
    "Batches",
    "Cadence",
    "Dataset",
    "Distillation",
    "Mixing",
    "Network",
    "Outputs",
    "Progress",
    "Slimmable",
    "Stage",
    "Student",
    "Task",
    "Teacher",
    "UserError",
    "apply_model",
    "augment",
    "batches",
    "channels",
    "create_distiller",
    "create_model",
    "cycles",
    "distil",
    "even_plan",
    "fit_distiller",
    "learning_rate",
    "load",
    "load_data",
    "load_teacher",
    "make_slimmable",
    "mask",
    "normalise",
    "sandwich_loss",
    "save",
    "score",
    "stage_plan",
    "take",
    "task",
    "train_teacher",
]  # fmt: skip
