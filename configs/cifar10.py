"""CIFAR-10 in the TFDS layout, with the recipe of the CIFAR distillation literature.

    python -m pwkd_jax.train --config=configs/cifar10.py --workdir=runs/cifar10
        --config.data.data_dir=/where/tfds/sets/lie     default: TFDS's own, ~/tensorflow_datasets

Needs array_record files, which `tfds build cifar10 --file_format=array_record` writes. Teacher resnet32x4 of four widths,
student resnet8x4, 240 epochs each: for a GPU or TPU. The argument `small` (--config=configs/cifar10.py:small) is the same
road for a CPU: 2,000 images, resnet8 to a narrower one, 8 epochs, one seed.

The full recipe has not been run by us, so no time or accuracy of it is claimed. `small`, on the same images as JPEG, took
four minutes on two busy CPU cores and gave, last epoch, top-1 in percent: the teacher 27.5, 34.2, 35.3 and 35.7 at widths
0.25 to 1; alone 25.0, kd_whole 27.6, kd_whole_cyclic 28.0, pwkd 29.0. One seed: no comparison, a check that it runs.
"""

from pwkd_jax.config import default


def get_config(arg: str = ""):
    if arg not in ("", "small"):
        raise ValueError(f"the argument is nothing or 'small', not '{arg}'")
    config = default().unlock()
    config.name = "cifar10" + (f"-{arg}" if arg else "")
    config.data.name = "cifar10"
    config.data.num_classes = 10
    config.data.crop_padding = 4
    config.data.flip = True
    config.teacher.model = "resnet32x4"
    config.student.model = "resnet8x4"
    if arg == "small":
        config.data.train_split = "train[:2000]"
        config.data.test_split = "test[:1000]"
        config.teacher.model = "resnet8"
        config.student.model = "resnet8"
        config.student.width = 0.25
        config.teacher.duration = config.student.duration = "8 epochs"
        config.seeds = 1
    return config.lock()
