"""One comparison: the same numbers through the authors' torch code and through ours, in float32 and float64."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch import nn

from pwkd_jax import distillers, slimmable
from pwkd_jax.models import Outputs

BATCH, CLASSES = 8, 10
SHAPES = {"student": ((6, 8), (10, 8), (14, 4)), "teacher": ((8, 8), (12, 8), (20, 4))}  # (channels, side) of each stage


def leaves(seed: int = 0, shapes=SHAPES, batch: int = BATCH, scale: float = 2.0) -> tuple[dict, dict]:
    """(student's, teacher's) arrays in float64 and torch's layout. The rows of the two are alike, as a trained pair's are."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((batch, CLASSES))
    made = []
    for who in ("student", "teacher"):
        a = {"logits": scale * (common + rng.standard_normal((batch, CLASSES)))}
        a["stem"] = np.maximum(rng.standard_normal((batch, 6, shapes[who][0][1], shapes[who][0][1])), 0)
        for i, (channels, side) in enumerate(shapes[who], start=1):
            a[f"preact{i}"] = rng.standard_normal((batch, channels, side, side)) + 0.3 * rng.standard_normal((1, channels, 1, 1))
            a[f"stage{i}"] = np.maximum(a[f"preact{i}"], 0)
        a["pooled"] = a[f"stage{i}"].mean((2, 3))
        a["kernel"], a["bias"] = rng.standard_normal((CLASSES, channels)), rng.standard_normal(CLASSES)
        for i, (channels, _) in enumerate(shapes[who], start=1):
            a[f"scale{i}"], a[f"shift{i}"] = 1 + 0.2 * rng.standard_normal(channels), 0.5 * rng.standard_normal(channels)
        made.append(a)
    return tuple(made)


def batch_of(seed: int = 0, batch: int = BATCH, images: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + seed)
    labels = rng.integers(0, CLASSES, images).astype(np.int32)
    index = rng.permutation(images)[:batch].astype(np.int32)
    return {"image": np.zeros((batch, 8, 8, 3)), "label": labels[index], "index": index, "dataset_label": labels}


def outputs(a: dict) -> Outputs:
    """Our `Outputs` of arrays in torch's layout."""
    nhwc = {k: jnp.transpose(v, (0, 2, 3, 1)) if jnp.ndim(v) == 4 else v for k, v in a.items()}
    count = sum(k.startswith("stage") for k in a)
    several = {k: tuple(nhwc[f"{k}{i}"] for i in range(1, count + 1)) for k in ("stage", "preact", "scale", "shift")}
    return Outputs(
        nhwc["logits"], several["stage"], several["preact"], nhwc["pooled"], (nhwc["kernel"].T, nhwc["bias"]),
        tuple(zip(several["scale"], several["shift"], strict=True)), nhwc["stem"], several["stage"][-1],
    )  # fmt: skip


# How a torch array lies in Flax. Linear maps that only move entries: gradients go the same way.
KINDS = {
    "conv": lambda w: w.transpose(2, 3, 1, 0),
    "up": lambda w: w.transpose(2, 3, 0, 1)[::-1, ::-1],  # transposed convolutions keep their input channels first
    "pixel": lambda w: w[:, :, 0, 0].T,  # a 1x1 convolution as a linear layer
    "linear": lambda w: w.T,
    "same": lambda w: w,
    "scalar": lambda w: w.reshape(()),
}


@dataclasses.dataclass
class Case:
    """A method, or a part of one, and where the authors have it.

    theirs(module, student, teacher, batch) -> scalar; module: what `build` makes. ours: as it is called; by default the built-in
    method with `options`, whole. weights: {our path: (their name, kind)}, all that ours trains. wrt: student's arrays to compare
    gradients of. total: compare ce_weight * CE + weight * loss. differs: why the two are expected to, "" where they are equal.
    """

    method: str
    source: tuple[str, str]
    theirs: Callable
    wrt: tuple[str, ...]
    part: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    build: Callable[[dict, dict], nn.Module] | None = None
    weights: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    ours: Callable | None = None
    total: bool = False
    differs: str = ""
    note: str = ""
    data: Callable[[], tuple[dict, dict]] = leaves
    batch: Callable[[], dict] = batch_of
    patched: Callable = contextlib.nullcontext  # around ours
    rtol: float = 1e-9


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) if np.any(a != b) else 0.0


def vary(module: nn.Module) -> nn.Module:
    """Batch norms away from 1 and 0, so that their place counts; the same whatever the precision."""
    rng = np.random.default_rng(7)
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) and m.affine:
            m.weight.data = torch.as_tensor(1 + 0.3 * rng.standard_normal(len(m.weight)), dtype=m.weight.dtype)
            m.bias.data = torch.as_tensor(0.3 * rng.standard_normal(len(m.bias)), dtype=m.bias.dtype)
    return module


def in_torch(case: Case, student, teacher, batch, dtype) -> tuple[float, dict, dict, nn.Module | None]:
    s, t = ({k: torch.tensor(v, dtype=dtype) for k, v in a.items()} for a in (student, teacher))
    for name in case.wrt:
        s[name].requires_grad_()
    b = {k: torch.as_tensor(v).long() if v.dtype == np.int32 else torch.as_tensor(v, dtype=dtype) for k, v in batch.items()}
    module = None
    if case.build:
        torch.manual_seed(0)
        module = vary(case.build(s, t)).to(dtype)
    start = copy.deepcopy(module.state_dict()) if module else {}
    loss = case.theirs(module, s, t, b).sum()
    loss.backward()
    zero = {k: torch.zeros_like(s[k]) for k in case.wrt}
    grads = {k: (s[k].grad if s[k].grad is not None else zero[k]).numpy() for k in case.wrt}
    named = dict(module.named_parameters()) if module else {}
    trained = {k: named[k].grad.numpy() for k, _ in case.weights.values() if k in named and named[k].grad is not None}
    return float(loss), grads, trained, start


def in_jax(case: Case, student, teacher, batch, dtype, start: dict) -> tuple[float, dict, dict]:
    cast = {np.float32: jnp.float32, np.float64: jnp.float64}[dtype]
    s, t = ({k: jnp.asarray(v, cast) for k, v in a.items()} for a in (student, teacher))
    b = {k: jnp.asarray(v, None if v.dtype == np.int32 else cast) for k, v in batch.items()}
    params = {
        ours: jnp.asarray(KINDS[kind](start[theirs].numpy()), cast) for ours, (theirs, kind) in case.weights.items()
    }
    made = distillers.create(case.method, **case.options) if case.ours is None else None
    progress = distillers.Progress(jnp.int32(0), jnp.int32(1000), jnp.asarray(1000.0, cast))
    state = {}
    if made is not None:
        key = jax.random.key(0)
        variables = dict(jax.jit(made.init)({"params": key, "distiller": key}, outputs(s), outputs(t), b, progress))
        own = flatten_dict(variables.pop("params", {}), sep="/")
        if own.keys() != params.keys():
            raise KeyError(f"{case.method}: weights of {sorted(own.keys() ^ params.keys())} are on one side alone")
        for path, like in own.items():
            assert like.shape == params[path].shape, (case.method, path, like.shape, params[path].shape)
        state = variables

    def loss(own, params):
        a = {**s, **own}
        if made is None:
            return case.ours(a, t, b, params)
        variables = {"params": unflatten_dict(params, sep="/"), **state}
        rngs = {"distiller": jax.random.key(1)}
        (value, _), _ = made.apply(variables, outputs(a), outputs(t), b, progress, rngs=rngs, mutable=list(state))
        if not case.total:
            return value
        return made.ce_weight * jnp.mean(slimmable.cross_entropy(a["logits"], b["label"])) + made.weight * value

    value, (grads, trained) = jax.jit(jax.value_and_grad(loss, (0, 1)))({k: s[k] for k in case.wrt}, params)
    return float(value), {k: np.asarray(v) for k, v in grads.items()}, {k: np.asarray(v) for k, v in trained.items()}


def run(case: Case) -> dict[str, Any]:
    """The row of one case: relative differences of value and gradients in both precisions, and what follows."""
    student, teacher = case.data()
    batch = case.batch()
    row: dict[str, Any] = {"method": case.method, "part": case.part, "source": " ".join(case.source)}
    for name, dtype, torch_dtype in (("float32", np.float32, torch.float32), ("float64", np.float64, torch.float64)):
        value, grads, trained, start = in_torch(case, student, teacher, batch, torch_dtype)
        with jax.enable_x64(dtype == np.float64), case.patched():
            ours, own_grads, own_trained = in_jax(case, student, teacher, batch, dtype, start)
        row[name] = {"official": value, "ours": ours, "value": relative(ours, value)}
        row[name]["gradient"] = max(relative(own_grads[k], grads[k]) for k in case.wrt)
        pairs = [(own_trained[k], KINDS[kind](trained[n])) for k, (n, kind) in case.weights.items() if n in trained]
        if pairs:
            row[name]["weights"] = max(relative(a, b) for a, b in pairs)
    worst = max(row["float64"][k] for k in ("value", "gradient", "weights") if k in row["float64"])
    row |= {"equal": worst <= case.rtol, "expected": not case.differs, "says": case.differs or case.note}
    return row
