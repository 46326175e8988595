"""RandAugment, TrivialAugment, colour jitter, blur and erasing: against Pillow's own operations, and what they draw."""

import colorsys
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter
from test_commands import TINY

from pwkd_jax import config, data, train
from pwkd_jax.data import colours, policies
from pwkd_jax.errors import UserError

RNG = np.random.default_rng(0)
SMOOTH = np.clip(np.cumsum(np.cumsum(RNG.normal(0, 3, (33, 40, 3)), 0), 1) + 120, 20, 230).astype(np.uint8)
IMAGES = {"noise": RNG.integers(0, 256, (33, 40, 3)).astype(np.uint8), "smooth": SMOOTH,
          "flat": np.full((33, 40, 3), 77, np.uint8)}  # fmt: skip


def pillow(image: np.ndarray, name: str, value: float) -> np.ndarray:
    """The operation as the papers' own code calls Pillow."""
    x = Image.fromarray(image)
    affine = {"shear_x": (1, value, 0, 0, 1, 0), "shear_y": (1, 0, 0, value, 1, 0), "translate_x": (1, 0, int(value), 0, 1, 0),
              "translate_y": (1, 0, 0, 0, 1, int(value))}  # fmt: skip
    enhance = {"brightness": ImageEnhance.Brightness, "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
               "sharpness": ImageEnhance.Sharpness}  # fmt: skip
    if name in affine:
        x = x.transform(x.size, Image.Transform.AFFINE, affine[name], resample=Image.Resampling.NEAREST)
    elif name in enhance:
        x = enhance[name](x).enhance(1 + value)
    elif name == "rotate":
        x = x.rotate(value)
    elif name == "posterize":
        x = ImageOps.posterize(x, int(value))
    elif name == "solarize":
        x = ImageOps.solarize(x, value)
    elif name in ("autocontrast", "equalize", "invert"):
        x = getattr(ImageOps, name)(x)
    return np.asarray(x)


@pytest.fixture(scope="module")
def applied():
    return jax.jit(policies.apply)


@pytest.mark.parametrize("name", policies.OPERATIONS)
@pytest.mark.parametrize("which", IMAGES)
def test_operations_are_pillows(name, which, applied):
    for policy in ("rand", "trivial"):
        row = policies.magnitudes(policy, 33, 40)[policies.OPERATIONS.index(name)]
        for value in (row[0], row[9], row[17], row[30], -row[23] if name in policies.SIGNED else row[23]):
            ours = np.asarray(applied(IMAGES[which], jnp.int32(policies.OPERATIONS.index(name)), value))
            theirs = pillow(IMAGES[which], name, float(value))
            assert ours.dtype == np.uint8 and ours.shape == theirs.shape
            off = np.abs(ours.astype(int) - theirs) > (name in ("autocontrast", *policies.SIGNED[5:]))
            # A pixel on the edge between two is given to either by the last bit of a float.
            assert off.any(-1).mean() < (0.005 if name in ("rotate", "shear_x", "shear_y") else 1e-9), (name, value)


def test_magnitudes_are_those_of_the_papers():
    rand, trivial = (dict(zip(policies.OPERATIONS, policies.magnitudes(p, 224, 224), strict=True)) for p in ("rand", "trivial"))
    assert [rand[k][30] for k in ("shear_x", "rotate", "color", "posterize", "solarize")] == pytest.approx([0.3, 30, 0.9, 4, 0])
    assert rand["translate_x"][30] == pytest.approx(150 / 331 * 224) and rand["rotate"][9] == pytest.approx(9)
    ends = [trivial[k][30] for k in ("shear_y", "translate_y", "rotate", "sharpness", "posterize", "solarize")]
    assert ends == pytest.approx([0.99, 32, 135, 0.99, 2, 0]) and trivial["posterize"][0] == rand["posterize"][0] == 8


@pytest.mark.parametrize("policy", [data.Policy("trivial"), data.Policy("rand", 1, 20)])
def test_every_image_draws_for_itself_and_all_operations_come(policy):
    """Images that tell by what became of them which operation it was."""
    images = np.stack([IMAGES["smooth"]] * 400)
    found = np.asarray(jax.jit(policy)(jax.random.key(0), images))
    assert np.array_equal(found[:7], np.asarray(jax.jit(policy)(jax.random.key(0), images[:7])))  # whatever the batch
    assert not np.array_equal(found[:7], np.asarray(jax.jit(policy)(jax.random.key(1), images[:7])))
    kept = (found == images).all((1, 2, 3)).mean()
    assert 0.03 < kept < 0.25  # identity, and operations at magnitude 0
    table, seen = policies.magnitudes(policy.name, 33, 40), set()
    for row, name in zip(table, policies.OPERATIONS, strict=True):
        strengths = row if policy.name == "trivial" else row[20:21]
        for value in {float(v * s) for v in strengths for s in ((1, -1) if name in policies.SIGNED else (1,))}:
            expected = pillow(IMAGES["smooth"], name, value)
            like = (np.abs(found - expected.astype(int)) <= 1).all((1, 2, 3))
            if like.any() and not np.array_equal(expected, IMAGES["smooth"]):
                seen.add((name, value < 0))
    names = {name for name, _ in seen}
    assert names >= {*policies.OPERATIONS} - {"identity", "rotate", "shear_x", "shear_y", "posterize"}, names
    assert {("translate_x", True), ("translate_x", False)} <= seen


def test_layers_are_one_after_another():
    images = np.stack([IMAGES["smooth"]] * 200)
    one, three = (np.asarray(jax.jit(data.Policy("rand", n, 15))(jax.random.key(0), images)) for n in (1, 3))
    same = [(x == images).all((1, 2, 3)).mean() for x in (one, three)]
    assert same[0] > 3 * same[1]


# Of the code before AutoAugment: what the first six images of key 0 undergo, and the sums of eight that underwent it.
RECORDED = {
    "trivial": ([[("solarize", 17.0)], [("contrast", 0.693)], [("rotate", 135.0)], [("translate_x", -29.8667)],
                 [("shear_x", -0.858)], [("rotate", -99.0)]],
                [21488, 24166, 19033, 0, 13460, 22142, 13460, 13636]),
    "rand": ([[("solarize", 178.5), ("translate_y", 4.3505)], [("contrast", 0.27), ("brightness", -0.27)],
              [("rotate", 9.0), ("shear_y", 0.09)], [("translate_x", -4.3505), ("identity", 0.0)],
              [("shear_x", -0.09), ("posterize", 7.0)], [("rotate", -9.0), ("brightness", 0.27)]],
             [12544, 17514, 22260, 21104, 23144, 26836, 13700, 20893]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_the_policies_before_autoaugment_draw_as_they_did(name):
    policy, (draws, sums) = data.Policy(name), RECORDED[name]
    for i, expected in enumerate(draws):
        found = policy.drawn(jax.random.fold_in(jax.random.key(0), i), 32, 32)
        assert [policies.OPERATIONS[int(operation)] for operation, _ in found] == [operation for operation, _ in expected]
        assert [float(value) for _, value in found] == pytest.approx([value for _, value in expected], abs=1e-4)
    ramp = (np.arange(192) * 37 % 256).astype(np.uint8).reshape(8, 8, 3)
    images = np.asarray(jax.jit(policy)(jax.random.key(0), np.stack([ramp] * 64)))[:8]
    # To a pixel that another processor's last bit may give to another place.
    np.testing.assert_allclose(images.astype(int).sum((1, 2, 3)), sums, atol=256)


def test_what_no_policy_can_do_is_refused():
    wrong = ((("auto",), "'auto' is not possible"), (("rand", 0), "0 layers"), (("rand", 2, 31), "magnitude 31"))
    for options, sentence in wrong:
        with pytest.raises(UserError, match=f"policy: .*{sentence}"):
            data.Policy(*options)
    with pytest.raises(UserError, match="policy: changes uint8 images, and these are float32"):
        data.Policy("trivial")(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(UserError, match=r"policy: 'auto_svhn' is not .* one of rand, trivial, auto_cifar10, auto_imagenet"):
        data.Policy("auto_svhn")


# Jitter, blur and erasing.


def many(function, *options, count=60, which="smooth", seed=0):
    images = np.stack([IMAGES[which]] * count)
    return np.asarray(jax.jit(lambda key, x: function(key, x, *options))(jax.random.key(seed), images))


@pytest.mark.parametrize("part", range(3))
def test_jitter_is_pillows_blend_by_a_factor_within_its_strength(part):
    """Of brightness, contrast or saturation alone, every image is what Pillow makes of it by one factor."""
    strengths = [0.4 * (i == part) for i in range(4)]
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[part](Image.fromarray(IMAGES["smooth"]))
    factors = np.linspace(0.6, 1.4, 321)
    known = np.stack([np.asarray(enhance.enhance(f)) for f in factors]).astype(int)
    nearest = [np.abs(known - x).mean((1, 2, 3)) for x in many(colours.jitter, strengths)]
    assert max(d.min() for d in nearest) < 0.8  # within the rounding of bytes
    drawn = factors[[d.argmin() for d in nearest]]
    assert drawn.min() < 0.68 and drawn.max() > 1.32


def test_hue_turns_as_colorsys_has_it():
    images = RNG.integers(0, 256, (1, 5, 6, 3)).astype(np.uint8)
    found = np.asarray(colours._turned(jnp.asarray(images[0], jnp.float32), 0.3))
    for y in range(5):
        for x in range(6):
            h, s, v = colorsys.rgb_to_hsv(*(images[0, y, x] / 255))
            np.testing.assert_allclose(found[y, x] / 255, colorsys.hsv_to_rgb((h + 0.3) % 1, s, v), atol=1e-5)
    turned = many(colours.jitter, (0, 0, 0, 0.2))
    assert np.abs(turned.max(-1).astype(int) - IMAGES["smooth"].max(-1)).max() <= 1  # the value of HSV stays
    grey = np.repeat(IMAGES["smooth"][..., :1], 3, -1)[None]
    assert np.array_equal(np.asarray(colours.jitter(jax.random.key(0), grey, (0, 0, 0.5, 0.5))), grey)


def test_blur_is_scipys_gaussian_of_one_sigma():
    found, sigmas = many(colours.blur, 0.5), np.linspace(0.1, 2.0, 96)
    known = np.stack([gaussian_filter(IMAGES["smooth"].astype(float), (s, s, 0), mode="mirror", radius=6) for s in sigmas])
    plain = (found == IMAGES["smooth"]).all((1, 2, 3))
    assert 0.25 < plain.mean() < 0.75
    nearest = [np.abs(known - x).max((1, 2, 3)) for x in found[~plain]]
    assert max(d.min() for d in nearest) < 1.2
    assert np.ptp(sigmas[[d.argmin() for d in nearest]]) > 1


def test_erasing_leaves_a_box_of_the_mean_colour():
    found = many(colours.erase, 0.75, (1, 2, 3), count=200)
    areas, whole = [], 0
    for image in found:
        box = (image == (1, 2, 3)).all(-1)
        assert np.array_equal(image[~box], IMAGES["smooth"][~box])
        if not box.any():
            whole += 1
            continue
        rows, columns = np.nonzero(box)
        tall, broad = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert box.sum() == tall * broad
        areas.append(box.mean())
        assert tall in (1, 33) or broad in (1, 40) or 0.25 < tall / broad < 4.0
    assert 0.15 < whole / 200 < 0.35 and min(areas) < 0.06 and 0.28 < max(areas) < 0.36


def test_everything_together_is_a_function_of_the_image_and_its_place():
    images = np.stack([*IMAGES.values()])
    options = {"crop_padding": 2, "flip": True, "policy": data.Policy("rand"), "jitter": (0.3, 0.3, 0.3, 0.1), "blur": 0.5,
               "erasing": 0.5, "fill": (9, 9, 9)}  # fmt: skip
    run = jax.jit(functools.partial(data.augment, **options))
    all_, two = (np.asarray(run(jax.random.key(3), x)) for x in (images, images[:2]))
    assert all_.dtype == np.uint8 and all_.shape == images.shape
    plain = jax.jit(functools.partial(data.augment, crop_padding=2, flip=True))(jax.random.key(3), images)
    kept = jax.jit(functools.partial(data.augment, crop_padding=2, flip=True, jitter=(0, 0, 0, 0)))(jax.random.key(3), images)
    assert np.array_equal(plain, kept)  # what is off draws nothing
    grey = np.asarray(jax.jit(functools.partial(data.augment, **options | {"fill": (9,)}))(jax.random.key(3), images[..., :1]))
    assert grey.shape == (3, 33, 40, 1) and not np.array_equal(two, images[:2])


@pytest.mark.parametrize(("option", "sentence"), [
    ("policy=auto", "data.policy: 'auto' is not possible; it should be one of '', rand, trivial, auto_cifar10, auto_imagenet"),
    ("policy_magnitude=31", "data.policy_magnitude: 31 is not possible; it should be from 0 to 30"),
    ("jitter=(0.3,)", r"data.jitter: \(0.3,\) is not possible"), ("jitter=(0,0,0,0.6)", "that of hue to 0.5"),
    ("erasing=1.5", "data.erasing: 1.5 is not possible"),
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused(option, sentence):
    with pytest.raises(UserError, match=sentence):
        config.load([f"--config={Path(__file__).parents[1]}/configs/digits.py", f"--config.data.{option}"])


def test_training_under_a_recipe_learns_and_teacher_and_student_see_the_same(tmp_path):
    options = ["--config.data.policy=trivial", "--config.data.jitter=(0.2,0.2,0,0)", "--config.data.blur=0.2",
               "--config.data.erasing=0.25", "--config.arms=pwkd", "--config.seeds=1"]  # fmt: skip
    assert train.main([*TINY, *options, f"--workdir={tmp_path}/w"]) == 0
    assert train.main([*TINY, *options[1:], f"--workdir={tmp_path}/w"]) == 2  # another experiment
