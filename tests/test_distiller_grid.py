"""Every method x every stage width x every kind of pair: it runs and lowers its own loss, or refuses with its reason."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pwkd_jax import distillers, models, slimmable
from pwkd_jax.distillers import compatibility
from pwkd_jax.errors import UserError
from pwkd_jax.models import again

ROOT = Path(__file__).parents[1]
WIDTHS, SHAPE, BATCH, CLASSES = (0.25, 0.5, 0.75, 1.0), (8, 8, 3), 8, 5


class Net(nn.Module):
    """Three stages of one convolution each: all that `Outputs` can hold, and quick to compile."""

    width: float = 1.0
    stride: int = 1  # of the first stage: 2 halves every map
    normed: bool = True

    @nn.compact
    def __call__(self, x, train=False, start=0):
        preact, norms = [], []
        for i, (channels, stride) in list(enumerate(((16, self.stride), (16, 1), (32, 2))))[start:]:
            pre = nn.Conv(models.channels(channels, self.width), (3, 3), strides=stride, padding=1, name=f"Conv_{i}")(x)
            scale = bias = jnp.ones(pre.shape[-1:])
            if self.normed:
                norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"BatchNorm_{i}")
                pre = norm(pre)
                scale, bias = (norm.variables["params"][k] for k in ("scale", "bias"))
            x = nn.relu(pre)
            preact.append(pre)
            norms.append((scale, bias))
        pooled = x.mean((1, 2))
        head = nn.Dense(CLASSES)
        logits = head(pooled)
        weights = (head.variables["params"]["kernel"], head.variables["params"]["bias"])
        return models.Outputs(logits, tuple(map(nn.relu, preact)), tuple(preact), pooled, weights, tuple(norms), final=x)


# What only an initial phase trains, or a search in the first epochs; here both are over.
STILL = {"FT": "paraphraser", "SoKD": "policy"}
# Heads whose boxes choose, without gradient, where the loss is taken: it falls where their choice is held.
HELD = {"SoKD": ("heat", "size", "offset")}
# All that is drawn from elsewhere: here the key is always the same.
OPTIONS = {"fcfd": {"paths": 4}}
# Students without batch norm, which compile in half the time.
PAIRS = {
    "same shape": Net(normed=False),
    "other channels": Net(normed=False, width=0.5),
    "other size": Net(normed=False, stride=2),
}


@functools.cache
def setup():
    rng = np.random.default_rng(0)
    net = slimmable.build(lambda w: Net(width=w), WIDTHS, SHAPE)
    params, statistics = net.init(jax.random.key(5), SHAPE)
    images = rng.standard_normal((BATCH, *SHAPE)).astype(np.float32)
    labels = rng.integers(0, CLASSES, 40).astype(np.int32)
    index = rng.permutation(40)[:BATCH].astype(np.int32)
    batch = {"image": images, "strong": images[:, ::-1], "label": labels[index], "index": index, "dataset_label": labels}
    taught = {}
    for w in WIDTHS:
        variables = net.extract(params, statistics, w)
        out = jax.jit(functools.partial(models.apply, net.members[w], train=False))(variables, images)[0]
        taught[w] = again.attach(out, net.members[w], variables, train=False)
    return jax.tree.map(jnp.asarray, (batch, taught))


def build(name: str, model: nn.Module, widths=(1.0,)):
    """(Distillation, student variables) for one pair; UserError where the method refuses it."""
    batch, taught = setup()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (batch, taught))
    variables = model.init(jax.random.key(1), jnp.zeros((1, *SHAPE)), train=False)
    out = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], variables, abstract[0]["image"])
    out = again.attach(out, model, jax.eval_shape(lambda: variables), train=True)
    method = distillers.create(name, **OPTIONS.get(name, {}))
    fitted = distillers.build(method, out, {w: abstract[1][w] for w in widths}, abstract[0])
    return fitted, dict(variables)


def fast(name: str, pair: str) -> bool:
    """Whether a cell of the grid belongs to every run: connectors are at work where the channels differ."""
    return pair == ("same shape" if name in ("fsp", "kdsvd") else "other channels")


@functools.cache
def served() -> dict[tuple[str, str], set[float]]:
    """{(method, pair): the widths that it serves} of the README's table, whose derivation takes a minute."""

    def widths(cell: str) -> set[float]:
        word, *found = re.findall(r"yes|no|at|[\d.]+", cell.partition("[")[0])
        return {"yes": set(WIDTHS), "no": set(), "at": {float(w) for w in found}}[word]

    # By its heading: other tables of the page begin their rows with a name in the same way.
    table = (ROOT / "README.md").read_text().partition("| method | reads |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*?\|.*?\|(.*)\|(.*)\|(.*)\|$", table, re.MULTILINE)
    return {(name, pair): widths(cell) for name, *cells in rows for pair, cell in zip(PAIRS, cells, strict=True)}


@pytest.mark.parametrize("widths", [(0.25,), pytest.param((0.5, 0.75, 1.0), marks=pytest.mark.slow)], ids=["narrow", "others"])
@pytest.mark.parametrize(
    "name, pair",
    [
        pytest.param(name, pair, marks=[pytest.mark.slow] * (not fast(name, pair)))
        for name in sorted(distillers.BUILTIN)
        for pair in PAIRS
    ],
)
def test_it_lowers_its_own_loss_or_refuses(name, pair, widths):
    for width in widths:
        try:
            fitted, variables = build(name, PAIRS[pair], (width, 1.0))
        except UserError as e:
            assert str(e).startswith("student.distiller: ") and "\n" not in str(e) and len(str(e)) > 60
            assert width not in served()[name, pair], f"refused at {width}: {e}"
            continue
        assert width in served()[name, pair]
        # Another size differs only in connectors' strides: one width says all.
        if pair != "other size" or width == 1.0:
            learns(fitted, variables, PAIRS[pair], width)


def learns(fitted, variables, model, width) -> None:
    """Its loss falls on a fixed batch, and all that trains of it at this width moves."""
    batch, taught = setup()
    own, state = jax.jit(fitted.init)(jax.random.key(2))

    def objective(params, state, progress):
        own = {**variables, "params": params["student"]}
        out = again.attach(models.apply(model, own, batch["image"], train=True)[0], model, own, train=True)
        _, state, values = fitted(params["own"], state, width, out, taught[width], batch, progress, jax.random.key(3))
        return values["distillation"], state

    @jax.jit
    def step(params, state, progress):
        (loss, state), grads = jax.value_and_grad(objective, has_aux=True)(params, state, progress)
        # Descent by sign: as indifferent to the scale of a loss as Adam is, and quicker to compile.
        down = grads | {"own": {k: jax.tree.map(jnp.zeros_like, g) if k in held else g for k, g in grads["own"].items()}}
        return jax.tree.map(lambda p, g: p - 2e-3 * jnp.sign(g), params, down), state, loss, grads["own"]

    held = HELD.get(type(fitted.distiller).__name__, ())
    params, losses, pull = {"student": variables["params"], "own": own}, [], jax.tree.map(jnp.zeros_like, own)
    for n in range(12):
        # Past every warm-up and initial phase.
        progress = distillers.Progress(jnp.int32(0), jnp.int32(1000 + n), jnp.float32(200.0))
        params, state, loss, grads = step(params, state, progress)
        pull = jax.tree.map(lambda a, g: a + jnp.abs(g), pull, grads)
        losses.append(float(loss))
    assert np.all(np.isfinite(losses)), losses
    assert min(losses[-3:]) < losses[0], losses
    like = dict(fitted.likes[width]).get("params", {})
    flat = jax.tree_util.tree_flatten_with_path(slimmable.take(pull, like))[0]
    named = {"/".join(str(part.key) for part in path): bool(np.any(x)) for path, x in flat}
    excused = STILL.get(type(fitted.distiller).__name__, "none")
    assert [path for path, moved in named.items() if not moved and not path.startswith(excused)] == []


def test_the_readme_shows_the_generated_table():
    readme = (ROOT / "README.md").read_text()
    assert compatibility.table() in readme


EIGHT = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_default_matmul_precision", "highest")
from test_distiller_grid import PAIRS, build, setup
from pwkd_jax import distillers, models
from pwkd_jax.models import again
from pwkd_jax.training import sharding
mesh = sharding.make_mesh()
assert mesh.size == 8
batch, taught = setup()
model = PAIRS["same shape"]
for name in sys.argv[1].split(","):
    fitted, variables = build(name, model)
    own, state = fitted.init(jax.random.key(2))
    progress = distillers.Progress(jnp.int32(0), jnp.int32(1000), jnp.float32(200.0))

    def loss(student, own, batch, teacher):
        mine = {**variables, "params": student}
        out = again.attach(models.apply(model, mine, batch["image"], train=True)[0], model, mine, train=True)
        return fitted(own, state, 1.0, out, teacher, batch, progress, jax.random.key(3))[0]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    rows = lambda x: NamedSharding(mesh, P("data") if x.shape[:1] == (8,) else P())
    place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, rows(x)), tree)
    one = step(variables["params"], own, batch, taught[1.0])
    teacher = taught[1.0]._replace(**{f: jax.device_put(getattr(taught[1.0], f), NamedSharding(mesh, P()))
                                      for f in ("head", "norms", "again")})
    sharded = {f: place(getattr(teacher, f)) for f in ("logits", "stages", "preact", "pooled")}
    eight = step(variables["params"], own, place(batch), teacher._replace(**sharded))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
        a, b = np.asarray(a), np.asarray(b)
        worst = np.abs(a - b).max() / max(1e-3, np.abs(a).max()) if a.size else 0
        assert worst < 2e-3, (name, worst)
print("all")
"""
# Losses over maps, over the whole data set, and between the images of a batch.
ACROSS = ("at", "crd", "dist")
ALL = pytest.param(sorted(distillers.BUILTIN), marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [ACROSS, ALL], ids=["some", "all"])
def test_eight_devices_give_the_loss_and_gradients_of_one(names):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, ",".join(names)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("all")
