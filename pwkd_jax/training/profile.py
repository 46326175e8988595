"""A trace of a few steps of one run, for XProf (TensorBoard's profile plugin) and Perfetto."""

import dataclasses
import re
from pathlib import Path

import jax

from pwkd_jax import storage
from pwkd_jax.errors import UserError


@dataclasses.dataclass
class Trace:
    """Steps first + 1 ... last of a run, traced into `directory`; nothing where `last` is 0."""

    directory: Path
    first: int = 0
    last: int = 0
    _on: bool = False
    _begun: bool = False

    def due(self, at: int) -> bool:
        """Whether a chunk of steps has to end here."""
        return bool(self.last) and at in (self.first, self.last)

    def begin(self, at: int) -> None:
        """Before the step after `at`."""
        if self.last and not self._on and self.first <= at < self.last:
            self._outbox = storage.outbox(self.directory)
            jax.profiler.start_trace(str(self._outbox.local), create_perfetto_trace=True)
            self._on = self._begun = True

    def __call__(self, at: int, state, metrics) -> None:
        """After step `at`."""
        if self._on and at >= self.last:
            jax.block_until_ready(state)
            self.close()
        self.begin(at)

    def close(self) -> None:
        """End a trace that is under way; says where it is, or that none of its steps was taken."""
        if self._on:
            jax.profiler.stop_trace()
            self._outbox.close()
            print(f"profile: steps {self.first + 1} to {self.last} are in {self.directory}", flush=True)
        elif self.last and not self._begun:
            print(f"profile: this run took no step from {self.first + 1} to {self.last}, so nothing was traced", flush=True)
        self._on = False


def parse(spec: str) -> tuple[str, int, int]:
    """(part of a run's name, first, last) of config.profile: `pwkd/seed0:100-110` is steps 101 to 110. Raises UserError."""
    match = re.fullmatch(r"(?P<run>[^:]*):(?P<first>\d+)-(?P<last>\d+)", spec)
    if not match or int(match["first"]) >= int(match["last"]):
        raise UserError(
            f"profile: '{spec}' should be part of a run's name and steps, as in teacher/slimmable:100-110 or pwkd/seed0:20-25"
        )
    return match["run"], int(match["first"]), int(match["last"])


def trace(spec: str, label: str, directory: Path) -> Trace:
    """What config.profile asks of the run `label`."""
    if not spec:
        return Trace(directory)
    run, first, last = parse(spec)
    return Trace(directory, first, last) if run in label else Trace(directory)
