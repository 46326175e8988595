"""Methods of 2023 and 2024, each by its authors' own step: regions, transport, N parts, an orthogonal projection."""

import contextlib
import functools
import io
import types
from unittest import mock

import torch
from compare import KINDS, Case, conv, norm
from inputs import CLASSES
from official import Fixed, load, mdistiller
from ours import PARTS
from torch import nn

SDD, WKD, NORM, VKD = "shicaiwei123/SDD-CVPR2024", "JiamingLv/WKD", "OSVAI/NORM", "roymiles/VkD"
ALL = ("logits", "stage3", "kernel", "bias")
EIGHT = (((6, 8), (10, 8), (14, 8)), ((8, 8), (12, 8), (20, 8)))
HELD = "they hold the factor for an epoch, counted from 1; ours {} with every step from 0"


def quiet(theirs):
    """theirs(...) without what their code prints."""

    @functools.wraps(theirs)
    def run(*args):
        with contextlib.redirect_stdout(io.StringIO()):
            return theirs(*args)

    return run


def classifier(a):
    return lambda x: nn.functional.linear(x, a["kernel"], a["bias"])


# SDD


class Regions(nn.Module):
    """Logits, and those of regions by their network's own forward on a map that is already there."""

    def __init__(self, a, scales: str):
        super().__init__()
        utils = load(SDD, "mdistiller/models/cifar/utils.py")
        names = [".".join(("mdistiller", "models", "cifar", "utils")[:i]) for i in (1, 2, 3)]
        missing = {**{n: {} for n in names}, "mdistiller.models.cifar.utils": {"SPP": utils.SPP}}
        network, same = load(SDD, "mdistiller/models/cifar/resnet.py", missing).ResNet_SDD, nn.Identity()
        layers = {f"layer{i}": lambda _, x=a[f"stage{i}"]: (x, x) for i in (1, 2, 3)}
        parts = types.SimpleNamespace(
            **layers, conv1=same, bn1=same, relu=same, spp=utils.SPP(scales), avgpool=nn.AdaptiveAvgPool2d(1), fc=classifier(a),
            class_num=CLASSES,
        )  # fmt: skip
        self.result = a["logits"], network.forward(parts, a["stem"])[1]

    def forward(self, image):
        return self.result


def sdd(name: str, scales: str, epoch: float = 1000):
    @quiet
    def theirs(module, s, t, batch):
        cfg = mdistiller("KD", SDD)[1]
        cfg.M, cfg.warmup = scales, 20.0
        made = getattr(load(SDD, f"mdistiller/distillers/{'KD' if name == 'SDD_KD' else name}.py"), name)
        distiller = made(Regions(s, scales), Regions(t, scales), cfg)
        return sum(distiller.forward_train(image=None, target=batch["label"], epoch=epoch)[1].values())

    return theirs


# WKD


def wkd_build(logit: float, feature: float, **settings):
    @quiet
    def build(s, t):
        made, cfg = mdistiller("WKD", WKD)
        cfg.WKD.LOSS.update(WKD_LOGIT_WEIGHT=logit, WKD_FEAT_WEIGHT=feature, COSINE_DECAY_EPOCH=150)
        cfg.WKD.update(INPUT_SIZE=(8, 8), HINT_LAYER=-1, PROJECTOR="conv1x1", COST_MATRIX="fc", **settings)
        teacher = Fixed(t)
        teacher.fc = types.SimpleNamespace(weight=t["kernel"])
        return made(Fixed(s), teacher, cfg)

    return build


def wkd(epoch: float):
    def theirs(module, s, t, batch):
        module.student, module.teacher = Fixed(s), Fixed(t)
        # They cast to float32 by name.
        with mock.patch.object(torch, "float32", s["logits"].dtype):
            losses = module.forward_train(image=batch["image"], target=batch["label"], epoch=epoch)[1]
        return sum(losses.values())

    return theirs


# NORM

KINDS |= {
    "expand": (lambda w: w[:, :, 0, 0].T.reshape(w.shape[1], PARTS, -1),
               lambda w, shape: w.reshape(shape[1], shape[0]).T[:, :, None, None]),
    "contract": (lambda w: w[:, :, 0, 0].T.reshape(PARTS, -1, w.shape[0]),
                 lambda w, shape: w.reshape(shape[1], shape[0]).T[:, :, None, None]),
    "parts": (lambda w: w.reshape(PARTS, -1), lambda w, shape: w.reshape(shape)),
}  # fmt: skip


class Given(nn.Module):
    """A layer, or a network, that gives what it was given."""

    result = None

    def forward(self, *args, **kwargs):
        return self.result


def norm_build(s, t):
    channels = s["stage3"].shape[1], t["stage3"].shape[1]
    network = load(NORM, "models/cifar/resnet_student.py").ResNet
    made = network(8, [1, 1, 1, channels[0]], num_classes=CLASSES, co_sponge=PARTS, channel_t=channels[1])
    made.conv1 = made.bn1 = made.relu = nn.Identity()
    made.layer1, made.layer2, made.layer3, made.avgpool = Given(), Given(), Given(), nn.AdaptiveAvgPool2d(1)
    del made.fc
    return made


def norm_student(module, s):
    for i in (1, 2, 3):
        getattr(module, f"layer{i}").result = s[f"stage{i}"], s[f"stage{i}"]
    module.fc = classifier(s)
    return module


def norm_step(epoch: int, alpha: float = 0.0):
    """theirs(...) as train_distill takes a step; its own backward call has then left the gradients."""

    @quiet
    def theirs(module, s, t, batch):
        teacher = Given()
        teacher.result = [t["stem"], *(t[f"stage{i}"] for i in (1, 2, 3)), t["pooled"]], t["logits"]
        options = types.SimpleNamespace(
            dataset="cifar100", distill="NORM", model_s="resnet8x4", num_cls=CLASSES, co_sponge=PARTS, ceta=2.5, gamma=0.1,
            alpha=alpha, beta=1.0, beta1=1, print_freq=100,
        )  # fmt: skip
        kl = load(NORM, "distiller_zoo/KD.py").DistillKL(4.0)
        batches, losses = [(s["stem"], batch["label"], batch["index"])], [nn.CrossEntropyLoss(), kl, nn.MSELoss()]
        train = load(NORM, "helper/loops.py").train_distill
        value = train(epoch, batches, [norm_student(module, s), teacher], losses, mock.MagicMock(), options)[1]
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    return theirs


def norm_predicts(module, s, t, batch):
    """Their predictions, levelled as train_distill does with them."""
    logits = norm_student(module, s).eval()(s["stem"])
    logits = 2.5 * nn.functional.layer_norm(logits, (CLASSES,), eps=1e-7)
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sum()


TRANSFORM, RUNNING = {}, {}
for name, layer, kind in (("expand", "layer31", "parts"), ("contract", "layer32", "same")):
    TRANSFORM[f"transform/{name}/kernel"] = (f"{layer}.0.weight", name)
    TRANSFORM |= {f"transform/{name}_norm/{o}": (f"{layer}.1.{w}", kind) for o, w in (("scale", "weight"), ("bias", "bias"))}
    RUNNING |= {f"batch_stats/transform/{name}_norm/{o}": (f"{layer}.1.running_{o}", kind) for o in ("mean", "var")}
RUNNING |= {f"params/{k}": v for k, v in TRANSFORM.items()}

# VkD


def vkd_build(orthogonal_map=None):
    """The projector of train.py, beginning at the identity; orthogonal_map: another than PyTorch's choice by the shape."""

    def build(s, t):
        made = nn.ModuleDict({"projector": nn.Linear(s["pooled"].shape[1], t["pooled"].shape[1], bias=False)})
        nn.utils.parametrizations.orthogonal(made["projector"], orthogonal_map=orthogonal_map)
        base = made["projector"].parametrizations.weight[0].base
        base.copy_(torch.eye(len(base)))
        return made

    return build


def vkd(module, s, t, batch):
    """As train_one_epoch takes a step. It has no step without KD: the token's logits are the teacher's, and KD is 0."""
    weight = module["projector"].parametrizations.weight
    if weight[0].orthogonal_map.name == "householder":
        # There the diagonal is of signs.
        weight.original.data.diagonal().fill_(-1)
    student, teacher, found = types.SimpleNamespace(), types.SimpleNamespace(), []
    student.module, student.train, student.parameters, teacher.eval = student, lambda: None, list, lambda: None
    student.forward_features = lambda x: (s["logits"], t["logits"], s["pooled"][:, None])
    student.head = student.head_dist = nn.Identity()
    student.projector = module["projector"]
    teacher.forward_features, teacher.forward_head = lambda x: t["pooled"][:, :, None, None], lambda x: t["logits"]
    missing = ["timm", "timm.models", "timm.utils", "utils", "utils.tensors"]
    step, kl = load(VKD, "engine.py", missing).train_one_epoch, nn.KLDivLoss(reduction="batchmean")
    args, batches = types.SimpleNamespace(alpha=1.0, gamma=1.0, bce_loss=False), [(batch["image"], batch["label"], None)]
    optimizer, schedule = mock.MagicMock(is_second_order=False), mock.MagicMock()
    with mock.patch.object(torch.cuda, "synchronize"):
        step(1, None, None, student, teacher, nn.CrossEntropyLoss(), kl, batches, optimizer, "cpu", 0,
             lambda loss, *a, **k: found.append(loss), 0.0, lr_scheduler=schedule, args=args)  # fmt: skip
    return found[0]


KD_FILE, DKD_FILE = ((SDD, f"mdistiller/distillers/{n}.py, models/cifar/resnet.py, utils.py") for n in ("KD", "SDD_DKD"))
WKD_FILE, TRAIN = (WKD, "mdistiller/distillers/WKD.py"), (NORM, "helper/loops.py, models/cifar/resnet_student.py")
LEVEL, PROJECTION = {"parts": PARTS}, {"projection": ("projector.parametrizations.weight.original", "linear")}
CONVREG = conv("regressor/conv", "conv_reg.conv") | norm("regressor/norm", "conv_reg.bn")
SAME, WIDER = (((8, 8), (12, 8), (20, 4)),) * 2, (((6, 8), (10, 8), (24, 4)), ((8, 8), (12, 8), (20, 4)))
CASES = [
    Case("sdd", KD_FILE, sdd("SDD_KD", "[1,2]"), ALL, "total, default settings", total=True, shapes=EIGHT, golden=True),
    Case("sdd", KD_FILE, sdd("SDD_KD", "[1,2,4]"), ALL, "total, grids for pairs of two kinds", total=True, shapes=EIGHT,
         options={"scales": (2, 4)}),
    Case("sdd_dkd", DKD_FILE, sdd("SDD_DKD", "[1,2]"), ALL, "total, default settings", total=True, shapes=EIGHT),
    Case("sdd_dkd", DKD_FILE, sdd("SDD_DKD", "[1,2,4]", 5), ALL, "the same with all grids, epoch 5 of the warm-up", total=True,
         shapes=EIGHT, options={"scales": (2, 4)}, epoch=5.0, golden=True, note=HELD.format("grows")),
    Case("wkd_l", WKD_FILE, wkd(100), ("logits",), "total, default settings", build=wkd_build(600.0, 0.0, TEMPERATURE=8.0),
         total=True, epoch=100.0),
    Case("wkd_l", WKD_FILE, wkd(200), ("logits",), "wrn40-2 to ShuffleV1, epoch 200 of the fade", total=True, epoch=200.0,
         build=wkd_build(200.0, 0.0, TEMPERATURE=6.0), options={"transport_weight": 200.0, "temperature": 6.0}, golden=True,
         note=HELD.format("falls") + ", so the last epoch of theirs has none"),
    Case("wkd_f", WKD_FILE, wkd(100), ("logits", "stage3"), "total, default settings", total=True, epoch=100.0,
         build=wkd_build(0.0, 0.08, MEAN_COV_RATIO=4.0, SPATIAL_GRID=1), weights=CONVREG),
    Case("wkd_f", WKD_FILE, wkd(200), ("logits", "stage3"), "wrn40-2 to ShuffleV1, epoch 200 of the fade", total=True,
         build=wkd_build(0.0, 0.3, MEAN_COV_RATIO=3.0, SPATIAL_GRID=4), weights=CONVREG, shapes=EIGHT, epoch=200.0, golden=True,
         options={"weight": 0.3, "mean_weight": 3.0, "grid": 4}, note=HELD.format("falls")),
    Case("norm", TRAIN, norm_step(100), ALL[1:], "total, default settings, 3 parts", build=norm_build, weights=TRANSFORM,
         total=True, epoch=100.0, options=LEVEL),
    Case("norm", TRAIN, norm_step(15, 1.0), ALL[1:], "NORM+KD in epoch 15, a larger teacher's map", build=norm_build,
         weights=TRANSFORM, total=True, epoch=15.0, options=LEVEL | {"kd_weight": 1.0}, golden=True,
         shapes=(((6, 8), (10, 8), (14, 4)), ((8, 8), (12, 8), (20, 8)))),
    Case("norm", (NORM, "models/cifar/resnet_student.py"), norm_predicts, ALL[1:], "predictions in evaluation",
         build=norm_build, weights=RUNNING, options=LEVEL, call="norm predictions", golden=True,
         note="theirs are not levelled, which changes no class"),
    Case("vkd", (VKD, "engine.py, train.py"), vkd, ("logits", "pooled"), "total and projection, as many features",
         build=vkd_build(), weights=PROJECTION, total=True, shapes=SAME, golden=True,
         note="theirs begins at a drawn orthogonal matrix, here at the identity"),
    Case("vkd", (VKD, "engine.py, train.py"), vkd, ("logits", "pooled"), "the same, a smaller student", build=vkd_build(),
         weights=PROJECTION, total=True,
         differs="where the counts differ theirs is Householder's map, another one onto the same projections; its signs are a "
                 "diagonal of -1 that the optimiser of train.py decays and PyTorch cuts to whole numbers: after one step the "
                 "projection is 0 and the term teaches nothing more; ours is the exponential for every shape: next two"),
    Case("vkd", (VKD, "engine.py"), vkd, ("logits", "pooled"), "a smaller student, by PyTorch's exponential map",
         build=vkd_build("matrix_exp"), weights=PROJECTION, total=True),
    Case("vkd", (VKD, "engine.py"), vkd, ("logits", "pooled"), "a larger student, by PyTorch's exponential map",
         build=vkd_build("matrix_exp"), weights=PROJECTION, total=True, shapes=WIDER),
]  # fmt: skip
