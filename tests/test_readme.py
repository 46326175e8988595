"""What the README tells people to write, run as they would."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The README's Python blocks as the files that their first line names, and a few images."""
    folder = tmp_path_factory.mktemp("readme")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        (folder / re.match(r"# (\w+\.py)", block)[1]).write_text(block)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for shade, label in enumerate(("cat", "dog")):
            place = folder / "images" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (8, 8, 3)) + 127 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    images, labels = load_digits(return_X_y=True)
    np.save(folder / "images.npy", (images * 15.9).astype(np.uint8).reshape(-1, 8, 8, 1))
    np.save(folder / "labels.npy", labels)
    return folder


def run(folder: Path, *line: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *line], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_data_model_and_distiller(folder):
    run(folder, "my_images.py")
    overrides = [
        "data.name=my_images", "data.data_dir=data", "teacher.model=my_model:Net", "student.model=my_model:Net",
        "student.width=0.25", "student.distiller.name=my_distiller:Hint", "student.distiller.weight=2", "arms=alone,pwkd",
        "seeds=1", "teacher.duration=16 epochs", "student.duration=16 epochs", "teacher.batch_size=16",
        "student.batch_size=16", "evaluation.every=100 %", "data.crop_padding=0",
    ]  # fmt: skip
    config = f"--config={ROOT / 'configs' / 'digits.py'}"
    line = ["-m", "pwkd_jax.train", config, "--workdir=runs/mine", *(f"--config.{o}" for o in overrides)]
    table = run(folder, *line)
    assert re.search(r"slimmable +1 .* 100\.00", table), table  # dark cats, light dogs
    assert "pwkd" in run(folder, "-m", "pwkd_jax.report", "runs/mine")


def test_ten_lines_from_a_module_to_a_student(folder):
    code = (folder / "ten_lines.py").read_text()
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 10
    scores = ast.literal_eval(run(folder, "ten_lines.py").strip().splitlines()[-1])
    assert scores["images"] == 400 and scores["teacher"]["top1"] > 80 and scores["top1"] > 50, scores


def test_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:launch|configs|pwkd_jax)/[\w/.]*\w", text):
        assert (ROOT / path).exists(), path
