"""A newcomer's road with a stopwatch: python tests/bench/newcomer.py --data-dir=DIR --out=DIR [--data=cifar10] [--json=FILE]

In OUT: a clone of this repository as it is committed; a folder of photos, 500 to learn from and 200 to test with, JPEGs of five
classes and of many sizes, made of a TFDS set's images; unlabelled ones; weights of the shapes and names of torchvision's
resnet18, random, saved by PyTorch. Then what the README says, read from it: quickstart, and the six commands of "Your photos",
the training with the flags that make a first try short. Prints each command and its seconds, and stops where one fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = ["--config.data.image_size=64", "--config.teacher.duration=4 epochs", "--config.student.duration=8 epochs"]
EXTRAS = ["torch==2.13.0", "onnx", "onnxruntime"]
# Run with the clone's Python, in it.
PHOTOS = """
import sys, numpy as np
from PIL import Image
from pathlib import Path
from pwkd_jax.data import sources
name, data_dir, out = sys.argv[1:]
rng = np.random.default_rng(0)
for split, piece, each in (("train", "train[:4000]", 100), ("test", "test[:2000]", 40), ("new", "test[2000:2400]", 4)):
    data, _ = sources.load_split(name, data_dir, piece)
    for label in range(5):
        for i in [i for i in range(len(data)) if data.labels[i] == label][:each]:
            width, height = rng.integers(64, 160, 2)
            place = Path(out, "new_photos" if split == "new" else f"my_photos/{split}/class{label}")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[i]).resize((width, height)).save(place / f"{label}_{i}.jpg")
"""
WEIGHTS = """
import torch
torch.manual_seed(0)
made = {}
def norm(name, n):
    made.update({f"{name}.weight": torch.ones(n), f"{name}.bias": torch.zeros(n), f"{name}.running_mean": torch.zeros(n),
                 f"{name}.running_var": torch.ones(n), f"{name}.num_batches_tracked": torch.tensor(0)})
def conv(name, inputs, outputs, size):
    made[f"{name}.weight"] = torch.nn.init.kaiming_normal_(torch.empty(outputs, inputs, size, size), mode="fan_out")
conv("conv1", 3, 64, 7), norm("bn1", 64)
for stage, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
    for block in (0, 1):
        name = f"layer{stage}.{block}"
        conv(f"{name}.conv1", outputs if block else inputs, outputs, 3), norm(f"{name}.bn1", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3), norm(f"{name}.bn2", outputs)
        if not block and inputs != outputs:
            conv(f"{name}.downsample.0", inputs, outputs, 1), norm(f"{name}.downsample.1", outputs)
made |= {"fc.weight": torch.nn.init.normal_(torch.empty(1000, 512), std=0.01), "fc.bias": torch.zeros(1000)}
torch.save(made, "resnet18.pth")
"""


def commands(readme: str) -> list[str]:
    """The six commands of "Your photos", as one line each."""
    block = re.search(r"### Your photos(?s:.*?)\n\n((?:    .*\n)+)", readme)[1]
    return [line.strip() for line in block.replace("\\\n", " ").splitlines()]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    clone, python, rows = options.out.resolve() / "clone", ".venv/bin/python", []

    def step(line: str | list[str]) -> None:
        shown = line if isinstance(line, str) else " ".join(line)
        print(f"$ {shown}", file=sys.stderr, flush=True)
        started = time.monotonic()
        subprocess.run(line, shell=isinstance(line, str), cwd=clone, check=True)
        rows.append({"command": shown, "seconds": round(time.monotonic() - started, 1)})

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    step("bash launch/quickstart.sh")
    step([".venv/bin/pip", "install", "--quiet", *EXTRAS])
    subprocess.run([python, "-c", PHOTOS, options.data, str(options.data_dir.resolve()), "."], cwd=clone, check=True)
    subprocess.run([python, "-c", WEIGHTS], cwd=clone, check=True)
    for line in commands((clone / "README.md").read_text()):
        short = [f"'{flag}'" for flag in SHORT] if ".train " in line else []
        step(" ".join([*line.split(), *short]))
    print("| command | s |\n|---|---|")
    for row in rows:
        print(f"| `{row['command']}` | {row['seconds']:.0f} |")
    print(f"{len(rows)} commands, {sum(row['seconds'] for row in rows) / 60:.0f} minutes on {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
