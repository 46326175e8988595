#!/usr/bin/env bash
# jaxlib 0.10.2 on CPU: lax.optimization_barrier is gone before fusion, so what it should hold apart is computed anew behind it.
#
# The documentation has every operand computed before anything behind the barrier. In the lowered program the barrier stands; the
# CPU compiler takes it out before it fuses, and an array that two consumers read past the barrier is computed inside each of
# them, as if there were none. Guess before running: once, before it.
# Who meets it: anybody who puts a barrier where a chain of cheap layers should be stored once. A transposed reader then computes
# the whole chain against the order of memory, all of its inputs with it. A loop holds them apart: its operands are arrays.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax import lax


def readers(stored, x):
    return stored.T + 1.0, stored * 2.0


def without(x):
    return readers(jnp.sin(x), x)


def barrier(x):
    return readers(lax.optimization_barrier(jnp.sin(x)), x)


def loop(x):
    stored = jnp.sin(x)
    return lax.map(lambda i: lax.dynamic_index_in_dim(stored, i, 1, keepdims=False) + 1.0, jnp.arange(256)), stored * 2.0


x = jnp.ones((256, 256))
found = {}
for form in (without, barrier, loop):
    lowered = jax.jit(form).lower(x)
    compiled = lowered.compile()
    bodies = compiled.as_text().split("\n}\n")
    found[form.__name__] = any(" sine(" in body and " transpose(" in body for body in bodies)
    print(f"{form.__name__}: a barrier in the lowered program: {'optimization_barrier' in lowered.as_text()}; "
          f"sines in the kernel that transposes: {found[form.__name__]}")
    for a, b in zip(compiled(x), without(x)):
        assert jnp.allclose(a, b)
if found != {"without": True, "barrier": True, "loop": False}:
    sys.exit(f"the compiler does something else now: {found}")
PYTHON
# Seen:
# without: a barrier in the lowered program: False; sines in the kernel that transposes: True
# barrier: a barrier in the lowered program: True; sines in the kernel that transposes: True
# loop: a barrier in the lowered program: False; sines in the kernel that transposes: False
