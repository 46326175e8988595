"""A first step compiled while its state is made: once, where it may be, and a process that ends meanwhile ends as it would."""

import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pwkd_jax import data
from pwkd_jax.training import ahead, dispatch, distributed, preemption, sharding

SLOW = """
import sys, jax, jax.numpy as jnp, numpy as np
from pwkd_jax import data
from pwkd_jax.training import ahead, dispatch, sharding
mesh = sharding.make_mesh()
split = data.Split(np.zeros((8, 2, 2, 1), np.uint8), np.zeros(8, np.int32))
batches = dispatch.Resident(mesh, data.Pipeline(split, 4, 0), dispatch.store(mesh, split), 1)
def step(state, batch):
    for _ in range(400):
        state = jnp.sin(state) @ state
    return state, {}
step = ahead.compile_ahead(jax.jit(step), jax.ShapeDtypeStruct((8, 8), jnp.float32), batches)
assert ahead.compiling()
sys.exit(3)
"""


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def batches(mesh):
    split = data.Split(np.arange(32, dtype=np.uint8).reshape(8, 2, 2, 1), np.arange(8, dtype=np.int32))
    return dispatch.Resident(mesh, data.Pipeline(split, 4, 0), dispatch.store(mesh, split), 1)


def add(state, batch):
    return state + batch["rows"].sum(), {"seen": batch["count"]}


def test_the_program_is_compiled_before_its_first_call_and_once(mesh, batches):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(threading.get_ident()) if event.endswith("compile_duration") else None
    )
    whole = sharding.replicated(mesh)
    step = jax.jit(add, out_shardings=whole)
    early = ahead.compile_ahead(step, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), batches)
    state, batch = jax.device_put(np.int32(1), whole), batches(0)
    compiled.clear()
    found, seen = early(state, batch)
    here = [thread for thread in compiled if thread == threading.get_ident()]
    assert not here and step._cache_size() == 1 and not ahead.compiling()
    assert int(found) == 1 + batch["rows"].sum() and int(seen["seen"]) == 1


def test_others_compile_where_they_did(mesh, batches, monkeypatch):
    step = jax.jit(add)
    assert ahead.compile_ahead(step, None, lambda at: None) is step  # batches that are read
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert ahead.compile_ahead(step, None, batches) is step
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ahead.compile_ahead(step, None, batches) is step


def test_a_failure_is_the_steps_own(mesh, batches):
    def broken(state, batch):
        return jax.pure_callback(lambda x: 1 / 0, state, state), {}

    early = ahead.compile_ahead(jax.jit(broken), jax.ShapeDtypeStruct((), jnp.float32), batches)
    with pytest.raises(Exception, match="division by zero"):
        jax.block_until_ready(early(jnp.float32(0), batches(0)))


def test_a_process_that_ends_meanwhile_says_its_own_code():
    done = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


def test_a_signal_while_a_later_first_step_is_compiled_is_answered_in_seconds(monkeypatch):
    """The main thread waits for the thread, and looked at signals before: in another teacher's training."""
    left, over, done = [], threading.Event(), threading.Event()
    monkeypatch.setattr(preemption, "_GRACE", 0.5)
    monkeypatch.setattr(preemption._Notice, "agreed", False)
    monkeypatch.setattr(preemption.os, "_exit", lambda code: (left.append(code), over.set()))
    watch = threading.Thread(target=preemption._leave_idle, args=(signal.SIGTERM, over, preemption._Notice.looked - 1))
    compiling = threading.Thread(target=done.wait, args=(30,), name=ahead.NAME)
    watch.start()
    try:
        assert not over.wait(2)  # nothing is compiled
        compiling.start()
        watch.join(10)
    finally:
        done.set()
        over.set()
        watch.join()
    compiling.join()
    assert left == [distributed.RESUMABLE]
