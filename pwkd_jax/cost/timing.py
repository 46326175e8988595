"""Programs timed: compiled once, and run in rounds that others take turns in."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pwkd_jax.cost import chips


class Case(NamedTuple):
    """One program and what feeds it.

    lower(state, batch) of (state, batch, **extra) -> (state, anything); extra: None of an evaluation, which leaves its state as
    it is and does not return it. make() -> the first state. batches: as training has them. flops: of one step, by the models'
    multiply-accumulates, a backward pass counted twice a forward one.
    """

    lower: Callable[..., jax.stages.Lowered]
    make: Callable[[], Any]
    extra: dict | None
    batches: Callable
    batch: int
    flops: float


class Timer:
    """Compiles a case and runs it for about `seconds` a round: with a batch at hand, and as training does, batch by batch."""

    def __init__(self, name: str, case: Case, seconds: float):
        self.name, self.case = name, case
        self._state = case.make()
        self._most, self._at = getattr(case.batches, "most", 1), 0
        self._batch = self._next()
        begun = time.perf_counter()
        lowered = case.lower(self._state, self._batch, **(case.extra or {}))
        self.trace_seconds = time.perf_counter() - begun
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begun - self.trace_seconds
        self.found: list[tuple[float, float]] = []
        self._run(1, fed=False)
        once = self._run(1, fed=False)
        self._dispatches = max(1, round(seconds / 2 / (once * self._most)))

    def _next(self) -> dict:
        batch = self.case.batches(self._at) if self._most == 1 else self.case.batches(self._at, self._most)
        self._at += self._most
        return batch

    def _run(self, dispatches: int, fed: bool) -> float:
        """Seconds a step."""
        begun = time.perf_counter()
        for _ in range(dispatches):
            batch = self._next() if fed else self._batch
            if self.case.extra is not None:
                self._state, out = self._compiled(self._state, batch, **self.case.extra)
            else:
                out = self._compiled(self._state, batch)
        jax.block_until_ready((self._state, out))
        return (time.perf_counter() - begun) / (dispatches * self._most)

    def round(self) -> None:
        self.found.append((self._run(self._dispatches, fed=False), self._run(self._dispatches, fed=True)))

    def row(self, peak: float, devices: int) -> dict:
        at_hand, fed = zip(*self.found, strict=True)
        seconds, memory, work = statistics.median(at_hand), self._compiled.memory_analysis(), self._compiled.cost_analysis()
        # XLA counts what is in a loop once, so this is of one step, however many a dispatch has.
        traffic = float(work.get("bytes accessed", 0.0))
        waits = [max(0.0, 1 - a / f) for a, f in self.found]
        return {
            "name": self.name,
            "batch": self.case.batch,
            "steps_per_dispatch": self._most,
            "trace_seconds": self.trace_seconds,
            "compile_seconds": self.compile_seconds,
            "step_seconds": seconds,
            "step_seconds_rounds": list(at_hand),
            "fed_step_seconds": statistics.median(fed),
            "images_per_second": self.case.batch / statistics.median(fed),
            "model_flops": self.case.flops,
            "utilisation": self.case.flops / (seconds * peak * devices),
            "traffic_bytes": traffic,
            "traffic_per_second": traffic / seconds,
            "memory_bytes": int(memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                                + memory.temp_size_in_bytes),
            "input_wait": statistics.median(waits),
        }  # fmt: skip


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it, JAX neither reads nor writes compiled programs on disk."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def peak_here(dtype: str) -> tuple[float, str]:
    """(FLOP/s of one device, where that is from): its maker's figure, or what a large matrix product reaches."""
    kind = jax.devices()[0].device_kind
    if chip := chips.of_kind(kind):
        return (chip.peak if dtype == "bfloat16" else chip.peak_float32), f"{chip.name}'s published figure"
    size, best = 2048, float("inf")
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x).lower(square).compile()
    product(square).block_until_ready()
    for _ in range(5):
        begun = time.perf_counter()
        product(square).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best, f"the best of five {dtype} products of {size} x {size} here"


def processor() -> str:
    """The CPU's name and how many threads it has."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} threads" if names else "unknown"
