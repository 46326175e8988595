"""What other projects call the modules of a model here, and which of their arrays are left out, or are of no model here.

A project is a function of (model, module), as `stage1_block1/conv1`, that gives the module's names there, () where it has none
for this family: `reference` are those that a family's `torch_names` states (RepDistiller, mdistiller, torchvision, timm's
residual networks and transformers), `transformers` Hugging Face's as its files have them, `transformers5` the same library's
since version 5 in memory (what `torch.save(model.state_dict())` keeps), and `timm` its MobileNetV2. To `transformers` belong
residual networks, all of them behind ImageNet's stem, and vision transformers.
"""

import collections
import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from pwkd_jax.errors import UserError
from pwkd_jax.models.mobilenet import MobileNetV2
from pwkd_jax.models.resnet import ResNet
from pwkd_jax.models.vit import ViT

Project = Callable[[nn.Module, str], tuple[str, ...]]

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# {pattern: why it is left out}; "": in silence.
LEFT_OUT = {
    "*num_batches_tracked": "",  # counters of batches, which come with every batch norm
    "*n_averaged": "",
    "*vit.pooler.dense.*": "its classifier reads the class token before this layer",
    "*vit.embeddings.mask_token": "it stands for hidden patches in pre-training alone",
}
# (patterns, what they are), of networks that no family here can be.
UNFIT = (
    (("*dist_token", "*distillation_token"), "the second token of a distilled transformer; those without distillation fit"),
    (("*reg_token", "*register_tokens"), "register tokens; transformers here have the class token alone"),
    (
        ("*.ls1.gamma", "*.layer_scale*", "*.gamma_1", "*.lambda_1"),
        "scales of residual branches, which transformers here have not",
    ),
    (("*.q_norm.*", "*.k_norm.*"), "norms of queries and keys, which transformers here have not"),
    (("*norm_pre.*",), "a norm before the first block, which transformers here have not"),
    (("*fc_norm.*",), "the norm of a mean over all tokens; transformers here read the class token"),
    (("*conv1.6.weight",), "a stem of three convolutions; residual networks here have one of 7x7 or 3x3"),
    (("*downsample.2.weight",), "a shortcut that pools first; residual networks here have a convolution of stride 2"),
    (("*.se.fc1.*", "*.se.conv.*"), "attention over channels, which residual networks here have not"),
    (
        ("*mobilenet_v2.*",),
        "of transformers' MobileNetV2, which pads as TensorFlow does and has another epsilon; torchvision's fits",
    ),
)


def reference(model: nn.Module, module: str) -> tuple[str, ...]:
    # A model of one's own is expected under its own names.
    return model.torch_names(module) if hasattr(model, "torch_names") else (module.replace("/", "."),)


def transformers(model: nn.Module, module: str) -> tuple[str, ...]:
    if isinstance(model, ViT):
        block, layer = _block(module)
        inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp1": "intermediate.dense", "mlp2": "output.dense",
                 "attention/out": "attention.output.dense"}  # fmt: skip
        layer = inner.get(layer, layer.replace("attention/", "attention.attention."))
        return (f"encoder.layer.{block}.{layer}",) if block >= 0 else _vit_top(module)
    if not isinstance(model, ResNet):
        return ()
    top = {"stem_conv": "embedder.embedder.convolution", "stem_bn": "embedder.embedder.normalization",
           "classifier": "classifier.1"}  # fmt: skip
    if module in top:
        return (top[module],)
    stage, block, layer = re.fullmatch(r"stage(\d+)_block(\d+)/(\w+)", module).groups()
    kind = "convolution" if "conv" in layer else "normalization"
    part = "shortcut" if layer.startswith("shortcut") else f"layer.{int(layer[-1]) - 1}"
    return (f"encoder.stages.{int(stage) - 1}.layers.{int(block) - 1}.{part}.{kind}",)


def transformers5(model: nn.Module, module: str) -> tuple[str, ...]:
    if not isinstance(model, ViT):
        return ()
    block, layer = _block(module)
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp1": "mlp.fc1", "mlp2": "mlp.fc2",
             "attention/out": "attention.o_proj"}  # fmt: skip
    layer = inner.get(layer, re.sub(r"attention/(\w)\w*", r"attention.\1_proj", layer))
    return (f"layers.{block}.{layer}",) if block >= 0 else _vit_top(module)


def _block(module: str) -> tuple[int, str]:
    """(index from 0, rest) of a transformer's module, -1 for one outside its blocks."""
    match = re.fullmatch(r"block(\d+)/(.+)", module)
    return (int(match[1]) - 1, match[2]) if match else (-1, module)


def _vit_top(module: str) -> tuple[str, ...]:
    top = {"patch_conv": "embeddings.patch_embeddings.projection", "class_token": "embeddings.cls_token",
           "position": "embeddings.position_embeddings", "final_norm": "layernorm", "classifier": "classifier"}  # fmt: skip
    return (top[module],)


def timm(model: nn.Module, module: str) -> tuple[str, ...]:
    if not isinstance(model, MobileNetV2) or model.expand_first:
        return ()
    top = {"stem_conv": "conv_stem", "stem_bn": "bn1", "last_conv": "conv_head", "last_bn": "bn2", "classifier": "classifier"}
    if module in top:
        return (top[module],)
    group, block, layer, kind = re.fullmatch(r"group(\d)_block(\d)/(\w+)_(conv|bn)", module).groups()
    plain = model.groups[int(group) - 1][0] == 1  # its last layer is called as others' first, for there is no expansion
    order = ["depthwise", "project"] if plain else ["expand", "depthwise", "project"]
    convolution = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pw" if plain else "conv_pwl"}[layer]
    last = convolution if kind == "conv" else f"bn{order.index(layer) + 1}"
    return (f"blocks.{int(group) - 1}.{int(block) - 1}.{last}",)


PROJECTS: tuple[Project, ...] = (reference, transformers, transformers5, timm)


def keys(project: Project, model: nn.Module, path: tuple[str, ...]) -> tuple[str, ...]:
    """Names that the array at `path` (collection first) may have in a file of a project."""
    *module, leaf = path[1:]
    if not module:  # a parameter of the model itself
        return project(model, leaf)
    found = project(model, "/".join(module))
    return tuple(f"{name}{'' if name.endswith('_') else '.'}{LEAVES.get(leaf, leaf)}" for name in found)


def project(model: nn.Module, like: Iterable[tuple[str, ...]], found: Mapping[str, Any]) -> Project:
    """The project most of whose names for the arrays at the paths `like` are in a file."""
    endings = {name[at:] for name in found for at in [0, *(m.end() for m in re.finditer(r"\.", name))]}

    def count(one: Project) -> int:
        return sum(any(key in endings for key in keys(one, model, path)) for path in like)

    return max(PROJECTS, key=count)


def found_as(name: str, found: Mapping[str, Any], prefix: str | None = None) -> str | None:
    """What a file calls `name`: with `prefix`, or else the only one of its names that ends so after a dot."""
    if prefix is not None and prefix + name in found:
        return prefix + name
    ending = [key for key in found if key == name or key.endswith(f".{name}")]
    return ending[0] if len(ending) == 1 else None


def prefix(wanted: Iterable[Sequence[str]], found: Mapping[str, Any]) -> str:
    """What wrappers (DataParallel, torch.compile, Lightning, mmpretrain and the like) put before most of the wanted names."""
    count: collections.Counter[str] = collections.Counter()
    for names in wanted:
        for key in names:
            count.update({name[: len(name) - len(key)] for name in found if name == key or name.endswith(f".{key}")})
    return max(count, key=lambda prefix: (count[prefix], -len(prefix)), default="")


def left_out(name: str) -> str | None:
    """The pattern of LEFT_OUT that a name is of, or None."""
    return next((pattern for pattern in LEFT_OUT if fnmatch.fnmatchcase(name, pattern)), None)


def say_left_out(where: str, found: Iterable[str]) -> None:
    """On standard error the names that are left out, and why, but for those of no meaning outside training."""
    for pattern, why in LEFT_OUT.items():
        if why and (left := fnmatch.filter(found, pattern)):
            print(f"note: {where} holds {', '.join(sorted(left))}, which is left out: {why}", file=sys.stderr)


def refuse_unfit(where: str, model: str, left: Iterable[str]) -> None:
    """UserError where a name that was left over tells that the network is of no family here."""
    for name in left:
        for patterns, what in UNFIT:
            if any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in patterns):
                raise UserError(f"{where}: does not fit '{model}': {name} is {what}")
