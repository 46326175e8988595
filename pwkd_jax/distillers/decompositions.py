"""Decompositions of many small matrices, where several of them stand in one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def of_each(decompose: Callable[[jax.Array], tuple], matrices: jax.Array) -> Any:
    """decompose(matrices) of [..., n, m], such as `jnp.linalg.eigh`; on a CPU one matrix after another.

    There jaxlib 0.10.2 gives a batch to the threads that run the program, and waits for them in one of these: as many batches
    at once as there are threads (two stages of student and teacher on two cores) wait for each other for ever.
    """

    def in_turn(matrices: jax.Array) -> tuple:
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        found = jax.lax.map(lambda one: tuple(decompose(one)), flat)
        return tuple(x.reshape(*matrices.shape[:-2], *x.shape[1:]) for x in found)

    return jax.lax.platform_dependent(matrices, cpu=in_turn, default=lambda x: tuple(decompose(x)))


def eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [..., n], rising, and eigenvectors [..., n, n] of symmetric matrices [..., n, n]."""
    return of_each(jnp.linalg.eigh, matrices)


def svd(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U [..., n, k], singular values [..., k], falling, and V^T [..., k, m] of matrices [..., n, m]; k: min(n, m)."""
    return of_each(lambda x: jnp.linalg.svd(x, full_matrices=False), matrices)
