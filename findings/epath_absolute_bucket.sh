#!/usr/bin/env bash
# etils 1.15.0: epath.Path("gs://bucket/run").absolute() and .resolve() are a folder of the working directory, "CWD/gs:/bucket/run".
#
# A bucket's path is a pathlib.PurePosixPath, and these two it has from pathlib, which knows no schemes; str(), "/", parent and
# is_absolute() are right, and nothing is raised: mkdir and write_text then write to the machine's own disk, and exists() and
# read_text find it there again. Orbax, which asks for absolute paths, makes "CWD/gs://bucket" of that one and fails on it.
# Who meets it: anyone who lets users name a local folder or a bucket by one option, as on Cloud TPU, and makes it absolute before
# the working directory changes: the results of a preempted machine are gone with it.
# Guessed before it ran: the same path back, for it is absolute already (is_absolute() says so).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 \
    orbax-checkpoint==0.12.8 etils==1.15.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import os
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

print("etils", version("etils"), "orbax-checkpoint", version("orbax-checkpoint"))
bucket, here = epath.Path("gs://bucket/run"), os.getcwd()
print("is_absolute():", bucket.is_absolute(), " absolute():", os.fspath(bucket.absolute()).replace(here, "CWD"))
assert os.fspath(bucket) == os.fspath(bucket / "x" / "..").removesuffix("/x/..") == "gs://bucket/run"
assert os.fspath(bucket.absolute()) == os.fspath(bucket.resolve()) == f"{here}/gs:/bucket/run"

path = bucket.absolute() / "metrics.json"
path.parent.mkdir(parents=True)
path.write_text("{}")
print("written to the local folder gs:/bucket/run:", Path("gs:/bucket/run/metrics.json").is_file())
assert path.exists() and Path("gs:/bucket/run/metrics.json").is_file()
try:
    ocp.save(bucket.absolute() / "1", {"w": jnp.ones(2)})
    raise SystemExit("Orbax took it")
except (KeyError, ValueError) as error:
    print(f"Orbax: {type(error).__name__}", str(error).replace(here, "CWD")[:100])
    assert f"{here}/gs://" in str(error)
PYTHON
