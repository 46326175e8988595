"""ImageNet-1k: the two pairs of the distillation literature, and a pair of vision transformers.

    python -m pwkd_jax.train --config=configs/imagenet.py:resnet34-resnet18,dkd --workdir=runs/imagenet
        --config.data.data_dir=/where/tfds/sets/lie     default: TFDS's own, ~/tensorflow_datasets

The argument is `resnet34-resnet18`, `resnet50-mobilenetv1` or `vit_base-vit_tiny`, then a method or a sum of them (`kd` where
none is given). We have run nothing at this scale: no accuracy or time is claimed, and what follows is a recipe. One word more,
`small` (resnet34-resnet18,kd,small), is a check that it runs where you are: the same networks, streaming, augmentation and
optimiser at 64 pixels on the first 256 images of CIFAR-10 (data.name=imagenet2012 and its splits for yours), an epoch a stage.
With --config.arms=pwkd it took, teacher included, 8 minutes for resnet34-resnet18,kd, 8 for resnet50-mobilenetv1,dkd and 13 for
vit_base-vit_tiny,kd on two cores that ran tests beside it (2.6, 4.4 and 9.1 GB); too few images and steps to learn from.

What they cost at least, by the TPU's compiler (`python -m pwkd_jax.preflight --config=configs/imagenet.py:PAIR,METHOD
--topology=v5e:4x4 --price=YOURS`), with the four default arms of three students and their teacher, in float32: 201 chip-hours
of v5e for resnet34-resnet18,kd (12.5 hours on those 16 chips), 305 for resnet50-mobilenetv1,dkd, and 6,711 for
vit_base-vit_tiny,kd, whose teacher's step fills 14.1 of a chip's 16 GiB. Real runs take longer.

The images are TFDS's imagenet2012 in array_record, with the splits `train` and `validation`, as `python -m pwkd_jax.prepare`
makes it from the tars of image-net.org; a folder train/CLASS/*.JPEG, validation/CLASS/*.JPEG is as good (data.name=folder).
They stay encoded on disk, about 150 GB, and are decoded as they are needed, by one process a core (data.workers). Training
sees random crops of 8 to 100 % of the area and ratio 3/4 to 4/3 at 224 pixels, mirrored half the time, evaluation the central
224 pixels after the shorter side became 256: torchvision's and the literature's, but for the resampling (see data/images.py).

Residual networks: mdistiller's SGD, 0.1 at batch 256 (the linear rule makes that 0.2 at 512), weight decay 1e-4, 100 epochs,
times 0.1 at 30, 60 and 90. The transformers: DeiT's AdamW, 1e-3 at batch 1024, weight decay 0.05 on kernels, 300 epochs of
cosine down to 1e-5, warm-up 5 epochs (here of every cycle), RandAugment (2, 9), random erasing by 0.25, and with `kd`, which
can do with mixed images, mixup 0.8, CutMix 1 and smoothing 0.1 (with other methods set student.mix, where they take it), and
stochastic depth 0.1; no repeated augmentation. Gradients are clipped to 1, our choice. The form of the staged arms' cycles
is our default, cosine.
"""

import cifar100
from ml_collections import ConfigDict

from pwkd_jax.config import default
from pwkd_jax.errors import UserError

# Teacher, student; dkd's beta and reviewkd's weight (mdistiller's); catkd's weight, resolution and normalised (its authors').
# Ours: catkd for MobileNetV1, where the authors have these values for MobileNetV2, and all three for the transformers.
PAIRS = {
    "resnet34-resnet18": ("imagenet_ResNet34", "imagenet_ResNet18", 0.5, 1.0, (0.5, 4, False)),
    "resnet50-mobilenetv1": ("imagenet_ResNet50", "imagenet_MobileNetV1", 2.0, 8.0, (10.0, 2, True)),
    "vit_base-vit_tiny": ("vit_base_patch16", "vit_tiny_patch16", 0.5, 1.0, (0.5, 4, False)),
}


def get_config(arg: str = ""):
    pair, distiller, *words = cifar100.read(arg or "resnet34-resnet18", PAIRS)
    if words not in ([], ["small"]):
        raise UserError(f"--config: '{arg}' is too long; write a pair and a distiller, as in {pair},{distiller}, and 'small'")
    teacher, student, beta, review, cat = PAIRS[pair]
    config = default().unlock()
    config.name = f"imagenet-{pair}-{distiller}"
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.num_classes = 1000
    config.data.image_size = 224
    config.data.flip = True
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.teacher.model, config.student.model = teacher, student
    for who in (config.teacher, config.student):
        if teacher.startswith("vit"):
            who.duration = "300 epochs"
            who.batch_size = 1024
            who.optimizer.update({"name": "adamw", "weight_decay": 0.05, "decay": "kernels", "clip_norm": 1.0})
            who.drop_path = 0.1
            who.schedule.update({"peak": 1e-3, "floor": 0.01, "warmup": "5 epochs"})
            if distiller == "kd":
                who.mix.update({"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1})
        else:
            who.duration = "100 epochs"
            who.batch_size = 256
            who.optimizer.weight_decay = 1e-4
            who.schedule.update({"peak": 0.1, "milestones": (0.3, 0.6, 0.9)})
    if teacher.startswith("vit"):
        config.data.update({"policy": "rand", "erasing": 0.25})
    else:
        config.teacher.schedule.form = config.student.schedule.single_form = "step"
    cifar100.set_distiller(config, distiller, {
        "kd": {"ce_weight": 0.5, "weight": 0.5, "temperature": 1.0},
        "dkd": {"beta": beta, "temperature": 1.0, "warmup_epochs": 1.0},
        "reviewkd": {"weight": review, "warmup_epochs": 1.0, "student_preact": True},
        "catkd": dict(zip(("weight", "resolution", "normalised"), cat, strict=True)),
        "dist": {"temperature": 1.0},
        "ofd": {"weight": 1e-4},
    })  # fmt: skip
    if words:
        shrink(config)
    return config.lock()


def shrink(config: ConfigDict) -> None:
    """Make of a recipe what two CPU cores finish in minutes; its learning rate follows the batch."""
    config.name += "-small"
    config.seeds = 1
    config.data.update({"name": "cifar10", "num_classes": 10, "image_size": 64,
                        "train_split": "train[:256]", "test_split": "test[:256]"})  # fmt: skip
    for who in (config.teacher, config.student):
        who.schedule.per_batch, who.batch_size = who.batch_size, 32
        who.schedule.warmup = "2 %" if who.schedule.warmup != "0 epochs" else "0 epochs"
    config.teacher.duration, config.student.duration = "2 epochs", "4 epochs"
    config.evaluation.every = "2 epochs"
