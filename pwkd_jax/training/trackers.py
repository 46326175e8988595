"""Metrics sent to an experiment tracker as they are written: Weights & Biases, MLflow, or your own. Never in training's way.

A run on disk is a run there, by an id that is kept beside it, so that a run which was stopped goes on under the same one; rows
it had sent already are not sent again. Where, to whom and how is the tracker's own business: WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the like.
"""

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.models import import_path, reason

NAMES = ("", "wandb", "mlflow")
FILE = "tracked.json"


class Tracker(Protocol):
    """One run. Made as Tracker(name, config, id): name: WORKDIR/students/pwkd/seed0; config: {dotted key: value}; id: what `id`
    was when the run was left, "" at first."""

    id: str

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Metrics of a step, which rises from call to call."""

    def close(self) -> None:
        """Sends what is still to be sent."""


class WeightsAndBiases:
    def __init__(self, name: str, config: dict[str, Any], id: str):
        import wandb

        self.id = id or uuid.uuid4().hex[:16]
        project = os.environ.get("WANDB_PROJECT", "pwkd_jax")
        self._run = wandb.init(project=project, name=name, id=self.id, resume="allow", config=config, reinit="finish_previous",
                               settings=wandb.Settings(silent=True))  # fmt: skip

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    def __init__(self, name: str, config: dict[str, Any], id: str):
        import mlflow

        self._client = mlflow.MlflowClient()
        self.id = id
        if not id:
            wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pwkd_jax")
            found = self._client.get_experiment_by_name(wanted)
            experiment = found.experiment_id if found else self._client.create_experiment(wanted)
            self.id = self._client.create_run(experiment, run_name=name).info.run_id
            for key, value in config.items():
                self._client.log_param(self.id, key, str(value)[:500])

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            self._client.log_metric(self.id, key, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self.id)


def check(name: str) -> None:
    """UserError for a tracker that is not known, or whose package is not installed."""
    if ":" in name:
        import_path(name)
    elif name not in NAMES:
        raise UserError(f"log.tracker: {name!r} is not possible; it should be wandb, mlflow or module:Class of your own")
    elif name and importlib.util.find_spec(name) is None:
        raise UserError(f"log.tracker: {name} is not installed; pip install {name}")


class Guarded:
    """A tracker of the run in `directory` that drops what was sent before, and gives up with one line where it fails."""

    def __init__(self, kind: str, directory: Path):
        self._kind, self._path, self._tracker = kind, directory / FILE, None
        try:
            kept = json.loads(storage.read(self._path)) if storage.exists(self._path) else {}
            known = kept.get(kind, {"id": "", "step": -1})
            self._others, self._sent = {k: v for k, v in kept.items() if k != kind}, int(known["step"])
            make = {"wandb": WeightsAndBiases, "mlflow": MLflow}.get(kind) or import_path(kind)
            name, config = _named(directory)
            self._tracker = make(name=name, config=config, id=known["id"])
            self.flush()
        except Exception as e:  # a server's or a user's own, which may fail in any way
            self._give_up(e)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._tracker and step > self._sent:
            try:
                self._tracker.write(step, scalars)
                self._sent = step
            except Exception as e:
                self._give_up(e)

    def flush(self) -> None:
        """Keep the id and how far it is, so that the run can go on."""
        if self._tracker:
            kept = self._others | {self._kind: {"id": self._tracker.id, "step": self._sent}}
            storage.replace(self._path, json.dumps(kept) + "\n")

    def close(self) -> None:
        if self._tracker:
            self.flush()
            try:
                self._tracker.close()
            except Exception as e:
                self._give_up(e)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        print(f"warning: log.tracker={self._kind} failed ({reason(error)}); metrics.jsonl goes on without it", file=sys.stderr)


def _named(directory: Path) -> tuple[str, dict[str, Any]]:
    """(name of a run, {dotted key: value} of its config), of the workdir that it lies in; without one its own name alone."""
    workdir = next((p for p in directory.parents if storage.exists(p / "config.json")), None)
    if workdir is None:
        return directory.name, {}
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", json.loads(storage.read(workdir / "config.json")))
    return f"{workdir.name}/{directory.relative_to(workdir)}", flat
