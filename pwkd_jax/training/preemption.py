"""Preemption: a SIGTERM to any process makes all of them stop at the same place, where the run saves and raises `Preempted`.

All processes call `check` or `reached` equally often and in the same order: at every step, every evaluation batch and between
runs. JAX's preemption service picks the call at which all of them stop, the first that none of them has made yet.

Compiling may take many minutes, in which nobody looks, and schedulers wait for less than one before they kill. So where the
main thread still compiles some seconds after a SIGTERM or a Ctrl-C, or has not begun to train, the process ends unsaved.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from jax.experimental import multihost_utils

from pwkd_jax.training import ahead, distributed


class Preempted(Exception):
    """The run has saved what it needs; the same command goes on from there."""


class _Notice:
    """What this process knows: whether it was asked to stop or interrupted, how often it looked, whether all have agreed."""

    asked = False
    interrupted = False
    looked = 0
    agreed = False


_GRACE = 8.0  # seconds of compiling after a signal
# Where JAX traces, lowers and compiles; a step that runs has none of these files on its stack (jax 0.10.2).
_COMPILING = tuple(os.path.join("jax", "_src", *name) for name in (
    ("compiler.py",), ("interpreters", "mlir.py"), ("interpreters", "partial_eval.py"),
))  # fmt: skip


def reached() -> bool:
    """Whether all processes stop here. Raises KeyboardInterrupt where a Ctrl-C did not: Python drops one that comes in a
    finaliser or a callback."""
    _Notice.looked += 1
    if _Notice.interrupted:
        raise KeyboardInterrupt
    if distributed.several():
        _Notice.agreed |= multihost_utils.reached_preemption_sync_point(_Notice.looked)
    else:
        _Notice.agreed |= _Notice.asked
    return _Notice.agreed


def check() -> None:
    """Raise Preempted where all processes stop here."""
    if reached():
        raise Preempted


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, unless it comes again.

    Within Orbax it would cut its event loop, to which TensorStore still calls back with tracebacks, or come out as an error of
    the checkpoint that is read (orbax-checkpoint 0.12.8).
    """
    before, heard = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def hear(number, frame) -> None:
        heard.append(number)
        if len(heard) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        before(signal.SIGINT, None)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Note a SIGTERM, for `reached` to see; a second one, or Ctrl-C after it, ends the process at once, and either one ends it
    after some seconds of compiling. Not in a thread."""
    _Notice.asked, _Notice.interrupted, _Notice.agreed = False, False, False
    over = threading.Event()
    tell = _jax_handler() if distributed.several() else lambda: None
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    # Python's own handlers wait for the interpreter, which compiling keeps out for minutes; a byte in a socket does not.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader, tell, over, _Notice.looked), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        writer.close()


def _listen(reader: socket.socket, tell: Callable[[], None], over: threading.Event, begun: int) -> None:
    first = None
    with reader:
        while received := reader.recv(1):
            number = received[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if first is None:
                first = time.monotonic()
                threading.Thread(target=_leave_idle, args=(number, over, begun), daemon=True).start()
            elif time.monotonic() - first > 1:  # sooner, it is the first again: launchers pass on what the group got too
                os._exit(128 + number)
            _Notice.interrupted |= number == signal.SIGINT
            if number == signal.SIGTERM and not _Notice.asked:
                print("SIGTERM: saving at the next step; a second one ends at once", file=sys.stderr, flush=True)
                _Notice.asked = True
                tell()


def _leave_idle(number: int, over: threading.Event, begun: int) -> None:
    """End this process where, some seconds after a signal, its main thread compiles, by `ahead` too, or has not looked since
    `begun` looks."""
    heard = since = time.monotonic()
    while not over.wait(0.2) and not _Notice.agreed:
        now, main = time.monotonic(), threading.main_thread().ident
        compiling = ahead.compiling() or _compiles(sys._current_frames().get(main))
        if not compiling and _Notice.looked != begun:
            since = now
        # Not for a small program between a long step and the look after it.
        if now - heard > _GRACE and now - since > min(2, _GRACE):
            doing = "compiling" if compiling else "preparing"
            said = f"{signal.Signals(number).name}: left while {doing}; the same command continues from the last checkpoint"
            print(said, file=sys.stderr, flush=True)
            os._exit(distributed.RESUMABLE if number == signal.SIGTERM else 128 + number)


def _compiles(frame: FrameType | None) -> bool:
    """Whether JAX traces or compiles somewhere on a stack."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COMPILING):
            return True
        frame = frame.f_back
    return False


def _jax_handler() -> Callable[[], None]:
    """What JAX does at a SIGTERM: it has taken the signal for its preemption service, which tells the other processes."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    address = libc.signal(signal.SIGTERM, None)
    if not address:
        return lambda: None
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
    return lambda: handler(signal.SIGTERM)
