"""Weights in this project's own names: of .npz files, of what Orbax saved, and of states of Flax NNX."""

import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import close, made_up
from flax import nnx
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1
from test_weights_names import NORMALISED, read_back, refused

from pwkd_jax import models
from pwkd_jax.weights import pytorch

SMALL = ["--model=resnet8", "--image-size=8", *NORMALISED]
SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def net():
    """(model, variables) of a resnet8 with 10 classes."""
    model = models.create("resnet8")
    return model, made_up(model, SHAPE)


@pytest.mark.parametrize("names", ["/", ".", "bare", "torch", "wrapped"])
def test_npz_in_our_names_and_in_pytorchs(names, net, tmp_path):
    model, variables = net
    flat = flatten_dict(variables)
    if names == "torch":
        arrays = pytorch.to_torch(model, variables)
    elif names == "bare":
        arrays = {"/".join(path[1:]): x for path, x in flat.items()}
    else:
        arrays = {("model/state/" if names == "wrapped" else "") + (names if len(names) == 1 else "/").join(path): x
                  for path, x in flat.items()}  # fmt: skip
    np.savez(tmp_path / "net.npz", **arrays)
    close(read_back(tmp_path / "net.npz", tmp_path, *SMALL), variables, 0)


def test_npz_that_are_refused(net, tmp_path, capsys):
    arrays = {"/".join(path): x for path, x in flatten_dict(net[1]).items()}
    kernel = "params/stem_conv/kernel"
    path, command = tmp_path / "net.npz", [*SMALL, f"--out={tmp_path / 'o.safetensors'}"]
    for spoil, sentence in (
        ({kernel: np.array([None], object)}, r"holds Python objects besides arrays, which could run code"),
        (
            {kernel: arrays[kernel].astype(ml_dtypes.bfloat16)},
            rf"holds {kernel} as bytes without a type, as NumPy keeps bfloat16",
        ),
        ({kernel: np.full((3, 3, 3, 16), np.nan)}, rf"{kernel} holds values that are not finite"),
        ({kernel: np.zeros((5, 5, 3, 16))}, rf"{kernel} is \[5, 5, 3, 16\], not \[3, 3, 3, 16\]"),
        ({kernel: np.zeros((3, 3, 3, 16), int)}, rf"{kernel} is int64, not a floating-point array"),
        ({"params/more": np.zeros(3)}, r"does not fit 'resnet8': params/more is not wanted$"),
        ({"params.stem_conv.kernel": arrays[kernel]}, r"holds \S+kernel twice, also as \S+kernel"),
    ):
        np.savez(path, **(arrays | spoil))
        assert re.search(sentence, refused(capsys, path, *command).strip())
    np.savez(path, **{name: x for name, x in arrays.items() if name != kernel})
    assert f"does not fit 'resnet8': {kernel} is not in it\n" in refused(capsys, path, *command)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nothing" * 9):
        path.write_bytes(content)
        assert "is not a whole .npz file" in refused(capsys, path, *command)
    assert "there is no such file" in refused(capsys, tmp_path / "none.npz", *command)
    assert [p.name for p in tmp_path.iterdir()] == ["net.npz"]


# Orbax and Flax NNX.


def standard(path: Path, tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def manager(path: Path, tree) -> None:
    with ocp.CheckpointManager(path) as steps:
        for step, saved in ((3, jax.tree.map(np.zeros_like, tree)), (7, tree)):
            steps.save(step, args=ocp.args.StandardSave(saved))
            steps.wait_until_finished()


def composite(path: Path, tree) -> None:
    with ocp.CheckpointManager(path) as steps:
        steps.save(5, args=ocp.args.Composite(**{name: ocp.args.StandardSave(part) for name, part in tree.items()}))


@pytest.mark.parametrize(
    "save",
    [
        standard,
        ocp.PyTreeCheckpointer().save,
        manager,
        composite,
        lambda path, tree: v1.save_checkpointables(path, {"net": tree}),
    ],
    ids=["standard", "pytree", "manager", "composite", "version 1"],
)
def test_a_tree_that_orbax_saved(save, net, tmp_path, capsys):
    save(tmp_path / "saved", net[1])
    close(read_back(tmp_path / "saved", tmp_path, *SMALL), net[1], 0)
    assert ("the latest, 7, was taken" in capsys.readouterr().err) == (save is manager)


def test_a_tree_of_devices_that_are_not_here(net, tmp_path):
    standard(tmp_path / "saved", jax.tree.map(jnp.asarray, net[1]))
    kept = tmp_path / "saved" / "_sharding"
    placed = json.loads(kept.read_text())
    for name, one in placed.items():
        sharding = json.loads(one)
        assert sharding["device_str"] == str(jax.devices()[0])
        placed[name] = json.dumps(sharding | {"device_str": "TPU_99(process=3,(9,9,9,1))"})
    kept.write_text(json.dumps(placed))
    close(read_back(tmp_path / "saved", tmp_path, *SMALL), net[1], 0)


@pytest.mark.parametrize("pure", [False, True], ids=["state", "pure dict"])
def test_a_state_of_nnx(pure, net, tmp_path, capsys):
    module = nnx.bridge.ToNNX(net[0], rngs=nnx.Rngs(0)).lazy_init(np.zeros((1, *SHAPE), np.float32))
    state = nnx.state(module)
    nnx.replace_by_pure_dict(state, {**nnx.to_pure_dict(state), **merged(net[1])})
    standard(tmp_path / "saved", nnx.to_pure_dict(state) if pure else state)
    close(read_back(tmp_path / "saved", tmp_path, *SMALL), net[1], 0)
    assert "left out: 2 of rngs (the state of random numbers)" in capsys.readouterr().err


def merged(variables: dict) -> dict:
    """As NNX keeps them: statistics beside the parameters of their layer."""
    result: dict = {}
    for (_, *path, leaf), x in flatten_dict(variables).items():
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = x
    return result


class Listed(nn.Module):
    """A model of someone's own, whose layers are a list."""

    width: float = 1.0
    num_classes: int = 10

    def setup(self):
        self.layers = [nn.Dense(4), nn.Dense(self.num_classes)]

    def __call__(self, x, train=False):
        return self.layers[1](nn.relu(self.layers[0](x.reshape(len(x), -1))))


class Lists(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(192, 4, rngs=rngs), nnx.Linear(4, 6, rngs=rngs)])


def test_lists_of_nnx_are_linens_numbered_names(tmp_path):
    state = nnx.state(Lists(nnx.Rngs(0)))
    standard(tmp_path / "saved", state)
    variables = read_back(tmp_path / "saved", tmp_path, "--model=test_weights_trees:Listed", "--image-size=8", *NORMALISED)
    assert json.loads((tmp_path / "out.json").read_text())["num_classes"] == 6
    for i in (0, 1):
        close(variables["params"][f"layers_{i}"], nnx.to_pure_dict(state)["layers"][i], 0)


def test_a_training_state_holds_more_than_a_network(net, tmp_path, capsys):
    """Averaged weights by --key, with the statistics beside them; the optimiser and counters are left out, and it is said."""
    raw, averaged = net[1], jax.tree.map(lambda x: 2 * x, net[1]["params"])
    moments = ({"count": np.int32(3)}, {"mu": jax.tree.map(np.ones_like, raw["params"])})
    state = {**raw, "ema_params": averaged, "opt_state": moments, "step": np.int32(3)}
    standard(tmp_path / "saved", state)
    sentence = refused(capsys, tmp_path / "saved", *SMALL, f"--out={tmp_path / 'o.safetensors'}")
    assert "ema_params/classifier/bias is not wanted; " in sentence
    close(read_back(tmp_path / "saved", tmp_path, *SMALL, "--ignore=ema_params/*"), raw, 0)
    assert "left out: 30 of opt_state (the optimiser's), 1 of step (a counter)" in capsys.readouterr().err
    close(read_back(tmp_path / "saved", tmp_path, *SMALL, "--key=ema_params"), {**raw, "params": averaged}, 0)
    sentence = refused(capsys, tmp_path / "saved", *SMALL, f"--out={tmp_path / 'o.safetensors'}", "--key=ema")
    assert "holds no 'ema'; there are batch_stats, ema_params, opt_state, params, step" in sentence


def test_directories_that_are_no_checkpoint_or_a_torn_one(net, tmp_path, capsys):
    command = [*SMALL, f"--out={tmp_path / 'o.safetensors'}"]
    (tmp_path / "empty").mkdir()
    assert "is a directory, and not a checkpoint of Orbax" in refused(capsys, tmp_path / "empty", *command)
    standard(tmp_path / "saved", net[1])
    (tmp_path / "saved" / "_METADATA").write_text("{")
    assert "is not a whole checkpoint of Orbax" in refused(capsys, tmp_path / "saved", *command)
    standard(tmp_path / "cut", net[1])
    for path in (tmp_path / "cut").rglob("d/*"):
        path.unlink()
    assert "is not a whole checkpoint of Orbax" in refused(capsys, tmp_path / "cut", *command)
