"""Numbered batches made ahead of their use by worker processes. Grain starts the workers and carries the batches."""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import threading
import time
from typing import Protocol

import numpy as np

from pwkd_jax.errors import UserError

# Grain wants a length; no run is as long, in batches.
_ENDLESS = 1 << 40


class Batches(Protocol):
    """batches(number) -> one of them, a pure function; pickled to the workers. nbytes: of one."""

    nbytes: int

    def __call__(self, number: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Batches start, start + 1, ... (of a circle) as Grain reads a source."""

    batch: Batches
    start: int
    cycle: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number) -> dict[str, np.ndarray]:
        step = self.start + int(number)
        return self.batch(step % self.cycle if self.cycle else step)


class Reader:
    """reader(step) -> batch(step), made ahead by `workers` processes (below 0: one a core; 0: a thread of this one).

    Each worker makes whole batches, every workers-th one, and holds two; steps that follow each other come from one
    stream, and any other step begins a new one. Raises UserError, also for a worker that died.
    """

    def __init__(self, batch: Batches, workers: int, cycle: int = 0):
        self.batch, self.cycle = batch, cycle
        self._workers = cores() if workers < 0 else workers
        self._iterator, self._next = None, -1

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        if self._iterator is None or step != self._next:
            self.close()
            self._iterator = self._open(step)
        try:
            result = next(self._iterator)
        except UserError:
            self.close()
            raise
        except Exception as e:  # of the workers' own kind, or Grain's about a worker that is gone
            self.close()
            if self._workers:
                raise UserError(
                    f"data.workers: a process that decodes images stopped ({type(e).__name__}: "
                    f"{(str(e).strip() or 'no reason given').splitlines()[0]}); use fewer, or data.workers=0 to see where"
                ) from e
            raise
        self._next = (step + 1) % self.cycle if self.cycle else step + 1
        # Out of the shared memory in which workers hand them over: JAX may keep an array as long as it likes.
        return {key: np.array(value) for key, value in result.items()} if self._workers else result

    def _open(self, step: int):
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its own flags, which our commands do not define to absl
            flags.FLAGS.mark_as_parsed()
        numbered = grain.MapDataset.source(_Numbered(self.batch, step, self.cycle))
        # Counted in batches, the elements here: one that is being made and one that is ready.
        stream = numbered.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        if self._workers:
            self._check_memory()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self._workers), functools.partial(_begin, os.getpid()))
        return iter(stream)

    def _check_memory(self) -> None:
        """Refuse what would end in a bus error: containers often come with 64 MB of shared memory."""
        if not os.path.isdir("/dev/shm"):
            return
        need, free = 3 * self._workers * self.batch.nbytes, shutil.disk_usage("/dev/shm").free
        if need > free:
            raise UserError(
                f"data.workers: {self._workers} processes need {need >> 20} MiB of shared memory for their batches, and "
                f"/dev/shm has {free >> 20}; use fewer, or give the container more (docker's --shm-size)"
            )

    def close(self) -> None:
        """End the workers."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "close"):
            with contextlib.suppress(Exception):
                iterator.close()

    def __del__(self):
        self.close()


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(parent: int, worker: int, workers: int) -> None:
    """What a worker process does first."""
    # Control-C reaches every process of a terminal; the parent alone says what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed and could not end us

    threading.Thread(target=watch, daemon=True).start()
