#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: as a static argument of jit, Net(1.0) runs the program that Net(1) traced, and Net(-0.0) Net(0.0)'s.
#
# jit tells the types of its static arguments apart: f(1), f(1.0) and f(True) are three programs. A Linen module is a dataclass that
# compares by its fields, and 1 == 1.0 == True, so all of these are one key of jit's cache. Types of results depend on what
# ran earlier in the process, and so do errors: Stack(2.0) raises a TypeError alone and works after Stack(2).
# Who meets it: one jitted step or evaluation, static in the model, for the widths of a slimmable network or for a sweep. A width
# of 1 in one config and 1.0 in another, or a test that passes only behind another test; dtypes decide rounding, and a temperature
# or a loss scale read from YAML is an int as soon as somebody leaves out ".0".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 flax==0.12.8 \
    optax==0.2.8 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp


class Scaled(nn.Module):
    width: float

    def __call__(self, counts):
        return counts * self.width


class Signed(nn.Module):
    slope: float

    def __call__(self, x):
        return x / self.slope


class Stack(nn.Module):
    depth: int

    def __call__(self, x):
        for _ in range(self.depth):
            x = x + 1
        return x


def programs():
    """jit's cache is per function, so each call of this starts with an empty one."""
    bare = jax.jit(lambda width, counts: counts * width, static_argnums=0)
    module = partial(jax.jit, static_argnums=0)(lambda model, x: model.apply({}, x))
    return bare, module


def dtypes(function, arguments):
    return [str(function(a, counts).dtype) for a in arguments]


print("flax", flax.__version__, "jax", jax.__version__)
counts = jnp.arange(3)
bare, module = programs()
told = dtypes(bare, (1, 1.0))
first = dtypes(module, (Scaled(1), Scaled(1.0)))
second = dtypes(programs()[1], (Scaled(1.0), Scaled(1)))
plain = dtypes(lambda model, x: model.apply({}, x), (Scaled(1), Scaled(1.0)))
print("int32 * width, dtypes for 1 then 1.0:    bare", told, " module", first, " module without jit", plain)
print("                           1.0 then 1:                               module", second)
if told != ["int32", "float32"] or plain != ["int32", "float32"]:
    sys.exit("Changed: jit no longer tells 1 from 1.0 as a bare static argument, or the module itself changed.")
if first != ["int32", "int32"] or second != ["float32", "float32"]:
    sys.exit("Changed: a static module's 1 and 1.0 are told apart.")

infinities = [float(module(Signed(s), jnp.float32(1))) for s in (0.0, -0.0)]
print("1 / slope for 0.0 then -0.0:", infinities)
if infinities[0] != infinities[1]:
    sys.exit("Changed: a static module's 0.0 and -0.0 are told apart.")


def outcome(function, *args):
    try:
        return float(function(*args))
    except TypeError as e:
        return f"TypeError: {e}"


module = programs()[1]
before = outcome(module, Stack(2.0), 0.0)
outcome(module, Stack(2), 0.0)
after = outcome(module, Stack(2.0), 0.0)
print(f"Stack(2.0): {before!r}; after Stack(2): {after!r}")
if not (isinstance(before, str) and after == 2.0):
    sys.exit("Changed: whether Stack(2.0) is an error no longer depends on what ran before.")
print("As stated: the first of several equal modules decides types, signs and errors for all of them.")
PYTHON
