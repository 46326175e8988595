"""Files of every kind that is read, as they were written and as another of their kind: what the fuzz of files damages."""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fuzzing
import jax
import numpy as np
import safetensors.numpy
from conftest import made_up
from test_data import _images, _records, _tfds
from test_prepare import _framed

from pwkd_jax import convert, data, models, report, train, weights
from pwkd_jax.data import records, tfrecord
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading, sweep
from pwkd_jax.training import record
from pwkd_jax.weights import files, pytorch

SHAPE = (8, 8, 1)
PUPIL, TEACHER = "students/pwkd/seed0", "teacher/slimmable"
WORK = [
    "--config=configs/digits.py",
    *(f"--config.{override}" for override in (
        "teacher.model=fuzz_models:Net", "student.model=fuzz_models:Net", "student.width=0.5", "seeds=1", "arms=pwkd",
        "teacher.widths=(0.5,1.0)", "data.train_split=train[:150]", "data.test_split=test[:32]", "teacher.duration=2 steps",
        "student.duration=4 steps", "log.every=1 steps", "checkpoint.every=1 steps", "evaluation.every=1 steps",
    )),
]  # fmt: skip
SWEEP = """config = "configs/digits.py"
[grid]
arms = ["alone", "pwkd"]
seed = [0, 1]
"student.width" = [0.5, 0.25]
[set]
seeds = 1
"""


class Case(NamedTuple):
    """read(folder) -> what comes of the files of a folder: the same numbers each time.

    sure: what it reads knows whether it was changed, so it has to be the same or refused. named: refusals name the file.
    alone: nothing beside it says what it should be, so that another whole one is read as that.
    """

    read: Callable[[Path], Any]
    home: Path  # the files as they were written
    other: Path  # others of the same kind, under the same names
    damaged: list[str]  # which of them
    sure: bool = False
    named: bool = True
    alone: bool = False


def digest(tree: Any) -> str:
    return record.digest(jax.tree.map(np.asarray, tree))


def quiet(command: Callable, *arguments: str | Path) -> None:
    """A command that ended with exit code 0; its refusal is raised as a UserError."""
    with contextlib.redirect_stderr(text := fuzzing.Text()):
        code = command([str(a) for a in arguments])
    if code:
        assert code == 2, text.getvalue()
        [error] = [line for line in text.getvalue().splitlines() if line.startswith("error: ")]
        raise UserError(error)


# What writes them: (folder, whether the other one).


def network(folder: Path, other: bool) -> None:
    classes = 10 + other
    model = models.create("resnet8", num_classes=classes)
    variables = made_up(model, SHAPE, int(other))
    weights.write(folder / "w.safetensors", variables, weights.card("resnet8", 1.0, 0, classes, SHAPE, (0.3,), (0.4,), {}))
    tensors = {f"module.{key}": np.asarray(x) for key, x in pytorch.to_torch(model, variables).items()}
    safetensors.numpy.save_file(tensors, folder / "torch.safetensors")


def checkpoint(folder: Path, other: bool) -> None:
    import torch

    network(folder, other)
    tensors = files.tensors(folder / "torch.safetensors")[0]
    torch.save({"model": {key: torch.tensor(x) for key, x in tensors.items()}, "epoch": 3}, folder / "w.pth")


def tfds(folder: Path, other: bool) -> None:
    splits = {s: [_records(_images(6 - other, (4, 4, 3), other + i))] for i, s in enumerate(("train", "test"))}
    _tfds(folder, splits, classes=5 + other)


def labels(folder: Path, other: bool) -> None:
    tfds(folder, other)
    kept_labels(folder)
    [file] = folder.glob("toy/1.0.0/.labels-*")
    file.rename(file.with_name("kept.npy"))


def tfrecords(folder: Path, other: bool) -> None:
    (folder / "x.tfrecord").write_bytes(b"".join(_framed(bytes([i, other]) * (9 + i)) for i in range(4)))


def toml(folder: Path, other: bool) -> None:
    (folder / "s.toml").write_text(SWEEP.replace("0.25", "1.0").replace("pwkd", "kd_whole") if other else SWEEP)


def workdir(folder: Path, other: bool) -> None:
    more = ["--config.teacher.widths=(0.25,1.0)", "--config.seed=3", "--config.student.width=0.25"] if other else []
    assert train.main([*WORK, *more, f"--workdir={folder}"]) == 0
    if other:
        shutil.copytree(folder / "students/pwkd/seed3", folder / PUPIL)
        shutil.copy(folder / TEACHER / "width_0.25.safetensors", folder / TEACHER / "width_0.5.safetensors")


def claimed(folder: Path, other: bool) -> None:
    record.claim(folder, {"model": f"resnet{8 + 6 * other}", "mean": [0.5], "steps": 7})


# What reads them: (folder) -> the same each time.


def of_read(found: tuple) -> str:
    return digest(found[0]) + json.dumps(found[1])


def images(folder: Path) -> str:
    d = data.load("toy", str(folder))
    return digest((d.train.images, d.train.labels, d.test.images, d.test.labels)) + str(d.num_classes)


def kept_labels(folder: Path) -> list[int]:
    reader, kept = records.Records(folder / "toy/1.0.0", [("train", 0, 5)]), folder / "toy/1.0.0/kept.npy"
    if kept.is_file():
        kept.rename(reader._cache()[0])
    return reader.labels().tolist()


def converted(folder: Path) -> None:
    options = ["--model=resnet8", "--image-size=8", "--channels=1", "--mean=0.5", "--std=0.5"]
    quiet(convert.main, folder / "torch.safetensors", f"--out={folder / 'o.safetensors'}", *options)


def opened(run: str, width: float | None = None) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        found, split = loading.load(str(folder / run), width)
        return digest(found.variables) + json.dumps({**found.card, "source": 0}) + json.dumps(split, default=list)

    return read


def gone_on(folder: Path) -> None:
    """A student that had not finished."""
    (folder / PUPIL / "result.json").unlink(missing_ok=True)
    quiet(train.main, *WORK, f"--workdir={folder}")


def make(folder: Callable[[str], Path]) -> dict[str, Case]:
    """folder(name): a new one."""

    def pair(name: str, write: Callable[[Path, bool], None]) -> tuple[Path, Path]:
        home, other = folder(name), folder(f"other_{name}")
        write(home, False)
        write(other, True)
        return home, other

    nets, sets, works = pair("nets", network), pair("tfds", tfds), pair("work", workdir)

    def swept(folder: Path, other: bool) -> None:
        points = [sweep.Point("a", {"arms": "pwkd"}, "g", []), sweep.Point("b", {}, "", [])]
        sweep.write(points[: 2 - other], folder, "s")
        shutil.copytree(works[other], folder / "a")

    saved = [p for p in (works[0] / PUPIL / "checkpoints/4").rglob("*") if p.is_file()]
    saved = sorted(p.relative_to(works[0]).as_posix() for p in saved)
    shards = [f"toy/1.0.0/toy-{split}.array_record-00000-of-00001" for split in ("train", "test")]
    facts = ["toy/1.0.0/dataset_info.json", "toy/1.0.0/features.json"]
    swepts = pair("swept", swept)
    results = [f"{TEACHER}/result.json", f"{PUPIL}/result.json", "config.json", "data.json", "made_with.json"]
    running = [f"{PUPIL}/metrics.jsonl", f"{TEACHER}/width_1.safetensors", *(f for f in saved if f.count("/") < 6)]
    found = {
        "our weights": Case(lambda p: of_read(weights.read(p / "w.safetensors")), *nets, ["w.safetensors"], True, alone=True),
        "safetensors": Case(lambda p: of_read(files.tensors(p / "torch.safetensors")), *nets, ["torch.safetensors"]),
        "convert": Case(converted, *nets, ["torch.safetensors"], named=False),
        "array_record": Case(images, *sets, shards, True),
        "TFDS information": Case(images, *sets, facts, named=False),
        "kept labels": Case(kept_labels, *pair("kept", labels), ["toy/1.0.0/kept.npy"], True),
        "TFRecord": Case(
            lambda p: list(tfrecord.records(p / "x.tfrecord", 4)), *pair("records", tfrecords), ["x.tfrecord"], True, alone=True
        ),
        "sweep": Case(lambda p: str(sweep.load(p / "s.toml", Path("r"))), *pair("toml", toml), ["s.toml"]),
        "teacher's weights": Case(opened(TEACHER, 0.5), *works, [f"{TEACHER}/width_0.5.safetensors"], True),
        "checkpoint": Case(opened(PUPIL), *works, saved, True),
        "facts of a workdir": Case(opened(PUPIL), *works, ["config.json", "data.json", "made_with.json"], named=False),
        "results": Case(lambda p: quiet(train.main, *WORK, f"--workdir={p}"), *works, results, named=False),
        "a run that goes on": Case(gone_on, *works, running, named=False),
        "summary": Case(lambda p: quiet(report.main, p), *works, ["summary.json"], named=False),
        "run.json": Case(lambda p: claimed(p, False), *pair("claim", claimed), ["run.json"]),
        "sweep.json": Case(lambda p: quiet(report.main, p), *swepts, ["sweep.json", "a/summary.json"], named=False),
    }
    if importlib.util.find_spec("torch"):
        found["pytorch"] = Case(lambda p: digest(pytorch.read(p / "w.pth")), *pair("pth", checkpoint), ["w.pth"])
    return found


