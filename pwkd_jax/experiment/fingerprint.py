"""What every process of a run must have alike: the config, the code, the versions and the workdir."""

import hashlib
import importlib.metadata
from pathlib import Path

from ml_collections import ConfigDict

from pwkd_jax.config import leaves

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def facts(config: ConfigDict, workdir: str) -> dict[str, str]:
    """{what: its value}, for `distributed.agree`: every key, the digest of every source file, and every version."""
    root = Path(__file__).parents[1]
    files = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".html"))
    return {
        **{f"config {key}": repr(value) for key, value in leaves(config)},
        **{f"version {name}": importlib.metadata.version(name) for name in PACKAGES},
        **{f"code {p.relative_to(root)}": hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in files},
        "workdir": workdir,
    }
