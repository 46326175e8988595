"""One comparison: the same numbers through the authors' torch code and through ours, in float32 and float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import inputs
import jax
import numpy as np
import ours
import torch
from torch import nn

# How a torch array lies in Flax, and back. They only move entries, so gradients go the same way.
KINDS = {
    "conv": (lambda w: w.transpose(2, 3, 1, 0), lambda w, shape: w.transpose(3, 2, 0, 1)),
    # Transposed convolutions keep their input channels first, and turn the kernel.
    "up": (lambda w: w.transpose(2, 3, 0, 1)[::-1, ::-1], lambda w, shape: w[::-1, ::-1].transpose(2, 3, 0, 1)),
    "pixel": (lambda w: w[:, :, 0, 0].T, lambda w, shape: w.T[:, :, None, None]),  # a 1x1 convolution as a linear layer
    "linear": (lambda w: w.T, lambda w, shape: w.T),
    "same": (lambda w: w, lambda w, shape: w),
    "scalar": (lambda w: w.reshape(()), lambda w, shape: w.reshape(shape)),
}


def norm(ours: str, theirs: str) -> dict:
    """Weights of a batch norm: {our path: (their name, kind)}."""
    return {f"{ours}/scale": (f"{theirs}.weight", "same"), f"{ours}/bias": (f"{theirs}.bias", "same")}


def conv(ours: str, theirs: str, kind="conv", bias=False) -> dict:
    """Weights of a convolution, or of a layer of another kind."""
    return {f"{ours}/kernel": (f"{theirs}.weight", kind)} | ({f"{ours}/bias": (f"{theirs}.bias", "same")} if bias else {})


@dataclasses.dataclass
class Case:
    """A method, or a part of one, and where the authors have it.

    theirs(module, student, teacher, batch) -> scalar; module: what `build(student, teacher)` makes. weights: {our path: (their
    name, kind)}, all that ours trains. wrt: student's arrays to compare gradients of. differs: why the two are expected to, ""
    where they are equal to `rtol` in float64. golden: whether the tests
    keep its numbers. The rest: a setting of `ours`.
    """

    method: str
    source: tuple[str, str]
    theirs: Callable
    wrt: tuple[str, ...]
    part: str = ""
    build: Callable[[dict, dict], nn.Module] | None = None
    weights: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    differs: str = ""
    note: str = ""
    golden: bool = False
    rtol: float = 1e-9
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    total: bool = False
    epoch: float = 1000.0
    seed: int = 0
    shapes: tuple = inputs.SHAPES
    call: str = ""
    patch: str = ""

    def setting(self) -> dict[str, Any]:
        return {"method": self.method, "wrt": self.wrt} | {key: getattr(self, key) for key in ours.SETTING}


def relative(a, b) -> float:
    """|a - b| over the longer of the two; 1 where one is zero and the other not."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), np.linalg.norm(b))) if np.any(a != b) else 0.0


def same_weights(case: Case, module: nn.Module) -> dict[str, np.ndarray]:
    """Give a torch module the weights of `inputs.drawn`, or its own where that has none; {our path: array}."""
    found, held = {}, module.state_dict()
    for path, (name, kind) in case.weights.items():
        there, back = KINDS[kind]
        own = there(held[name].numpy())
        made = inputs.drawn(path, own.shape)
        if made is not None:
            held[name].copy_(torch.as_tensor(back(made, held[name].shape).copy()))
        found[path] = own if made is None else made
    return found


def in_torch(case: Case, dtype) -> tuple[float, dict, dict, dict]:
    """(value, gradients of the student's arrays, of the weights by our path and in our layout, those weights)."""
    s, t = ({k: torch.tensor(v, dtype=dtype) for k, v in a.items()} for a in inputs.leaves(case.seed, case.shapes))
    for name in case.wrt:
        s[name].requires_grad_()
    batch = {k: torch.as_tensor(v).to(torch.int64 if v.dtype == np.int32 else dtype) for k, v in inputs.batch().items()}
    module, weights = None, {}
    if case.build:
        torch.manual_seed(0)
        module = case.build(s, t).to(torch.float64)
        weights = same_weights(case, module)
        module = module.to(dtype)
    loss = case.theirs(module, s, t, batch).sum()
    loss.backward()
    grads = {k: (torch.zeros_like(s[k]) if s[k].grad is None else s[k].grad).numpy() for k in case.wrt}
    named = dict(module.named_parameters()) if module else {}
    # Without a gradient there, ours has to be 0 too.
    trained = {
        path: KINDS[kind][0]((torch.zeros_like(named[name]) if named[name].grad is None else named[name].grad).numpy())
        for path, (name, kind) in case.weights.items() if name in named
    }  # fmt: skip
    return float(loss.detach()), grads, trained, weights


def run(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row of one case, its golden entry): differences in both precisions, and the authors' float64 numbers."""
    row: dict[str, Any] = {"method": case.method, "part": case.part, "source": " ".join(case.source)}
    for name, dtype, torch_dtype in (("float32", np.float32, torch.float32), ("float64", np.float64, torch.float64)):
        value, grads, trained, weights = in_torch(case, torch_dtype)
        with jax.enable_x64(dtype == np.float64):
            own, own_grads, own_trained = ours.evaluate(case.setting(), weights, dtype)
        row[name] = {"official": value, "ours": own, "value": relative(own, value)}
        row[name]["gradient"] = max(relative(own_grads[k], grads[k]) for k in case.wrt)
        if trained:
            # A bias before another batch norm has a gradient of 0, of which both sides compute rounding errors.
            least = 10 * np.finfo(dtype).eps * max(np.linalg.norm(g) for g in trained.values())
            alive = [(k, g) for k, g in trained.items() if max(map(np.linalg.norm, (own_trained[k], g))) > least]
            row[name]["weights"] = max(relative(own_trained[k], g) for k, g in alive)
    worst = max(row["float64"][k] for k in ("value", "gradient", "weights") if k in row["float64"])
    row |= {"equal": worst <= case.rtol, "expected": not case.differs, "says": case.differs or case.note}
    golden = {key: v for key, v in case.setting().items() if v != ours.SETTING.get(key)}
    golden |= {"source": row["source"], "rtol": case.rtol, "value": value}
    golden["gradients"] = {k: inputs.summary(g, k) for k, g in grads.items()}
    golden["weights"] = {k: inputs.summary(g, k) for k, g in trained.items()}
    return row, golden
