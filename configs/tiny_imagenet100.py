"""The pairs, recipe and methods of configs/cifar100.py on a hundred classes of Tiny-ImageNet, at CIFAR-100's size.

    python -m pwkd_jax.train --config=configs/tiny_imagenet100.py:resnet56-resnet20,dkd --workdir=runs/tiny
        --config.data.data_dir=/where/tfds/sets/lie     default: TFDS's own, ~/tensorflow_datasets

TFDS has no such set; you make it: the first 100 classes (WordNet ids in order) of Tiny-ImageNet-200, images scaled to
32x32, 500 a class in the split `train` and 50 in `validation`, as array_record under the name tiny_imagenet100_32. The README's
"Your data" shows how a folder of images becomes one. The validation split is the test set; mean and deviation are measured.

The argument is that of configs/cifar100.py, hyper-parameters of each pair included, though they were found on CIFAR-100. One
word more, `small` (resnet56-resnet20,kd,small), makes it a check that a pair runs: 2,000 images, an epoch a stage, one seed
(with --config.arms=pwkd 14 minutes, teacher included, on two cores with as much other work; too short to learn from).
The full recipe has not been run by us, so no time or accuracy of it is claimed; its programs and steps are CIFAR-100's, so what
that page says of chip-hours holds here.
"""

import cifar100


def get_config(arg: str = ""):
    words = [word.strip() for word in arg.split(",")]
    small = words[-1] == "small"
    config = cifar100.get_config(",".join(words[:-1] if small else words)).unlock()
    config.name = config.name.replace("cifar100", "tiny_imagenet100") + ("-small" if small else "")
    config.data.name = "tiny_imagenet100_32"
    config.data.test_split = "validation"
    config.data.mean = config.data.std = ()
    if small:
        config.data.train_split = "train[:2000]"
        config.data.test_split = "validation[:1000]"
        config.teacher.duration = config.student.duration = "4 epochs"
        config.seeds = 1
    return config.lock()
