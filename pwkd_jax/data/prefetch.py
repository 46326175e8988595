"""Numbered batches made ahead of their use by worker processes. Grain starts the workers and keeps the batches in order;
their pixels go through a ring."""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import signal
import threading
import time
from multiprocessing import util
from typing import Protocol

import numpy as np

from pwkd_jax.data.ring_buffer import Ring
from pwkd_jax.errors import UserError

# Of each worker in the ring: one that is being made and one that is ready.
_SLOTS = 2
# Grain wants a length; no run is as long, in batches.
_ENDLESS = _NEVER = 1 << 40


class Batches(Protocol):
    """batches(number) -> one of them, a pure function; pickled to the workers.

    shape: of its "image", uint8, which lies in `out` where that is given.
    """

    shape: tuple[int, ...]

    def __call__(self, number: int, out: np.ndarray | None = None) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Batches start, start + 1, ... (of a circle) as Grain reads a source; "image" goes into the ring where there is one."""

    batch: Batches
    start: int
    cycle: int
    ring: Ring | None

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number) -> dict[str, np.ndarray]:
        step = self.start + int(number)
        step = step % self.cycle if self.cycle else step
        if self.ring is None:
            return self.batch(step)
        if (out := self.ring.write(int(number))) is None:
            return {}  # nobody reads any more; Grain ends this worker when it gets something
        return {key: value for key, value in self.batch(step, out).items() if key != "image"}


class Reader:
    """reader(step) -> batch(step), made ahead by `workers` processes (below 0: one a core; 0: a thread of this one).

    Each worker makes whole batches, every workers-th one, and holds two; steps that follow each other come from one
    stream, and any other step begins a new one. Raises UserError, also for a worker that died.
    """

    def __init__(self, batch: Batches, workers: int, cycle: int = 0):
        self.batch, self.cycle = batch, cycle
        self._workers = cores() if workers < 0 else workers
        self._iterator, self._ring, self._end, self._next = None, None, None, -1

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
        return {"image": self._ring.take(), **result} if self._workers else result

    def _open(self, step: int):
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its own flags, which our commands do not define to absl
            flags.FLAGS.mark_as_parsed()
        if self._workers:
            self._check_memory()
            self._ring = Ring(self.batch.shape, _SLOTS * self._workers)
        # Counted in batches, the elements here. A worker needs no thread to be ahead: its batches wait in the ring.
        threads = 0 if self._workers else 1
        numbered = grain.MapDataset.source(_Numbered(self.batch, step, self.cycle, self._ring))
        stream = numbered.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if self._workers:
            # What is left of a batch is small, and is pickled in place of a new segment of shared memory for each array.
            options = grain.experimental.DatasetOptions(min_shm_size=_NEVER)
            stream = grain.experimental.WithOptionsIterDataset(stream, options)
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self._workers), functools.partial(_begin, os.getpid()))
        iterator = iter(stream)
        # With the reader or at the process's end, and then before Grain's own (1), which waits for workers that wait for room.
        self._end = util.Finalize(self, _end, (iterator, self._ring), exitpriority=2)
        return iterator

    def _check_memory(self) -> None:
        """Refuse what would end in a bus error: containers often come with 64 MB of shared memory."""
        if not os.path.isdir("/dev/shm"):
            return
        need, free = _SLOTS * self._workers * math.prod(self.batch.shape), shutil.disk_usage("/dev/shm").free
        if need > free:
            raise UserError(
                f"data.workers: {self._workers} processes need {need >> 20} MiB of shared memory for their batches, and "
                f"/dev/shm has {free >> 20}; use fewer, or give the container more (docker's --shm-size)"
            )

    def close(self) -> None:
        """End the workers."""
        end, self._iterator, self._ring, self._end = self._end, None, None, None
        if end is not None:
            end()


def _end(iterator, ring: Ring | None) -> None:
    if ring is not None:
        ring.free()
    try:
        if hasattr(iterator, "close"):
            with contextlib.suppress(Exception):
                iterator.close()
    finally:
        if ring is not None:
            ring.close()


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
