"""A distiller of your own: a Flax module from both networks' outputs to a loss, its connector following the teacher's width.

    python -m pwkd_jax.examples.own_distiller
"""

import flax.linen as nn
import jax.numpy as jnp

import pwkd_jax as pwkd


class Hint(nn.Module):
    """The student guesses the teacher's pooled features."""

    ce_weight: float = 1.0  # total loss: ce_weight * cross entropy + weight * this
    weight: float = 0.1

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        guess = nn.Dense(teacher.pooled.shape[-1])(student.pooled)
        error = jnp.mean((guess - teacher.pooled) ** 2)
        return error, {"hint_error": error}


task = pwkd.task(pwkd.load_data("digits"))
net = pwkd.make_slimmable("resnet8", (0.5, 1.0), image_shape=(8, 8, 1), num_classes=10)
teacher = pwkd.train_teacher(net, task, duration="2 epochs")
pupil = pwkd.create_model("resnet8", width=0.25, num_classes=10)
student = pwkd.distil(pupil, teacher, task, distiller=Hint(), duration="4 epochs")
print("student:", pwkd.score(student, task))
