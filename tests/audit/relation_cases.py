"""Methods that compare relations: between images, between channels, between stages, or with a memory of the whole data set."""

import types

import inputs
import torch
from compare import Case, conv
from logit_cases import whole
from official import MD, RD, load
from ours import BANKS, FEATURES, NEGATIVES, OTHERS
from torch import nn

STAGES = ("stage1", "stage2", "stage3")
OTHER_SIZES = (((6, 8), (10, 4), (14, 2)), ((8, 4), (12, 4), (20, 3)))


def listed(s, names=STAGES):
    return [s[n] for n in names]


def authors_rkd(module, s, t, batch):
    util = load("lenscloth/RKD", "metric/utils.py")
    loss = load("lenscloth/RKD", "metric/loss.py", {"metric": {}, "metric.utils": {"pdist": util.pdist}})
    parts = 25 * loss.RkdDistance()(s["pooled"], t["pooled"]) + 50 * loss.RKdAngle()(s["pooled"], t["pooled"])
    return nn.functional.cross_entropy(s["logits"], batch["label"]) + parts


def authors_at(module, s, t, batch):
    loss = load("szagoruyko/attention-transfer", "utils.py", ["nested_dict"]).at_loss
    parts = sum(loss(s[n], t[n]) for n in STAGES)
    return nn.functional.cross_entropy(s["logits"], batch["label"]) + 1000 * parts


def authors_pkt(module, s, t, batch):
    loss = load("passalis/probabilistic_kt", "nn/pkt.py").cosine_similarity_loss(s["pooled"], t["pooled"])
    return nn.functional.cross_entropy(s["logits"], batch["label"]) + 30000 * loss


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


def crd_build(s, t):
    options = types.SimpleNamespace(
        s_dim=s["pooled"].shape[1], t_dim=t["pooled"].shape[1], feat_dim=FEATURES, n_data=inputs.IMAGES, nce_k=NEGATIVES,
        nce_t=0.07, nce_m=0.5,
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


def total(method: str, theirs: str, wrt, part="total, default settings", **more) -> Case:
    return Case(method, (MD, f"mdistiller/distillers/{theirs}.py"), whole(theirs), ("logits", *wrt), part, total=True, **more)


CASES = [
    Case("rkd", ("lenscloth/RKD", "metric/loss.py, metric/utils.py"), authors_rkd, ("logits", "pooled"),
         "total, default weights", total=True, rtol=1e-7),
    total("rkd", "RKD", ("pooled",), rtol=1e-7),
    Case("pkt", ("passalis/probabilistic_kt", "nn/pkt.py"), authors_pkt, ("logits", "pooled"), "total, default weight",
         total=True, rtol=1e-6, note="they add 1e-7 to a length before dividing by it; ours does not"),
    total("pkt", "PKT", ("pooled",), rtol=1e-6, golden=True,
          note="they add 1e-7 to a length before dividing by it; ours does not"),
    total("sp", "SP", ("stage3",)),
    Case("at", ("szagoruyko/attention-transfer", "utils.py"), authors_at, ("logits", *STAGES), "total, default weight",
         total=True),
    total("at", "AT", STAGES),
    total("at", "AT", STAGES, "total, maps of other sizes", shapes=OTHER_SIZES),
    total("nst", "NST", STAGES),
    total("nst", "NST", STAGES, "total, maps of other sizes", shapes=OTHER_SIZES),
    Case("cc", (RD, "distiller_zoo/CC.py, models/util.py"), correlation, ("pooled",), "loss and both embeddings",
         build=correlation_build,
         weights=conv("student", "0.linear", "linear", True) | conv("teacher", "1.linear", "linear", True)),
    Case("fsp", (RD, "distiller_zoo/FSP.py"), fsp, ("stem", *STAGES), "loss, from the stem", shapes=inputs.SAME),
    Case("kdsvd", (RD, "distiller_zoo/KDSVD.py"), kdsvd(True), STAGES,
         "loss, each teacher's vector turned to a sum of 0 or more", shapes=inputs.SAME, rtol=1e-6),
    Case("kdsvd", (RD, "distiller_zoo/KDSVD.py"), kdsvd(False), STAGES, "loss, signs as LAPACK leaves them",
         shapes=inputs.SAME,
         differs="the value depends on the arbitrary signs of singular vectors; ours fixes them, see the row above"),
    Case("crd", (RD, "crd/criterion.py, crd/memory.py"), crd_two_steps, ("pooled",),
         "two steps: banks, normalisers, embeddings", build=crd_build, call="crd two steps", patch="crd",
         options={"features": FEATURES, "negatives": NEGATIVES},
         weights=conv("student", "embed_s.linear", "linear", True) | conv("teacher", "embed_t.linear", "linear", True)),
]  # fmt: skip
