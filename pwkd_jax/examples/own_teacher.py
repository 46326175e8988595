"""A slimmable teacher of your own Flax module, read at a width, and a student taught partial to whole.

    python -m pwkd_jax.examples.own_teacher
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pwkd_jax as pwkd

# Any module with a width: its sub-networks are the leading blocks of its arrays.


class Net(nn.Module):
    width: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        for full in (16, 32):
            x = nn.Conv(pwkd.channels(full, self.width), (3, 3), (2, 2), padding=1, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


# Data as they come: arrays here, or any iterable of batches.

digits = load_digits()
images, labels = (digits.images[..., None] / 16).astype("float32"), digits.target
x, x_test, y, y_test = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
task = pwkd.task((x, y), test=(x_test, y_test))

# One set of weights, trained at three widths by the sandwich rule, then frozen.

net = pwkd.make_slimmable(Net, (0.25, 0.5, 1.0), image_shape=(8, 8, 1))
teacher = pwkd.train_teacher(net, task, duration="6 epochs", learning_rate=0.1)
for width in teacher.widths:
    print(f"teacher at width {width:g}: {pwkd.score(teacher.at(width), task)['top1']:.1f} %")

# Read at a width by hand: the leading block of every kernel is a network of its own, and so is the rest set to zero.

narrow = pwkd.take(teacher.variables[1.0]["params"]["Conv_0"], teacher.variables[0.25]["params"]["Conv_0"])
print("the first kernel at width 0.25:", narrow["kernel"].shape)

# Your own optax chain, a metric and a callback; the plan is partial to whole over the teacher's widths.


def entropy(outputs: pwkd.Outputs, labels: jax.Array) -> dict[str, jax.Array]:
    p = jax.nn.softmax(outputs.logits)
    return {"entropy": -jnp.sum(p * jnp.log(p + 1e-9), axis=-1)}


def watch(step, state, values):
    if step % 50 == 0:
        print(f"step {step}: loss {values['train_loss']:.3f}, entropy {values['entropy']:.3f}")


chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=1e-4))
student = pwkd.distil(
    Net(width=0.25), teacher, task, distiller="kd", duration="9 epochs", optimizer=chain, metrics=entropy, callback=watch
)
print("student:", pwkd.score(student, task, teacher=teacher))

# Kept and read again.

pwkd.save(student, "runs/own/student.safetensors")
teacher.save("runs/own/teacher")
again = pwkd.load("runs/own/student.safetensors", model=Net(width=0.25))
assert (again.logits(x_test) == student.logits(x_test)).all()
assert pwkd.load_teacher("runs/own/teacher", net).widths == teacher.widths
