"""Students whose fused maps teach a leader: the authors' losses and gradients, and a step, in every way that students are put
together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, identical
from test_commands import ROOT, TINY, rows
from test_hosts import terminated_at
from test_together import state

from pwkd_jax import config, models, train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition, programs
from pwkd_jax.training import fusion, student
from pwkd_jax.training.fusion import Fusion

FUSION = [*TINY, "--config.seeds=3", "--config.student.batches=shared", "--config.log.tensorboard=false",
          "--config.student.model=test_fusion:Two", "--config.student.online=fusion"]  # fmt: skip
RUNS = [f"students/{arm}/seed{seed}" for arm in ("alone", "pwkd") for seed in range(3)]
# Three common students and the leader; of the maps, channels first.
SHAPES, IMAGES, CLASSES, COMMON = ((2, 12, 12), (4, 6, 6), (8, 3, 3)), 4, 5, 3
LABELS = np.array([0, 3, 4, 3])


class Two(nn.Module):
    """Two stages, the second of half the size."""

    width: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        maps = []
        for stage, features in enumerate((4, 6), 1):
            x = nn.Conv(models.channels(features, self.width), (3, 3), stage, use_bias=False, name=f"conv{stage}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{stage}")(x))
            maps.append(x)
        return models.Outputs(nn.Dense(self.num_classes, name="head")(x.mean((1, 2))), tuple(maps))


@pytest.fixture(scope="module")
def authors():
    return json.loads((Path(__file__).parent / "data" / "golden_fusion.json").read_text())


def norm(path, rng, c):
    """[(path, array)] of a batch norm: scale, bias, mean and variance."""
    return [((*path, "scale"), 1 + 0.2 * rng.normal(size=c)), ((*path, "bias"), 0.2 * rng.normal(size=c)),
            ((*path, "mean"), 0.3 * rng.normal(size=c)), ((*path, "var"), rng.uniform(0.5, 1.5, c))]  # fmt: skip


def mixed(rng, c, out):
    return [(("depthwise", "kernel"), 0.3 * rng.normal(size=(c, 1, 3, 3))), *norm(("norm1",), rng, c),
            (("pointwise", "kernel"), 0.3 * rng.normal(size=(out, c, 1, 1))), *norm(("norm2",), rng, out)]  # fmt: skip


def drawn():
    """(maps of each student, logits of each, {module: [(path, array)]}), in PyTorch's layouts."""
    rng = np.random.default_rng(7)
    maps = [[np.abs(rng.normal(size=(IMAGES, *shape))) for shape in SHAPES] for _ in range(COMMON + 1)]
    logits = [2 * rng.normal(size=(IMAGES, CLASSES)) for _ in range(COMMON + 1)]
    fuse = [*mixed(rng, 24, 8), (("classifier", "kernel"), 0.3 * rng.normal(size=(CLASSES, 8))),
            (("classifier", "bias"), 0.3 * rng.normal(size=CLASSES))]  # fmt: skip
    made = {"fuse": fuse, "unfuse": mixed(rng, 8, 24)}
    for i in range(1, COMMON + 1):
        made[f"back{i}"] = [
            (("stage2_conv", "kernel"), 0.3 * rng.normal(size=(8, 4, 3, 3))), *norm(("stage2_norm",), rng, 4),
            (("stage1_conv", "kernel"), 0.3 * rng.normal(size=(4, 2, 3, 3))), *norm(("stage1_norm",), rng, 2),
        ]  # fmt: skip
    return maps, logits, made


def here(path, x):
    """A kernel or map in JAX's layout; PyTorch's transposed convolutions turn their kernels around."""
    if x.ndim == 4 and path and path[0].endswith("_conv"):
        return x.transpose(2, 3, 0, 1)[::-1, ::-1]
    if x.ndim == 4:
        return x.transpose(2, 3, 1, 0) if path else x.transpose(0, 2, 3, 1)
    return x.T if x.ndim == 2 and path else x


def there(path, x):
    """Back to PyTorch's."""
    if x.ndim == 4 and path and path[0].endswith("_conv"):
        return x[::-1, ::-1].transpose(2, 3, 0, 1)
    if x.ndim == 4:
        return x.transpose(3, 2, 0, 1) if path else x.transpose(0, 3, 1, 2)
    return x.T if x.ndim == 2 and path else x


def tree(arrays, statistics: bool) -> dict:
    found = {}
    for path, x in arrays:
        if (path[-1] in ("mean", "var")) == statistics:
            found.setdefault(path[0], {})[path[1]] = jnp.asarray(here(path, x), jnp.float32)
    return found


def alike(found, expected) -> None:
    """A gradient in PyTorch's layout, by its length and its product with normal numbers."""
    x = np.asarray(found, np.float64).ravel()
    length, product = expected
    assert np.linalg.norm(x) == pytest.approx(length, rel=2e-4)
    assert x @ np.random.default_rng(1).normal(size=x.size) == pytest.approx(product, abs=2e-4 * length * x.size**0.5)


def graded(params, statistics, seen, z, everyone, index):
    """((loss with cross entropy, (statistics, metrics)), gradients of params, maps, logits and what the others said)."""
    learn = Fusion(COMMON + 1, diversity=0.7, self_distillation=50.0)

    def loss(params, seen, z, everyone):
        out = models.Outputs(z, seen)
        found, kept, values = learn(params, statistics, index, out, everyone, LABELS, jnp.float32(2.1))
        cross = -jnp.mean(jax.nn.log_softmax(z)[np.arange(IMAGES), LABELS])
        return found + cross, (kept, values)

    return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(params, seen, z, everyone)


# As each student has code of its own, and as all run the same.
HOW = {"int": jax.jit(graded, static_argnums=5), "traced": jax.jit(graded)}


@pytest.mark.parametrize("index", range(COMMON + 1))
@pytest.mark.parametrize("how", HOW)
def test_losses_and_gradients_are_the_authors(how, index, authors):
    maps, logits, made = drawn()
    own = {"fuse": made["fuse"], "unfuse": made["unfuse"], "back": made[f"back{max(index, 1)}"]}
    params, statistics = ({name: tree(x, which) for name, x in own.items()} for which in (False, True))
    everyone = jnp.asarray(logits, jnp.float32), jnp.asarray([here((), m[-1]) for m in maps], jnp.float32)
    seen = tuple(jnp.asarray(here((), m), jnp.float32) for m in maps[index])
    (value, (kept, values)), grads = HOW[how](params, statistics, seen, everyone[0][index], everyone, index)
    leads, said, moved = index == COMMON, authors["losses"], authors["gradients"]
    heard = ([said["Leader Ensemble"], said["Leader Fusion"] + said["Leader Trans Fusion"], said["Leader Self Distillation"]]
             if leads else [said[f"{name}{index}"] for name in ("DML", "Diversity", "Self Distillation")])  # fmt: skip
    names = "online_logits", "online_maps", "online_self"
    assert [float(values[name]) for name in names] == pytest.approx(heard, rel=1e-4)
    assert float(value) == pytest.approx(said["Leader Loss" if leads else f"Loss{index}"], rel=1e-5)
    whose = "Leader " if leads else ""
    learnt = sum(said[f"{whose}Self Distillation {kind}{'' if leads else index}"] for kind in ("Feature", "Attention"))
    assert float(values["online_modules"]) == pytest.approx(learnt + leads * said["Fusion Loss"], rel=1e-4)

    alike(grads[2], moved[f"student{index}.logits"])
    for stage, grad in enumerate(grads[1]):
        if index:
            alike(there((), np.asarray(grad)), moved[f"student{index}.map{stage}"])
    assert not any(np.any(x) for x in jax.tree.leaves((grads[3], grads[1] if not index else ())))
    used = {"fuse": leads, "unfuse": leads, "back": index > 0}
    for name, arrays in own.items():
        known = name if name != "back" else f"back{index}"
        trained = [path for path, _ in arrays if path[-1] not in ("mean", "var")]
        for number, path in enumerate(trained):
            grad = np.asarray(grads[0][name][path[0]][path[1]])
            if used[name]:
                alike(there(path, grad), moved[f"{known}.{number}"])
            else:
                assert not np.any(grad)
        means = [np.linalg.norm(kept[name][path[0]]["mean"]) for path, _ in arrays if path[-1] == "mean"]
        if used[name]:
            assert means == pytest.approx(authors["means"][known], rel=1e-4)
        else:
            assert identical(kept[name], statistics[name])


def test_weights_rise_as_the_authors(authors):
    scale = [float(Fusion(3).scale(jnp.float32(epoch + 0.5))) for epoch in range(7)]
    assert scale == pytest.approx(authors["scale"], rel=1e-5)
    assert Fusion(3, warmup=0).scale(jnp.float32(0)) == 1


def steps(*options: str):
    """(experiment, creator, step) of three students without a teacher."""
    plain = ["arms=alone", "data.on_device=never", "data.crop_padding=0", "student.schedule.form=constant",
             "student.optimizer.momentum=0.0", "student.optimizer.weight_decay=0.01", "student.fusion.diversity=0.5",
             "student.fusion.self_distillation=20.0"]  # fmt: skip
    settings, _ = config.load([*FUSION, *(f"--config.{option}" for option in (*plain, *options))])
    experiment = definition.prepare(settings)
    create, made = programs.student_steps(experiment, experiment.plan("alone"), None, experiment.several(3))
    return experiment, create, made[()]


def one(create, step, batch):
    after, found = step(create(np.arange(3, dtype=np.uint32), None), batch, teacher={})
    return jax.tree.map(np.asarray, (after, {name: v.total / v.count for name, v in found.items()}))


@pytest.fixture(scope="module")
def stepped():
    experiment, create, step = steps()
    batch = jax.tree.map(np.asarray, experiment.task.batches(16, 0)(0))
    return experiment, create, batch, *one(create, step, batch)


def test_a_step_is_that_of_one_loss_of_all(stepped):
    """All students' parameters by the gradient of one loss, in which what is heard is cut off."""
    experiment, create, batch, after, found = stepped
    before = jax.tree.map(jnp.asarray, create(np.arange(3, dtype=np.uint32), None))
    images = experiment.task.preprocess(jax.random.key(0), jnp.asarray(batch["image"]))  # nothing of it is random here
    cut, scale, rows16 = jax.lax.stop_gradient, float(np.exp(-5 * 0.8**2)), np.arange(16)

    def member(x):
        return [jax.tree.map(lambda leaf, i=i: leaf[i], x) for i in range(3)]

    def cross(z):
        return -jnp.mean(jax.nn.log_softmax(z)[rows16, batch["label"]])

    def apart(taught, z):
        p, q = jax.nn.log_softmax(taught / 2), jax.nn.log_softmax(z / 2)
        return 4 * jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    def unit(x):
        return x.reshape(16, -1) / jnp.linalg.norm(x.reshape(16, -1), axis=1, keepdims=True)

    def look(x):
        return (x**2).mean(-1)

    def off(x, y):
        return ((unit(x) - unit(y)) ** 2).mean()

    def total(params):
        pupils, online = member(params["student"]), member(params["online"])
        kept, own = member(before.collections["batch_stats"]), member(before.collections["online"])
        outs = [models.apply(experiment.student, {"params": pupils[i], "batch_stats": kept[i]}, images, train=True)[0]
                for i in range(3)]  # fmt: skip
        modules = fusion.modules_of(outs[0], 2)

        def run(name, i, x, train):
            variables = {"params": online[i][name], "batch_stats": own[i][name]}
            return modules[name].apply(variables, x, train, mutable=["batch_stats"])[0]

        (z0, z1, z2), (m0, m1, m2) = ([o.logits for o in outs], [o.stages[-1] for o in outs])
        loss = cross(z0) + cross(z1) + cross(z2) + apart(cut(z0), z1) + apart(cut(z1), z0)
        # The second hears the first.
        seen, length = unit(look(cut(m0))), jnp.linalg.norm(look(cut(m0)).reshape(16, -1), axis=1, keepdims=True)
        edge = jnp.sort(seen, 1)[:, [seen.shape[1] // 3 - 1]]
        target = (length / 2 - seen) * jnp.sign(seen - edge) + length / 2
        hint = cut(m0) + ((target - seen) * length / m0.shape[-1]).reshape(*m0.shape[:3], 1)
        loss += scale * 0.5 * (((unit(look(m1)) - target) ** 2).mean()
                               + off(look(outs[1].stages[0]), look(cut(run("back", 1, hint, False)[0]))))  # fmt: skip
        # The fusion module, and the leader.
        side = cut(jnp.concatenate([m0, m1], -1))
        z, fused = run("fuse", 2, side, True)
        loss += cross(z) + apart(cut((z0 + z1) / 2), z) + apart(cut(z), z2)
        loss += scale * 10 * (off(look(m2), look(cut(fused))) + off(look(run("unfuse", 2, m2, True)), look(side))
                              + off(look(outs[2].stages[0]), look(cut(run("back", 2, cut(fused), False)[0]))))  # fmt: skip
        for i in (1, 2):
            (made,), first = run("back", i, cut(outs[i].stages[1]), True), cut(outs[i].stages[0])
            loss += scale * 20 * (off(made, first) + off(look(made), look(first)))
        return loss

    params = {part: before.params[part] for part in ("student", "online")}
    grads, rate = jax.jit(jax.grad(total))(params), found["learning_rate"]
    moved = jax.tree.map(lambda x, g: x - rate * (g + 0.01 * x), params, grads)
    close(after.params["student"], moved["student"], 1e-5)
    for i, used in enumerate(((), ("back",), ("fuse", "unfuse", "back"))):
        for name in ("fuse", "unfuse", "back"):
            now, was, then = (jax.tree.map(lambda x, i=i: x[i], p["online"][name]) for p in (after.params, params, moved))
            close(now, then, 1e-5) if name in used else None
            assert identical(now, jax.tree.map(np.asarray, was)) == (name not in used), (i, name)
            kept = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), s.collections["online"][name]) for s in (after, before)]
            assert identical(*kept) == (name not in used), (i, name)


@pytest.mark.parametrize("how", ["scan", pytest.param("vmap", marks=pytest.mark.slow)])
def test_other_ways_step_alike(how, stepped):
    _, create, batch, after, found = stepped
    _, create, step = steps(f"student.together={how}")
    then, said = one(create, step, batch)
    close(then.params, after.params, 1e-5)
    close(then.collections, after.collections, 1e-5)
    close(said, found, 1e-3)


def test_new_weights_have_new_modules(stepped):
    _, create, _, after, _ = stepped

    def fresh():
        return create(np.arange(3, dtype=np.uint32), None)

    for reset, same in ((["weights"], fresh()), (["batch_norm", "momentum"], after)):
        entered = student.enter_stage(after, fresh, lambda params: after.opt_state, reset, "reinit")
        for part in ("params", "collections"):
            assert identical(*(jax.tree.map(np.asarray, getattr(s, part)["online"]) for s in (entered, same)))
    assert not identical(after.params["online"], jax.tree.map(np.asarray, fresh().params["online"]))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("fusion") / "work"
    assert train.main([*FUSION, "--config.arms=alone,pwkd", f"--workdir={workdir}"]) == 0
    return workdir


def test_all_learn_staged_or_not_and_the_leader_is_named(learnt):
    for name in RUNS:
        logged = [row for row in rows(learnt, name) if "online_maps" in row]
        assert logged and all(row["online_logits"] > 0 for row in logged)
        assert all((row["online_maps"] > 0) == (not name.endswith("seed0")) for row in logged)
    summary = json.loads((learnt / "summary.json").read_text())
    assert any("(student.online)" in line for line in summary["warnings"])
    assert any(line.startswith("Seed 2 is the leader of each arm") for line in summary["warnings"])


@pytest.mark.slow
def test_stopped_again_and_again_it_ends_the_same(learnt, tmp_path, monkeypatch):
    codes, line = [], [*FUSION, "--config.arms=pwkd", f"--config.teacher.run={learnt}", f"--workdir={tmp_path / 'w'}"]
    while not codes or codes[-1]:
        with monkeypatch.context() as patch:
            terminated_at(20, patch)
            codes.append(train.main(line))
        assert codes[-1] in (0, 75) and len(codes) < 40
    assert len(codes) > 2
    for name in RUNS[3:]:
        assert identical(state(learnt, name, 24), state(tmp_path / "w", name, 24)), name


@pytest.mark.slow
def test_a_device_for_each_student(learnt, tmp_path):
    line = [*FUSION, "--config.arms=pwkd", "--config.student.together=devices", f"--config.teacher.run={learnt}",
            f"--workdir={tmp_path / 'w'}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": "4"}
    exact = "import sys, jax; jax.config.update('jax_default_matmul_precision', 'highest'); from pwkd_jax import train; "
    done = subprocess.run([sys.executable, "-c", exact + "sys.exit(train.main(sys.argv[1:]))", *line], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in RUNS[3:]:
        for x, y in zip(*(jax.tree.leaves(state(w, name, 24)) for w in (learnt, tmp_path / "w")), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_is_refused(learnt, tmp_path, capsys):
    for options, said in (
        (["seeds=2"], "fewer than three seeds"),
        (["student.batches=own"], "'' unless student.batches is 'shared'"),
        (["student.mutual=1.0"], "'' where student.mutual is above 0"),
        (["student.accumulate=2"], "'' where student.accumulate, non_finite or evaluation.patience"),
        (["student.online=ffsd"], "one of '', fusion"),
        (["student.fusion.temperature=0.0"], "student.fusion.temperature: 0.0 is not possible"),
        (["student.fusion.warmup=-1"], "student.fusion.warmup: -1 is not possible"),
        (["student.model=own_modules:Noise"], "student.online: 'fusion' fuses 'stages'"),
    ):
        assert train.main([*FUSION, *(f"--config.{option}" for option in options), f"--workdir={tmp_path / 'w'}"]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "w").exists(), options
    with pytest.raises(UserError, match="needs 3 pixels or more in the student's last map, which has 1"):
        fusion.check(Two(), (2, 2, 3))
    # Others cannot join those that have learnt already.
    assert train.main([*FUSION, "--config.arms=alone,pwkd", "--config.seeds=4", f"--workdir={learnt}"]) == 2
    assert "3 of 4 students are finished, and those of student.online" in capsys.readouterr().err
