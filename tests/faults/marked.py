"""The training command, telling where it is: a line for each thing that begins, to the pipe that $MARKS numbers.

    MARKS=3 python -m tests.faults.marked --config=... --workdir=...

Nothing of it is changed: some functions are called through others that write a mark first.
"""

import functools
import os
import runpy
from collections.abc import Callable


def mark(name: str) -> None:
    os.write(int(os.environ["MARKS"]), f"{name}\n".encode())


def tell(owner, attribute: str, name: str | Callable[..., str]) -> None:
    """Mark each call of `owner.attribute`. name: of the mark, or what gives it from the arguments ('': none)."""
    true = getattr(owner, attribute)

    @functools.wraps(true)
    def marked(*args, **kwargs):
        if said := name(*args, **kwargs) if callable(name) else name:
            mark(said)
        return true(*args, **kwargs)

    setattr(owner, attribute, marked)


def step(progress, at: int, note: str = "") -> str:
    """The phase of a step that was made: the teacher's, one of pwkd's two stages, or a control's."""
    run = progress._name.partition("/")[0].partition(",")[0]
    return run if run == "teacher" else f"pwkd {1 if at <= progress._total // 2 else 2}" if run == "pwkd" else "control"


def reported(path, content) -> str:
    return "report" if path.name in ("summary.json", "report.html", "result.json") else ""


if __name__ == "__main__":
    import jax._src.compiler

    from pwkd_jax import storage
    from pwkd_jax.training.checkpoints import Checkpoints
    from pwkd_jax.training.evaluation import Evaluator
    from pwkd_jax.training.writers import Progress

    tell(jax._src.compiler, "backend_compile_and_load", "compile")
    tell(Progress, "update", step)
    tell(Checkpoints, "save", "save")
    tell(Evaluator, "__call__", "evaluation")
    tell(Evaluator, "ensemble_top1", "evaluation")
    tell(storage, "replace", reported)
    runpy.run_module("pwkd_jax.train", run_name="__main__", alter_sys=True)
