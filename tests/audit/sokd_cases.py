"""SoKD, part by part: the authors' working copy draws, searches and warps by its own rules, of which ours keeps some."""

import random

import numpy as np
import torch
from compare import Case
from official import load
from torch import nn

COPY = "FabienCode/mdistiller"
OPERATIONS = "mdistiller/engine/dfkd_operation.py"
TORCHVISION = {f"torchvision{x}": {} for x in ("", ".transforms", ".transforms.transforms")}
ENGINE = {f"mdistiller{x}": {} for x in (
    "", ".engine", ".engine.dfkd_primitives", ".engine.dfkd_utils", ".models", ".dataset", ".engine.utils",
    ".engine.dfkd_operation", ".engine.area_utils")}  # fmt: skip
MAPS = (((8, 8), (8, 8), (8, 8)),) * 2


def loss_in_boxes(module, s, t, batch):
    area, copy = load(COPY, "mdistiller/engine/area_utils.py"), load(COPY, "mdistiller/distillers/DFKD.py", ENGINE)
    masks, scores = area.extract_regions(s["stage3"], s["heat"], s["size"], s["offset"], 4, 3)
    alike = nn.functional.mse_loss(s["areas"], t["areas"])
    return 1000 * copy.aaloss(s["stage3"], t["stage3"], masks, scores) + 1000 * alike


def head(module, s, t, batch):
    return (module(s["stage3"]) ** 2).sum()


HEAD = {f"conv{i + 1}/{ours}": (f"{2 * i}.{theirs}", kind) for i in (0, 1)
        for ours, theirs, kind in (("kernel", "weight", "conv"), ("bias", "bias", "same"))}  # fmt: skip


def warp(name: str, magnitude: float):
    def theirs(module, s, t, batch):
        copy, single = load(COPY, OPERATIONS, TORCHVISION), torch.float
        torch.float = s["stage3"].dtype
        np.random.seed(0)
        random.seed(0)
        try:
            low, high = copy.augment_dict[name][1:]
            level = torch.tensor((magnitude - low) / (high - low), dtype=s["stage3"].dtype)
            moved = copy.apply_augment(s["stage3"], name, level)
            return (moved * torch.tensor(np.random.default_rng(3).standard_normal(moved.shape), dtype=moved.dtype)).sum()
        finally:
            torch.float = single

    return theirs


def operation(theirs: str, at: float, ours: str, **more) -> Case:
    """ours: name and strength of the operation as `ours` calls it."""
    part = f"operation {theirs} at {at:g}"
    return Case("sokd", (COPY, OPERATIONS), warp(theirs, at), ("stage3",), part, call=f"sokd {ours}", shapes=MAPS, **more)


FAR = "they hand affine_grid a fraction times the number of pixels, where 2 is already the whole map: the map leaves the frame \
(next row); ours moves by the fraction itself, as the range of +-0.45 says"
CASES = [
    Case("sokd", (COPY, "mdistiller/distillers/DFKD.py, engine/area_utils.py"), loss_in_boxes, ("stage3", "areas"),
         "both losses in the boxes, weights of resnet32x4-resnet8x4", call="sokd boxes", golden=True, shapes=MAPS),
    Case("sokd", (COPY, "mdistiller/engine/area_utils.py"), head, ("stage3",), "a head", call="sokd head", shapes=MAPS,
         build=lambda s, t: load(COPY, "mdistiller/engine/area_utils.py").AreaDetection._build_head(8, 8, 2), weights=HEAD,
         differs="a second ReLU ends their heads and gives nothing to learn from where it is 0; ours ends in its "
                 "smooth form, softplus"),
    Case("sokd", (COPY, "mdistiller/engine/area_utils.py"), head, ("stage3",), "a head, with their last ReLU",
         call="sokd head relu",
         build=lambda s, t: load(COPY, "mdistiller/engine/area_utils.py").AreaDetection._build_head(8, 8, 2), weights=HEAD,
         shapes=MAPS, rtol=1e-6),
    operation("ShearX", 0.2, "shear_x 0.2"),
    operation("ShearY", -0.1, "shear_y -0.1"),
    operation("Rotate", 20.0, "turn 20"),
    operation("TranslateX", 0.3, "move_x 0.3", differs=FAR),
    operation("TranslateX", 0.015, "move_x 0.06",
              note="at what theirs comes to in ours, which is 4 times as much for maps of 8 pixels"),
    operation("TranslateY", 0.015, "move_y 0.06", note="likewise"),
]  # fmt: skip
