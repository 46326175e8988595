"""What partial to whole earns on CIFAR-10, with every control: a size that two CPU cores finish.

    python -m pwkd_jax.train --config=configs/evidence/cifar10.py:kd --workdir=runs/evidence/kd \\
        --config.data.data_dir=/where/tfds/sets/lie

The argument names the method: kd with all arms, any other with the three that decide, taught by the teacher that
results/teacher holds. kd trains one anew, or is taught by that one with
--config.teacher.run=configs/evidence/results/teacher. The first 4,000 training images and the first 5,000 test images; a
slimmable resnet20 of four widths for 20 epochs, and resnet8 at half its width for 24. Five seeds, three of the other methods,
train in one program and share their batches, so they differ in their initial weights alone. The last epoch counts; nothing was
chosen by it. What they gave on two EPYC cores (jax 0.10.2) stands in results/METHOD.json.
"""

from ml_collections import ConfigDict

from pwkd_jax.config import default


def get_config(arg: str = "kd"):
    config = default().unlock()
    config.name = f"cifar10, {arg}"
    config.seeds = 5
    config.arms = ("kd_whole", "kd_whole_cyclic", "pwkd")
    config.data.name = "cifar10"
    config.data.num_classes = 10
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.train_split = "train[:4000]"
    config.data.test_split = "test[:5000]"
    config.teacher.model = "resnet20"
    config.teacher.duration = "20 epochs"
    config.student.model = "resnet8"
    config.student.width = 0.5
    config.student.duration = "24 epochs"
    config.student.batches = "shared"
    config.student.distiller = ConfigDict({"name": arg})
    if arg == "dkd":
        config.student.distiller.warmup_epochs = 2.0  # 20 of the published 240
    config.evaluation.every = "6 epochs"
    config.log.tensorboard = False
    if arg == "kd":
        config.arms = ("kd_whole", "kd_whole_cyclic", "pwkd", "pwkd_reversed", "pwkd_random", "alone", "kd_standard")
    else:
        config.seeds = 3
        config.teacher.run = "configs/evidence/results/teacher"
    return config.lock()
