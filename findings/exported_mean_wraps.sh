#!/usr/bin/env bash
# jax 0.10.2: jnp.mean of positive numbers becomes negative, or infinite, in an exported program with a symbolic batch.
#
# jax.export multiplies symbolic dimensions inside the program, in int32. jnp.mean(matrix [b, b]) divides by b * b, which wraps
# from b = 46341 on; jit of the same function divides by a constant and is right, and where the product is written out, jit
# refuses it with an OverflowError. The exported program says nothing, and batches below the edge are right.
# Who meets it: a similarity or relational distance (SP, RKD, CKA) between a student's and a teacher's features, exported once
# for "any batch" and then called on CIFAR's 50000 training or ImageNet's 50000 validation images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 flatbuffers==25.12.19
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


def distance(student, teacher):
    """Mean squared difference of two similarity matrices [b, b]: never negative. XLA fuses it, so no matrix is stored."""
    return jnp.mean(jnp.square(student[:, None] * student - teacher[:, None] * teacher))


print("jax", jax.__version__)
(b,) = export.symbolic_shape("b")
features = jax.ShapeDtypeStruct((b,), jnp.float32)
exported = export.deserialize(export.export(jax.jit(distance))(features, features).serialize())
values = {}
print("images     jit  exported  exported should be jit * b^2 / int32(b^2)")
for images in (46340, 46341, 50000, 65536):
    student, teacher = np.full(images, 2, np.float32), np.full(images, 1, np.float32)  # (4 - 1)^2 = 9 everywhere
    right, got = float(jax.jit(distance)(student, teacher)), float(exported.call(student, teacher))
    count = (images**2 + 2**31) % 2**32 - 2**31
    values[images] = right, got
    print(f"{images:6d} {right:7.3f} {got:9.3f}  {right * images**2 / count if count else float('inf'):9.3f}")

if not all(abs(right - 9) < 0.1 for right, _ in values.values()):
    sys.exit("Changed: jit no longer gives the right mean, so there is nothing to compare the exported program with.")
if abs(values[46340][1] - 9) > 0.1:
    sys.exit("Changed: the exported mean is wrong below 2^31 elements too.")
if not (values[46341][1] < 0 and values[50000][1] < 0 and np.isinf(values[65536][1])):
    sys.exit("Changed: the exported mean no longer wraps at 2^31 elements.")
print("As stated: above 46340 images the exported mean of squares is negative, and infinite at 65536; jit is right.")
PYTHON
