"""Data that go away, or are spoiled, between two commands and under a running one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pwkd_jax import evaluate, train
from pwkd_jax.training.writers import Progress
from tests.faults import tiny


def pictures(root: Path, size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for n, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(16):
                pixels = rng.integers(0, 60, (size, size, 3)) + 20 + 100 * n
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:02d}.png")
    return root


def command(root: Path, workdir: Path, streamed: bool, *more: str) -> list[str]:
    options = [o for o in tiny.OPTIONS if "_split" not in o]
    options += ["--config.data.name=folder", f"--config.data.data_dir={root}", "--config.arms=alone", f"--workdir={workdir}"]
    if streamed:
        options += [f"--config.data.{o}" for o in ("image_size=8", "resize=8", "crop_padding=0", "mean=(0.5,0.5,0.5)",
                                                   "std=(0.25,0.25,0.25)")]  # fmt: skip
    return [*options, *more]


def gone(root: Path) -> None:
    shutil.rmtree(root)


def spoiled(root: Path) -> None:
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])


def sentence(code: int, capsys, *phrases: str) -> None:
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines), lines
    assert any(phrase in lines[-1] for phrase in phrases), lines


@pytest.mark.parametrize("streamed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["in RAM", "streamed"])
def test_between_two_commands(streamed, tmp_path, capsys):
    root, workdir = pictures(tmp_path / "d"), tmp_path / "w"
    line = command(root, workdir, streamed, "--config.data.workers=0")
    assert train.main(line) == 0
    shutil.copytree(root, tmp_path / "kept")
    spoiled(root)
    capsys.readouterr()
    sentence(train.main([*line, "--config.seeds=2"]), capsys, "cannot be decoded")
    gone(root)
    sentence(train.main([*line, "--config.seeds=2"]), capsys, "data.data_dir: ")
    sentence(evaluate.main([str(workdir / "students/alone/seed0")]), capsys, "data.data_dir: ")
    shutil.move(tmp_path / "kept", root)
    assert train.main([*line, "--config.seeds=2"]) == 0


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [gone, spoiled])
def test_under_a_running_command(change, workers, tmp_path, capsys, monkeypatch):
    """Images are read as they are needed; once they are back the same command goes on, to the bits of a run that had them."""
    root, workdir = pictures(tmp_path / "d"), tmp_path / "w"
    shutil.copytree(root, tmp_path / "kept")
    line = command(root, workdir, True, f"--config.data.workers={workers}")
    true = Progress.update

    def update(self, step, note=""):
        if step == 6 and not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            change(root)
        true(self, step, note)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", update)
        code = train.main(line)
    sentence(code, capsys, f"file {root}")
    shutil.rmtree(root, ignore_errors=True)
    shutil.move(tmp_path / "kept", root)
    assert train.main(line) == 0
    whole = command(root, tmp_path / "whole", True, "--config.data.workers=0")
    assert train.main(whole) == 0
    found = tiny.differences(tmp_path / "whole", workdir)
    assert [d for d in found if d not in ("config.json differs", "summary.json differs")] == []


def test_in_ram_they_are_no_longer_needed(tmp_path, monkeypatch):
    root = pictures(tmp_path / "d")
    monkeypatch.setattr(Progress, "close", lambda self, note: shutil.rmtree(root, ignore_errors=True))
    assert train.main(command(root, tmp_path / "w", False)) == 0
    assert not root.exists()
