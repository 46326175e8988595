"""Methods that compare logits."""

import jax.numpy as jnp
import numpy as np
import torch
from compare import Case
from official import MD, Fixed, Registry, load, mdistiller

from pwkd_jax.distillers.mlkd import MLKD, batch_loss, class_loss

LOGITS = ("logits",)
TORCH_MISSING = {"termios": {}, "turtle": {}}


def whole(method: str, repository: str = MD, group: str = "", missing=(), **settings):
    """theirs(...) of an mdistiller distiller: the sum of all its losses, cross entropy too, after every warm-up."""

    def theirs(module, s, t, batch):
        made, cfg = mdistiller(method, repository, missing)
        cfg.EXPERIMENT.LOGIT_STAND = False
        if settings:
            cfg[group].update(settings)
        distiller = module or made(Fixed(s), Fixed(t), cfg)
        distiller.student, distiller.teacher = Fixed(s), Fixed(t)
        losses = distiller.forward_train(image=batch["image"], target=batch["label"], epoch=1000)[1]
        return sum(losses.values())

    return theirs


def mlkd_parts(module, s, t, batch):
    losses = load("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py", TORCH_MISSING)
    parts = [f(s["logits"], t["logits"], T) for T in (2.0, 3.0, 4.0, 5.0, 6.0)
             for f in (losses.kd_loss, losses.bc_loss, losses.cc_loss)]  # fmt: skip
    return sum(parts)


def mlkd_whole(module, s, t, batch):
    """The released total with one view in the place of both, so that the views add nothing to what differs."""
    losses = load("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py", TORCH_MISSING)
    cfg = mdistiller("KD", "Jin-Ying/Multi-Level-Logit-Distillation")[1]
    made = losses.KD_ours(Fixed(s), Fixed(t), cfg)
    image = batch["image"]
    return sum(made.forward_train(image_weak=image, image_strong=image, target=batch["label"])[1].values()) / 2


def mlkd_as_released(s, t, batch, params):
    """What the released masks come to with one view: our parts, those of the weak view times the share that a mask keeps."""
    made, total = MLKD(), 0.0
    confidence = np.asarray(t["logits"], np.float64)
    p = np.exp(confidence - confidence.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    sure, often = p.max(-1), p.sum(0)
    share, classes = np.mean(sure <= np.percentile(sure, 50)), np.mean(often <= np.percentile(often, 50))
    for T in made.temperatures:
        instance = MLKD(temperatures=(T,)).apply({}, _logits(s), _logits(t), batch, None)[1]["instance_level"]
        total += (1 + share) * instance + share * batch_loss(s["logits"], t["logits"], T)
        total += classes * class_loss(s["logits"], t["logits"], T)
    log_p = s["logits"] - jnp.log(jnp.sum(jnp.exp(s["logits"]), -1, keepdims=True))
    ce = -jnp.mean(jnp.take_along_axis(log_p, batch["label"][:, None], 1))
    return made.ce_weight * ce + made.weight * total / 2


class _Logits:
    def __init__(self, logits):
        self.logits = logits


def _logits(a):
    return _Logits(a["logits"])


def ctkd_build(s, t):
    return load("zhengli97/CTKD", "models/temp_global.py").Global_T()


def ctkd(module, s, t, batch):
    """As train_distill has it once the curriculum has come to its end, where CosineDecay gives -1."""
    raw = module(t["logits"], s["logits"], -1.0)
    temperature = 1.0 + 20.0 * torch.sigmoid(raw)
    ce = torch.nn.functional.cross_entropy(s["logits"], batch["label"])
    return 0.1 * ce + 0.9 * load("zhengli97/CTKD", "distiller_zoo/KD.py").DistillKL()(s["logits"], t["logits"], temperature)


def nkd(**settings):
    def theirs(module, s, t, batch):
        loss = load("yzd-v/cls_KD", "mmcls/models/dis_losses/nkd.py", {"mmcls": {}, "mmcls.registry": {"MODELS": Registry()}})
        ce = torch.nn.functional.cross_entropy(s["logits"], batch["label"])
        return ce + loss.NKDLoss("loss_nkd", True, **settings)(s["logits"], t["logits"], batch["label"])

    return theirs


def ttm(name: str, exponent: float, weight: float):
    def theirs(module, s, t, batch):
        loss = getattr(load("zkxufo/TTM", f"distiller_zoo/{name.lower()}.py"), name)(exponent)
        ce = torch.nn.functional.cross_entropy(s["logits"], batch["label"])
        return ce + weight * loss(s["logits"], t["logits"])

    return theirs


def dist(module, s, t, batch):
    loss = load("hunto/image_classification_sota", "lib/models/losses/dist_kd.py").DIST(beta=1.0, gamma=1.0, tau=4.0)
    return torch.nn.functional.cross_entropy(s["logits"], batch["label"]) + 2 * loss(s["logits"], t["logits"])


def streamlined(module, s, t, batch):
    losses = load("yoshitomo-matsubara/torchdistill", "torchdistill/losses/mid_level.py", TORCHDISTILL)
    io = {"student_module_path": "m", "student_module_io": "o", "teacher_module_path": "m", "teacher_module_io": "o"}
    inputs = [{"m": {"o": x["logits"]}} for x in (s, t)]
    eye = torch.eye
    torch.eye = lambda *a, **k: eye(*a, **k, dtype=s["logits"].dtype)
    try:
        parts = sum(getattr(losses, f"SKD{name}Loss")(**io)(*inputs) for name in ("Instance", "Direction"))
    finally:
        torch.eye = eye
    return torch.nn.functional.cross_entropy(s["logits"], batch["label"]) + parts


def _as_is(made=None, **options):
    return made if made is not None else _as_is


TORCHDISTILL = {
    "..common": {}, "..common.constant": {},
    ".registry": {f"register_{n}": _as_is for n in ("loss_wrapper", "mid_level_loss", "single_loss", "custom_loss")},
}  # fmt: skip

CASES = [
    Case("kd", (MD, "mdistiller/distillers/KD.py"), whole("KD"), LOGITS, "total, default settings", total=True),
    Case("dkd", (MD, "mdistiller/distillers/DKD.py"), whole("DKD"), LOGITS, "total, default settings", total=True),
    Case("rld", ("zju-SWJ/RLD", "mdistiller/distillers/RLD.py"), whole("RLD", "zju-SWJ/RLD"), LOGITS, "total, default settings",
         total=True),
    Case("nkd", ("yzd-v/cls_KD", "mmcls/models/dis_losses/nkd.py"), nkd(temp=1.0, gamma=1.5), LOGITS, "total, ImageNet's settings",
         total=True),
    Case("nkd", ("yzd-v/cls_KD", "mmcls/models/dis_losses/nkd.py"), nkd(temp=3.0, gamma=3.5), LOGITS, "total, CIFAR-100's settings",
         options={"temperature": 3.0, "gamma": 3.5}, total=True),
    Case("dist", ("hunto/image_classification_sota", "lib/models/losses/dist_kd.py"), dist, LOGITS, "total, CIFAR-100's settings",
         total=True),
    Case("ctkd", ("zhengli97/CTKD", "models/temp_global.py, distiller_zoo/KD.py, helper/loops.py"), ctkd, LOGITS,
         "total, after the curriculum; the gradient of the temperature, reversed, too", build=ctkd_build,
         weights={"raw": ("global_T", "scalar")}, options={"start": float(1 + 20 / (1 + np.exp(-1.0)))}, total=True),
    Case("mlkd", ("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py"), mlkd_parts, LOGITS,
         "the three levels over five temperatures"),
    Case("mlkd", ("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py"), mlkd_whole, LOGITS,
         "released total, one view in both places", total=True,
         differs="the released masks come after the sum that they should thin out, so they only scale the levels (here by the next "
         "row's factors), and T = 2 and 6 of the strong view read the weak one; ours is the paper's sum without masks, on one view"),
    Case("mlkd", ("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py"), mlkd_whole, LOGITS,
         "released total against our levels times the share that each mask keeps", ours=mlkd_as_released),
    Case("ttm", ("zkxufo/TTM", "distiller_zoo/ttm.py"), ttm("TTM", 0.1, 45.0), LOGITS, "total, the README's example", total=True),
    Case("wttm", ("zkxufo/TTM", "distiller_zoo/wttm.py"), ttm("WTTM", 0.2, 4.0), LOGITS, "total, the README's example", total=True),
    Case("streamlined", ("yoshitomo-matsubara/torchdistill", "torchdistill/losses/mid_level.py"), streamlined, LOGITS,
         "total, default settings", total=True, note="the authors' own repository is not public; torchdistill names theirs as its source"),
]  # fmt: skip
