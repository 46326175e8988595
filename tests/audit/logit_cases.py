"""Methods that compare logits."""

import types

import numpy as np
import torch
from compare import Case
from official import MD, Fixed, Registry, load, mdistiller

LOGITS = ("logits",)
CTKD = {name: {} for name in (
    "models", "models.temp_global", "models.util", "dataset", "dataset.cifar100", "dataset.imagenet", "distiller_zoo", "crd",
    "crd.criterion", "helper", "helper.loops", "helper.util")}  # fmt: skip
HELD = "they hold the factor for an epoch, counted from 1: it is 1/{} in the first; ours grows with every step from 0"
TORCH_MISSING = {"termios": {}, "turtle": {}}


def whole(method: str, repository: str = MD, epoch: float = 1000):
    """theirs(...) of an mdistiller distiller: the sum of all its losses, cross entropy too, by default after every warm-up."""

    def theirs(module, s, t, batch):
        made, cfg = mdistiller(method, repository)
        cfg.EXPERIMENT.LOGIT_STAND = False
        distiller = module or made(Fixed(s), Fixed(t), cfg)
        distiller.student, distiller.teacher = Fixed(s), Fixed(t)
        losses = distiller.forward_train(image=batch["image"], target=batch["label"], epoch=epoch)[1]
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


def ctkd_build(s, t):
    return load("zhengli97/CTKD", "models/temp_global.py").Global_T()


def ctkd(epoch: int):
    """theirs(...) as train_distill has it in this epoch of a curriculum of ten."""

    def theirs(module, s, t, batch):
        decay = load("zhengli97/CTKD", "train_student.py", CTKD).CosineDecay(max_value=0.0, min_value=-1.0, num_loops=10.0)
        temperature = 1.0 + 20.0 * torch.sigmoid(module(t["logits"], s["logits"], decay.get_value(epoch)))
        ce = torch.nn.functional.cross_entropy(s["logits"], batch["label"])
        return 0.1 * ce + 0.9 * load("zhengli97/CTKD", "distiller_zoo/KD.py").DistillKL()(s["logits"], t["logits"], temperature)

    return theirs


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


def abkd(alpha: float, beta: float, weight: float):
    def theirs(module, s, t, batch):
        options = types.SimpleNamespace(kd_T=4.0, ab_alpha=alpha, ab_beta=beta)
        divergence = load("ghwang-s/abkd", "standard_classification/distiller_zoo/abkl.py").ABKL(options)
        ce = torch.nn.functional.cross_entropy(s["logits"], batch["label"])
        return ce + weight * divergence(s["logits"], t["logits"])[0]

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

RAW, START = {"raw": ("global_T", "scalar")}, {"start": float(1 + 20 / (1 + np.exp(-1.0)))}
CASES = [
    Case("kd", (MD, "mdistiller/distillers/KD.py"), whole("KD"), LOGITS, "total, default settings", total=True),
    Case("dkd", (MD, "mdistiller/distillers/DKD.py"), whole("DKD"), LOGITS, "total, default settings", total=True),
    Case("dkd", (MD, "mdistiller/distillers/DKD.py"), whole("DKD", epoch=5), LOGITS, "epoch 5 of the warm-up", total=True,
         epoch=5.0, note=HELD.format(20)),
    Case("rld", ("zju-SWJ/RLD", "mdistiller/distillers/RLD.py"), whole("RLD", "zju-SWJ/RLD"), LOGITS,
         "total, default settings", total=True, golden=True),
    Case("rld", ("zju-SWJ/RLD", "mdistiller/distillers/RLD.py"), whole("RLD", "zju-SWJ/RLD", epoch=5), LOGITS,
         "epoch 5 of the warm-up", total=True, epoch=5.0, note=HELD.format(20), golden=True),
    Case("nkd", ("yzd-v/cls_KD", "mmcls/models/dis_losses/nkd.py"), nkd(temp=1.0, gamma=1.5), LOGITS,
         "total, ImageNet's settings", total=True, golden=True),
    Case("nkd", ("yzd-v/cls_KD", "mmcls/models/dis_losses/nkd.py"), nkd(temp=3.0, gamma=3.5), LOGITS,
         "total, CIFAR-100's settings", options={"temperature": 3.0, "gamma": 3.5}, total=True, golden=True),
    Case("dist", ("hunto/image_classification_sota", "lib/models/losses/dist_kd.py"), dist, LOGITS,
         "total, CIFAR-100's settings", total=True),
    Case("ctkd", ("zhengli97/CTKD", "models/temp_global.py, distiller_zoo/KD.py, helper/loops.py"), ctkd(200), LOGITS,
         "total, after the curriculum; the gradient of the temperature, reversed, too", build=ctkd_build, weights=RAW,
         total=True, options=START, golden=True),
    Case("ctkd", ("zhengli97/CTKD", "train_student.py"), ctkd(3), LOGITS, "the same in epoch 3 of the curriculum",
         build=ctkd_build, weights=RAW, total=True, options=START, epoch=3.0, golden=True,
         note="they hold the factor for an epoch, from 1; ours grows with every step"),
    Case("mlkd", ("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py"), mlkd_parts, LOGITS,
         "the three levels over five temperatures", call="mlkd levels"),
    Case("mlkd", ("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py"), mlkd_whole, LOGITS,
         "released total, one view in both places", total=True,
         differs="the released masks come after the sum that they should thin out, so they only scale the levels "
                 "(here by the next row's factors), and T = 2 and 6 of the strong view read the weak one; ours is "
                 "the paper's sum without masks, on one view"),
    Case("mlkd", ("Jin-Ying/Multi-Level-Logit-Distillation", "mdistiller/distillers/KD_ours.py"), mlkd_whole, LOGITS,
         "released total against our levels times the share that each mask keeps", call="mlkd as released"),
    Case("ttm", ("zkxufo/TTM", "distiller_zoo/ttm.py"), ttm("TTM", 0.1, 45.0), LOGITS, "total, the README's example",
         total=True),
    Case("wttm", ("zkxufo/TTM", "distiller_zoo/wttm.py"), ttm("WTTM", 0.2, 4.0), LOGITS, "total, the README's example",
         total=True),
    Case("abkd", ("ghwang-s/abkd", "standard_classification/distiller_zoo/abkl.py"), abkd(0.8, 0.3, 32.0), LOGITS,
         "total, the README's example", total=True, golden=True),
    Case("abkd", ("ghwang-s/abkd", "standard_classification/distiller_zoo/abkl.py"), abkd(0.5, 0.9, 100.0), LOGITS,
         "total, other exponents and weight", total=True, options={"alpha": 0.5, "beta": 0.9, "weight": 100.0}),
    Case("streamlined", ("yoshitomo-matsubara/torchdistill", "torchdistill/losses/mid_level.py"), streamlined, LOGITS,
         "total, default settings", total=True,
         note="a port: torchdistill names the authors' code as the source of its settings"),
]  # fmt: skip
