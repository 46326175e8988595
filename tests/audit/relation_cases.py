"""Methods that compare relations: between images, between channels, between stages, or with a memory of the whole data set."""

import types

import jax.numpy as jnp
import numpy as np
import torch
from compare import Case, batch_of, leaves, vary
from logit_cases import whole
from official import MD, RD, load
from torch import nn

from pwkd_jax.distillers import crd

STAGES = ("stage1", "stage2", "stage3")
SAME = {"student": ((8, 8), (12, 8), (20, 4)), "teacher": ((8, 8), (12, 8), (20, 4))}
OTHER_SIZES = {"student": ((6, 8), (10, 4), (14, 2)), "teacher": ((8, 4), (12, 4), (20, 3))}


def listed(s, names=STAGES):
    return [s[n] for n in names]


def correlation_build(s, t):
    util = load(RD, "models/util.py")
    return nn.ModuleList([util.LinearEmbed(x["pooled"].shape[1], 128) for x in (s, t)])


def correlation(module, s, t, batch):
    return load(RD, "distiller_zoo/CC.py").Correlation()(module[0](s["pooled"]), module[1](t["pooled"]))


def fsp(module, s, t, batch):
    names = ("stem", *STAGES)
    made = load(RD, "distiller_zoo/FSP.py").FSP(*([x[n].shape for n in names] for x in (s, t)))
    return sum(made(listed(s, names), listed(t, names)))


def kdsvd(signs: bool):
    """Their loss, with the sign that LAPACK gives to singular vectors, or with that of a sum of 0 or more."""

    def theirs(module, s, t, batch):
        svd = torch.svd

        def turned(x):
            u, d, v = svd(x)
            turn = torch.where(v.sum(1, keepdim=True) >= 0, 1.0, -1.0).to(v)
            return u * turn, d, v * turn

        torch.svd = turned if signs else svd
        try:
            return sum(load(RD, "distiller_zoo/KDSVD.py").KDSVD(k=1)(listed(s), listed(t)))
        finally:
            torch.svd = svd

    return theirs


IMAGES, NEGATIVES, FEATURES = 64, 16, 12
RNG = np.random.default_rng(5)
BANKS = RNG.uniform(-1, 1, (2, IMAGES, FEATURES)) / np.sqrt(FEATURES / 3)
OTHERS = RNG.integers(0, IMAGES, (8, NEGATIVES))


def crd_build(s, t):
    options = types.SimpleNamespace(
        s_dim=s["pooled"].shape[1], t_dim=t["pooled"].shape[1], feat_dim=FEATURES, n_data=IMAGES, nce_k=NEGATIVES, nce_t=0.07,
        nce_m=0.5,
    )  # fmt: skip
    load(RD, "crd/memory.py")
    made = load(RD, "crd/criterion.py").CRDLoss(options)
    for name, bank in zip(("memory_v1", "memory_v2"), BANKS, strict=True):
        setattr(made.contrast, name, torch.tensor(bank))
    return made


def crd_two_steps(module, s, t, batch):
    """The sum of two steps' losses: the second has the first one's normalisers and what it left in the banks."""
    module.contrast.params = module.contrast.params.to(torch.float64)
    module.contrast.params[1] = 0.07  # kept in float32 else, whatever the rest is in
    own, total = batch["index"], 0.0
    drawn = torch.cat([own[:, None], torch.as_tensor(OTHERS)], dim=1)
    for scale in (1.0, 1.5):
        total = total + module(scale * s["pooled"], t["pooled"], own, drawn)
    return total


def our_crd(a, t, batch, params):
    import jax

    from pwkd_jax import distillers

    made = distillers.create("crd", features=FEATURES, negatives=NEGATIVES)
    state = {"student_bank": BANKS[0], "teacher_bank": BANKS[1], "log_z": np.zeros(2), "started": np.zeros((), bool)}
    state = {"memory": {k: jnp.asarray(v, None if k == "started" else a["pooled"].dtype) for k, v in state.items()}}
    nested = {who: {k: params[f"{who}/{k}"] for k in ("kernel", "bias")} for who in ("student", "teacher")}
    drawn, crd.draw_negatives = crd.draw_negatives, lambda *_: jnp.asarray(OTHERS)
    total = 0.0
    try:
        for step, scale in enumerate((1.0, 1.5), start=1):
            from compare import outputs

            progress = distillers.Progress(jnp.int32(0), jnp.int32(step), jnp.float32(0))
            student = outputs({**a, "pooled": scale * a["pooled"]})
            variables, rngs = {"params": nested, **state}, {"distiller": jax.random.key(0)}
            (loss, _), state = made.apply(variables, student, outputs(t), batch, progress, rngs=rngs, mutable=["memory"])
            total += loss
    finally:
        crd.draw_negatives = drawn
    return total


def total(method: str, theirs: str, wrt, part="total, default settings", **more) -> Case:
    return Case(method, (MD, f"mdistiller/distillers/{theirs}.py"), whole(theirs), ("logits", *wrt), part, total=True, **more)


def other_sizes():
    return leaves(1, OTHER_SIZES)


CASES = [
    total("rkd", "RKD", ("pooled",), rtol=1e-7),
    total("pkt", "PKT", ("pooled",), rtol=1e-6, note="they add 1e-7 to a length before dividing by it; ours does not"),
    total("sp", "SP", ("stage3",)),
    total("at", "AT", STAGES),
    total("at", "AT", STAGES, "total, maps of other sizes", data=other_sizes),
    total("nst", "NST", STAGES),
    total("nst", "NST", STAGES, "total, maps of other sizes", data=other_sizes),
    Case("cc", (RD, "distiller_zoo/CC.py, models/util.py"), correlation, ("pooled",), "loss and both embeddings",
         build=correlation_build, weights={f"{who}/{ours}": (f"{i}.linear.{theirs}", kind) for i, who in enumerate(("student", "teacher"))
                                           for ours, theirs, kind in (("kernel", "weight", "linear"), ("bias", "bias", "same"))}),
    Case("fsp", (RD, "distiller_zoo/FSP.py"), fsp, ("stem", *STAGES), "loss, from the stem", data=lambda: leaves(2, SAME)),
    Case("kdsvd", (RD, "distiller_zoo/KDSVD.py"), kdsvd(True), STAGES, "loss, each teacher's vector turned to a sum of 0 or more",
         data=lambda: leaves(2, SAME), rtol=1e-6),
    Case("kdsvd", (RD, "distiller_zoo/KDSVD.py"), kdsvd(False), STAGES, "loss, signs as LAPACK leaves them",
         data=lambda: leaves(2, SAME),
         differs="the value depends on the arbitrary signs of singular vectors; ours fixes them, see the row above"),
    Case("crd", (RD, "crd/criterion.py, crd/memory.py"), crd_two_steps, ("pooled",), "two steps: banks, normalisers, embeddings",
         build=crd_build, ours=our_crd, weights={f"{who}/{ours}": (f"embed_{who[0]}.linear.{theirs}", kind)
                                                 for who in ("student", "teacher")
                                                 for ours, theirs, kind in (("kernel", "weight", "linear"), ("bias", "bias", "same"))}),
]  # fmt: skip
_ = batch_of, vary
