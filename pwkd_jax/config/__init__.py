"""Configs: the schema with every default (`schema`), how a file and overrides are read (`reading`), and what is refused
(`checks`). configs/*.py start from `default()`; after `load` the code sees plain arguments."""

from pwkd_jax.config.checks import check, check_kinds
from pwkd_jax.config.reading import complete, load
from pwkd_jax.config.schema import default, leaves

__all__ = ["check", "check_kinds", "complete", "default", "leaves", "load"]
