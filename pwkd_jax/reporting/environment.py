"""The versions, device and commit that results depend on."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax


def versions() -> dict[str, str]:
    """Of pwkd_jax, Python and the packages that results depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "pwkd_jax": sys.modules[__name__.partition(".")[0]].__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def environment() -> dict:
    """Versions, device and git commit, as the summary records them."""

    def git(*args: str) -> str | None:
        try:
            here = Path(__file__).parent
            done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    cpu = jax.default_backend() == "cpu"
    return {
        **versions(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        # XLA's sums on CPU are taken in as many parts as there are threads, one a core that this process may use.
        **({"cpu_threads": len(os.sched_getaffinity(0))} if cpu and hasattr(os, "sched_getaffinity") else {}),
        "git_commit": git("rev-parse", "HEAD") or "unknown",
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
