"""CIFAR-100, the thirteen teacher-student pairs of the CRD benchmark with its recipe, and any distillation method.

    python -m pwkd_jax.train --config=configs/cifar100.py:vgg13-MobileNetV2,dkd --workdir=runs/vgg13-MobileNetV2-dkd
        --config.data.data_dir=/where/tfds/sets/lie     default: TFDS's own, ~/tensorflow_datasets

The argument is a pair, then a method or a sum of them (`kd+crd`; `kd` where none is given), then, for `kd` alone,
`standardised` for logit standardisation with its T and weight. Name the method here and not by an override, which would
bring its general defaults in place of this pair's values; other models are overrides of teacher.model and student.model.
Needs array_record files, which `python -m pwkd_jax.prepare cifar100 --data-dir=DIR` makes, and a GPU or TPU.

The recipe is RepDistiller's: SGD with momentum 0.9 and weight decay 5e-4 on everything, batch 64, 240 epochs from 0.05 (0.01
for MobileNetV2 and the ShuffleNets), times 0.1 at 150, 180 and 210, random crop after 4 pixels of zeros, flip. The teacher and
the arms of one cycle follow it; the cycles of the staged arms are our default, cosine, for the paper's are unknown.

We have not run it, so no accuracy or time of ours is claimed. The TPU compiler's least for one v5e chip, with the four default
arms of three students and their teacher, is 2.8 chip-hours for resnet32x4-resnet8x4 with kd, and 1.7 for resnet56-resnet20
(`python -m pwkd_jax.preflight --config=configs/cifar100.py:PAIR,kd --topology=v5e:1x1 --price=YOURS`); real runs take longer.
configs/tiny_imagenet100.py:PAIR,METHOD,small is the recipe at a size that a laptop runs. For orientation, RepDistiller's own
published top-1 in percent at the last epoch, with ordinary teachers, neither ours nor partial to whole:

                          teacher  student  KD                                   teacher  student  KD
    wrn_40_2-wrn_16_2       75.61    73.26  74.92     vgg13-MobileNetV2            74.64    64.60  67.37
    wrn_40_2-wrn_40_1       75.61    71.98  73.54     ResNet50-MobileNetV2         79.34    64.60  67.35
    resnet56-resnet20       72.34    69.06  70.66     ResNet50-vgg8                79.34    70.36  73.81
    resnet110-resnet20      74.31    69.06  70.67     resnet32x4-ShuffleV1         79.42    70.50  74.07
    resnet110-resnet32      74.31    71.14  73.08     resnet32x4-ShuffleV2         79.42    71.82  74.45
    resnet32x4-resnet8x4    79.42    72.50  73.33     wrn_40_2-ShuffleV1           75.61    70.50  74.83
    vgg13-vgg8              74.64    70.36  72.98
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from pwkd_jax import distillers
from pwkd_jax.config import default
from pwkd_jax.errors import UserError

# What the references vary from pair to pair; all else is a method's default, theirs for every pair. dkd: mdistiller's
# configs. reviewkd: the authors' script; vgg13-vgg8 and ResNet50-MobileNetV2, which it lacks, as mdistiller's author and a
# user who reproduced the paper's number gave them (mdistiller issues 23 and 39). catkd: the authors' configs. standardised: the
# names of the authors' logs, or their general 2 and 9. "Ours" is what nobody published: the value of the same student's
# other pair.
PAIRS = {
    #                        dkd    reviewkd  catkd                            standardised
    #                        beta   weight    weight, resolution, normalised   temperature, weight
    "wrn_40_2-wrn_16_2":    (6.0,    5.0,     (12.0, 2, False),                (2.0, 9.0)),
    "wrn_40_2-wrn_40_1":    (6.0,    5.0,     (1.5, 2, False),                 (2.0, 9.0)),
    "resnet56-resnet20":    (2.0,    0.6,     (0.7, 2, False),                 (2.0, 9.0)),
    "resnet110-resnet20":   (2.0,    0.6,     (0.7, 2, False),                 (4.0, 12.0)),  # ours: dkd, reviewkd, catkd
    "resnet110-resnet32":   (2.0,    1.0,     (1.8, 2, False),                 (2.0, 9.0)),
    "resnet32x4-resnet8x4": (8.0,    5.0,     (15.0, 2, False),                (2.0, 9.0)),
    "vgg13-vgg8":           (6.0,    5.0,     (4.5, 2, False),                 (3.0, 9.0)),
    "vgg13-MobileNetV2":    (6.0,    30.0,    (15.0, 2, True),                 (3.0, 9.0)),  # ours: reviewkd
    "ResNet50-MobileNetV2": (8.0,    30.0,    (40.0, 2, True),                 (3.0, 1.0)),
    "ResNet50-vgg8":        (6.0,    5.0,     (4.5, 2, False),                 (3.0, 9.0)),  # ours: all
    "resnet32x4-ShuffleV1": (8.0,    5.0,     (600.0, 4, True),                (2.0, 9.0)),
    "resnet32x4-ShuffleV2": (8.0,    8.0,     (600.0, 4, True),                (2.0, 9.0)),
    "wrn_40_2-ShuffleV1":   (8.0,    5.0,     (80.0, 4, True),                 (2.0, 9.0)),
}  # fmt: skip


def get_config(arg: str = ""):
    pair, distiller, *words = read(arg or "resnet32x4-resnet8x4", PAIRS)
    teacher, student = pair.split("-")
    beta, review, cat, (temperature, weight) = PAIRS[pair]
    options = {"dkd": {"beta": beta}, "reviewkd": {"weight": review}}
    options["catkd"] = dict(zip(("weight", "resolution", "normalised"), cat, strict=True))
    standardised = words == ["standardised"] and distiller == "kd"
    if words and not standardised:
        raise UserError(
            f"--config: '{arg}' ends in '{','.join(words)}'; after {pair},kd the word 'standardised' may follow, and after "
            "other methods nothing (--config.student.standardise_logits=true serves them all)"
        )
    if standardised:
        options["kd"] = {"temperature": temperature, "weight": weight}

    config = default().unlock()
    config.name = "-".join(("cifar100", pair, distiller, *words))
    config.data.name = "cifar100"
    config.data.num_classes = 100
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.mean = (0.5071, 0.4867, 0.4408)
    config.data.std = (0.2675, 0.2565, 0.2761)
    config.teacher.model = teacher
    config.teacher.schedule.form = "step"
    config.student.model = student
    config.student.schedule.single_form = "step"
    if student in ("MobileNetV2", "ShuffleV1", "ShuffleV2"):
        config.student.schedule.peak = 0.01
    config.student.standardise_logits = standardised
    set_distiller(config, distiller, options)
    return config.lock()


def read(arg: str, pairs: Iterable[str]) -> list[str]:
    """[pair, distiller, further words] of `pair`, `pair,distiller` or `pair,distiller,words`."""
    pair, *rest = (word.strip() for word in arg.split(","))
    if pair not in pairs:
        raise UserError(f"--config: there is no pair '{pair}'; known are {', '.join(pairs)}")
    if not all(rest):
        raise UserError(f"--config: '{arg}' has an empty word; write a pair and a distiller, as in {pair},dkd")
    return [pair, *(rest or ["kd"])]


def set_distiller(config: ConfigDict, name: str, options: dict[str, dict]) -> None:
    """Make `name` the distiller of `config`, each of its methods with its `options`, {method: {option: value}}."""
    distiller = config.student.distiller = ConfigDict({"name": name, **distillers.fields(name)})
    parts = name.split("+")
    for part in parts:
        group = distiller if len(parts) == 1 else distiller[part]
        group.update({key: value for key, value in options.get(part, {}).items() if key in group})
    if len(parts) > 1 and "kd" in parts:
        # As RepDistiller has kd+crd, and SimKD's authors every method: all of the cross entropy and of KD.
        distiller.ce_weight = distiller.kd.weight = 1.0
