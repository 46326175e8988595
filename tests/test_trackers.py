"""Trackers: every row of metrics.jsonl once, under one id, whatever stops a run; a failing one is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import TINY
from test_weights import error

from pwkd_jax import storage, train
from pwkd_jax.training import trackers

OWN = "test_trackers:Lines"


class Lines:
    """A tracker that writes what it is told into the folder LINES."""

    def __init__(self, name, config, id):
        self.id = id or name.replace("/", "_")
        self._file = (Path(os.environ["LINES"]) / self.id).open("a")
        print(json.dumps({"name": name, "peak": config.get("student.schedule.peak")}), file=self._file)

    def write(self, step, scalars):
        if step == int(os.environ.get("FAIL_AT", -1)):
            raise OSError("the server is away")
        print(json.dumps({"step": step, **scalars}), file=self._file, flush=True)

    def close(self):
        self._file.close()


def said(folder: Path, name: str) -> tuple[list[dict], list[dict]]:
    """(how often it was opened, rows) of a run."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [x for x in lines if "name" in x], [x for x in lines if "step" in x]


def test_each_run_is_one_there_with_its_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("LINES", str(tmp_path))
    options = [*TINY, "--config.arms=pwkd", "--config.seeds=2", "--config.student.batches=shared",
               f"--config.log.tracker={OWN}"]  # fmt: skip
    assert train.main([*options, f"--workdir={tmp_path}/w"]) == 0
    for run in ("teacher/slimmable", "students/pwkd/seed0", "students/pwkd/seed1"):
        opened, told = said(tmp_path, f"w_{run.replace('/', '_')}")
        assert opened[0]["name"] == f"w/{run}" and opened[0]["peak"] == 0.1 and len(opened) == 1
        assert told == [json.loads(line) for line in (tmp_path / "w" / run / "metrics.jsonl").read_text().splitlines()]
    assert train.main([*options, f"--workdir={tmp_path}/w"]) == 0  # finished: nothing is opened again
    assert len(said(tmp_path, "w_teacher_slimmable")[0]) == 1


def test_a_run_that_goes_on_sends_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setenv("LINES", str(tmp_path))
    run = tmp_path / "there/run"
    run.mkdir(parents=True)
    for steps in ((1, 2, 3), (2, 3, 4)):  # the second one was resumed from step 1
        tracker = trackers.Guarded(OWN, run)
        for step in steps:
            tracker.write(step, {"loss": 1.0 / step})
        tracker.close()
    opened, told = said(tmp_path, "run")
    assert [row["step"] for row in told] == [1, 2, 3, 4] and len(opened) == 2
    kept = json.loads(storage.read(run / trackers.FILE))
    assert kept == {OWN: {"id": "run", "step": 4}}


def test_a_tracker_that_fails_is_left_behind_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LINES", str(tmp_path))
    monkeypatch.setenv("FAIL_AT", "2")
    (tmp_path / "there/run").mkdir(parents=True)
    tracker = trackers.Guarded(OWN, tmp_path / "there/run")
    for step in (1, 2, 3):
        tracker.write(step, {"loss": 1.0})
    tracker.close()
    assert [row["step"] for row in said(tmp_path, "run")[1]] == [1]
    assert capsys.readouterr().err == (
        f"warning: log.tracker={OWN} failed (OSError: the server is away); metrics.jsonl goes on without it\n"
    )


@pytest.mark.parametrize(("name", "sentence"), [
    ("neptune", "log.tracker: 'neptune' is not possible; it should be wandb, mlflow or module:Class of your own"),
    ("nowhere:Lines", "'nowhere:Lines' cannot be imported"),
])  # fmt: skip
def test_a_tracker_that_is_not_there_is_refused(name, sentence, tmp_path, capsys):
    assert sentence in error(train.main, *TINY, f"--config.log.tracker={name}", f"--workdir={tmp_path}/w", capsys=capsys)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(trackers.UserError, match=r"^log.tracker: wandb is not installed; pip install wandb$"):
        trackers.check("wandb")


TWICE = """
import sys
from pathlib import Path
from pwkd_jax.training import trackers
for steps in ((1, 2), (2, 3)):
    tracker = trackers.Guarded(sys.argv[1], Path(sys.argv[2]))
    for step in steps:
        tracker.write(step, {"top1_0.25": 10.0 * step})
    tracker.close()
"""


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_ones_hold_one_run(name, tmp_path, monkeypatch):
    """Without a server: W&B's offline files, MLflow's."""
    pytest.importorskip(name, reason=f"{name} is not installed; it is optional")
    run = tmp_path / "run"
    run.mkdir()
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path),
                                "MLFLOW_TRACKING_URI": f"file:{tmp_path}/m",
                                "MLFLOW_ALLOW_FILE_STORE": "true"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", TWICE, name, str(run)], env=environment, cwd=Path(__file__).parents[1],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr[-2000:]
    kept = json.loads((run / trackers.FILE).read_text())[name]
    assert kept["step"] == 3
    if name == "wandb":
        assert len([*(tmp_path / "wandb").glob(f"offline-run-*-{kept['id']}")]) >= 1
    else:
        import mlflow

        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
        history = [(m.step, m.value) for m in client.get_metric_history(kept["id"], "top1_0.25")]
        assert sorted(history) == [(1, 10.0), (2, 20.0), (3, 30.0)]
