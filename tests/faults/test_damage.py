"""Files of a workdir that are cut short between two commands: named in a sentence, or made again to the same bits."""

import random
import shutil

import pytest

from pwkd_jax import evaluate, export, report, train, weights
from pwkd_jax.errors import UserError
from tests.faults import kills, tiny

TEACHER, STUDENT = "teacher/slimmable", "students/pwkd/seed0"
COMMAND = [*tiny.OPTIONS, *kills.VARIANTS["one by one"]]


@pytest.fixture
def workdir(unbroken, tmp_path):
    return shutil.copytree(unbroken, tmp_path / "w")


def cut(path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: {"empty": 0, "half": len(content) // 2, "torn": len(content) - 2}[how]])


def is_sentence(said: str, name: str) -> bool:
    said = said.strip().splitlines()[-1]
    return said.startswith("error: ") and name in said and "Traceback" not in said


# {file: whether the same command makes it again}; what it refuses names the file.
FILES = {
    "config.json": False, "data.json": False, f"{TEACHER}/result.json": True, f"{STUDENT}/result.json": True,
    f"{TEACHER}/metrics.jsonl": None, f"{TEACHER}/parameters.txt": None, f"{STUDENT}/metrics.jsonl": None,
    "summary.json": True, "report.html": True,
}  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize("how", [pytest.param("empty", marks=SLOW), "half", pytest.param("torn", marks=SLOW)])
def test_a_finished_workdir_of_which_a_file_was_cut(how, unbroken, workdir, capsys):
    """None: a finished run is not read there, and its numbers stand in its result."""
    for name, recovered in FILES.items():
        cut(workdir / name, how)
        capsys.readouterr()
        code, said = train.main([*COMMAND, f"--workdir={workdir}"]), capsys.readouterr().err
        if recovered is False:
            assert code == 2 and is_sentence(said, name), (name, said)
        else:
            assert code == 0 and tiny.differences(unbroken, workdir) == ([f"{name} differs"] if recovered is None else [])
            assert ("is not whole" in said) == name.endswith("result.json"), (name, said)
        shutil.copy(unbroken / name, workdir / name)


@pytest.mark.parametrize(
    "run, how",
    [(TEACHER, "half"), (STUDENT, "torn"), *(pytest.param(r, h, marks=SLOW) for r, h in (
        (TEACHER, "empty"), (TEACHER, "torn"), (STUDENT, "empty"), (STUDENT, "half")))],
)  # fmt: skip
def test_rows_that_were_cut_are_missed_where_their_run_goes_on(run, how, unbroken, workdir, capsys):
    (workdir / run / "result.json").unlink()
    shutil.rmtree(workdir / run / "checkpoints" / "24")
    cut(workdir / run / "metrics.jsonl", how)
    code, said = train.main([*COMMAND, f"--workdir={workdir}"]), capsys.readouterr().err
    if how == "torn":  # the row of step 24, which is made again
        assert code == 0
    else:
        assert code == 2 and is_sentence(said, f"{run}/metrics.jsonl: lacks the row of step"), said
        shutil.rmtree(workdir / run)
        assert train.main([*COMMAND, f"--workdir={workdir}"]) == 0
    assert not tiny.differences(unbroken, workdir)


def test_a_checkpoint_that_was_cut_is_made_again(unbroken, workdir, capsys):
    for path in (workdir / STUDENT / "checkpoints/24").rglob("*"):
        if path.is_file() and path.name[0] != "c":
            cut(path, "half")
    (workdir / STUDENT / "result.json").unlink()
    assert train.main([*COMMAND, f"--workdir={workdir}"]) == 0
    assert "is not a whole checkpoint" in capsys.readouterr().err
    shutil.rmtree(workdir / STUDENT / "checkpoints/24.damaged")
    assert not tiny.differences(unbroken, workdir)


def test_what_reads_a_workdir_names_the_file_that_was_cut(workdir, tmp_path, capsys):
    student, teacher, out = workdir / STUDENT, workdir / TEACHER, f"--out={tmp_path / 'o'}"
    width = teacher / "width_1.safetensors"
    checkpoint = max((student / "checkpoints/24/state/d").iterdir(), key=lambda p: p.stat().st_size)
    for path, main, arguments, name in (
        (workdir / "config.json", evaluate.main, [student], "config.json"),
        (workdir / "data.json", export.main, [student, out], "data.json"),
        (width, evaluate.main, [teacher], width.name),
        (width, export.main, [teacher, out], width.name),
        (width, train.main, [*COMMAND, "--config.seeds=2", f"--workdir={workdir}"], width.name),
        (checkpoint, evaluate.main, [student], "checkpoints/24"),
        (checkpoint, export.main, [student, out], "checkpoints/24"),
        (workdir / "summary.json", report.main, [workdir], "summary.json"),
    ):
        whole = path.read_bytes()
        for how in ("empty", "torn"):
            cut(path, how)
            capsys.readouterr()
            assert main([str(a) for a in arguments]) == 2, (path, how)
            assert is_sentence(capsys.readouterr().err, name)
            path.write_bytes(whole)
    assert not (tmp_path / "o").exists()
    # A teacher whose result was cut is lent to nobody.
    cut(teacher / "result.json", "half")
    lent = [*COMMAND, f"--config.teacher.run={workdir}", f"--workdir={tmp_path / 'v'}"]
    assert train.main(lent) == 2 and "holds no finished slimmable teacher" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_no_damaged_file_of_weights_is_read(how, unbroken, tmp_path):
    """25 bits flipped and 25 files cut at random places, see test_training for checkpoints."""
    rng = random.Random(how)
    for _ in range(25):
        width = rng.choice(["width_0.5", "width_1"])
        content = bytearray((unbroken / TEACHER / f"{width}.safetensors").read_bytes())
        place = rng.randrange(len(content))
        if how == "flip":
            content[place] ^= 1 << rng.randrange(8)
        (tmp_path / f"{width}.safetensors").write_bytes(content if how == "flip" else content[:place])
        with pytest.raises(UserError, match=rf"{width}\.safetensors: is not "):
            weights.read(tmp_path / f"{width}.safetensors", "test_training:Tiny")
