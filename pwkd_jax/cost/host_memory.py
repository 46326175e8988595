"""On a CPU, memory that one step gives back is kept for the next.

XLA allocates a step's temporary arrays anew each time, and glibc maps memory of that size from the kernel and gives it back, so
that every step meets a page fault for each 4 KiB of them (tests/test_host_memory.py counts them). What the threads of a
convolution take for themselves glibc still maps, where it is more than 64 MiB. With a single arena (MALLOC_ARENA_MAX=1) it
would not, but then all threads wait for each other, those that compile and those of small networks' steps most.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jax

# The parameters of mallopt(3), by the numbers of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
# By which a user has settings of one's own for glibc: names in the environment begin so.
OWN = ("GLIBC_TUNABLES", "MALLOC_")


def keep() -> bool:
    """Tell glibc so; whether it was told.

    From then on the process keeps all that it frees, decoded images too. Nothing is done on other systems, where JAX may have
    an accelerator (a plug-in of JAX or libtpu is installed, and JAX_PLATFORMS is not cpu), and where the environment has
    settings of one's own, see OWN."""
    if sys.platform != "linux" or _accelerated() or any(name.startswith(OWN) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1)])


def _accelerated() -> bool:
    """Whether JAX may find another device than the CPU; asking JAX itself would start its threads."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
