"""Compiled programs kept between commands, so that the second run starts training in seconds."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def enable() -> None:
    """Let JAX keep what it compiles in ~/.cache/pwkd_jax/jax ($XDG_CACHE_HOME), a folder for each kind of processor.

    JAX_COMPILATION_CACHE_DIR names another place, gs://BUCKET/NAME too, and JAX_ENABLE_COMPILATION_CACHE=0 turns it off. Where
    the folder cannot be made nothing is kept. Process 0 writes, all read.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(home) / "pwkd_jax" / "jax" / _processor()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever may write here may run code as the user
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))


def _processor() -> str:
    # JAX's key does not name the CPU, whose instructions the program uses; homes are shared between unlike machines.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        facts = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(''.join(facts).encode()).hexdigest()[:8]}"
