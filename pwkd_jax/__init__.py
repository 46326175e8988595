"""Partial to whole knowledge distillation (arXiv 2109.12507) with width-slimmable teachers, in JAX and Flax.

What a notebook needs, in the order of use; nothing is imported before it is asked for:

    task, load_data, Batches, batches, augment, Mixing, normalise   images: arrays, any iterable of batches, named data sets
    make_slimmable, take, mask, sandwich_loss                       a teacher of your own Flax module, read at a width
    train_teacher, load_teacher, combine                            trained by the sandwich rule, frozen, kept; several as one
    stage_plan, even_plan, cycles, learning_rate                    who teaches when, and at which learning rate
    distil, fit_distiller, create_distiller                         any student, any distiller, or its loss in your own loop
    score, save, load, create_model, apply_model                    what came of it

`python -m pwkd_jax.train` and the other commands call the same functions.
"""

__version__ = "0.1.0"

# {name: where it lies}: so that `import pwkd_jax` costs nothing. __init__.pyi says the same to those who read types; a test
# holds the two together.
_HOMES = {
    "Batches": "data:Batches",
    "Dataset": "data:Dataset",
    "Mixing": "data:Mixing",
    "augment": "data:augment",
    "batches": "data:batches",
    "load_data": "data:load",
    "normalise": "data:normalise",
    "Distillation": "distillers:Distillation",
    "Progress": "distillers:Progress",
    "create_distiller": "distillers:create",
    "UserError": "errors:UserError",
    "load": "experiment.loading:open_network",
    "Outputs": "models:Outputs",
    "apply_model": "models:apply",
    "channels": "models:channels",
    "create_model": "models:create",
    "Slimmable": "slimmable:Slimmable",
    "make_slimmable": "slimmable:make_slimmable",
    "mask": "slimmable:mask",
    "sandwich_loss": "training.sandwich:sandwich_loss",
    "take": "slimmable:take",
    "Stage": "stages:Stage",
    "cycles": "stages:cycles",
    "even_plan": "stages:even",
    "stage_plan": "stages:plan",
    "Student": "training.outcome:Student",
    "distil": "training.distil:distil",
    "fit_distiller": "training.distil:fit",
    "score": "training.evaluation:score",
    "Cadence": "training.loop:Cadence",
    "learning_rate": "training.schedules:learning_rate",
    "Task": "training.task:Task",
    "task": "training.task:task",
    "combine": "training.several_teachers:combine",
    "Teacher": "training.teacher:Teacher",
    "load_teacher": "training.teacher:load_teacher",
    "train_teacher": "training.teacher:train_teacher",
    "Network": "weights:Network",
    "save": "weights:save",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pwkd_jax' has no attribute '{name}'")
    import importlib

    module, _, there = _HOMES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(f"pwkd_jax.{module}"), there)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
