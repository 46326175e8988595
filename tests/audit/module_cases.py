"""Methods with networks of their own: attention over stages, reused classifiers, heads, learned augmentation."""

import types

import torch
from compare import Case, conv, norm
from inputs import CLASSES
from official import SIMKD, load
from relation_cases import STAGES, listed
from torch import nn

STAGE = ("stage3",)


def ce(s, batch):
    return nn.functional.cross_entropy(s["logits"], batch["label"])


# SemCKD


def semckd_build(s, t):
    channels = ([x[n].shape[1] for n in STAGES] for x in (s, t))
    return load(SIMKD, "models/util.py").SelfA(len(s["logits"]), *channels, 1.0)


def semckd(module, s, t, batch):
    values, targets, weight = module(listed(s), listed(t))
    zeros = torch.zeros
    torch.zeros = lambda *a, **k: zeros(*a, **k, dtype=weight.dtype)
    try:
        return load(SIMKD, "distiller_zoo/SemCKD.py").SemCKDLoss()(values, targets, weight)
    finally:
        torch.zeros = zeros


SEMCKD = {}
for i in (1, 2, 3):
    for who in ("query", "key"):
        SEMCKD |= conv(f"{who}{i}/hidden", f"{who}_{i - 1}.linear1", "linear", True)
        SEMCKD |= conv(f"{who}{i}/out", f"{who}_{i - 1}.linear2", "linear", True)
    for j in (1, 2, 3):
        theirs = f"regressor{i - 1}{j - 1}.regressor"
        for k, (c, n) in enumerate(((0, 1), (3, 4), (6, None))):
            SEMCKD |= conv(f"project{i}_{j}/Conv_{k}", f"{theirs}.{c}")
            SEMCKD |= norm(f"project{i}_{j}/BatchNorm_{k}", f"{theirs}.{n}") if n else {}


# SimKD


def head_of(t) -> nn.Linear:
    made = nn.Linear(*reversed(t["kernel"].shape), dtype=t["kernel"].dtype)
    made.weight.data, made.bias.data = t["kernel"].detach(), t["bias"].detach()
    return made


def simkd_build(s, t):
    return load(SIMKD, "models/util.py").SimKD(s_n=s["stage3"].shape[1], t_n=t["stage3"].shape[1], factor=2)


def simkd(module, s, t, batch):
    return nn.functional.mse_loss(*module(s["stage3"], t["stage3"], head_of(t))[:2])


def simkd_predicts(module, s, t, batch):
    logits = module.eval()(s["stage3"], t["stage3"], head_of(t))[2]
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sum()


SIM, SIM_RUNNING = {}, {}
for i in (1, 2, 3):
    SIM |= conv(f"projector/conv{i}", f"transfer.{3 * i - 3}") | norm(f"projector/norm{i}", f"transfer.{3 * i - 2}")
    for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
        SIM_RUNNING[f"batch_stats/projector/norm{i}/{ours}"] = (f"transfer.{3 * i - 2}.{theirs}", "same")
SIM_RUNNING |= {f"params/{k}": v for k, v in SIM.items()}

# SRRL


def srrl_build(s, t):
    return load(SIMKD, "models/util.py").SRRL(s_n=s["pooled"].shape[1], t_n=t["pooled"].shape[1])


def srrl(module, s, t, batch):
    guess, logits = module(s["pooled"], head_of(t))
    mse = nn.functional.mse_loss
    return mse(guess, t["pooled"]) + mse(logits, head_of(t)(t["pooled"]).detach())


def authors_srrl_build(s, t):
    return load("jingyang2017/KD_SRRL", "distiller_zoo/AIN.py").transfer_conv(s["stage3"].shape[1], t["stage3"].shape[1])


def authors_srrl(module, s, t, batch):
    """As train() has it: the connector works on the map, and what it makes is pooled for the teacher's classifier."""
    made = module(s["stage3"])
    gap = load("jingyang2017/KD_SRRL", "distiller_zoo/AIN.py").statm_loss()(made, t["stage3"])
    seen = head_of(t)(nn.functional.adaptive_avg_pool2d(made, 1).flatten(1))
    return ce(s, batch) + gap + nn.functional.mse_loss(seen, head_of(t)(t["pooled"]).detach())


# OFA


class Net(nn.Module):
    """A network of three stages, called 2 to 4, as OFA asks for them."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def stage_info(self, stage):
        if stage == -1:
            return -1, self.a["pooled"].shape[1]
        return stage, tuple(self.a[f"stage{max(stage - 1, 1)}"].shape[1:])

    def forward(self, image, requires_feat=False):
        maps = [None, None, *listed(self.a)]
        return (self.a["logits"], maps) if requires_feat else self.a["logits"]


TIMM = {name: {} for name in ("timm", "timm.models", "timm.models.vision_transformer")}
TIMM["timm.models.layers"] = {"trunc_normal_": nn.init.trunc_normal_}


def ofa_build(s, t):
    args = types.SimpleNamespace(
        ofa_eps=[1.5], ofa_stage=[2, 3, 4], num_classes=CLASSES, ofa_temperature=2.0, ofa_loss_weight=1.0, gt_loss_weight=1.0,
        kd_loss_weight=1.0,
    )  # fmt: skip
    return load("Hao840/OFAKD", "distillers/ofa.py", TIMM).OFA(Net(s), Net(t), nn.functional.cross_entropy, args)


def ofa(module, s, t, batch):
    module.student.a, module.teacher.a = s, t
    return sum(module(batch["image"], batch["label"])[1].values())


OFA = {}
for i, halvings in enumerate((2, 1, 0), start=1):
    theirs = f"projector.{i + 1}"
    for h in range(halvings):
        block = f"head{i}/Halve_{h}"
        for k, place in enumerate((0, 1, 4, 5)):
            OFA |= conv(f"{block}/Conv_{k}", f"{theirs}.{h}.op.{place}")
        for k, place in enumerate((2, 6)):
            OFA |= norm(f"{block}/BatchNorm_{k}", f"{theirs}.{h}.op.{place}")
    OFA |= {} if halvings else conv(f"head{i}/Conv_0", f"{theirs}.0", bias=True)
    OFA |= conv(f"head{i}/Dense_0", f"{theirs}.{max(halvings, 1) + 2}", "linear", True)

# SRD


def srd_build(s, t):
    missing = {"..common": {}, "..common.constant": {}, ".registry": {f"register_{n}": lambda made: made for n in (
        "loss_wrapper", "single_loss")}}  # fmt: skip
    made = load("roymiles/Simple-Recipe-Distillation", "imagenet/torchdistill/losses/single.py", missing)
    return made.OurDistillationLoss(mode="log_bn_corr_4")


def srd(module, s, t, batch):
    inputs = ({"layer4": {"output": x["pooled"][:, :, None, None]}, "fc": {"output": x["logits"]}} for x in (s, t))
    return ce(s, batch) + module(*inputs, mode="log_bn_corr_4")


ROY = "imagenet/torchdistill/losses/single.py, core/distillation.py"
LARGER = ((6, 16), (10, 8), (14, 4)), ((8, 8), (12, 4), (20, 2))
CASES = [
    Case("semckd", (SIMKD, "models/util.py, distiller_zoo/SemCKD.py"), semckd, STAGES, "loss and all its networks",
         build=semckd_build, weights=SEMCKD, golden=True),
    Case("semckd", (SIMKD, "models/util.py, distiller_zoo/SemCKD.py"), semckd, STAGES, "the same, a larger student",
         build=semckd_build, weights=SEMCKD, shapes=LARGER),
    Case("simkd", (SIMKD, "models/util.py"), simkd, STAGE, "loss and projector", build=simkd_build, weights=SIM,
         golden=True),
    Case("simkd", (SIMKD, "models/util.py"), simkd, STAGE, "the same, a larger student", build=simkd_build, weights=SIM,
         shapes=LARGER),
    Case("simkd", (SIMKD, "models/util.py, helper/loops.py"), simkd_predicts, STAGE, "predictions in evaluation",
         build=simkd_build, weights=SIM_RUNNING, call="simkd predictions", golden=True),
    Case("srrl", (SIMKD, "models/util.py, helper/loops.py"), srrl, ("pooled",), "loss and connector, CIFAR's form", golden=True,
         build=srrl_build, weights=conv("linear", "transfer.0", "pixel") | norm("norm", "transfer.1")),
    Case("srrl", ("jingyang2017/KD_SRRL", "distiller_zoo/AIN.py, train_imagenet_distillation.py"), authors_srrl,
         ("logits", *STAGE), "total and connector, the authors' ImageNet form", build=authors_srrl_build,
         options={"on_map": True}, golden=True,
         weights=conv("linear", "Connectors.0", "pixel") | norm("norm", "Connectors.1"), total=True),
    Case("srrl", ("jingyang2017/KD_SRRL", "distiller_zoo/AIN.py, train_imagenet_distillation.py"), authors_srrl,
         ("logits", *STAGE, "pooled"), "the same against our default", build=authors_srrl_build,
         weights=conv("linear", "Connectors.0", "pixel") | norm("norm", "Connectors.1"), total=True,
         differs="the default is the form of the SimKD benchmark, whose CIFAR settings it has; `on_map` is the authors'"),
    Case("ofa", ("Hao840/OFAKD", "distillers/ofa.py, utils.py"), ofa, ("logits", *STAGES), "total and heads, eps 1.5, T 2",
         build=ofa_build, weights=OFA, options={"eps": 1.5, "temperature": 2.0}, golden=True, total=True),
    Case("srd", ("roymiles/Simple-Recipe-Distillation", ROY), srd, ("logits", "pooled"), "total, default settings",
         build=srd_build, weights=conv("linear", "embed", "linear"),
         shapes=(((6, 2), (6, 2), (512, 2)), ((6, 2), (6, 2), (512, 2))), total=True),
]  # fmt: skip
