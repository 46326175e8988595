"""The library as a notebook uses it: the README's ten lines, the examples, one's own loop, data, optimiser and methods."""

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import Tiny

import pwkd_jax as pwkd
from pwkd_jax import train
from pwkd_jax.models import compute

ROOT = Path(__file__).parents[1]
SHAPE = (8, 8, 1)
COMMAND = [
    f"--config={ROOT / 'configs/digits.py'}", "--config.data.train_split=train[:96]", "--config.data.test_split=test[:40]",
    "--config.data.crop_padding=1", "--config.teacher.model=test_training:Tiny", "--config.student.model=test_training:Tiny",
    "--config.teacher.widths=(0.5,1.0)", "--config.student.width=0.5", "--config.teacher.duration=2 epochs",
    "--config.student.duration=4 epochs", "--config.teacher.batch_size=16", "--config.student.batch_size=16",
    "--config.arms=pwkd", "--config.seeds=1", "--config.evaluation.every=100 %", "--config.steps_per_dispatch=1",
]  # fmt: skip


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images that a small network can learn: bright or dark, in three classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return rng.random((count, *SHAPE), np.float32) * 0.3 + 0.35 * labels[:, None, None, None].astype(np.float32), labels


@pytest.fixture(scope="module")
def task():
    return pwkd.task(drawn(96), test=drawn(40, 1))


@pytest.fixture(scope="module")
def net():
    return pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, num_classes=3)


@pytest.fixture(scope="module")
def teacher(task, net):
    return pwkd.train_teacher(net, task, duration=30, batch_size=16, learning_rate=0.1, label="")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only there can XLA be kept from fused products")
def test_a_loop_of_ones_own_gives_the_commands_bits(tmp_path):
    """In a process whose products and sums round apart: where the processor fuses them, XLA fuses those of one program and not
    those of another, and two programs of the same formula end a unit of the last place apart."""
    code = "import pathlib, test_library; test_library.loop_and_command(pathlib.Path('work'))"
    environment = _environment() | {"XLA_FLAGS": "--xla_cpu_max_isa=AVX"}
    environment["PYTHONPATH"] += f":{ROOT / 'tests'}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def loop_and_command(workdir: Path) -> None:
    """The student of `python -m pwkd_jax.train`, learnt again by a jitted step that takes our loss alone."""
    assert train.main([*COMMAND, f"--workdir={workdir}"]) == 0
    digits = pwkd.load_data("digits", train_split="train[:96]", test_split="test[:40]")
    augment = functools.partial(pwkd.augment, crop_padding=1, flip=False)
    task = pwkd.task(digits.train, test=digits.test, augment=augment)
    net = pwkd.make_slimmable(Tiny, (0.5, 1.0), task.image_shape, num_classes=10)
    teacher, student = pwkd.load_teacher(workdir / "teacher/slimmable", net), Tiny(width=0.5, num_classes=10)

    distil = pwkd.fit_distiller(student, teacher, task, "kd", batch_size=16)
    plan = pwkd.even_plan("pwkd", teacher.widths, total=24)
    rate = pwkd.learning_rate(pwkd.cycles(plan, True), form="cosine", peak=0.1)
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.trace(0.9))
    key = jax.random.key(0)
    variables = student.init(jax.random.fold_in(key, 0), jnp.zeros((1, *task.image_shape)))
    params, stats, opt_state = variables["params"], variables["batch_stats"], tx.init(variables["params"])

    # Compiled as the command has it: jaxlib's own choice on a CPU rounds otherwise.
    @functools.partial(jax.jit, static_argnames="width", compiler_options=compute.compiler_options("cpu"))
    def step(params, stats, opt_state, n, images, labels, frozen, width):
        x = task.preprocess(jax.random.fold_in(jax.random.fold_in(key, n), 0), images)
        taught, _ = pwkd.apply_model(net.members[width], frozen, x, train=False)

        def loss_fn(params):
            out, new = pwkd.apply_model(student, {"params": params, "batch_stats": stats}, x, train=True)
            loss, metrics = distil.loss(out, taught, labels, width=width)
            return loss, (new, metrics)

        grads, (stats, metrics) = jax.grad(loss_fn, has_aux=True)(params)
        direction, opt_state = tx.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, d: p - rate(n) * d, params, direction)
        return params, stats, opt_state, metrics

    batches = pwkd.batches(task.train, batch_size=16, seed=0)
    for stage in plan:
        for n in range(stage.start, stage.end):
            batch, width = batches(n), stage.widths[0]
            params, stats, opt_state, metrics = step(
                params, stats, opt_state, n, batch["image"], batch["label"], teacher.variables[width], width
            )
    assert float(metrics["distillation"]) > 0
    ours = pwkd.load(workdir / "students/pwkd/seed0", model="test_training:Tiny")
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), ours.variables, {"params": params, "batch_stats": stats})
    assert all(jax.tree.leaves(same)), same
    found = pwkd.Network(student, {"params": params, "batch_stats": stats}, ours.card)
    last = json.loads((workdir / "summary.json").read_text())["runs"][0]["top1_last"]
    assert pwkd.score(found, task)["top1"] == pytest.approx(last)


def test_a_teacher_is_read_at_a_width(task, net, teacher):
    assert teacher.widths == (0.5, 1.0) and teacher.rows[-1]["top1_1"] > 60
    whole, narrow = (teacher.variables[w]["params"] for w in (1.0, 0.5))
    cut = pwkd.take({"kernel": whole["conv"]["kernel"]}, {"kernel": narrow["conv"]["kernel"]})
    np.testing.assert_array_equal(cut["kernel"], narrow["conv"]["kernel"])
    masked = pwkd.mask({"kernel": whole["conv"]["kernel"]}, {"kernel": narrow["conv"]["kernel"]})["kernel"]
    assert masked.shape == whole["conv"]["kernel"].shape and float(jnp.abs(masked).sum()) == pytest.approx(
        float(jnp.abs(narrow["conv"]["kernel"]).sum()), rel=1e-5
    )
    score = pwkd.score(teacher.at(0.5), task, teacher=teacher)
    assert score["images"] == 40 and score["top1"] == pytest.approx(teacher.rows[-1]["top1_0.5"])
    assert score["teacher"]["top1"] == pytest.approx(teacher.rows[-1]["top1_1"])
    with pytest.raises(pwkd.UserError, match=r"this teacher has 0\.5, 1, not 0\.7"):
        teacher.at(0.7)


def test_own_optimiser_metrics_and_callback(task, teacher):
    seen = []

    def spread(outputs: pwkd.Outputs, labels: jax.Array) -> dict:
        return {"spread": outputs.logits.max(-1) - outputs.logits.min(-1)}

    def watch(step, state, values):
        seen.append((step, int(state.step), float(values["spread"]), "learning_rate" in values))

    rate = optax.exponential_decay(1e-2, 5, 0.5)
    student = pwkd.distil(
        Tiny(width=0.5, num_classes=3), teacher, task, distiller="at+kd", duration=12, batch_size=16,
        optimizer=optax.adam(rate), metrics=spread, callback=watch, label="",
    )  # fmt: skip
    assert [s[:2] for s in seen] == [(n, n) for n in range(1, 13)] and all(s[2] > 0 and not s[3] for s in seen)
    assert student.rows[-1]["spread"] > 0 and "learning_rate" not in student.rows[-1]
    # optax's own count says that it, and nothing else, made the updates.
    assert int(student.state.opt_state[0].count) == 12
    with pytest.raises(pwkd.UserError, match="has its learning rate in it"):
        pwkd.distil(Tiny(num_classes=3), teacher, task, optimizer=optax.adam(0.1), learning_rate=0.1)


def test_ones_own_optimiser_updates_as_optax_does(task):
    """Of the whole state after some steps, by a loop of plain optax."""
    model, tx = Tiny(width=0.5, num_classes=3), optax.sgd(0.05, momentum=0.9)
    student = pwkd.distil(model, None, task, duration=5, batch_size=16, optimizer=tx, label="")
    variables = model.init(jax.random.fold_in(jax.random.key(0), 0), jnp.zeros((1, *SHAPE)))
    params, stats, opt_state = variables["params"], variables["batch_stats"], tx.init(variables["params"])
    for n in range(5):
        batch = pwkd.batches(task.train, 16, 0)(n)

        def loss(params, batch=batch, stats=stats):
            variables = {"params": params, "batch_stats": stats}
            out, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(out.logits, batch["label"]).mean(), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(student.variables["params"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class Hint(nn.Module):
    weight: float = 0.1

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        guess = nn.Dense(teacher.pooled.shape[-1])(student.pooled)
        return jnp.mean((guess - teacher.pooled) ** 2), {}


def test_own_distiller_and_a_run_that_goes_on(task, teacher, tmp_path):
    """Stopped after a step by an exception of the callback's, the same call goes on to the bits of an unbroken run."""
    options = {"distiller": Hint(), "duration": 12, "batch_size": 16, "label": ""}
    model = Tiny(width=0.5, num_classes=3)
    whole = pwkd.distil(model, teacher, task, directory=tmp_path / "a", **options)

    def stop(step, state, values):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pwkd.distil(model, teacher, task, directory=tmp_path / "b", callback=stop, **options)
    again = pwkd.distil(model, teacher, task, directory=tmp_path / "b", **options)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (whole.state, again.state)), strict=True))
    assert [s.step for s in again.snapshots] == [6, 12]
    fitted = pwkd.fit_distiller(model, teacher, task, Hint(), batch_size=16)
    with pytest.raises(pwkd.UserError, match="Hint has params of its own"):
        fitted.loss(jnp.zeros((16, 3)), jnp.zeros((16, 3)), jnp.zeros(16, int))


def test_students_and_teachers_are_saved_and_loaded(task, net, teacher, tmp_path):
    model = pwkd.create_model("resnet8", width=0.25, num_classes=3)
    student = pwkd.distil(model, teacher.at(1.0), task, duration=2, batch_size=16, label="")
    pwkd.save(student, tmp_path / "s.safetensors")
    again = pwkd.load(tmp_path / "s.safetensors")  # a built-in model is known by its name
    assert again.card["model"] == "resnet8" and again.model == model
    np.testing.assert_array_equal(again.logits(task.test.images), student.logits(task.test.images))
    teacher.save(tmp_path / "t")
    loaded = pwkd.load_teacher(tmp_path / "t", net)
    np.testing.assert_array_equal(loaded.at(0.5).logits(task.test.images), teacher.at(0.5).logits(task.test.images))
    own = tmp_path / "t/width_0.5.safetensors"
    with pytest.raises(pwkd.UserError, match="not built in"):
        pwkd.load(own)
    assert pwkd.load(own, model=Tiny(width=0.5, num_classes=3)).card["width"] == 0.5
    with pytest.raises(pwkd.UserError, match="does not fit"):
        pwkd.load(own, model=Tiny(width=1.0, num_classes=3))


@pytest.mark.parametrize(
    "mean, std, sentence",
    [
        ((127.5,) * 3, (127.5,) * 3, r"^mean: 127\.5,127\.5,127\.5 is in units of pixels up to 255, .*: 0\.5,0\.5,0\.5$"),
        ((0.5,) * 3, (51.0,) * 3, r"^std: 51,51,51 is in units of .* by 255: 0\.2,0\.2,0\.2$"),
        ((0.5,) * 3, (0.0,) * 3, r"^std: 0,0,0 is not possible; each should be in \[0\.001, 1\]"),
    ],
)
def test_normalisations_in_other_units_are_refused(mean, std, sentence):
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    with pytest.raises(pwkd.UserError, match=sentence):
        pwkd.task((images, labels), mean=mean, std=std)
    # Float images are not divided by 255, so that theirs may be in any units.
    assert pwkd.task((images.astype(np.float32), labels), mean=(127.5,) * 3, std=(51.0,) * 3).std == (51.0,) * 3


class Loader:
    """Batches as PyTorch's DataLoader gives them: a length, and a fresh pass each time."""

    def __init__(self, count: int = 6, size: int = 16, **changes):
        self.count, self.size, self.changes, self.passes = count, size, changes, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        self.passes += 1
        for i in range(self.count):
            images, labels = drawn(self.size, i)
            yield self.changes.get("images", images), self.changes.get("labels", labels)


def test_any_iterable_of_batches(teacher):
    loader = Loader()
    images, labels = map(np.concatenate, zip(*loader, strict=True))
    task = pwkd.task(loader, test=Loader(3, 10), num_classes=3)
    assert len(task.train) == 96 and task.image_shape == SHAPE
    student = pwkd.distil(Tiny(width=0.5, num_classes=3), teacher, task, duration="2 epochs", label="")
    assert student.rows[-1]["step"] == 12 and student.rows[-1]["epoch"] == 2 and loader.passes >= 3
    score = pwkd.score(student, task, batch_size=16)
    in_memory = pwkd.score(student, tuple(map(np.concatenate, zip(*Loader(3, 10), strict=True))), batch_size=7)
    assert score["images"] == 30 and score["top1"] == in_memory["top1"] and score["nll"] == pytest.approx(in_memory["nll"])
    # In the order that arrays would have had unshuffled: each step saw the loader's own batch.
    batches = pwkd.batches(task.train, 16, 0)
    for n in (0, 1, 5, 6, 7):
        np.testing.assert_array_equal(batches(n)["image"], images[16 * (n % 6) : 16 * (n % 6) + 16])
        np.testing.assert_array_equal(batches(n)["label"], labels[16 * (n % 6) : 16 * (n % 6) + 16])


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        (lambda: (np.zeros((4, 8, 8)), np.zeros(4, int)), {}, r"a batch should be \(images, labels\)|images should be"),
        (lambda: (np.zeros((4, *SHAPE)), np.zeros(3, int)), {}, "labels should be 4 whole numbers"),
        (lambda: (np.zeros((4, *SHAPE)), np.zeros(4)), {}, "labels should be 4 whole numbers, one an image, not float64"),
        (lambda: (np.zeros((4, *SHAPE), int), np.zeros(4, int)), {}, "uint8 or float"),
        (lambda: (np.zeros((4, *SHAPE)), np.array([0, 1, 2, -1])), {}, "count from 0"),
        (lambda: (np.zeros((4, *SHAPE)), np.array([0, 1, 2, 3])), {"num_classes": 3}, "a label is 3"),
        (lambda: iter([drawn(4)]), {"num_classes": 3}, "without a length"),
        (lambda: [drawn(4)], {}, "give num_classes"),
        (lambda: [], {"num_classes": 3}, "gives none"),
        (lambda: 3, {}, "not int"),
        (lambda: Loader(images=np.zeros((16, *SHAPE), np.uint8)), {"num_classes": 3}, "cannot be measured"),
        (lambda: drawn(4), {"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}, "1 numbers each"),
    ],
)
def test_data_that_cannot_be_is_refused_in_a_sentence(data, options, sentence):
    with pytest.raises(pwkd.UserError, match=sentence):
        pwkd.task(data(), **options)


def test_mistakes_while_training_are_refused_in_a_sentence(task, teacher):
    model = Tiny(width=0.5, num_classes=3)
    ends = pwkd.task(pwkd.Batches(iter([drawn(16)] * 3), images=48), num_classes=3)
    with pytest.raises(pwkd.UserError, match="ended before step 4"):
        pwkd.distil(model, teacher, ends, duration=8, label="")
    ragged = pwkd.task([drawn(16), drawn(15)], num_classes=3)
    with pytest.raises(pwkd.UserError, match="drop the last, smaller batch"):
        pwkd.distil(model, teacher, ragged, duration=8, label="")
    with pytest.raises(pwkd.UserError, match=r"CRD reads batch\['dataset_label'\]"):
        pwkd.distil(model, teacher, pwkd.task(Loader(), num_classes=3), distiller="crd", duration=8, label="")
    with pytest.raises(pwkd.UserError, match="too few for 2 stages"):
        pwkd.distil(model, teacher, task, duration=1, label="")
    with pytest.raises(pwkd.UserError, match="there is no 'partial'"):
        pwkd.distil(model, teacher, task, arm="partial", label="")
    with pytest.raises(pwkd.UserError, match=r"taught at width 0\.25"):
        pwkd.distil(model, teacher, task, plan=[pwkd.Stage("slimmable", (0.25,), 0, 4)], label="")
    with pytest.raises(pwkd.UserError, match=r"give 'duration'|is not a duration"):
        pwkd.train_teacher(teacher.net, task, duration="ten epochs", label="")
    with pytest.raises(pwkd.UserError, match="test images are"):
        pwkd.task(drawn(8), test=(np.zeros((4, 9, 9, 1)), np.zeros(4, int)))


class Constant(nn.Module):
    """A module that does not get narrower."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(x.mean((1, 2)))


class Late(nn.Module):
    """A method whose first epochs see no label."""

    initial_epochs: float = 30.0

    def __call__(self, student, teacher, batch, progress):
        return jnp.mean((student.logits - teacher.logits) ** 2), {}

    def initial(self, student, teacher, batch, progress):
        return self(student, teacher, batch, progress)


def pupil() -> Tiny:
    return Tiny(width=0.5, num_classes=3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda t, n, k: pwkd.distil(Tiny, t, k), "student: Tiny is a class; give a module made of it"),
        (lambda t, n, k: pwkd.distil("resnet8", t, k), "student: 'resnet8' is a name; give a module"),
        (lambda t, n, k: pwkd.distil(Tiny(num_classes=5), t, k), r"Tiny gives 5 logits an image, and the data have 3 classes"),
        (lambda t, n, k: pwkd.distil(pupil(), n, k), "teacher: should be a Teacher or a Network.*Slimmable"),
        (lambda t, n, k: pwkd.distil(pupil(), t, drawn(9)), "task: should be made by pwkd_jax.task.*tuple"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, distiller=Hint), "distiller: Hint is a class"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, distiller=lambda *_: 0), "distiller: should be a Flax module"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, distiller=Late(), arm="kd_whole", duration=4), "initial_epochs: 30"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, connectors="leadng"), "connectors: 'leadng'"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, reset=("optimiser",)), "reset: 'optimiser'"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, optimizer="adam"), "optimizer: should be an optax"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, optimizer=optax.adamw), "optimizer: should be an optax"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, learning_rate="0.1"), "learning_rate: '0.1'"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, learning_rate=-1), "learning_rate: -1"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, duration=2.5), "duration: 2.5"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, batch_size=0), "batch_size: 0"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, seed="a"), "seed: 'a'"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, plan=[]), "plan: has no stages"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, plan=[pwkd.Stage("slim", (0.5,), 0, 4)]), "stage 1, teacher: 'slim'"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, plan=[pwkd.Stage("slimmable", (1.0,), 2, 4)]), "goes from step 2 to 4"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, duration=4, metrics=lambda o, y: 3), "metrics: should return"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, duration=4, metrics=lambda o, y: {"top1": y}), "'top1' is a name of ours"),
        (lambda t, n, k: pwkd.distil(pupil(), t, k, duration=4, metrics=lambda o, y: {"m": y.sum()}), "one value an image"),
        (lambda t, n, k: pwkd.train_teacher(n, k, loss="inplac"), "loss: 'inplac'"),
        (lambda t, n, k: pwkd.train_teacher(n, k, sampling="sandwch"), "sampling: 'sandwch'"),
        (lambda t, n, k: pwkd.train_teacher(n, k, reduction="avg"), "reduction: 'avg'"),
        (lambda t, n, k: pwkd.train_teacher(Tiny(), k), "net: should come of pwkd_jax.make_slimmable"),
        (lambda t, n, k: pwkd.make_slimmable(Tiny(), (0.5, 1.0), SHAPE), "should be a Flax module's class"),
        (lambda t, n, k: pwkd.make_slimmable(Tiny, 0.5, SHAPE), "widths: 0.5 is not possible"),
        (lambda t, n, k: pwkd.make_slimmable(Tiny, (), SHAPE), r"widths: \(\) is not possible"),
        (lambda t, n, k: pwkd.make_slimmable(Tiny, (0.5, 25), SHAPE), r"in \(0, 1\]"),
        (lambda t, n, k: pwkd.make_slimmable(Tiny, (0.5, 1.0), 8), "image_shape: 8"),
        (lambda t, n, k: pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, batch_norm="switch"), "batch_norm: 'switch'"),
        (lambda t, n, k: pwkd.make_slimmable(Constant, (0.5, 1.0), SHAPE), "the same arrays at width 0.5 as at 1"),
        (lambda t, n, k: pwkd.create_distiller("kd", temprature=2.0), "temprature: 'kd' has no such option"),
        (lambda t, n, k: pwkd.create_distiller("kd", temperature="hot"), "temperature: 'hot' is not a number"),
        (lambda t, n, k: pwkd.create_distiller("kd+at", **{"kd.temprature": 2.0}), "kd.temprature: 'kd.at' has no such"),
        (lambda t, n, k: pwkd.learning_rate([(0, 4)], form="cosin", peak=0.1), "form: there is no 'cosin'"),
        (lambda t, n, k: pwkd.save(t, "t.safetensors"), "a teacher is saved as a folder"),
        (lambda t, n, k: pwkd.save(t.at(1.0), "t"), "should be a name ending in .safetensors"),
        (lambda t, n, k: pwkd.score(t, pwkd.task(drawn(9))), "has no test images"),
        (lambda t, n, k: pwkd.score(pupil(), k), "network: should be a Student, a Teacher or a Network"),
        (lambda t, n, k: pwkd.score(t, (np.zeros((4, 9, 9, 1)), np.zeros(4, int))), r"images: are \[9, 9, 1\]"),
        (lambda t, n, k: pwkd.score(t, (np.zeros((4, *SHAPE)), np.full(4, 7))), "a label is 7"),
        (lambda t, n, k: t.logits(np.zeros(SHAPE)), r"this network takes \[B, \*\[8, 8, 1\]\]"),
        (lambda t, n, k: pwkd.task((np.full((4, *SHAPE), np.nan), np.zeros(4, int))), "not finite"),
        (lambda t, n, k: pwkd.task((np.full((4, *SHAPE), 255.0), np.zeros(4, int))), "float pixels reach 255"),
        (lambda t, n, k: pwkd.task((np.zeros((4, 3, 32, 32)), np.zeros(4, int))), "channels first"),
        (lambda t, n, k: pwkd.task((np.zeros((0, *SHAPE)), np.zeros(0, int))), "there are 0 images"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_anything_is_compiled(call, sentence, teacher, net, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pwkd.UserError, match=sentence):
        call(teacher, net, task)
    assert not list(tmp_path.iterdir())


def test_a_directory_holds_one_run(task, net, teacher, tmp_path):
    """The same call goes on; another one is refused, whatever it changed, and the first one's files stay."""
    options = {"duration": 4, "batch_size": 16, "label": "", "directory": tmp_path / "s"}
    first = pwkd.distil(pupil(), teacher, task, **options)
    again = pwkd.distil(pupil(), teacher, task, **options)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first.state, again.state)), strict=True))
    other = pwkd.train_teacher(net, task, duration=2, batch_size=16, label="", directory=tmp_path / "t")
    changed = {
        "distiller": {"distiller": "dkd"}, "seed": {"seed": 3}, "plan": {"arm": "pwkd_reversed"},
        "learning rate": {"learning_rate": 0.5}, "optimizer": {"optimizer": optax.adam(0.1)},
        "batch size": {"batch_size": 8}, "connectors": {"connectors": "reinit"},
    }  # fmt: skip
    for key, changes in changed.items():
        with pytest.raises(pwkd.UserError, match=f"holds a run whose {key} was|whose plan was"):
            pwkd.distil(pupil(), teacher, task, **options | changes)
    with pytest.raises(pwkd.UserError, match="whose teacher was"):
        pwkd.distil(pupil(), other, task, **options)
    with pytest.raises(pwkd.UserError, match="whose plan was"):
        pwkd.distil(pupil(), teacher, task, **options | {"duration": 8})
    swapped = pwkd.task(drawn(96, 7), test=drawn(40, 1))
    with pytest.raises(pwkd.UserError, match="whose data was"):
        pwkd.distil(pupil(), teacher, swapped, **options)
    with pytest.raises(pwkd.UserError, match="whose kind was 'student', not 'teacher'"):
        pwkd.train_teacher(net, task, **options)
    kept = pwkd.load(tmp_path / "s", model=pupil())
    np.testing.assert_array_equal(kept.logits(task.test.images), first.logits(task.test.images))
    loaded = pwkd.load_teacher(tmp_path / "t", net)
    np.testing.assert_array_equal(loaded.logits(task.test.images), other.logits(task.test.images))


def test_a_teacher_sees_the_images_as_it_was_taught(task, teacher):
    """A task that normalises otherwise would feed it other images than it learnt from."""
    other = pwkd.task((task.train.images, task.train.labels), mean=(0.5,), std=(0.25,))
    with pytest.raises(pwkd.UserError, match=r"another mean than the task's; make the task with mean=\(0\.0000,\)"):
        pwkd.distil(pupil(), teacher, other, label="")
    fits = pwkd.task((task.train.images, task.train.labels), mean=(0.0,), std=(1.0,))
    pwkd.distil(pupil(), teacher, fits, duration=2, batch_size=16, label="")


def test_what_a_cell_shows_is_short(task, net, teacher):
    student = pwkd.distil(pupil(), teacher, task, duration=2, batch_size=16, label="")
    for value in (task, net, teacher, student, teacher.at(0.5)):
        assert len(repr(value)) < 120 and "\n" not in repr(value), repr(value)


EXAMPLES = sorted(p.stem for p in (ROOT / "pwkd_jax/examples").glob("own_*.py"))


# The loop of one's own is run, and its bits compared, by test_a_loop_of_ones_own_gives_the_commands_bits.
# That of one's own teacher is ten lines of the README with more of them, which test_readme runs.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "own_distiller")) for n in EXAMPLES])
def test_the_examples_run(name, tmp_path):
    command = [sys.executable, "-m", f"pwkd_jax.examples.{name}"]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "student: {" in done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
