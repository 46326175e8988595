"""Memory is kept between steps where that serves, and nowhere else."""

import os
import subprocess
import sys

import pytest

from pwkd_jax.cost import host_memory

CHILD = """
import resource, sys
import jax, jax.numpy as jnp
from pwkd_jax.cost import host_memory
told = host_memory.keep()
step = jax.jit(lambda x: (jnp.sin(x) @ x).sum())
x = jnp.ones((1500, 1500))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for turn in range(15):
    before = faults()
    step(x).block_until_ready()
    counts.append(faults() - before)
print(told, sorted(counts)[7])
"""


def run(**environment) -> tuple[str, int]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(host_memory.OWN)}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is done there")
def test_a_step_gets_the_memory_of_the_one_before():
    told, faults = run(JAX_PLATFORMS="cpu")
    left, more = run(JAX_PLATFORMS="cpu", MALLOC_TRIM_THRESHOLD_="131072")
    assert (told, left) == ("True", "False")
    assert faults < 500 < more  # of 4 KiB, at the median: its two arrays take 4,400, and now and then one moves


def test_other_devices_and_machines_are_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert not host_memory.keep()
    monkeypatch.undo()
    monkeypatch.setattr(host_memory, "_accelerated", lambda: True)
    assert not host_memory.keep()


def test_an_accelerator_is_asked_for_or_installed(monkeypatch):
    import jax

    asked = jax.config.jax_platforms
    try:
        for platforms, found in (("cpu", False), ("cuda,cpu", True)):
            jax.config.update("jax_platforms", platforms)
            assert host_memory._accelerated() is found
        jax.config.update("jax_platforms", None)
        monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: ())
        assert not host_memory._accelerated()
        monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: ("xla_cuda12",))
        assert host_memory._accelerated()
    finally:
        jax.config.update("jax_platforms", asked)
