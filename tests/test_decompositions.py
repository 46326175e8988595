"""Decompositions of batches, several in one program."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from pwkd_jax.distillers import decompositions


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_they_are_numpys():
    x = drawn(2, 3, 5, 4)
    u, s, v = jax.jit(decompositions.svd)(x)
    np.testing.assert_allclose(s, np.linalg.svd(np.float64(x))[1], rtol=1e-5)
    np.testing.assert_allclose(u * s[..., None, :] @ v, x, atol=1e-5)
    x = x.swapaxes(-1, -2) @ x
    values, vectors = jax.jit(decompositions.eigh)(x)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(np.float64(x)), atol=1e-5)
    np.testing.assert_allclose(x @ vectors, values[..., None, :] * vectors, atol=1e-4)


def test_on_a_cpu_no_batch_is_one_call():
    text = jax.jit(decompositions.eigh).lower(drawn(32, 4, 4)).as_text()
    assert "while" in text and "tensor<32x4x4xf32>" in text
    calls = [line for line in text.splitlines() if "custom_call" in line and "syevd" in line]
    assert calls and not any("32x4x4" in line for line in calls)


@pytest.mark.slow
def test_many_in_one_program_come_to_an_end():
    code = """
import jax, jax.numpy as jnp, numpy as np
from pwkd_jax.distillers import decompositions
xs = [jnp.asarray(np.random.default_rng(m).standard_normal((32, m, m)), jnp.float32) for m in (16, 16, 32, 32, 64, 64)]
total = jax.jit(lambda xs: sum(jnp.sum(decompositions.svd(x)[1]) + jnp.sum(decompositions.eigh(x @ x.mT)[0]) for x in xs))
assert all(np.isfinite(float(total(xs))) for _ in range(10))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
