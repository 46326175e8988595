#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: {"layer1.0": a, "layer1": {"0": b}} is saved without a word, and loaded with a twice or with b twice.
#
# A path's parts are joined with dots into the name of an array on disk, so both leaves are written to one place, at the same time:
# which one survives differs from save to save. A key with a dot is fine alone, the saved metadata names both leaves, and a list
# ({"stage": [a], "stage.0": b}) does the same. Both APIs. (Leaves of two shapes are refused, in an error about zarr's "shape".)
# Who meets it: a state that holds a teacher's arrays under PyTorch's names ("layer1.0") beside a nested tree of the same layers
# (connectors, statistics, importance), or dotted settings or widths ("0.5") as keys. Shapes agree, so nothing fails: a resumed
# run distils from the wrong weights, and the next resume may differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 \
    orbax-checkpoint==0.12.8 tensorstore==0.1.86
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as v0
from orbax.checkpoint import v1

folder = Path(sys.argv[1])
print("orbax-checkpoint", version("orbax-checkpoint"), "tensorstore", version("tensorstore"))


def through_v1(tree, name):
    v1.save(folder / name, tree)
    return v1.load(folder / name, tree)


def through_v0(tree, name):
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / name, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / name, tree)


for through in (through_v1, through_v0):
    name = through.__name__
    alone = through({"layer1.0": jnp.full(3, 1.0), "layer2.0": jnp.full(3, 2.0)}, f"{name}_alone")
    if (float(alone["layer1.0"][0]), float(alone["layer2.0"][0])) != (1.0, 2.0):
        sys.exit(f"Changed: {name}: a key with a dot is not kept even alone.")
    seen = []
    for i in range(8):
        tree = {"layer1.0": jnp.full(3, 1.0), "layer1": {"0": jnp.full(3, 2.0)}}
        try:
            loaded = through(tree, f"{name}_{i}")
        except Exception as e:
            sys.exit(f"Changed: {name}: the tree is refused now ({type(e).__name__}: {str(e)[:120]}).")
        seen.append((float(loaded["layer1.0"][0]), float(loaded["layer1"]["0"][0])))
    print(f"{name}: saved (1.0, 2.0), loaded", *seen)
    if any(a != b for a, b in seen):
        sys.exit(f"Changed: {name}: two leaves came back as two.")
    listed = through({"stage.0": jnp.full(3, 1.0), "stage": [jnp.full(3, 2.0)]}, f"{name}_list")
    print(f"{name}: beside a list: saved (1.0, 2.0), loaded", (float(listed["stage.0"][0]), float(listed["stage"][0][0])))
    if float(listed["stage.0"][0]) != float(listed["stage"][0][0]):
        sys.exit(f"Changed: {name}: two leaves beside a list came back as two.")
print("As stated: one of the two leaves is lost in every save, without an error or a warning.")
PYTHON
