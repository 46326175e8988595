"""UCI digits, 1,797 real 8x8 images inside scikit-learn: the whole road in minutes, on any laptop, without download.

    python -m pwkd_jax.train --config=configs/digits.py --workdir=runs/digits
"""

from pwkd_jax.config import default


def get_config(arg: str = ""):
    config = default().unlock()
    config.name = "digits"
    config.data.name = "digits"
    config.data.crop_padding = 1

    config.teacher.model = "resnet14"
    config.teacher.duration = "30 epochs"
    config.teacher.batch_size = 64
    config.teacher.schedule.peak = 0.1

    config.student.model = "resnet8"
    config.student.width = 0.125
    config.student.duration = "40 epochs"
    config.student.batch_size = 64
    config.student.schedule.peak = 0.1
    config.evaluation.every = "2 epochs"
    return config.lock()
