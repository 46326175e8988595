"""Our side of a comparison: value and gradients of a built-in method on `inputs`. No torch here.

A setting is {"method", "options", "total", "epoch", "seed", "shapes", "wrt", "call", "patch"}: the method's options; whether
cross entropy and weights count; epochs of the stage before it; the seed and shapes of the arrays; which of the student's are
differentiated; a function of CALLS in place of the method's own call; and a replacement of PATCHES while it runs.
"""

import contextlib
import itertools
from unittest import mock

import inputs
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import distillers, slimmable
from pwkd_jax.distillers import crd, fcfd, mgd
from pwkd_jax.distillers.sokd import RANGES, Head, area_weights, augment, sokd_losses

SETTING = {"options": {}, "total": False, "epoch": 1000.0, "seed": 0, "shapes": inputs.SHAPES, "call": "", "patch": ""}
KEPT = np.random.default_rng(9).uniform(size=(inputs.BATCH, 20, 1, 1))  # of MGD: dropped where below its rate
NEGATIVES, FEATURES = 16, 12
PARTS = 3  # of NORM
TIMES = np.random.default_rng(6).integers(0, 1000, inputs.BATCH)  # of DiffKD's noise
_RNG = np.random.default_rng(5)
BANKS = _RNG.uniform(-1, 1, (2, inputs.IMAGES, FEATURES)) / np.sqrt(FEATURES / 3)
OTHERS = _RNG.integers(0, inputs.IMAGES, (inputs.BATCH, NEGATIVES))


def noise(turn: int, shape: tuple[int, ...]) -> np.ndarray:
    """What DiffKD draws in this turn: for the student's map, the teacher's, then for the logits of both; [B, H, W, C]."""
    return np.random.default_rng(turn % 4).standard_normal(shape)


@contextlib.contextmanager
def given_noise():
    turn = itertools.count()
    normal = mock.patch.object(jax.random, "normal", lambda _, shape, dtype: jnp.asarray(noise(next(turn), shape), dtype))
    with normal, mock.patch.object(jax.random, "randint", lambda *_: jnp.asarray(TIMES)):
        yield


def ft(method: str):
    def call(made, a, t, batch, params):
        args = (inputs.outputs(a), inputs.outputs(t), batch, distillers.START)
        nested = unflatten_dict(params, sep="/")
        state = {k: v for k, v in made.init(jax.random.key(0), *args).items() if k != "params"}
        state["frozen"] = {"weights": jax.lax.stop_gradient(nested["paraphraser"])}
        return made.apply({"params": nested, **state}, *args, mutable=list(state), method=method)[0][0]

    return call


def predictions(made, a, t, batch, params):
    logits = made.apply(unflatten_dict(params, sep="/"), inputs.outputs(a), inputs.outputs(t), method="predict")
    return jnp.sum(logits * jnp.linspace(-1, 1, logits.size, dtype=logits.dtype).reshape(logits.shape))


def crd_two_steps(made, a, t, batch, params):
    """The sum of two steps' losses: the second has the first one's normalisers and what it left in the banks."""
    state = {"student_bank": BANKS[0], "teacher_bank": BANKS[1], "log_z": np.zeros(2), "started": np.zeros((), bool)}
    state = {"memory": {k: jnp.asarray(v, None if k == "started" else a["pooled"].dtype) for k, v in state.items()}}
    total = 0.0
    for step, scale in enumerate((1.0, 1.5), start=1):
        progress = distillers.Progress(jnp.int32(0), jnp.int32(step), jnp.float32(0))
        student = inputs.outputs({**a, "pooled": scale * a["pooled"]})
        variables, rngs = {"params": unflatten_dict(params, sep="/"), **state}, {"distiller": jax.random.key(0)}
        (loss, _), state = made.apply(variables, student, inputs.outputs(t), batch, progress, rngs=rngs, mutable=["memory"])
        total += loss
    return total


def mlkd_levels(made, a, t, batch, params):
    return made.apply({}, inputs.outputs(a), inputs.outputs(t), batch, None)[0]


def mlkd_as_released(made, a, t, batch, params):
    """What the released masks come to with one view for both: our levels, each times the share that its mask keeps."""
    p = jax.nn.softmax(t["logits"])
    sure, often = jnp.max(p, -1), jnp.sum(p, 0)
    share, classes = (jnp.mean(x <= jnp.percentile(x, 50)) for x in (sure, often))
    levels = made.apply({}, inputs.outputs(a), inputs.outputs(t), batch, None)[1]
    total = (1 + share) * levels["instance_level"] + share * levels["batch_level"] + classes * levels["class_level"]
    ce = jnp.mean(slimmable.cross_entropy(a["logits"], batch["label"]))
    return made.ce_weight * ce + made.weight * total / 2


def sokd_boxes(made, a, t, batch, params):
    """Both losses, at the default weight, in the boxes that "heat", "size" and "offset" tell."""
    weights = area_weights(*(inputs.nhwc(a[k]) for k in ("heat", "size", "offset")), 4)
    maps, areas = ([inputs.nhwc(x[k]) for x in (a, t)] for k in ("stage3", "areas"))
    feature, alike = sokd_losses(*maps, *areas, weights)
    return made.weight * (feature + made.area_weight * alike)


def sokd_head(last: str):
    def call(made, a, t, batch, params):
        x = Head(2).apply({"params": unflatten_dict(params, sep="/")}, inputs.nhwc(a["stage3"]))
        # softplus(x) = log(1 + e^x), so x is at hand again and a ReLU can take its place.
        return jnp.sum((jnp.maximum(jnp.log(jnp.expm1(x)), 0) if last == "relu" else x) ** 2)

    return call


def sokd_operation(name: str, magnitude: float):
    def call(made, a, t, batch, params):
        x = inputs.nhwc(a["stage3"])
        strengths = jnp.zeros((len(x), len(RANGES)), x.dtype).at[:, list(RANGES).index(name)].set(magnitude)
        moved = jnp.transpose(augment(jax.random.key(0), x, strengths), (0, 3, 1, 2))
        return jnp.sum(moved * jnp.asarray(np.random.default_rng(3).standard_normal(moved.shape), moved.dtype))

    return call


CALLS = {
    "ft": ft("__call__"), "ft initial": ft("initial"), "simkd predictions": predictions, "norm predictions": predictions,
    "crd two steps": crd_two_steps, "mlkd levels": mlkd_levels, "mlkd as released": mlkd_as_released, "sokd boxes": sokd_boxes,
    "sokd head": sokd_head("softplus"), "sokd head relu": sokd_head("relu"),
}  # fmt: skip
for _name, _at in (("shear_x", 0.2), ("shear_y", -0.1), ("turn", 20.0), ("move_x", 0.3), ("move_x", 0.06), ("move_y", 0.06)):
    CALLS[f"sokd {_name} {_at:g}"] = sokd_operation(_name, _at)
PATCHES = {
    "": contextlib.nullcontext,
    "diffkd": given_noise,
    # FCFD's mixed networks: the student's first one or two stages before the teacher's, then the other way round.
    "fcfd outer": lambda: mock.patch.object(fcfd, "drawn_paths", lambda *_: jnp.array([True, False, True, False])),
    "fcfd inner": lambda: mock.patch.object(fcfd, "drawn_paths", lambda *_: jnp.array([False, True, False, True])),
    "mgd": lambda: mock.patch.object(mgd, "drop_channels", lambda _, x, rate: x * (KEPT.transpose(0, 2, 3, 1) >= rate)),
    "crd": lambda: mock.patch.object(crd, "draw_negatives", lambda *_: jnp.asarray(OTHERS)),
}


def build(setting: dict, dtype):
    """(distiller, student, teacher, batch, its own weights as shapes, the rest of its state) of a setting."""
    # JSON has no tuples.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in setting["options"].items()}
    made = distillers.create(setting["method"], **options)
    student, teacher = inputs.leaves(setting["seed"], setting["shapes"])
    s, t = ({k: jnp.asarray(v, dtype) for k, v in a.items()} for a in (student, teacher))
    batch = {k: jnp.asarray(v, None if v.dtype == np.int32 else dtype) for k, v in inputs.batch().items()}
    return made, s, t, batch


def evaluate(setting: dict, params: dict | None, dtype) -> tuple[float, dict, dict]:
    """(value, gradients of the student's arrays in torch's layout, gradients of weights).

    params: {our path: array}; None for those that `inputs.drawn` gives.
    """
    setting = SETTING | setting
    made, s, t, batch = build(setting, dtype)
    progress = distillers.Progress(jnp.int32(0), jnp.int32(1000), jnp.asarray(setting["epoch"], dtype))
    state, call = {}, CALLS.get(setting["call"])
    if setting["call"] == "sokd boxes":
        params = {}
    with PATCHES[setting["patch"]]():
        if not call or params is None:
            key = jax.random.key(0)
            args = ({"params": key, "distiller": key}, inputs.outputs(s, True), inputs.outputs(t), batch, progress)
            state = dict(jax.jit(made.init)(*args))
            own = flatten_dict(state if CALLS.get(setting["call"]) is predictions else state.pop("params", {}), sep="/")
            if params is None:
                params = {k: v if (w := inputs.drawn(k, v.shape)) is None else w for k, v in own.items()}
            if own.keys() != params.keys():
                raise KeyError(f"{setting['method']}: weights {sorted(own.keys() ^ params.keys())} are on one side alone")
        params = {k: jnp.asarray(v, dtype) for k, v in params.items()}

        def loss(own, params):
            a = {**s, **own}
            if call:
                return call(made, a, t, batch, params)
            variables = {"params": unflatten_dict(params, sep="/"), **state}
            args, rngs = (inputs.outputs(a, True), inputs.outputs(t), batch, progress), {"distiller": jax.random.key(1)}
            value = made.apply(variables, *args, rngs=rngs, mutable=list(state))[0][0]
            ce = jnp.mean(slimmable.cross_entropy(a["logits"], batch["label"]))
            return made.ce_weight * ce + made.weight * value if setting["total"] else value

        own = {k: s[k] for k in setting["wrt"]}
        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(own, params)
    return float(value), *({k: np.asarray(v) for k, v in g.items()} for g in grads)
