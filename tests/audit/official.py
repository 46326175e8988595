"""The authors' code, imported from clones: from which, and with what in the place of modules that no loss needs."""

import contextlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from torch import nn

REPOSITORIES = {
    "ADLab-AutoDrive/ICKD": "403b8d3d7c3aaa429e4708870d2be1d4daf92f07",
    "DefangChen/SimKD": "2b389c31ed7779aea31e7aaf0bb0f2d8b6ac2f01",
    "FabienCode/mdistiller": "515d2c5c28754f03fdf7e3ddc626be88169f6267",
    "GzyAftermath/CAT-KD": "4467073ca31b9929e7c45f5a6761e5e1b7c9442f",
    "Jangho-Kim/Factor-Transfer-pytorch": "19cce265ebe51c751481041e223a13be2e684322",
    "Hao840/OFAKD": "f7bb896cac9879040800bde08a8cc2057a904c52",
    "HobbitLong/RepDistiller": "b84f547c5db6a35318d4671d7d5c4de74c822403",
    "JiamingLv/WKD": "214cf8868c2b8e45781f238b8f0e47c2e4e38190",
    "Jin-Ying/Multi-Level-Logit-Distillation": "5ee473fcf193dfb00a0598b64d0acfe6ad58a482",
    "LiuDongyang6/FCFD": "2aefb7bc74ed81185c13e3fee350d36a9db8d250",
    "OSVAI/NORM": "c6dfc39eaf2fdaccf99ed07810da7a00b71b9144",
    "clovaai/overhaul-distillation": "76344a84a7ce23c894f41a2e05b866c9b73fd85a",
    "deep-optimization/ScaleKD": "478a7dbb19caa7dd6ec225cd824b0e0a74a6cdc4",
    "dvlab-research/ReviewKD": "cede6ea6387ae9b6127de0e561507177bf19c11e",
    "ghwang-s/abkd": "df813185e69d21d1e99510272cd94e49be7250c0",
    "hunto/image_classification_sota": "6f7a70a1dd57fd88413d83909d3d53243068f701",
    "jingyang2017/KD_SRRL": "d2e802f5f57efd4f5bc6326a697b48236008a5b6",
    "lenscloth/RKD": "0a6c3c0c190722d428322bf71703c0ae86c25242",
    "megvii-research/mdistiller": "a08d46f10d6102bd6e3f258ca5ac880b020ea259",
    "passalis/probabilistic_kt": "a58fd1b0c62491f55a78189daf835e3558f96176",
    "roymiles/Simple-Recipe-Distillation": "31e8477cfdd6bb6ec7cdc332915fd4496b6de7b6",
    "roymiles/VkD": "6f8a5072447a1c5bb6043cdc035cf7b78d3854d8",
    "scx-822/CRLD-main": "c9d665706f7d8b3598ab8033f0d467ed006037f5",
    "shicaiwei123/SDD-CVPR2024": "e412036c6b7b67d8ed25418d2dedad223ab49a71",
    "szagoruyko/attention-transfer": "893df5488f93691799f082a70e2521a9dc2ddf2d",
    "yoshitomo-matsubara/torchdistill": "3e4373c45214c5c56eebac481d5bfe8b8735aa05",
    "yzd-v/MGD": "2c9da0b28625eb948db57afc02c824452c3910fe",
    "yzd-v/cls_KD": "1e5d48f36957ee460d39d7ebc592c6cc7f8f3d66",
    "zhengli97/CTKD": "7d5252241259ae70d38a832371fed9697d15fc14",
    "zju-SWJ/RLD": "d54578fd77cd669d6209be4d05ae773bca4109b5",
    "zkxufo/TTM": "fe457b33a71ba27536ec04fe3d32c5b04963522f",
}
MD, RD, SIMKD = "megvii-research/mdistiller", "HobbitLong/RepDistiller", "DefangChen/SimKD"
_clones = Path()


def use(clones: Path) -> list[str]:
    """Import from the clones OWNER+NAME in this folder; those that are missing."""
    global _clones
    _clones = clones
    return [name for name in REPOSITORIES if not folder(name).is_dir()]


def folder(repository: str) -> Path:
    return _clones / repository.replace("/", "+")


class Registry:
    """Leaves what is registered as it is."""

    def register_module(self):
        return lambda made: made

    def build(self, config):
        return config


class Node(dict):
    """What yacs is to a config file: attributes are keys."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


@contextlib.contextmanager
def standing_in(names):
    """sys.modules with empty modules of these names, {name: attributes} or names."""
    made = {}
    for name in names:
        # A parent must be there too, and may be real.
        made[name] = mock.MagicMock(spec=None, __path__=[], __name__=name, __spec__=None)
        for key, value in (names[name] if isinstance(names, dict) else {}).items():
            setattr(made[name], key, value)
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules |= made
    try:
        yield
    finally:
        # What else was imported meanwhile stays.
        for name in made:
            del sys.modules[name]
        sys.modules |= before


_modules: dict[tuple[str, str], types.ModuleType] = {}


def load(repository: str, path: str, missing=()) -> types.ModuleType:
    """The module at `path` of a clone. Its packages' own __init__ do not run; `missing`: modules to stand in for."""
    if (repository, path) in _modules:
        return _modules[repository, path]
    name, place = "official_" + repository.replace("/", "_").replace("-", "_"), folder(repository)
    if not (place / path).is_file():
        raise FileNotFoundError(f"{repository}: no {path} below {place}; clone it at {REPOSITORIES[repository]}")
    for part in ("", *Path(path).parent.parts):
        place, name = (place / part, f"{name}.{part.replace('-', '_')}") if part else (place, name)
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__, package.__package__ = [str(place)], name
            sys.modules[name] = package
    missing = missing if isinstance(missing, dict) else {m: {} for m in missing}
    within = {importlib.util.resolve_name(m, name): attributes for m, attributes in missing.items()}
    with standing_in(within):
        _modules[repository, path] = importlib.import_module(f"{name}.{Path(path).stem}")
    return _modules[repository, path]


def mdistiller(method: str, repository: str = MD, missing=()) -> tuple[type, Node]:
    """(distiller class, its repository's default config) of mdistiller, or of a repository built on it."""
    module = load(repository, f"mdistiller/distillers/{method}.py", missing)
    stand_in = {"yacs.config": {"CfgNode": Node}, "yacs": {}, ".utils": {}}
    return getattr(module, method), load(repository, "mdistiller/engine/cfg.py", stand_in).CFG


class Fixed(nn.Module):
    """A network that has already run: the logits and features that mdistiller's distillers ask of it."""

    def __init__(self, leaves: dict[str, torch.Tensor]):
        super().__init__()
        maps = [leaves[k] for k in ("stem", "stage1", "stage2", "stage3")]
        preact = [leaves[k] for k in ("stem", "preact1", "preact2", "preact3")]
        self.norms = [types.SimpleNamespace(weight=leaves[f"scale{i}"], bias=leaves[f"shift{i}"]) for i in (1, 2, 3)]
        self.result = leaves["logits"], {"feats": maps, "preact_feats": preact, "pooled_feat": leaves["pooled"]}

    def forward(self, image):
        return self.result

    def get_stage_channels(self):
        return [x.shape[1] for x in self.result[1]["feats"]]

    def get_bn_before_relu(self):
        return self.norms

    def get_channel_num(self):
        return self.get_stage_channels()[1:]

    def extract_feature(self, image, preReLU):
        return list(self.result[1]["preact_feats"][1:]), self.result[0]


def without_cuda() -> None:
    """Let .cuda() and .to("cuda") leave things where they are."""
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *a, **k: self
    to = nn.Module.to
    nn.Module.to = lambda self, *a, **k: self if a == ("cuda",) else to(self, *a, **k)
