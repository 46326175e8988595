"""The experiment that is broken on purpose: as small as it can be with a teacher of several widths, stages and controls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from orbax.checkpoint import v1 as ocp

from tests import conftest  # noqa: F401  (its XLA_FLAGS)

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--config=configs/digits.py",
    *(
        f"--config.{override}"
        for override in (
            "teacher.model=test_training:Tiny", "student.model=test_training:Tiny", "student.width=0.5", "seeds=1",
            "teacher.widths=(0.5,1.0)", "data.train_split=train[:150]", "data.test_split=test[:50]",
            "teacher.duration=24 steps", "student.duration=24 steps", "teacher.batch_size=16", "student.batch_size=16",
            "evaluation.every=8 steps", "log.every=4 steps", "checkpoint.every=5 steps", "log.tensorboard=false",
        )
    ),
]  # fmt: skip
TIMES = ("seconds", "images_per_second", "environment")


def environment(**more: str) -> dict[str, str]:
    """Of a command in a process of its own: as little compiling as possible, and where it is kept."""
    home = ROOT / ".venv" / "jax_cache"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02"}
    return {**kept, **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **more}


def command(*options: str, workdir: Path, program: tuple[str, ...] = ("-m", "pwkd_jax.train")) -> list[str]:
    """The line that trains in `workdir`."""
    return [sys.executable, *program, *OPTIONS, *options, f"--workdir={workdir}"]


def run(*options: str, workdir: Path, **more: str) -> subprocess.CompletedProcess:
    """Train in a process of its own, to its end."""
    line = command(*options, workdir=workdir)
    return subprocess.run(line, env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=600)


# What two workdirs hold.


def differences(a: Path, b: Path) -> list[str]:
    """How two finished workdirs of one experiment differ, times apart, a phrase each; bits are compared."""
    names = [{p.relative_to(w).as_posix() for p in w.rglob("*") if _counts(p, w)} for w in (a, b)]
    found = [f"{name} is in one alone" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if not _equal(a / name, b / name):
            found.append(f"{name} differs")
    return found


def _counts(path: Path, workdir: Path) -> bool:
    inside = path.relative_to(workdir).parts
    if "checkpoints" in inside:  # compared as states, and as the steps that are there
        return inside[-2] == "checkpoints" and path.name.isdigit()
    return path.is_file() and path.name[0] != "." and path.name != "report.html"


def _equal(a: Path, b: Path) -> bool:
    if a.is_dir():
        x, y = state(a), state(b)
        return x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
    if a.suffix == ".safetensors":
        x, y = (safetensors.numpy.load_file(p) for p in (a, b))
        return x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() for k in x)
    if a.suffix == ".jsonl":
        return _lines(a) == _lines(b)
    return untimed(json.loads(a.read_text())) == untimed(json.loads(b.read_text())) if a.suffix == ".json" else (
        a.read_bytes() == b.read_bytes()
    )  # fmt: skip


def state(checkpoint: Path) -> dict[str, np.ndarray]:
    """{path: array} of a checkpoint."""
    import jax

    tree = ocp.load_checkpointables(checkpoint)["state"]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _lines(path: Path) -> list | None:
    try:
        return [untimed(json.loads(line)) for line in path.read_text().splitlines()]
    except ValueError:
        return None


def untimed(value):
    """JSON without what a clock or a machine said."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMES}
    return [untimed(v) for v in value] if isinstance(value, list) else value
