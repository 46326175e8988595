"""Whose fault an error is: the config's key, before the sentence of what lies deeper and knows no keys."""

import contextlib
from collections.abc import Iterator

from pwkd_jax import models
from pwkd_jax.errors import UserError


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """UserErrors of the block, but for those of a width, with the config's key that led to them before their sentence."""
    try:
        yield
    except models.WidthError:
        raise
    except UserError as e:
        raise UserError(f"{key}: {e}") from e
