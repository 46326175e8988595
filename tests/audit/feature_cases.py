"""Methods that compare feature maps, through connectors."""

import types
from unittest import mock

import inputs
import torch
from compare import Case, conv, norm
from logit_cases import whole
from official import MD, RD, Fixed, Node, load, mdistiller
from ours import KEPT
from relation_cases import STAGES, listed
from torch import nn

PREACT = ("preact1", "preact2", "preact3")
def distiller(method: str, group: str = "", **settings):
    """build(...) of an mdistiller distiller."""

    def build(s, t):
        made, cfg = mdistiller(method)
        if settings:
            cfg[group].update(settings)
        return made(Fixed(s), Fixed(t), cfg)

    return build


def fitnet(part: str, student: int, teacher: int, kind="conv") -> Case:
    return Case(
        "fitnet", (MD, "mdistiller/distillers/FitNet.py, _common.py"), whole("FitNet"), ("logits", "stage2"), f"total, {part}",
        build=distiller("FitNet"), total=True, shapes=(((6, 8), (10, student), (14, 4)), ((8, 8), (12, teacher), (20, 4))),
        weights=conv("regressor/conv", "conv_reg.conv", kind) | norm("regressor/norm", "conv_reg.bn"),
    )  # fmt: skip


def vid_build(s, t):
    made = load(RD, "distiller_zoo/VID.py").VIDLoss
    made = nn.ModuleList([made(s[n].shape[1], t[n].shape[1], t[n].shape[1]) for n in STAGES])
    return made


def vid(module, s, t, batch):
    return sum(m(s[n], t[n]) for m, n in zip(module, STAGES, strict=True))


VID = {f"stage{i}/conv{j}/kernel": (f"{i - 1}.regressor.{2 * j - 2}.weight", "conv") for i in (1, 2, 3) for j in (1, 2, 3)}
VID |= {f"stage{i}/scale": (f"{i - 1}.log_scale", "same") for i in (1, 2, 3)}
OFD = {}
for i in (1, 2, 3):
    theirs = f"connectors.connectors.{i - 1}"
    OFD |= conv(f"stage{i}_conv", f"{theirs}.0") | norm(f"stage{i}_norm", f"{theirs}.1")
REVIEW = {}
for i, name in enumerate(("pooled", "stage3", "stage2", "stage1")):
    REVIEW |= conv(f"{name}/middle_conv", f"abfs.{i}.conv1.0") | norm(f"{name}/middle_norm", f"abfs.{i}.conv1.1")
    REVIEW |= conv(f"{name}/conv", f"abfs.{i}.conv2.0") | norm(f"{name}/norm", f"abfs.{i}.conv2.1")
    REVIEW |= conv(f"{name}/attention", f"abfs.{i}.att_conv.0", bias=True) if i else {}


def authors_ofd_build(s, t):
    return load("clovaai/overhaul-distillation", "CIFAR-100/distiller.py").Distiller(Fixed(t), Fixed(s))


def authors_ofd(module, s, t, batch):
    """As train_with_distill has it, but for the teacher's batch norm."""
    module.t_net, module.s_net = Fixed(t), Fixed(s)
    logits, loss = module(batch["image"])
    return nn.functional.cross_entropy(logits, batch["label"]) + loss.sum() / len(logits) / 1000


class Listed(nn.Module):
    """A student as dvlab-research/ReviewKD has them: all its features in one list, and logits."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, image, is_feat=True):
        return [*listed(self.a), self.a["pooled"][:, :, None, None]], self.a["logits"]


def authors_review_build(student, teacher):
    channels = [[c for c, _ in x] + [x[-1][0]] for x in (student, teacher)]
    sides = [[1, *(side for _, side in reversed(x))] for x in (student, teacher)]
    return lambda s, t: load("dvlab-research/ReviewKD", REVIEWKD).ReviewKD(Listed(s), *channels, *sides)


def authors_review(module, s, t, batch):
    """As train.py has it after the warm-up, at weight 1."""
    module.student.a = s
    made, logits = module(batch["image"])
    loss = load("dvlab-research/ReviewKD", REVIEWKD).hcl(made, [*listed(t, PREACT), t["pooled"][:, :, None, None]])
    return nn.functional.cross_entropy(logits, batch["label"]) + loss


REVIEWKD, REVIEWED = "CIFAR-100/model/reviewkd.py", (((6, 16), (10, 8), (14, 4)), ((8, 16), (12, 8), (20, 4)))


def review(part: str, student, teacher, epoch=1000.0, note="") -> Case:
    channels = [[c for c, _ in x] + [x[-1][0]] for x in (student, teacher)]
    sides = [[1, *(side for _, side in reversed(x))] for x in (student, teacher)]
    settings = {"IN_CHANNELS": channels[0], "OUT_CHANNELS": channels[1], "SHAPES": sides[0], "OUT_SHAPES": sides[1]}
    return Case(
        "reviewkd", (MD, "mdistiller/distillers/ReviewKD.py"), whole("ReviewKD", epoch=epoch), ("logits", *STAGES, "pooled"),
        f"total, {part}", build=distiller("ReviewKD", "REVIEWKD", **settings), total=True, shapes=(student, teacher),
        weights=REVIEW, epoch=epoch, note=note, golden=part != "same sizes",
    )  # fmt: skip


def ab_build(s, t):
    return load(RD, "models/util.py").Connector(*([x[n].shape for n in PREACT] for x in (s, t)))


def ab(module, s, t, batch):
    return sum(load(RD, "distiller_zoo/AB.py").ABLoss(3)(module(listed(s, PREACT)), listed(t, PREACT)))


AB = {}
for i in (1, 2, 3):
    AB |= conv(f"stage{i}/conv", f"connectors.{i - 1}.conv") | norm(f"stage{i}/norm", f"connectors.{i - 1}.bn")


def ft_build(s, t):
    util = load(RD, "models/util.py")
    shapes = s["stage3"].shape, t["stage3"].shape
    return nn.ModuleDict({"paraphraser": util.Paraphraser(shapes[1]), "translator": util.Translator(*shapes)})


def ft(module, s, t, batch):
    """As train_distill has it, where the paraphraser is in no optimiser."""
    factor = module["paraphraser"](t["stage3"], is_factor=True).detach()
    return load(RD, "distiller_zoo/FT.py").FactorTransfer()(module["translator"](s["stage3"]), factor)


def ft_initial(module, s, t, batch):
    return nn.functional.mse_loss(module["paraphraser"](t["stage3"])[1], t["stage3"]) + 0 * s["stage3"].sum()


FT = {}
for i in (1, 2, 3):
    FT |= conv(f"translator/conv{i}", f"translator.encoder.{3 * i - 3}")
    FT |= norm(f"translator/norm{i}", f"translator.encoder.{3 * i - 2}")
    FT |= conv(f"paraphraser/encoder{i}", f"paraphraser.encoder.{3 * i - 3}", bias=True)
    FT |= conv(f"paraphraser/decoder{i}", f"paraphraser.decoder.{3 * i - 3}", "up", bias=True)


JANGHO = "Jangho-Kim/Factor-Transfer-pytorch"


def authors_ft_build(s, t):
    made, features = load(JANGHO, "Models/FeatureProjection.py"), t["stage3"].shape[1] // 2
    parts = {"paraphraser": made.Paraphraser(t["stage3"].shape[1], features)}
    return nn.ModuleDict(parts | {"translator": made.Translator(s["stage3"].shape[1], features)})


def authors_ft(module, s, t, batch):
    """As train_student.py has it."""
    factor = load(JANGHO, "utils.py", ["torchvision", "torchvision.transforms"]).FT
    return nn.L1Loss()(factor(module["translator"](s["stage3"])), factor(module["paraphraser"](t["stage3"], 1).detach()))


def authors_ft_initial(module, s, t, batch):
    """As train_Paraphraser.py has it."""
    return nn.L1Loss()(module["paraphraser"](t["stage3"], 0), t["stage3"]) + 0 * s["stage3"].sum()


JANGHO_FT = {}
for i in (0, 1, 2):
    JANGHO_FT |= conv(f"translator/conv{i + 1}", f"translator.conv{i}", bias=True)
    JANGHO_FT |= conv(f"paraphraser/encoder{i + 1}", f"paraphraser.conv{i}", bias=True)
    JANGHO_FT |= conv(f"paraphraser/decoder{i + 1}", f"paraphraser.deconv{i}", "up", bias=True)


def ickd_build(s, t):
    dims = s["stage3"].shape[1], t["stage3"].shape[1]
    options = types.SimpleNamespace(s_dim=dims[0], t_dim=dims[1], feat_dim=dims[1])
    return load("ADLab-AutoDrive/ICKD", "Cifar100/distiller_zoo/ICKD.py").ICKDLoss(options)


def ickd(module, s, t, batch):
    ce = nn.functional.cross_entropy(s["logits"], batch["label"])
    return ce + 2.5 * sum(module([s["stage3"]], [t["stage3"]]))


def mgd_build(s, t):
    builder = {"..builder": {"DISTILL_LOSSES": types.SimpleNamespace(register_module=lambda: lambda made: made)}}
    made = load("yzd-v/MGD", "cls/mmcls/distillation/losses/mgd.py", builder).MGDLoss
    return made(s["stage3"].shape[1], t["stage3"].shape[1], "loss_mgd")


def mgd_total(module, s, t, batch):
    ce = nn.functional.cross_entropy(s["logits"], batch["label"])
    with mock.patch.object(torch, "rand", lambda shape: torch.tensor(KEPT)):
        return ce + module(s["stage3"], t["stage3"])


MGD = conv("align", "align", bias=True)
MGD |= conv("generate1", "generation.0", bias=True) | conv("generate2", "generation.2", bias=True)


def cat(**settings):
    def theirs(module, s, t, batch):
        made, cfg = mdistiller("CAT_KD", "GzyAftermath/CAT-KD")
        cfg.CAT_KD.LOSS = Node(cfg.CAT_KD.LOSS | {k: v for k, v in settings.items() if k.startswith("CA")})
        cfg.CAT_KD.IF_NORMALIZE = settings["IF_NORMALIZE"]
        # Their networks end in a 1x1 convolution before the pooling: its outputs are the last of their features.
        s, t = ({**x, "stage3": torch.einsum("bchw,kc->bkhw", x["stage3"], x["kernel"])} for x in (s, t))
        losses = made(Fixed(s), Fixed(t), cfg).forward_train(image=None, target=batch["label"])[1]
        return sum(losses.values())

    return theirs


CAT = ("GzyAftermath/CAT-KD", "mdistiller/distillers/CAT_KD.py")
CASES = [
    fitnet("same size", 8, 8),
    fitnet("half", 8, 4),
    fitnet("double", 4, 8, "up"),
    fitnet("as many pixels less", 8, 6),
    Case("vid", (RD, "distiller_zoo/VID.py"), vid, STAGES, "loss, regressors and variances", build=vid_build, weights=VID),
    Case("ofd", (MD, "mdistiller/distillers/OFD.py"), whole("OFD"), ("logits", *PREACT), "total, default settings",
         golden=True, build=distiller("OFD"), weights=OFD, total=True, rtol=1e-6, note="they keep margins in float32"),
    Case("ofd", ("clovaai/overhaul-distillation", "CIFAR-100/distiller.py, train_with_distillation.py"), authors_ofd,
         ("logits", *PREACT), "total, the same features", build=authors_ofd_build, total=True, rtol=1e-6,
         weights={k: (n.replace("connectors.connectors", "Connectors"), kind) for k, (n, kind) in OFD.items()},
         note="given the teacher's features; the authors take them with its batch norm in training mode, "
              "by the batch's statistics, and ours, as in every method, in evaluation mode"),
    Case("reviewkd", ("dvlab-research/ReviewKD", REVIEWKD), authors_review, ("logits", *STAGES, "pooled"), "total, same sizes",
         build=authors_review_build(*REVIEWED), shapes=REVIEWED, weights=REVIEW, total=True),
    review("same sizes", ((6, 16), (10, 8), (14, 4)), ((8, 16), (12, 8), (20, 4))),
    review("a student of half the size", ((6, 8), (10, 4), (14, 2)), ((8, 16), (12, 8), (20, 4))),
    review("epoch 5 of the warm-up", ((6, 16), (10, 8), (14, 4)), ((8, 16), (12, 8), (20, 4)), 5.0,
           "mdistiller counts epochs from 1, the authors' own dvlab-research/ReviewKD from 0, both a whole epoch "
            "long; ours is between"),
    Case("ab", (RD, "distiller_zoo/AB.py, models/util.py"), ab, PREACT, "loss of the initial phase", build=ab_build,
         weights=AB),
    Case("ab", (RD, "distiller_zoo/AB.py"), ab, PREACT, "the same, equal shapes", build=ab_build,
         options={"connectors": False}, shapes=inputs.SAME),
    Case("ft", (RD, "distiller_zoo/FT.py, models/util.py"), ft, ("stage3",), "loss and translator", build=ft_build,
         weights=FT, call="ft", golden=True),
    Case("ft", (RD, "models/util.py, helper/pretrain.py"), ft_initial, ("stage3",), "initial phase: the paraphraser",
         build=ft_build, weights=FT, call="ft initial", golden=True),
    Case("ft", (JANGHO, "Models/FeatureProjection.py, train_student.py"), authors_ft, ("stage3",),
         "loss and translator, the authors' form", build=authors_ft_build, weights=JANGHO_FT, call="ft",
         options={"whole_factors": True}, golden=True,
         note="the default is RepDistiller's form, whose weight and benchmark it has: factors averaged over channels, batch "
              "norm in the translator, a squared error in the initial phase; `whole_factors` is the authors'"),
    Case("ft", (JANGHO, "Models/FeatureProjection.py, train_Paraphraser.py"), authors_ft_initial, ("stage3",),
         "initial phase, the authors' form", build=authors_ft_build, weights=JANGHO_FT, call="ft initial",
         options={"whole_factors": True}, golden=True),
    Case("ickd", ("ADLab-AutoDrive/ICKD", "Cifar100/distiller_zoo/ICKD.py"), ickd, ("logits", "stage3"),
         "total without their KD", build=ickd_build, weights=conv("conv", "embed_s.conv2d") | norm("norm", "embed_s.l2norm"),
         total=True),
    Case("mgd", ("yzd-v/MGD", "cls/mmcls/distillation/losses/mgd.py"), mgd_total, ("logits", "stage3"),
         "total, the same mask", build=mgd_build, weights=MGD, total=True, patch="mgd", golden=True,
         note="they align channels only where the counts differ; ours always does, since a stage's counts change"),
    Case("catkd", CAT, cat(IF_NORMALIZE=False, CAT_loss_weight=15.0), ("logits", "stage3", "kernel"),
         "total, resnet32x4-resnet8x4", total=True),
    Case("catkd", CAT, cat(IF_NORMALIZE=True, CAT_loss_weight=600.0, CAM_RESOLUTION=4), ("logits", "stage3", "kernel"),
         "total, ShuffleNets' settings", options={"normalised": True, "resolution": 4, "weight": 600.0}, total=True,
         shapes=(((6, 16), (10, 8), (14, 4)), ((8, 16), (12, 8), (20, 8)))),
]  # fmt: skip
