#!/usr/bin/env bash
# keras 3.15.1 on jax 0.10.2: keras.distillation.Distiller.evaluate(), and validation_data in fit(), change the student where a
# FeatureDistillation names layers: its batch norm's moving statistics take in the images that it is judged by.
#
# Features of named layers come from a second forward pass of the student, always with training=True, whichever pass asks for the
# loss. So evaluating the same student twice gives two losses, a validation set leaks into what is saved and exported, and dropout is
# on in the validation loss. In fit() a step moves the statistics twice (the student runs twice), the second time from where the
# first left them. With LogitsDistillation alone, which takes the first pass's logits, nothing moves.
# Guessed before it ran: as every Keras model, evaluate() leaves all variables as they are.
# Who meets it: whoever distils hidden layers in Keras with a student that has batch norm, and validates as it trains.
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
from keras.distillation import Distiller, FeatureDistillation, LogitsDistillation

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
images, labels = (3 + 5 * rng.standard_normal((64, 4))).astype("float32"), rng.integers(0, 10, 64)


def net():
    return keras.Sequential([
        keras.layers.Input((4,)), keras.layers.Dense(8, name="hint"), keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(10),
    ])


def distiller(loss):
    found = Distiller(net(), net(), loss)
    found.compile(keras.optimizers.SGD(0.0), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return found


def mean(model):
    return np.array(keras.ops.convert_to_numpy(model.student.get_layer("norm").moving_mean))


print("keras", keras.__version__, "jax", jax.__version__)
moved = {}
for name, loss in (("features", FeatureDistillation("mse", "hint", "hint")), ("logits", LogitsDistillation(loss="KLDivergence"))):
    model = distiller(loss)
    before, losses = mean(model), []
    predicted = model.student.predict(images, verbose=0)
    for _ in range(2):
        losses.append(model.evaluate(images, labels, batch_size=64, verbose=0, return_dict=True)["student_loss"])
    moved[name] = float(np.abs(mean(model) - before).max())
    off = float(np.abs(model.student.predict(images, verbose=0) - predicted).max())
    print(f"{name}: two evaluations moved the mean by {moved[name]:.3f}, predictions by {off:.3f}; student_loss", [round(x, 4) for x in losses])

# One step at learning rate 0: a mean that starts at 0 should be (1 - momentum) of the batch's.
parts = {}
for name, loss in (("features", FeatureDistillation("mse", "hint", "hint")), ("logits", LogitsDistillation(loss="KLDivergence"))):
    model = distiller(loss)
    of_batch = keras.ops.convert_to_numpy(model.student.get_layer("hint")(images)).mean(0)
    model.fit(images, labels, batch_size=64, verbose=0)
    parts[name] = float((mean(model) / of_batch).mean())
print("one step of fit: moving mean over the batch's", {k: round(v, 4) for k, v in parts.items()})
if not moved["features"] > 0.05 or moved["logits"] or abs(parts["features"] - (1 - 0.99**2)) > 1e-4 or abs(parts["logits"] - 0.01) > 1e-5:
    raise SystemExit("this has changed")
PYTHON
