"""A Ctrl-C where it would do harm: inside Orbax, and where Python drops it."""

import os
import signal
import time

import jax.numpy as jnp
import pytest
from conftest import identical

from pwkd_jax.training import preemption
from pwkd_jax.training.checkpoints import Checkpoints


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)


def test_it_waits_for_the_end_of_a_block_and_its_second_does_not():
    seen = []
    with pytest.raises(KeyboardInterrupt), preemption.unbroken():
        interrupt()
        seen.append("after one")
    with pytest.raises(KeyboardInterrupt), preemption.unbroken():
        interrupt()
        interrupt()
        seen.append("after two")
    assert seen == ["after one"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_that_is_being_read_is_not_taken_for_a_damaged_one(tmp_path, capsys):
    """Orbax makes an error of its own of a Ctrl-C, and what cannot be read is put aside."""
    state = {"w": jnp.arange(4.0)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    true = checkpoints._manager.load_checkpointables

    def load(*args):
        interrupt()
        return true(*args)

    checkpoints._manager.load_checkpointables = load
    with pytest.raises(KeyboardInterrupt):
        checkpoints.restore(state)
    checkpoints._manager.load_checkpointables = true
    assert identical(checkpoints.restore(state), state) and not list(tmp_path.glob("*.damaged"))
    checkpoints.close()
    assert capsys.readouterr().err == ""


def test_one_that_python_dropped_is_raised_at_the_next_look(monkeypatch):
    monkeypatch.setattr(preemption._Notice, "interrupted", True)
    with pytest.raises(KeyboardInterrupt):
        preemption.check()
