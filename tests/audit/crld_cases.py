"""CRLD: the authors' step of two views, from a copy of their code, with logits that are there for either."""

import types

from compare import Case
from official import Node, load
from recent_cases import quiet
from torch import nn

CRLD = "scx-822/CRLD-main"  # a copy of the authors' arcaninez/crld
FILE = "mdistiller/distillers/CRLD.py"


class Base(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher


def theirs(**settings):
    @quiet
    def step(module, s, t, batch):
        cfg = load(CRLD, "mdistiller/engine/cfg.py", {"yacs": {}, "yacs.config": {"CfgNode": Node}, ".utils": {}}).CFG
        cfg = types.SimpleNamespace(CRLD=types.SimpleNamespace(**(cfg.CRLD | settings)))
        made = load(CRLD, FILE, {"._base": {"Distiller": Base}}).CRLD
        networks = [lambda view, a=a: (a["logits"] if view == "weak" else a["strong"], None) for a in (s, t)]
        losses = made(*networks, cfg).forward_train("weak", "strong", batch["label"])[1]
        return sum(losses.values())

    return step


SOURCE, WRT = (CRLD, FILE), ("logits", "strong")
COPY = "by a copy of the authors' code"
CASES = [
    Case("crld", SOURCE, theirs(), WRT, "total, default settings", total=True, golden=True, note=COPY),
    Case("crld", SOURCE, theirs(TAU_W=0.5, TAU_S=0.7, TEMPERATURE=2.0), WRT, "total, other thresholds", total=True,
         options={"sure_weak": 0.5, "sure_strong": 0.7, "temperature": 2.0}, seed=1, golden=True, note=COPY),
]  # fmt: skip
