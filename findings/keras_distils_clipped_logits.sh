#!/usr/bin/env bash
# keras 3.15.1 on jax 0.10.2: keras.distillation.LogitsDistillation() as it comes compares logits, not probabilities: no softmax, no
# temperature^2, and everything below 0 or above the temperature without a gradient.
#
# Its default loss is the name "kl_divergence", which keras.losses resolves to a function; the softmax and the factor T^2 are for
# instances of the class keras.losses.KLDivergence alone. What then runs is the sum of t log(t / s) over logits over T, both clipped
# to [1e-7, 1]. Of random logits about two thirds of the entries have no gradient; a student with larger logits than its teacher's
# has a loss below that of the teacher itself, which is 0; in the example a student without labels answers as its teacher in 6 % of
# images, where chance is 10, and with the class in 84. That is loss="KLDivergence", or loss=keras.losses.KLDivergence(): Hinton's KD
# to float32.
# Guessed before it ran, from the class's words: KL of the two softmaxes at temperature 3, times 9.
# Who meets it: whoever distils in Keras by the example in its documentation, which passes temperature=3.0 and nothing else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
KERAS_BACKEND=jax KERAS_HOME="$folder" JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
import jax
import keras
import numpy as np
from keras.distillation import Distiller, LogitsDistillation

rng, T = np.random.default_rng(0), 3.0
teacher, student = (3 * rng.standard_normal((64, 10)).astype("float32") for _ in range(2))


def softmax(x):
    e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


t, s = softmax(teacher / T), softmax(student / T)
hinton = T**2 * float((t * np.log(t / s)).sum(-1).mean())
default, named = LogitsDistillation(temperature=T), LogitsDistillation(temperature=T, loss="KLDivergence")
values = {"Hinton's KD": hinton, "default": float(default.compute_loss(teacher, student)),
          'loss="KLDivergence"': float(named.compute_loss(teacher, student))}
print("keras", keras.__version__, "jax", jax.__version__)
print("random logits:", {k: round(v, 3) for k, v in values.items()})
dead = {name: float((np.asarray(jax.grad(lambda x, d=d: d.compute_loss(teacher, x))(student)) == 0).mean())
        for name, d in (("default", default), ("KLDivergence", named))}
print("share of logits without a gradient:", {k: round(v, 2) for k, v in dead.items()})
above = float(default.compute_loss(teacher, teacher + 5))
print(f"default loss of a student 5 above its teacher in every class, whose probabilities are the same: {above:.3f}")

# A teacher's answers alone: how often a student of its own shape says the same on other inputs.
inputs, others = rng.standard_normal((4096, 16)).astype("float32"), rng.standard_normal((1024, 16)).astype("float32")


def net(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])


agree = {}
for name, loss in (("default", default), ("KLDivergence", named)):
    wise, pupil = net(1), net(2)
    wise.layers[-1].kernel.assign(8 * wise.layers[-1].kernel)
    distiller = Distiller(wise, pupil, loss, student_loss_weight=0.0)
    distiller.compile(keras.optimizers.Adam(0.003), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.fit(inputs, np.zeros(len(inputs)), batch_size=64, epochs=20, verbose=0)
    said = [m.predict(others, verbose=0).argmax(-1) for m in (wise, pupil)]
    agree[name] = float((said[0] == said[1]).mean())
print("agreement with the teacher after 20 epochs without labels:", {k: f"{v:.0%}" for k, v in agree.items()})
right = abs(values['loss="KLDivergence"'] / hinton - 1) < 1e-4 and abs(values["default"] / hinton - 1) > 0.5
if not right or dead["default"] < 0.5 or dead["KLDivergence"] > 0.01 or above > -0.1 or agree["default"] > agree["KLDivergence"] - 0.1:
    raise SystemExit("this has changed")
PYTHON
