"""Shared by all tests: exact float32 matrix products, and tiny networks, data and configs."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In the environment, so that commands which tests start compile the same programs as the tests, and find them kept.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Tiny shapes: compiling costs more than running, so let LLVM do less of it, and let XLA write simpler code where it can.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),  # later ones know no such flag
)

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

from pwkd_jax import models, slimmable
from pwkd_jax.models import resnet

IMAGE_SHAPE = (8, 8, 3)
WIDTHS = (0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="session")
def golden():
    return json.loads((Path(__file__).parent / "data" / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_logits():
    return dict(np.load(Path(__file__).parent / "data" / "golden_logits.npz"))


@pytest.fixture(scope="session")
def batch():
    rng = np.random.default_rng(0)
    return rng.standard_normal((16, *IMAGE_SHAPE)).astype(np.float32), rng.integers(0, 10, 16).astype(np.int32)


@pytest.fixture(scope="session")
def bucket():
    """bucket(what) asks the server of `gs://bucket`, see bucket_server.py, where this and other processes find it."""
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package, reason=f"{package} is not installed; launch/test.sh installs it")
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("bucket_server.py")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    address = server.stdout.readline().strip()
    # A token for TensorStore, which otherwise looks for one in the cloud.
    os.environ |= {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "no"}

    def ask(what: str) -> dict:
        with urllib.request.urlopen(f"{address}/tests/{what}", timeout=30) as answer:
            return json.load(answer)

    yield ask
    server.communicate("")


def family(width: float):
    """A CIFAR ResNet of one block with a shortcut: all that resnet8 has, and quick to compile."""
    return resnet.ResNet(blocks=(1,), full_channels=(16, 32), width=width)


def made_up(model, image_shape, seed: int = 0) -> dict:
    """Variables of a network that behaves, drawn by NumPy: compiling an initialiser takes longer than all else of a test."""
    noise = np.random.default_rng(seed).standard_normal

    def draw(path, like):
        drawn, fan_in = noise(like.shape, np.float32), max(1, np.prod(like.shape[:-1]))
        if path[-1].key in ("scale", "var"):
            return 1 + 0.1 * np.abs(drawn)
        return drawn * np.float32((2 / fan_in) ** 0.5 if len(like.shape) > 1 else 0.1)

    return jax.tree_util.tree_map_with_path(draw, models.abstract(model, image_shape))


def network(**options) -> slimmable.Slimmable:
    return slimmable.build(options.pop("make", family), options.pop("widths", WIDTHS), IMAGE_SHAPE, **options)


def perturbed(tree, seed: int = 0):
    """`tree` with noise on every leaf, so that no scale is still 1 and no bias still 0."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [x + 0.1 * np.abs(rng.standard_normal(x.shape)).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


def varied(variables: dict, seed: int = 0) -> dict:
    """`variables` off their starting values but still of a network that behaves: signed noise, positive on statistics."""
    noise = np.random.default_rng(seed).standard_normal
    stats = jax.tree.map(lambda x: x + 0.1 * np.abs(noise(x.shape, np.float32)), variables.get("batch_stats", {}))
    return {"params": jax.tree.map(lambda x: x + 0.05 * noise(x.shape, np.float32), variables["params"]), "batch_stats": stats}


def network_outputs(name: str, width: float, images) -> models.Outputs:
    """Of a network in training, layer by layer: blocks that repeat are then compiled once."""
    model = models.create(name, width=width)
    return models.apply(model, made_up(model, images.shape[1:]), images, train=True)[0]


def close(a, b, tolerance: float) -> None:
    """Every leaf of a equals b's within `tolerance` of that leaf's largest magnitude (at least 1)."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape, path
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()), err_msg=str(path))


def identical(a, b) -> bool:
    """Whether two trees are equal bit for bit."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))
