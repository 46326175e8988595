"""Chains of teacher's assistants: who teaches whom, what is refused, and that a chain runs and goes on."""

import json
from pathlib import Path

import pytest

from pwkd_jax import report, sweep
from pwkd_jax.errors import UserError
from pwkd_jax.experiment.sweep import load

ROOT = Path(__file__).parents[1]


def _write(folder: Path, text: str) -> Path:
    path = folder / "chain.toml"
    path.write_text(f'config = "{ROOT}/configs/digits.py"\n{text}')
    return path


def _keys(point) -> dict[str, str]:
    return dict(word.removeprefix("--config.").split("=", 1) for word in point.arguments[1:])


def test_each_learns_from_the_one_before_it(tmp_path):
    text = 'chain = ["resnet32", "resnet20", "resnet14", "resnet8"]\n%s\n[set]\nseed = 7\n"student.width" = 0.25\n'
    first, second, last = load(_write(tmp_path, text % ""), tmp_path / "runs")
    assert [p.name for p in (first, second, last)] == ["1-resnet20", "2-resnet14", "3-resnet8"]
    before = tmp_path / "runs/1-resnet20"
    assert first.assistant is None and "teacher.weights" not in _keys(first)
    assert second.assistant == (f"{before}/students/kd_standard/seed7", f"{before}/assistant")
    keys = _keys(second)
    assert (keys["teacher.model"], keys["student.model"], keys["arms"]) == ("resnet20", "resnet14", "kd_standard")
    assert keys["teacher.weights"] == f"{before}/assistant/model.safetensors"
    # One assistant, with all its channels; the last is what the config says.
    assert (keys["seeds"], keys["student.width"]) == ("1", "1.0") and "student.teachers" not in keys
    assert _keys(last)["student.width"] == "0.25" and "seeds" not in _keys(last)
    dense = [_keys(p).get("student.teachers", "") for p in load(_write(tmp_path, text % "dense = true"), tmp_path / "runs")]
    assert dense == ["", str(before), f"{before},{tmp_path}/runs/2-resnet14"]


CHAIN = 'chain = ["resnet20", "resnet14", "resnet8"]\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('chain = ["resnet20", "resnet8"]', "chain should name three models or more"),
        ("chain = 3", "chain should name three models or more"),
        (f"{CHAIN}dense = 1", "dense should be true or false"),
        ('dense = true\n[grid]\n"student.width" = [1.0]', "dense should be true or false, beside a chain"),
        (f'{CHAIN}[grid]\n"student.width" = [1.0]', r"\[grid\] with a list to cross, or chain"),
        (f'{CHAIN}[set]\narms = ["pwkd", "alone"]', "set.arms should be one arm"),
        (f'{CHAIN}[set]\narms = ["alone"]', "set.arms should be one arm that has a teacher"),
        (f'{CHAIN}[set]\n"teacher.model" = "vgg8"', "set.teacher.model: the chain sets it"),
        (CHAIN.replace("8", "9"), "link 2-resnet9: student.model: there is no model 'resnet9'"),
    ],
)
def test_what_is_no_chain_is_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        load(_write(tmp_path, text), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["kd_standard", "pwkd"])
def test_a_chain_runs_and_goes_on(tmp_path, monkeypatch, capsys, arm):
    monkeypatch.chdir(ROOT)
    small = {"teacher.duration": "2 steps", "student.duration": "4 steps", "evaluation.every": "2 steps",
             "data.train_split": "train[:128]", "data.test_split": "test[:64]"}  # fmt: skip
    text = 'chain = ["resnet20", "resnet14", "resnet8"]\ndense = true\n[set]\nseeds = 2\n"student.width" = 0.25\n'
    text += f'arms = ["{arm}"]\n' + "".join(f'"{key}" = "{value}"\n' for key, value in small.items())
    path, root = _write(tmp_path, text), tmp_path / "runs"
    assert sweep.main([str(path), f"--root={root}", "--run=1"]) == 2
    assert f"error: {root}/1-resnet14/students/{arm}/seed0: there is no such file" in capsys.readouterr().err
    for _ in range(2):
        assert sweep.main([str(path), f"--root={root}", "--run=all"]) == 0
    found = json.loads((root / "2-resnet8/summary.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1] and found["config"]["teacher"]["model"] == "resnet14"
    assert "resnet20" in capsys.readouterr().out
    assert report.main([str(root)]) == 0
    # An assistant that is not there ends the chain with its own sentence.
    (root / "1-resnet14/data.json").unlink()
    assert sweep.main([str(path), f"--root={root}", "--run=all"]) == 2
