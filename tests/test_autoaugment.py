"""AutoAugment: its tables as published, its operations as Pillow's, and what is drawn of them."""

import collections
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_policies import IMAGES, pillow

from pwkd_jax import config, data
from pwkd_jax.data import autoaugment, policies

# {policy: of a line for each sub-policy, `operation chance strength` twice}, computed of torchvision 0.29.1's own tables.
PUBLISHED = {"auto_cifar10": "c5a460559da9f37f", "auto_imagenet": "a8d285d39a35649a"}


def meant(name: str, strength: int, height: int, width: int) -> float:
    """What the strength, of 0 to 9, means by the paper's table of operations and torchvision's space."""
    most = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 150 / 331 * width, "translate_y": 150 / 331 * height, "rotate": 30,
            **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 0.9)}  # fmt: skip
    if name == "posterize":
        return (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)[strength]
    return 255 - strength * 255 / 9 if name == "solarize" else most.get(name, 0) * strength / 9


@pytest.mark.parametrize("name", autoaugment.TABLES)
def test_sub_policies_are_those_published(name):
    table = autoaugment.TABLES[name]
    assert len(table) == 25 and all(len(pair) == 2 for pair in table)
    text = "\n".join(" ".join(f"{o} {chance:.1f} {strength}" for o, chance, strength in pair) for pair in table)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PUBLISHED[name]
    for operation, chance, strength in (step for pair in table for step in pair):
        assert operation in {*policies.OPERATIONS, "invert"} - {"identity"}
        assert 0 <= chance <= 1 and strength in range(10)
    assert "invert" not in policies.OPERATIONS  # of which the other policies draw
    options = [f"--config={Path(__file__).parents[1]}/configs/digits.py", f"--config.data.policy={name}"]
    assert config.load(options)[0].data.policy == name


@pytest.mark.parametrize("name", autoaugment.TABLES)
def test_every_operation_of_a_sub_policy_is_pillows(name):
    applied = jax.jit(policies.apply)
    operations, chances, values = policies.sub_policies(name, 33, 40)
    assert operations.shape == chances.shape == values.shape == (25, 2)
    tried = set()
    for row, pair in enumerate(autoaugment.TABLES[name]):
        for step, (what, chance, strength) in enumerate(pair):
            assert chances[row, step] == pytest.approx(chance)
            for sign in () if (what, strength) in tried else (1, -1) if what in policies.SIGNED else (1,):
                value = meant(what, strength, 33, 40) * sign
                for which, image in IMAGES.items():
                    ours = np.asarray(applied(image, operations[row, step], values[row, step] * sign))
                    off = np.abs(ours.astype(int) - pillow(image, what, value))
                    off = off > (what in ("autocontrast", *policies.SIGNED[5:]))
                    bound = 0.005 if what in ("rotate", "shear_x", "shear_y") else 1e-9
                    assert off.any(-1).mean() < bound, (what, value, which)
            tried.add((what, strength))
    assert "invert" in {what for what, _ in tried}


@pytest.mark.parametrize("name", autoaugment.TABLES)
def test_sub_policies_and_signs_are_drawn_evenly_and_operations_by_their_chance(name):
    count = 40_000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(count))
    (first, a), (second, b) = jax.jit(jax.vmap(lambda key: data.Policy(name).drawn(key, 331, 331)))(keys)
    still = policies.OPERATIONS.index("identity")
    columns = first, np.where(first == still, 0, a), second, np.where(second == still, 0, b)
    found = collections.Counter(zip(*(np.asarray(x, np.float64).round(3).tolist() for x in columns), strict=True))

    def outcomes(what, chance, strength):
        """(operation, value, chance) of all that a step may come to."""
        yield still, 0.0, 1 - chance
        index = policies.OPERATIONS.index("solarize" if what == "invert" else what)
        for sign in (1, -1) if what in policies.SIGNED else (1,):
            value = round(meant(what, strength, 331, 331) * sign, 3)
            yield index, value, chance / (2 if what in policies.SIGNED else 1)

    expected = collections.Counter()
    for one, two in autoaugment.TABLES[name]:
        for o, v, p in outcomes(*one):
            for o2, v2, p2 in outcomes(*two):
                expected[o, v, o2, v2] += p * p2 / 25
    assert sum(expected.values()) == pytest.approx(1) and len(expected) > 60
    assert {*found} <= {outcome for outcome, p in expected.items() if p > 0}
    for outcome, p in expected.items():
        # Five standard deviations and, where hardly any are expected, a few more.
        assert abs(found[outcome] - count * p) <= 5 * (count * p * (1 - p)) ** 0.5 + 3, (outcome, found[outcome], count * p)


def test_an_image_undergoes_its_own_sub_policy_whatever_is_beside_it():
    policy, key = data.Policy("auto_cifar10"), jax.random.key(0)
    images = np.stack([IMAGES["smooth"]] * 40)
    run = jax.jit(policy)
    found = np.asarray(run(key, images))
    assert found.dtype == np.uint8 and found.shape == images.shape
    others = np.concatenate([images[:7], np.stack([IMAGES["noise"]] * 33)])
    assert np.array_equal(found[:7], np.asarray(run(key, others))[:7])
    assert np.array_equal(found[:7], np.asarray(run(key, images[:7])))
    assert not np.array_equal(found, np.asarray(run(jax.random.key(1), images)))
    near = []
    for i, image in enumerate(found):
        theirs = IMAGES["smooth"]
        for operation, value in policy.drawn(jax.random.fold_in(key, i), 33, 40):
            theirs = pillow(theirs, policies.OPERATIONS[int(operation)], float(value))
        near.append((np.abs(image.astype(int) - theirs) <= 2).mean())
    # What equalize makes of a difference by 1 is more than 2.
    assert np.mean(np.array(near) > 0.99) > 0.8 and len(np.unique(found, axis=0)) > 15
