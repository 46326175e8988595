"""Sizes of images that a family cannot use are refused by shapes alone, and sizes that fit are named."""

import re

import pytest

import pwkd_jax as pwkd
from pwkd_jax import models, train
from pwkd_jax.errors import UserError
from pwkd_jax.models import contract


@pytest.mark.parametrize(
    "name, size, sentence",
    [
        ("vit_tiny_patch16", (8, 8), r"a patch of 16x16 is more than their 8 pixels; images of 16x16 fit"),
        ("vit_tiny_patch16", (40, 32), r"leave out 8 of 40 pixels; images of 32x32 or 48x48 fit"),
        ("vit_tiny_patch3", (8, 8), r"leave out 2 of 8 pixels; images of 6x6 or 9x9 fit"),
        ("vgg8", (4, 4), r"its pools leave no pixel of them; images of 8x8 fit"),
        ("vgg8", (28, 28), r"2x2 windows of stride 2 leave out 1 of 7 pixels; images of 24x24 or 32x32 fit"),
        ("vgg8", (72, 72), r"leave out 1 of 9 pixels; images of 64x64 or 80x80 fit"),
        ("resnet8", (2, 2), r"a layer of stride 2 is given a map of one pixel; images of 3x3 fit"),
        ("imagenet_ResNet18", (8, 8), r"given a map of one pixel; images of 17x17 fit"),
        ("MobileNetV2", (8, 8), r"given a map of one pixel; images of 9x9 fit"),
        ("imagenet_MobileNetV1", (16, 16), r"given a map of one pixel; images of 17x17 fit"),
        ("ShuffleV1", (4, 4), r"given a map of one pixel; images of 5x5 fit"),
        ("wrn_10_1", (32, 2), r"given a map of one pixel; images of 32x32 fit"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(name, size, sentence):
    with pytest.raises(UserError) as e:
        contract.check(models.create(name, width=1.0), (*size, 3), "student.model", 10)
    said = f"student.model: '{{}}' cannot use images of {size[0]}x{size[1]}: "
    assert re.search(sentence, str(e.value)), str(e.value)
    shown = name if name in {n for f in models._families() for n in f.KNOWN} else type(models.create(name)).__name__
    assert str(e.value).startswith(said.format(shown)) and "\n" not in str(e.value)


@pytest.mark.parametrize("name, size", [("vgg8", 32), ("vgg8", 64), ("resnet8", 3), ("wrn_10_1", 7), ("vit_tiny_patch4", 8)])
def test_a_size_that_fits_passes(name, size):
    contract.check(models.create(name), (size, size, 3), "student.model", 10)


def test_teacher_and_student_are_asked_alike(tmp_path, capsys):
    for who in ("teacher", "student"):
        argv = ["--config=configs/digits.py", f"--config.{who}.model=vit_tiny_patch16", f"--workdir={tmp_path / who}"]
        assert train.main(argv) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"error: {who}.model: 'vit_tiny_patch16' cannot use images of 8x8") and "\n" not in said
        assert not (tmp_path / who).exists()
    with pytest.raises(UserError, match=r"teacher.model: 'vgg8' cannot use images of 28x28"):
        pwkd.make_slimmable("vgg8", (0.5, 1.0), (28, 28, 1))
