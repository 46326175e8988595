"""Several students in one program end as they do one by one on the same batches, however they are put together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import identical
from orbax.checkpoint import v1 as ocp
from test_commands import ROOT, TINY, rows
from test_hosts import terminated_at

from pwkd_jax import config, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment.workdir import FREE
from pwkd_jax.training import students_together

SHARED = [*TINY, "--config.seeds=3", "--config.student.batches=shared", "--config.log.tensorboard=false"]
RUNS = [f"students/{arm}/seed{seed}" for arm in ("pwkd", "pwkd_random") for seed in range(3)]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Every seed of two arms one by one; of the first, two seeds more."""
    workdir = tmp_path_factory.mktemp("apart") / "work"
    for options in (["--config.arms=pwkd_random"], ["--config.arms=pwkd", "--config.seeds=5"]):
        assert train.main([*SHARED, *options, "--config.student.together=none", f"--workdir={workdir}"]) == 0
    return workdir


def run(apart, workdir, *options) -> int:
    """One arm unless `options` say more, under the teacher that the others had."""
    return train.main([*SHARED, "--config.arms=pwkd", f"--config.teacher.run={apart}", *options, f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def unrolled(apart, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unrolled") / "work"
    assert run(apart, workdir, "--config.arms=pwkd,pwkd_random") == 0
    return workdir


def state(workdir: Path, run: str, step: int):
    """On whatever devices it was saved, as NumPy arrays."""
    path, here = workdir / run / "checkpoints" / str(step), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = ocp.checkpointables_metadata(path).metadata["state"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    return jax.tree.map(np.asarray, ocp.load_checkpointables(path, {"state": like})["state"])


def alike(apart: Path, joined: Path, runs=RUNS[:3], steps=(12, 24)) -> None:
    for name in runs:
        for step in steps:
            for x, y in zip(*(jax.tree.leaves(state(w, name, step)) for w in (apart, joined)), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        here, there = rows(apart, name), rows(joined, name)
        assert [r.keys() for r in here] == [r.keys() for r in there]
        for r, s in zip(here, there, strict=True):
            for key, value in r.items():
                # One image of 50 is 2 percent, and may lie on the edge.
                assert value == pytest.approx(s[key], rel=1e-4, abs=2.001 if "top1" in key else 1e-5), (name, key)


def test_unrolled_equals_apart(apart, unrolled):
    alike(apart, unrolled, RUNS)
    assert sorted(p.name for p in (unrolled / "students/pwkd").iterdir()) == ["seed0", "seed1", "seed2"]
    first, second = (state(unrolled, f"students/pwkd/seed{seed}", 24)["params"] for seed in (0, 1))
    assert not identical(first, second)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["vmap"], marks=pytest.mark.slow, id="vmap"),
        pytest.param(["scan", "--config.steps_per_dispatch=5"], id="scan"),
    ],
)
def test_other_ways_equal_apart(options, apart, tmp_path):
    assert run(apart, tmp_path / "w", f"--config.student.together={options[0]}", *options[1:]) == 0
    alike(apart, tmp_path / "w")


def test_results_are_those_of_each(apart, unrolled):
    for name in RUNS:
        here, there = (json.loads((w / name / "result.json").read_text()) for w in (apart, unrolled))
        assert here.keys() == there.keys()
        for key in ("arm", "seed", "plan", "cycles", "steps", "learning_rates"):
            assert here[key] == there[key]
        # So that the seconds of all add up to what was spent: those of the common rows were divided.
        assert there["seconds"] == pytest.approx(sum(json.loads(line)["seconds"] for line in
                                                     (unrolled / name / "metrics.jsonl").read_text().splitlines()))  # fmt: skip
        # Of 50 images, whose edges may fall to either side; each student has its own.
        assert 2 * sum(there["classes"]["correct"]) == pytest.approx(there["top1_last"])
        assert here["classes"]["images"] == there["classes"]["images"]
    summary = json.loads((unrolled / "summary.json").read_text())
    assert summary.keys() == json.loads((apart / "summary.json").read_text()).keys()


def test_stopped_again_and_again_it_ends_the_same(apart, unrolled, tmp_path, monkeypatch):
    codes = []
    while not codes or codes[-1]:
        with monkeypatch.context() as patch:
            terminated_at(20, patch)  # later than a command's own looks before and after training, so that all get on
            codes.append(run(apart, tmp_path / "w"))
        assert codes[-1] in (0, 75) and len(codes) < 40
    assert len(codes) > 2
    for name in RUNS[:3]:
        assert identical(state(unrolled, name, 24), state(tmp_path / "w", name, 24)), name
        assert rows(unrolled, name) == rows(tmp_path / "w", name)


@pytest.mark.slow
def test_more_seeds_leave_finished_ones_alone(apart, tmp_path):
    assert run(apart, tmp_path / "w", "--config.seeds=1") == 0
    before = (tmp_path / "w/students/pwkd/seed0/result.json").read_bytes()
    assert run(apart, tmp_path / "w") == 0
    assert (tmp_path / "w/students/pwkd/seed0/result.json").read_bytes() == before
    alike(apart, tmp_path / "w")


def test_a_device_for_each_student(apart, tmp_path):
    """Five students on five of eight devices; the teacher, which the eight had shared, is lent."""
    options = ["--config.arms=pwkd", "--config.seeds=5", f"--config.teacher.run={apart}", "--config.student.together=devices"]
    line = [*SHARED, *options, f"--workdir={tmp_path / 'w'}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": "8"}
    exact = "import sys, jax; jax.config.update('jax_default_matmul_precision', 'highest'); from pwkd_jax import train; "
    done = subprocess.run([sys.executable, "-c", exact + "sys.exit(train.main(sys.argv[1:]))", *line], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alike(apart, tmp_path / "w", [f"students/pwkd/seed{seed}" for seed in range(5)])


def test_what_cannot_be_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="needs one for each of 3 students, and here are 1; use 'auto'"):
        students_together.several("devices", 3, jax.devices()[:1])
    assert train.main([*TINY, "--config.student.together=scan", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "'scan' is not possible; it should be auto or none where student.batches is 'own'" in capsys.readouterr().err
    assert train.main([*SHARED, "--config.student.together=devices", f"--workdir={tmp_path / 'w'}"]) == 2
    assert not (tmp_path / "w").exists()


def test_one_student_or_own_batches_train_as_before():
    several = students_together.several
    assert several("auto", 1, jax.devices()) is None and several("none", 3, jax.devices()) is None
    assert config.default().student.batches == "own"
    assert "student.together" in FREE and "student.batches" not in FREE
