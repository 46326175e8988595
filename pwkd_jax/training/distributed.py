"""Several processes as one: they start together, decide together, and end together. Alone, all of it does nothing.

Import it before anything touches a device, and call `start` first: JAX learns of the other processes only then. Every other
function here is called by all processes, in the same order. What depends on files is decided by process 0 and shared, because a
shared file system may show two processes different things.
"""

import ctypes
import inspect
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pwkd_jax.errors import UserError
from pwkd_jax.storage import Unreachable, replace
from pwkd_jax.training import cluster

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command may be given again
LOST = "another process has died or cannot be reached; the same command continues from the last checkpoint"
_TIMES = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}
_kept = []  # a handler that C code holds must not be collected


def start(argv: Sequence[str]) -> list[str]:
    """Join the other processes, if there are any; returns the arguments that are not about them.

    By hand with --coordinator=HOST:PORT --processes=N --process=I, or as the cluster says: Cloud TPU, SLURM, Kubernetes
    and Open MPI, by JAX's own detectors. Raises UserError where the three are not all there or the others cannot be reached.
    """
    given, rest = cluster.given(argv)
    if given:
        _initialize(**cluster.by_hand(given))
    elif cluster.known(os.environ):
        _initialize()
    if several():
        _sentence_for_aborts()
        _own_output()
    return rest


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def primary() -> bool:
    """Whether this is the process that prints and writes files (checkpoints are written by all)."""
    return not several() or jax.process_index() == 0


def write(path: Path, content: str) -> None:
    """Write a file, by the first of several processes. Raises OSError."""
    if primary():
        replace(path, content)


def share(value: Any) -> Any:
    """Process 0's `value`, which JSON can hold, on every process."""
    if not several():
        return value
    content = json.dumps(value).encode() if primary() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return json.loads(multihost_utils.broadcast_one_to_all(_padded(content, size)).tobytes()[:size])


def gather(text: str) -> list[str]:
    """The `text` of every process, by process index."""
    if not several():
        return [text]
    content = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    rows = multihost_utils.process_allgather(_padded(content, int(sizes.max())))
    return [row.tobytes()[:size].decode() for row, size in zip(np.asarray(rows), sizes, strict=True)]


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """[processes, ...]: the `rows` of every process, which have one shape."""
    return np.asarray(multihost_utils.process_allgather(rows)) if several() else rows[None]


def decide(f: Callable[[], Any]) -> Any:
    """f() of process 0 on every process; its result is JSON, and its UserError is raised everywhere."""
    if not several():
        return f()
    outcome = {}
    if primary():
        try:
            outcome = {"value": f()}
        except UserError as e:
            outcome = {"error": str(e)}
    outcome = share(outcome)
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def together(f: Callable[[], Any]) -> Any:
    """f() of every process, each its own; a UserError of any of them is raised on all, so that none waits for it."""
    if not several():
        return f()
    value, error = None, ""
    try:
        value = f()
    except UserError as e:
        error = str(e)
    errors = gather(json.dumps([socket.gethostname(), error]))
    for index, (host, said) in enumerate(map(json.loads, errors)):
        if said:
            alike = len({json.loads(e)[1] for e in errors}) == 1
            raise UserError(said if alike else f"process {index} ({host}): {said}")
    return value


def agree(facts: Mapping[str, str]) -> None:
    """Raise UserError on all processes, naming the first whose `facts` are not those of process 0, and in what they differ."""
    found = [json.loads(text) for text in gather(json.dumps([socket.gethostname(), dict(facts)]))]
    host_0, first = found[0]
    for index, (host, own) in enumerate(found):
        differ = [name for name in {**first, **own} if first.get(name) != own.get(name)]
        if differ:
            name = differ[0]
            more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
            raise UserError(
                f"process {index} ({host}) differs from process 0 ({host_0}): {name} is {own.get(name, 'missing')}, not "
                f"{first.get(name, 'missing')}{more}; every process needs the same command, code and versions"
            )


def fetch(tree: Any) -> Any:
    """`tree` with its arrays as NumPy's, whole, on every process."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def is_lost(error: BaseException) -> bool:
    """Whether `error` is how JAX says that another process is gone; on one process it never is."""
    signs = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL", "coordination service", "Barrier")
    return several() and isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in signs)


def leave(error: BaseException) -> None:
    """End this process at once for an error that the others do not share; returns if there are no others.

    An ordinary exit would wait for them, and they may be waiting for this one.
    """
    if not several():
        return
    if is_lost(error):
        _end(f"error: {LOST}", RESUMABLE)
    if isinstance(error, UserError):
        _end(f"error: {error}", RESUMABLE if isinstance(error, Unreachable) else 2)
    _end("".join(traceback.format_exception(error)).rstrip(), 1)


def _end(text: str, code: int) -> None:
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


def _padded(content: bytes, size: int) -> np.ndarray:
    """uint8, zeros after the content; of few different lengths, since each is a program of its own."""
    row = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)
    row[: len(content)] = np.frombuffer(content, np.uint8)
    return row


def _initialize(**who) -> None:
    if jax.distributed.is_initialized():
        return
    known = inspect.signature(jax.distributed.initialize).parameters
    try:
        jax.distributed.initialize(**who, **{name: value for name, value in _TIMES.items() if name in known})
    except Exception as e:  # JAX, gRPC and the metadata server raise of everything
        where = who.get("coordinator_address", "the cluster")
        raise UserError(
            f"--coordinator: cannot join the processes of {where} ({str(e).splitlines()[0]}); give --coordinator=HOST:PORT, "
            "--processes=N and --process=I that hold for all of them"
        ) from e


def _own_output() -> None:
    """What Python prints, of the first process alone; what C libraries print there goes to standard error, so that JSON stays
    JSON: Gloo says whom it met (jaxlib 0.10.2, findings/gloo_prints_on_stdout.sh). For the rest of the process."""
    if not primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stdout is sys.__stdout__:
        sys.stdout.flush()
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


def _sentence_for_aborts() -> None:
    """JAX aborts a process from a thread of its own where the coordinator lost another: end with the sentence then too.

    The main thread waits in a collective, so nothing in Python could catch it. A failure of this process's own in that
    thread stays what it is.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number):
        if threading.get_ident() != threading.main_thread().ident:
            _end(f"error: {LOST} (JAX's own words stand above)", RESUMABLE)

    _kept.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
