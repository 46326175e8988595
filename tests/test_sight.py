"""A teacher that sees the images at another size, or normalised in another way, than the student."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import zoom

from pwkd_jax import config, evaluate, export, models, train, weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import loading
from pwkd_jax.models import costs, image_sizes, sight

ROOT = Path(__file__).parents[1]
SHAPE = (8, 8, 3)



def test_it_is_the_network_on_images_of_its_own():
    own, data = (((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.5, 0.25)))
    network = models.create("resnet8", num_classes=5)
    seeing = sight.wrap(network, sight.sees(0, own, data))
    variables = network.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    found = seeing.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(variables)))
    pixels = np.random.default_rng(0).random((4, *SHAPE))
    as_data, as_own = ((pixels - np.array(m)) / np.array(s) for m, s in (data, own))
    logits = [models.apply(m, variables, jnp.asarray(x, jnp.float32), train=False)[0].logits
              for m, x in ((seeing, as_data), (network, as_own))]  # fmt: skip
    np.testing.assert_allclose(*logits, atol=2e-5)
    assert sight.sees(0, ((), ()), data) is None and sight.wrap(network, None) is network
    # What a card remembers gives back what the network wants itself.
    card = {"mean": data[0], "std": data[1], "sees": sight.sees(16, own, data)}
    np.testing.assert_allclose(sight.wanted(card), own)
    assert sight.wanted({"mean": data[0], "std": data[1]}) == data


def test_sizes_follow_pixel_centres():
    network = models.create("resnet8", num_classes=5)
    seeing = sight.Sight(network, 16)
    x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    # SciPy's linear spline between pixel centres, the border's value beyond them.
    larger = np.stack([zoom(image, (2, 2, 1), order=1, mode="nearest", grid_mode=True) for image in x])
    variables = network.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    logits = [models.apply(m, variables, y, train=False)[0].logits for m, y in ((seeing, x), (network, larger))]
    np.testing.assert_allclose(*logits, atol=2e-5)
    assert costs.macs(seeing, SHAPE) == costs.macs(network, (16, 16, 3)) > 3 * costs.macs(network, SHAPE)
    assert models.name_of(seeing) == "resnet8" and seeing.width == 1.0 and seeing.num_classes == 5
    # A transformer has places for the patches that it sees.
    vit = sight.Sight(models.create("vit_tiny_patch16"), 32)
    assert models.abstract(vit, SHAPE)["params"]["position"].shape == (1, 5, 192)
    image_sizes.check(*sight.inner(vit, SHAPE))
    with pytest.raises(UserError, match="cannot use images of 40x40"):
        image_sizes.check(*sight.inner(sight.Sight(models.create("vit_tiny_patch16"), 40), SHAPE))


TINY = ["--config=configs/digits.py", "--config.data.train_split=train[:128]", "--config.data.test_split=test[:64]",
        "--config.teacher.duration=2 steps", "--config.student.duration=4 steps", "--config.evaluation.every=2 steps",
        "--config.teacher.model=resnet8", "--config.teacher.widths=(0.5,1.0)", "--config.seeds=1",
        "--config.log.tensorboard=false"]  # fmt: skip
SEES = ["--config.teacher.image_size=16", "--config.teacher.mean=(0.5,)", "--config.teacher.std=(0.25,)"]


def test_an_experiment_with_such_a_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    assert train.main([*TINY, *SEES, "--config.arms=pwkd,kd_standard", f"--workdir={run}"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    for name in ("slimmable", "standard"):
        widths = {w["width"]: w for w in summary["teachers"][name]["widths"]}
        alone = models.create("resnet8", num_classes=10)
        assert widths[1.0]["macs"] == costs.macs(alone, (16, 16, 1))
        capsys.readouterr()
        assert evaluate.main([str(run / "teacher" / name)]) == 0
        assert f"{widths[1.0]['top1_last']:.2f}" in capsys.readouterr().out
    # A file of it stands for itself: evaluated, or as another experiment's teacher.
    assert export.main([str(run / "teacher/standard"), "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out/model.safetensors"
    network = loading.load(str(path))[0]
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    program = jax.export.deserialize(bytearray((tmp_path / "out/model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(images), jax.nn.softmax(network.logits(images)), atol=1e-5)
    card = weights.read(path)[1]
    assert card["image_shape"] == [8, 8, 1] and card["sees"]["size"] == 16
    np.testing.assert_allclose(sight.wanted(card), ((0.5,), (0.25,)))
    again = [f"--config.teacher.weights={path}", "--config.arms=kd_standard", "--config.student.duration=2 steps"]
    assert train.main([*TINY, *SEES, *again, f"--workdir={tmp_path / 'again'}"]) == 0
    # The teacher is as it was given: what it says is what it said.
    one, two = (json.loads((tmp_path / w / "summary.json").read_text())["teachers"]["standard"] for w in ("run", "again"))
    assert one["widths"][0]["top1_last"] == two["widths"][0]["top1_last"]
    assert train.main([*TINY, "--config.teacher.mean=(0.1,)", "--config.teacher.std=(0.25,)", *again,
                       f"--workdir={tmp_path / 'other'}"]) == 2  # fmt: skip
    assert "teacher.mean and teacher.std, where the student's differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["image_size=-1"], "teacher.image_size: -1 is not possible"),
        (["mean=(0.5,)"], "teacher.std: .* is not possible; it should be one number for each channel"),
        (["mean=(0.5,)", "std=(0,)"], "teacher.std"),
    ],
)
def test_what_it_cannot_see_is_refused(words, says):
    with pytest.raises(UserError, match=says):
        config.load(["--config=configs/digits.py", *(f"--config.teacher.{word}" for word in words)])
