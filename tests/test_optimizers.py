"""Optimisers beside PyTorch's SGD: against optax's own, with the learning rate of every step, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import close

from pwkd_jax import config
from pwkd_jax.errors import UserError
from pwkd_jax.training import averaging, optimizers
from pwkd_jax.training import state as states

PARAMS = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.asarray([0.3, -0.1])}
DIGITS = f"--config={Path(__file__).parents[1]}/configs/digits.py"
OPTIONS = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "decay": "all", "clip_norm": 0.0}


def rate(step):
    return 0.1 / (1 + step)


def gradient(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), PARAMS)


def run(name, steps=4, **options):
    tx = optimizers.optimizer(name, **{**OPTIONS, **options})
    state = states.create(0, PARAMS, {}, tx)
    step = jax.jit(lambda state, grads: states.apply_gradients(state, grads, {}, tx, rate))
    for n in range(steps):
        state, used = step(state, gradient(n))
        assert float(used["learning_rate"]) == pytest.approx(rate(n))
    return state


def theirs(tx, steps=4):
    params, opt_state = PARAMS, tx.init(PARAMS)
    for n in range(steps):
        updates, opt_state = tx.update(gradient(n), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


@pytest.mark.parametrize(("name", "tx"), [
    ("sgd", optax.sgd(rate)),
    ("lion", optax.lion(rate, b1=0.9, b2=0.99, weight_decay=0.1)),
    ("lamb", optax.lamb(rate, b1=0.9, weight_decay=0.1)),
    ("optax:adamw", optax.adamw(rate, b1=0.9, weight_decay=0.1)),
    ("optax:lamb", optax.lamb(rate, b1=0.9, weight_decay=0.1)),
    ("optax.contrib:muon", optax.contrib.muon(rate, weight_decay=0.1, nesterov=False)),
])  # fmt: skip
def test_it_is_optaxs_at_the_learning_rate_of_every_step(name, tx):
    plain = {"momentum": 0.0, "weight_decay": 0.0} if name == "sgd" else {}  # nothing but the learning rate
    close(run(name, **plain).params, theirs(tx)[0], 1e-6)


def test_lars_is_its_formula():
    """g + wd p, of kernels scaled by 0.001 |p| / |g + wd p| (You et al. 2017), then momentum; the bias is left unscaled."""
    for decay, spared in (("all", False), ("kernels", True)):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
        velocity = jax.tree.map(np.zeros_like, params)
        for n in range(4):
            for key, g in gradient(n).items():
                own = key == "kernel"
                d = np.asarray(g, np.float64) + (0.1 if own or not spared else 0) * params[key]
                d *= 0.001 * np.linalg.norm(params[key]) / np.linalg.norm(d) if own else 1
                velocity[key] = 0.9 * velocity[key] + d
                params[key] = params[key] - rate(n) * velocity[key]
        close(run("lars", decay=decay).params, params, 1e-6)


def test_of_a_schedule_free_one_the_average_counts():
    state = run("optax.contrib:schedule_free_adamw")
    inner = optax.contrib.schedule_free_adamw(1.0, b1=0.9, weight_decay=0.1)
    params, opt_state = PARAMS, inner.init(PARAMS)
    for n in range(4):
        made = optax.contrib.schedule_free_adamw(rate(n), b1=0.9, weight_decay=0.1)
        updates, opt_state = made.update(gradient(n), opt_state, params)
        params = optax.apply_updates(params, updates)
    close(state.params, params, 1e-6)
    assert averaging.averages(state)
    close(averaging.outcome(state).params, optax.contrib.schedule_free_eval_params(opt_state, params), 1e-6)


def test_clipping_and_decay_of_kernels_reach_an_optimiser_by_its_function():
    clip = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, b1=0.9, weight_decay=0.1,
                       mask={"kernel": True, "bias": False}))  # fmt: skip
    close(run("optax:adamw", clip_norm=0.5, decay="kernels").params, theirs(clip)[0], 1e-6)


def no_rate(weight_decay):
    return optax.sgd(weight_decay)


def no_optimiser(learning_rate):
    return learning_rate


@pytest.mark.parametrize(("overrides", "message"), [
    (["optimizer.name=adam"], "it should be one of sgd, adamw, lamb, lars, lion, or module:function"),
    (["optimizer.name=optax:nothing"], "'optax:nothing' cannot be imported"),
    (["optimizer.name=test_optimizers:no_rate"], r"should be a function\(learning_rate=...\)"),
    (["optimizer.name=test_optimizers:no_optimiser"], "did not give an optax optimiser"),
    (["optimizer.name=optax:lbfgs"], "'optax:lbfgs' did not give an optax optimiser"),
    (["optimizer.name=optax:adam", "optimizer.weight_decay=0.1"], "optimizer.weight_decay: 0.1 .* no place for it"),
    (["optimizer.name=lion", "optimizer.nesterov=true"], "optimizer.nesterov: True .* no place for it"),
    (["ema=1.0"], "student.ema: 1.0 is not possible"),
    (["accumulate=7"], "student.accumulate: 7 .* equal parts of student.batch_size, which is 64"),
    (["schedule.per_batch=-1"], "schedule.per_batch"),
])  # fmt: skip
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        config.load([DIGITS, *[f"--config.student.{override}" for override in overrides]])


def test_own_options_left_alone_need_no_place():
    config.load([DIGITS, "--config.student.optimizer.name=optax:adam"])
