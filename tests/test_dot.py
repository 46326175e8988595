"""DOT: momenta of the labels' and of the teacher's gradients, against the authors' optimiser run in PyTorch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import identical
from test_commands import TINY, final, rows
from test_hosts import terminated_at

from pwkd_jax import train
from pwkd_jax.training import dot, optimizers

GOLDEN = json.loads((Path(__file__).parent / "data/golden_dot.json").read_text())
SHAPES = {"both": (3, 2), "task": (4,), "kd": (2, 3)}
OWN = [*TINY, "--config.log.tensorboard=false", "--config.arms=alone,pwkd"]


def test_steps_are_those_of_the_authors():
    """But for a connector's first step, of which their code forgets the decay that it gives all later ones."""
    stream = np.random.RandomState(0)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(stream.randn(*shape)) for name, shape in SHAPES.items()}
        tx = optimizers.optimizer("sgd", momentum=0.9, nesterov=False, weight_decay=0.05, decay="all", clip_norm=0.0, dot=0.075)
        state, update, first, kept = tx.init(params), jax.jit(tx.update), np.asarray(params["kd"]), []
        for expected in GOLDEN["steps"]:
            heard = {name: jnp.asarray(stream.randn(*SHAPES[name])) for name in ("both", "kd")}
            own = {name: jnp.asarray(stream.randn(*SHAPES[name])) for name in ("both", "task")}
            whole = ({name: given.get(name, jnp.zeros(shape)) for name, shape in SHAPES.items()} for given in (own, heard))
            direction, state = update(dot.Parts(*whole), state, params)
            params = jax.tree.map(lambda p, d: p - 0.1 * d, params, direction)
            for name in ("both", "task"):
                np.testing.assert_allclose(params[name], expected[name], rtol=1e-12)
            kept.append((np.asarray(heard["kd"]), np.asarray(params["kd"]), np.asarray(expected["kd"])))
    for forgets, column in ((False, 1), (True, 2)):
        p, v = first, 0.0
        for n, step in enumerate(kept):
            v = 0.9 * v + step[0] + (0.0 if forgets and n == 0 else 0.05) * p
            p = p - 0.1 * v
            np.testing.assert_allclose(step[column], p, rtol=1e-12)


def test_gradients_come_in_their_parts():
    def loss(params, x):
        task, heard = jnp.sum(params["a"] * x), jnp.sum(params["a"] ** 2 * params["b"])
        return 0.5 * task + heard, {"task": task}

    params, x = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([3.0, -1.0])}, jnp.asarray([0.5, 4.0])
    (value, aux), parts = dot.gradient(loss, lambda aux: 0.5 * aux["task"])(params, x)
    assert float(value) == 0.5 * 8.5 + 3 - 4 and float(aux["task"]) == 8.5
    np.testing.assert_allclose(parts.task["a"], [0.25, 2.0])
    np.testing.assert_allclose(parts.distillation["a"], [6.0, -4.0])
    np.testing.assert_allclose(parts.distillation["b"], [1.0, 4.0])
    assert not np.any(parts.task["b"])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dot") / "work"
    assert train.main([*OWN, "--config.student.optimizer.dot=0.075", f"--workdir={workdir}"]) == 0
    return workdir


def test_it_moves_what_a_teacher_says_and_nothing_else(learnt, tmp_path):
    """Without a teacher it is SGD, to rounding; with one it is not."""
    assert train.main([*OWN, f"--config.teacher.run={learnt}", f"--workdir={tmp_path / 'w'}"]) == 0
    params = [[final(w, f"students/{arm}/seed0", 24)["params"]["student"] for w in (learnt, tmp_path / "w")] for arm in
              ("alone", "pwkd")]  # fmt: skip
    worst = [max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, pair), strict=True)) for pair in params]
    assert worst[0] < 1e-5 and worst[1] > 1e-3
    assert all(np.isfinite(row["train_loss"]) for row in rows(learnt, "students/pwkd/seed0"))


def test_stopped_again_and_again_it_ends_the_same(learnt, tmp_path, monkeypatch):
    line = [*OWN, "--config.student.optimizer.dot=0.075", f"--config.teacher.run={learnt}", f"--workdir={tmp_path / 'w'}"]
    codes = []
    while not codes or codes[-1]:
        with monkeypatch.context() as patch:
            terminated_at(20, patch)
            codes.append(train.main(line))
        assert codes[-1] in (0, 75) and len(codes) < 60
    assert len(codes) > 2
    assert identical(*(final(w, "students/pwkd/seed0", 24) for w in (learnt, tmp_path / "w")))


def test_what_cannot_be_is_refused(tmp_path, capsys):
    for options, said in (
        (["optimizer.momentum=0.95"], "momentum is 0.95"),
        (["optimizer.name=adamw"], "0 unless optimizer.name is sgd"),
        (["accumulate=2"], "0 where student.accumulate is above 1"),
        (["distiller.name=ab"], "0 with ab, whose initial phase"),
    ):
        line = [*OWN, "--config.student.optimizer.dot=0.075", *(f"--config.student.{option}" for option in options)]
        assert train.main([*line, f"--workdir={tmp_path / 'w'}"]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "w").exists()
