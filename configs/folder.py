"""Your own photos, from a pretrained network: a large teacher that starts from its weights, and a small student.

    python -m pwkd_jax.train --config=configs/folder.py --workdir=runs/photos --config.data.data_dir=my_photos \\
        --config.teacher.weights=resnet18.safetensors --config.teacher.head=new

my_photos/train/CLASS/*.jpg and my_photos/test/CLASS/*.jpg of any sizes. The weights are torchvision's resnet18, as
`python -m pwkd_jax.convert resnet18.pth --model=imagenet_ResNet18 --out=resnet18.safetensors` makes them; the images are
normalised as theirs were. A smaller data.image_size is faster. The teacher's learning rate is for a network that is trained
already; the student, from scratch, has ten times that. The recipe is ours, and not tuned to anything.
"""

from pwkd_jax.config import default


def get_config():
    config = default().unlock()
    config.name = "photos"
    config.arms = ("kd_whole", "kd_whole_cyclic", "pwkd")
    config.seeds = 1
    config.data.name = "folder"
    config.data.image_size = 224
    config.data.flip = True
    config.data.policy = "trivial"
    config.teacher.model = "imagenet_ResNet18"
    config.teacher.widths = (0.25, 0.5, 0.75, 1.0)
    config.teacher.duration = "20 epochs"
    config.teacher.batch_size = 32
    config.teacher.schedule.peak = 0.01
    config.teacher.schedule.warmup = "1 epoch"
    config.student.model = "imagenet_ResNet18"
    config.student.width = 0.25
    config.student.duration = "40 epochs"
    config.student.batch_size = 32
    config.student.schedule.peak = 0.1
    config.log.tensorboard = False
    return config.lock()
