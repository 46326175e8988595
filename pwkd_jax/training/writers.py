"""Where metrics go: `metrics.jsonl`, TensorBoard events without TensorFlow, a tracker, and the terminal."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import tqdm

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.training import distributed, trackers


class Writer:
    """clu's MetricWriter methods over `metrics.jsonl` and tensorboardX (clu's own writers need TensorFlow).

    One JSON object a line: {"step": n, name: number, ...}. Opened at step n of a resumed run, it first drops what a
    killed run had written after n, so a resumed file reads like an unbroken one. Of several processes the first one
    writes; the others hold the same rows, and so does this one without a directory.
    """

    def __init__(self, directory: Path | None, start: int = 0, tensorboard: bool = True, tracker: str = ""):
        self.rows: list[dict] = []
        self._file = self._events = self._tracker = None
        if directory is None:
            return
        self._path = directory / "metrics.jsonl"
        rows = distributed.decide(lambda: read_rows(self._path))
        self.rows = [row for row in rows if row["step"] <= start]
        if not distributed.primary():
            return
        self._file = storage.lines(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        if tensorboard:
            self._outbox = storage.outbox(directory)
            self._events = _Events(self._outbox.local, start)
        if tracker:
            self._tracker = trackers.Guarded(tracker, directory)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        row = {"step": step, **scalars}
        self.rows.append(row)
        if self._file:
            self._file.write(json.dumps(row) + "\n")
        if self._events:
            for name, value in scalars.items():
                self._events.add(step, "scalar", name, value)
        if self._tracker:
            self._tracker.write(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        if self._events:
            for name, text in texts.items():
                self._events.add(step, "text", name, text)

    def write_hparams(self, hparams: Mapping[str, object]) -> None:
        self.write_texts(0, {"config": "\n".join(f"    {k}: {v}" for k, v in hparams.items())})

    def flush(self) -> None:
        if self._file:
            self._file.flush()
        if self._events:
            self._events.flush()
            self._outbox.push()
        if self._tracker:
            self._tracker.flush()

    def close(self) -> None:
        for file in (self._file, self._events, self._tracker):
            if file:
                file.close()
        if self._events:
            self._outbox.close()


class _Events:
    """TensorBoard's file of events, written by the thread that trains.

    tensorboardX would write from one of its own (2.6.5), which dies of a full disk; nobody then empties the queue in which
    training waits for room.
    """

    def __init__(self, directory: Path, start: int):
        self._directory, self._start, self._file = directory, start, None
        self._new: list[tuple] = []

    def add(self, step: int, kind: str, name: str, value: float | str) -> None:
        self._new.append((step, time.time(), kind, name, value))

    def flush(self) -> None:
        # Not before something is to be written, for this import takes as long as a small program's compiling.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._file is None:
            self._file = EventsWriter(str(self._directory / "events"))
            # What a killed run wrote after `start` is no longer shown.
            begun = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=self._start + 1, wall_time=time.time(), session_log=begun))
        for step, seconds, kind, name, value in self._new:
            self._file.write_event(Event(step=step, wall_time=seconds, summary=getattr(summary, kind)(name, value)))
        self._new.clear()
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line torn by a kill is left out. Raises UserError for any other that is no row."""
    rows: list[dict] = []
    again = "bring it back, or remove its run's folder to train it anew"
    try:
        lines = storage.read(path).splitlines() if storage.exists(path) else []
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"'{path}' cannot be read ({e}); {again}") from e
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            fault = storage.misfit(row, {"step": int, "seconds?": float, "images_per_second?": float})
        except (ValueError, RecursionError) as e:
            fault = str(e)
        if fault and number == len(lines):
            break
        if fault or (rows and row["step"] <= rows[-1]["step"]):
            raise UserError(f"'{path}' was changed in line {number} ({fault or 'its steps do not rise'}); {again}")
        rows.append(row)
    return rows


def refuse_without(path: Path, steps: Sequence[int]) -> None:
    """UserError where a metrics.jsonl has no row of one of those steps."""
    known = {row["step"] for row in read_rows(path)}
    if missing := [step for step in steps if step not in known]:
        raise UserError(
            f"{path}: lacks the row of step {missing[0]}, so it was cut short or edited; bring it back, or remove its run's "
            "folder to train it anew"
        )


class Progress:
    """A bar with the time left on a terminal; in a log, a plain line at most every `seconds` and one at the end; nothing
    without a name."""

    def __init__(self, name: str, total: int, start: int, seconds: float = 10.0):
        self._name, self._total, self._seconds = name, total, seconds
        self._began = self._told = time.monotonic()
        self._start, self._timed, self._note = start, False, ""
        bar = name and sys.stderr.isatty() and distributed.primary()
        self._bar = tqdm.tqdm(total=total, initial=start, desc=name, unit="step", leave=False) if bar else None

    def update(self, step: int, note: str = "") -> None:
        self._note = note or self._note
        now = time.monotonic()
        if not self._timed:  # the first step compiled; the time left is judged by those after it
            self._timed, self._start, self._began = True, step, now
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if note:
                self._bar.set_postfix_str(note)
        elif self._name and self._start < step < self._total and now - self._told >= self._seconds:
            self._told = now
            left = (now - self._began) / (step - self._start) * (self._total - step)
            print(f"{self._name}: step {step}/{self._total}, about {left:.0f} s left  {self._note}", flush=True)

    def close(self, note: str) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._name:
            print(f"{self._name}: {note}", flush=True)
