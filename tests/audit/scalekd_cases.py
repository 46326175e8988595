"""ScaleKD: the authors' losses and projectors in the loss of their distiller, with mmcv's two layers in their plain form."""

import types

import torch
from compare import KINDS, Case, conv, norm
from fcfd_cases import Staged
from official import load
from recent_cases import quiet
from torch import nn

SCALEKD = "deep-optimization/ScaleKD"
LOSSES = "mmcls/models/dis_losses"
DISTILLER = "mmcls/models/classifiers/distiller.py"
KINDS |= {
    "table": (lambda w: w[None], lambda w, shape: w[0]),
    "map": (lambda w: w.transpose(0, 2, 3, 1), lambda w, shape: w.transpose(0, 3, 1, 2)),
}


class Feedforward(nn.Module):
    """mmcv's FFN as it is called here: x + W2 relu(W1 x)."""

    def __init__(self, embed_dims, feedforward_channels):
        super().__init__()
        self.first, self.second = nn.Linear(embed_dims, feedforward_channels), nn.Linear(feedforward_channels, embed_dims)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Registry:
    def register_module(self):
        return lambda made: made


def official_module(name: str):
    registry = {"mmcls.registry": {"MODELS": Registry()}, "mmcls": {}, "matplotlib": {}, "matplotlib.pyplot": {}}
    missing = {
        **registry, "mmengine": {}, "mmengine.model": {"BaseModule": Module}, "mmengine.utils": {"digit_version": str},
        "mmengine.model.weight_init": {"trunc_normal_": lambda x, std: nn.init.trunc_normal_(x, std=std)}, "mmcv": {},
        "mmcv.cnn": {}, "mmcv.cnn.bricks": {}, "mmcv.cnn.bricks.drop": {"build_dropout": lambda _: nn.Identity()},
        "mmcv.cnn.bricks.transformer": {"FFN": Feedforward}, "mmcls.models": {}, "mmcls.models.utils": {},
        "mmcls.models.utils.helpers": {}, "mmcls.models.utils.layer_scale": {}, "..utils": {},
    }  # fmt: skip
    if name == "fmd":
        load(SCALEKD, f"{LOSSES}/attention.py", missing)
    return load(SCALEKD, f"{LOSSES}/{name}.py", missing)


class Label(types.SimpleNamespace):
    """A label as mmcls keeps it, not mixed."""

    def __init__(self, label):
        super().__init__(label=label)

    def __contains__(self, what):
        return False


class Module(nn.Module):
    def __init__(self, init_cfg=None):
        super().__init__()


def build(heads: tuple[int, int]):
    @quiet
    def make(s, t):
        losses = {}
        for name, stage, count, own in (("s3", "stage2", heads[0], True), ("s4", "stage3", heads[1], False)):
            student, taught = s[stage].shape, t[stage].shape
            losses[f"loss_fmd_{name}"] = official_module("fmd").FreqMaskingDistillLoss(
                name, True, [0.08, 0.06], student[1], taught[1], taught[2:], student[2:], taught[1], self_query=own,
                softmax_scale=[5.0, 5.0], num_heads=count,
            )  # fmt: skip
        losses["loss_kd"] = official_module("kd").KDLoss("kd", True, temp=1.0, alpha=0.5)
        return nn.ModuleDict(losses)

    return make


def theirs(module, s, t, batch):
    """The total of their distiller's own `loss`."""
    missing = ["mmcls.models", "mmcls.registry", "mmcls.structures", "mmcls", "mmengine", "mmengine.model", "mmengine.config",
               "mmengine.structures", "mmengine.runner", "mmengine.runner.checkpoint"]  # fmt: skip
    stand_in = {m: {} for m in missing} | {"mmcls.registry": {"MODELS": Registry()}, "mmengine.model": {"BaseModel": Module}}
    loss = load(SCALEKD, DISTILLER, stand_in).ClassificationDistiller.loss
    network, maps = Staged(t, False), lambda a: [a["stem"], a["stage1"], a["stage2"], a["stage3"]]

    def forward_specific_stage(tokens, stage):
        x = tokens.permute(0, 2, 1).reshape(len(tokens), -1, *t["stage2"].shape[2:])
        return network.stage_forward(stage - 1, x).flatten(2).permute(0, 2, 1)

    head = types.SimpleNamespace(fc=lambda _: s["logits"], _get_loss=lambda logits, _: {
        "loss": nn.functional.cross_entropy(logits, batch["label"])})  # fmt: skip
    itself = types.SimpleNamespace(
        student=types.SimpleNamespace(extract_feat=lambda *_, **__: maps(s), with_neck=False, with_head=False, head=head),
        teacher=types.SimpleNamespace(
            extract_feat=lambda *_, **__: maps(t), neck=lambda x: x, head=types.SimpleNamespace(fc=lambda _: t["logits"]),
            backbone=types.SimpleNamespace(forward_specific_stage=forward_specific_stage),
        ),
        use_logit=True, is_vit=False, distill_losses=module,
    )  # fmt: skip
    samples = [types.SimpleNamespace(gt_label=Label(y[None])) for y in batch["label"]]
    before = torch.get_default_dtype()
    torch.set_default_dtype(s["logits"].dtype)  # in which they make the cosine transform
    try:
        return sum(loss(itself, batch["image"], samples).values())
    finally:
        torch.set_default_dtype(before)


WEIGHTS = {}
for name, number in (("spatial", 0), ("frequency", 1)):
    for ours, stage in (("before", "s3"), ("last", "s4")):
        at = f"loss_fmd_{stage}.projector_{number}"
        WEIGHTS |= conv(f"{name}_{ours}/conv", f"{at}.proj_student.0")
        WEIGHTS |= norm(f"{name}_{ours}/norm", f"{at}.proj_student.1") | norm(f"{name}_{ours}/layer_norm", f"{at}.norm")
        WEIGHTS |= conv(f"{name}_{ours}/ask", f"{at}.proj_pos.0", "pixel", True)
        for layer, called in (("attend_query", "pos_attention.q"), ("attend_key", "pos_attention.k"),
                              ("attend_value", "pos_attention.v"), ("attend_out", "pos_attention.proj"),
                              ("mlp1", "ffn.first"), ("mlp2", "ffn.second")):  # fmt: skip
            WEIGHTS |= conv(f"{name}_{ours}/{layer}", f"{at}.{called}", "linear", layer != "attend_key")
        WEIGHTS[f"{name}_{ours}/position"] = (f"{at}.pos_embed", "map")
    WEIGHTS[f"{name}_before/query"] = (f"loss_fmd_s3.projector_{number}.query.weight", "table")

SOURCE, WRT = (SCALEKD, f"{DISTILLER}, {LOSSES}/fmd.py, attention.py, kd.py"), ("logits", "stage2", "stage3")
HALF = (((6, 4), (10, 4), (14, 2)), ((8, 8), (12, 8), (20, 4)))
CASES = [
    Case("scalekd", SOURCE, theirs, WRT, "total, default settings, 3 and 5 heads", build=build((3, 5)), weights=WEIGHTS,
         total=True, options={"head_features": 4}, golden=True),
    Case("scalekd", SOURCE, theirs, WRT, "total, a student of half the size, one head", build=build((1, 1)), weights=WEIGHTS,
         total=True, shapes=HALF),
]  # fmt: skip
