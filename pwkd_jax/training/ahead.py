"""The first step's program, compiled while the state that it takes is made."""

import contextlib
import threading
from collections.abc import Callable

import jax

from pwkd_jax.training.dispatch import Resident
from pwkd_jax.training.state import State

NAME = "compile-ahead"


def compiling() -> bool:
    """Whether such a thread is at work, for which Python waits when it ends."""
    return any(thread.name == NAME for thread in threading.enumerate())


def compile_ahead(step: Callable, like: State, batches: Callable) -> Callable:
    """`step`, which is compiled for (like, batches(0)) by a thread meanwhile; its first call waits for that.

    step: of `jax.jit`, which finds the program again. like: the state's ShapeDtypeStructs. Nothing is done where several
    processes would have to compile in one order, where an accelerator is timed in compiling, and for batches that are read.
    """
    if jax.process_count() > 1 or jax.default_backend() != "cpu" or not isinstance(batches, Resident):
        return step
    lowered = step.lower(like, batches(0))

    def run() -> None:
        with contextlib.suppress(Exception):  # it comes again where the step is called
            lowered.compile()

    thread = threading.Thread(target=run, name=NAME)  # no daemon: a process that ends while one compiles is aborted
    thread.start()

    def wait(*args, **frozen):
        thread.join()
        return step(*args, **frozen)

    return wait
