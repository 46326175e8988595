"""Arrays of one shape in shared memory that is used over and over, on their way from worker processes.

Memory that a process touches first is given to it page by page, zeroed: a batch in a new segment costs its worker several
times what it takes to copy it (tests/bench/input.py has both).
"""

import functools
import math
import time
from multiprocessing.shared_memory import SharedMemory

import numpy as np

_HEAD = 4096  # bytes before the arrays, a page; the number taken so far is in them
_CLOSED = 1 << 62


class Ring:
    """uint8 arrays 0, 1, 2, ... of `shape`, written in any order and taken in order; at most `slots` are on their way.

    Pickled to the processes that write, each of its own numbers; the process that made the ring takes, and closes it.
    """

    def __init__(self, shape: tuple[int, ...], slots: int):
        self._shape, self._slots, self._next = tuple(shape), slots, 0
        self._memory = SharedMemory(create=True, size=_HEAD + slots * math.prod(shape))
        self._name = self._memory.name

    def __getstate__(self):
        return {key: self.__dict__[key] for key in ("_shape", "_slots", "_name")}

    @functools.cached_property
    def _memory(self) -> SharedMemory:
        return SharedMemory(self._name)

    def _taken(self) -> np.ndarray:
        return np.ndarray((), np.int64, self._memory.buf)

    def _slot(self, number: int) -> np.ndarray:
        return np.ndarray(self._shape, np.uint8, self._memory.buf, _HEAD + number % self._slots * math.prod(self._shape))

    def write(self, number: int) -> np.ndarray | None:
        """Where to put array `number`, as soon as the one that lay there is taken; None when the ring is closed."""
        waited = 0.0
        while (taken := int(self._taken())) <= number - self._slots:
            # At most half as long as it waited already, so that it starts again in time for the reader's next round.
            nap = min(max(waited / 2, 0.001), 0.05)
            time.sleep(nap)
            waited += nap
        return None if taken == _CLOSED else self._slot(number)

    def take(self) -> np.ndarray:
        """A copy of the next array, of which it must be known that it is written: JAX may keep it as long as it likes."""
        result = self._slot(self._next).copy()
        self._next += 1
        self._taken()[()] = self._next
        return result

    def free(self) -> None:
        """Let all who wait in `write` go, with None."""
        self._taken()[()] = _CLOSED

    def close(self) -> None:
        """Give the memory back, for those that still have it when they end."""
        self._memory.close()
        self._memory.unlink()
