#!/usr/bin/env bash
# transformers 5.24.0: one ViT has two sets of names, those of its state_dict() and those of the file that save_pretrained writes.
#
# Since 5.0 a model may be renamed while it is loaded and saved, so that files keep the names of old. Of ViTForImageClassification
# state_dict() says vit.layers.0.attention.q_proj.weight and save_pretrained's model.safetensors, as every file on the Hub,
# vit.encoder.layer.0.attention.attention.query.weight: no name of a layer is in both. torch.save(model.state_dict()), the usual
# way out of a training loop, thus makes a file that load_state_dict takes, and that whatever reads Hub files by name does not; of
# ResNetForImageClassification both are the same.
# Who meets it: whoever converts weights of transformers to another framework by their names, and tried it with one of the two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from safetensors import safe_open

print("transformers", transformers.__version__, "torch", torch.__version__)
vit = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
found = {}
for model in (transformers.ViTForImageClassification(vit), transformers.ResNetForImageClassification(resnet)):
    name = type(model).__name__
    model.save_pretrained(name)
    with safe_open(f"{name}/model.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}
    held = model.state_dict()
    layers = [{k for k in keys if "layer" in k and ".0." in k} for keys in (held, saved)]
    both = layers[0] & layers[1]
    # The same numbers all the same: each array of the file is one of the model's, whatever it is called.
    numbers = lambda arrays: sorted((tuple(a.shape), float(a.double().sum())) for a in arrays.values() if a.is_floating_point())
    print(f"{name}: {len(layers[0])} arrays of layers held, {len(layers[1])} saved, {len(both)} of one name in both")
    print("  held ", sorted(layers[0])[0], "\n  saved", sorted(layers[1])[0])
    found[name] = {"of one name": len(both), "of": len(layers[0]), "same numbers": numbers(held) == numbers(saved)}

expected = {"ViTForImageClassification": {"of one name": 0, "of": 16, "same numbers": True},
            "ResNetForImageClassification": {"of one name": 30, "of": 30, "same numbers": True}}
if found != expected:
    sys.exit(f"Changed: {found}, and was {expected}.")
print("As stated: a ViT is held by some names and saved by others.")
PYTHON
