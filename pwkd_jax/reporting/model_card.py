"""The card of an exported model as a page for people: README.md in the form of the Hugging Face Hub.

Made of the JSON card alone, see `weights`; what that does not know is left out. Names that users gave stand in code spans and,
in the header, as JSON strings, which YAML reads: they cannot become markup or keys.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from pwkd_jax.reporting import phrases

PAPER = "https://arxiv.org/abs/2109.12507"

TEMPLATE = """\
---
# license: name one, such as apache-2.0; this file cannot know it
library_name: pwkd_jax
pipeline_tag: image-classification
tags:
- jax
- flax
{% if distilled %}
- knowledge-distillation
{% endif %}
- {{ model | quoted }}
{% if dataset %}
datasets:
- {{ dataset | quoted }}
{% endif %}
{% if top1 is not none %}
metrics:
- accuracy
model-index:
- name: {{ name | quoted }}
  results:
  - task:
      type: image-classification
    dataset:
      name: {{ data | quoted }}
      type: {{ data | quoted }}
      split: {{ split | quoted }}
    metrics:
    - type: accuracy
      name: top-1
      value: {{ "%.6g" | format(top1 / 100) }}
{% endif %}
---

# {{ model | code }}{% if width != 1 %} at width {{ "%g" | format(width) }}{% endif %}, an image classifier

{% for line in facts %}
- {{ line }}
{% endfor %}
{% if training %}

## How it was trained

{% for line in training %}
- {{ line }}
{% endfor %}
{% endif %}

## How to use it

{% for title, snippet in snippets %}
{{ title }}

```python
{{ snippet }}
```

{% endfor %}
`images` are uint8, [batch, {{ shape | join(", ") }}], of any batch size.

## Limits

{% for line in limits %}
- {{ line }}
{% endfor %}
"""


def render(card: dict, names: str = "flax") -> str:
    """The page of an export. names: of the arrays in model.safetensors, flax or torch, which another program reads."""
    source, shape = card["source"], card["image_shape"]
    data, split = source.get("data", ""), source.get("test_split", "test")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True)  # fmt: skip
    environment.filters |= {"code": code, "quoted": quoted}
    width = "" if card["width"] == 1 else f" at width {card['width']:g}"
    return environment.from_string(TEMPLATE).render(
        model=card["model"], width=card["width"], name=card["model"] + width, data=data, split=split, shape=shape,
        # A folder is no data set of the Hub, nor a name of one.
        dataset="" if data == "folder" else data, top1=source.get("top1") if data else None,
        distilled=bool(source.get("distiller")), facts=_facts(card), training=_training(card),
        snippets=_snippets(card, names), limits=_limits(card),
    )  # fmt: skip


def quoted(text: Any) -> str:
    """A scalar of YAML and of JSON. JSON leaves alone what YAML takes for the end of a line or cannot print."""
    odd = r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"
    return re.sub(odd, lambda found: f"\\u{ord(found[0]):04x}", json.dumps(str(text), ensure_ascii=False))


def code(text: Any) -> str:
    """A code span of Markdown on one line, between more backticks than follow each other in the text."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)


def _facts(card: dict) -> list[str]:
    source = card["source"]
    height, width, channels = card["image_shape"]
    lines = [
        f"Architecture: {code(card['model'])}, width {card['width']:g}"
        + (f", channels rounded to multiples of {card['divisor']}" if card.get("divisor") else ""),
        f"Size: {card['parameters']:,} parameters, {card['macs']:,} multiply-accumulates an image",
        f"Input: {height} x {width} pixels, {phrases.plural(channels, 'channel')}; the programs scale them to [0, 1] and "
        f"normalise them by mean {_numbers(card['mean'])} and deviation {_numbers(card['std'])}",
    ]  # fmt: skip
    names = [code(name) for name in card.get("classes", ())]
    more = ", the others in model.json" if len(names) > 20 else ""
    lines.append(f"Output: probabilities of {card['num_classes']:,} classes"
                 + (f", in this order: {phrases.some(names, 20)}{more}" if names else ""))  # fmt: skip
    if "assisted" in card:
        its = card["assisted"]
        teacher = f"{code(its['teacher'])} at width {its['width']:g}"
        lines.append(f"It predicts through the classifier of its teacher, {teacher}, which the programs hold too")
    if source.get("data"):
        lines.append(f"Data set: {code(source['data'])}")
        if "top1" in source:
            where = f"on its split {code(source.get('test_split', 'test'))}"
            lines.append(f"Accuracy: {source['top1']:.2f} % top-1 {where}, measured when it was trained")
    return lines


def _training(card: dict) -> list[str]:
    source, lines = card["source"], []
    if "experiment" in source:
        run = f", run {code(source['run'])}" if source.get("run") else ""
        lines.append(f"Experiment {code(source['experiment'])}{run}")
    if "file" in source:
        lines.append(f"Its weights were converted from {code(source['file'])}"
                     + (f" (SHA-256 {code(source['sha256'])})" if "sha256" in source else ""))  # fmt: skip
    if source.get("steps"):
        lines.append(f"{phrases.plural(source['steps'], 'step')} of training")
    if "distiller" in source:
        staged = f" ([partial to whole knowledge distillation]({PAPER}))" if source.get("arm") == "pwkd" else ""
        lines.append(f"Distilled by {code(source['distiller'])} in the arm {code(source.get('arm', ''))}{staged}")
    for teacher in source.get("teachers", ()):
        widths = ", ".join(f"{w:g}" for w in teacher["widths"])
        lines.append(f"Teacher: {code(teacher['model'])} at width {widths}")
    if "seed" in source:
        lines.append(f"Seed {source['seed']}")
    if source.get("made_with"):
        lines.append("Versions: " + ", ".join(f"{code(name)} {code(version)}" for name, version in source["made_with"].items()))
    return lines


def _snippets(card: dict, names: str) -> list[tuple[str, str]]:
    found = []
    if "program" in card:
        platforms = ", ".join(card["program"]["platforms"])
        found.append((
            f"With jax {card['program']['jax']}, or one up to half a year newer, alone (for {platforms}):",
            'import jax, jax.export\n\nprogram = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))\n'
            "probabilities = program.call(images)",
        ))  # fmt: skip
    if names == "torch":
        found.append((
            "The weights, in the names and layouts of the PyTorch original:",
            'from safetensors.torch import load_file\n\ntensors = load_file("model.safetensors")',
        ))  # fmt: skip
    elif "assisted" not in card:
        own = f", model={json.dumps(card['model'])}" if ":" in card["model"] else ""
        found.append((
            "With pwkd_jax, to train on or to take apart:",
            f'import pwkd_jax as pwkd\n\nnetwork = pwkd.load("model.safetensors"{own})\nlogits = network.logits(images)',
        ))  # fmt: skip
    if "onnx" in card:
        found.append((
            "With onnxruntime:",
            'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
            'probabilities, = session.run(None, {"images": images})',
        ))  # fmt: skip
    return found


def _limits(card: dict) -> list[str]:
    height, width, _ = card["image_shape"]
    lines = [
        f"It takes images of {height} x {width} pixels alone; others have to be resized and cropped first.",
        f"It knows {card['num_classes']:,} classes, and gives one of them to any image, whatever that shows.",
    ]
    if "top1" in card["source"] and card["source"].get("data"):
        lines.append("Its accuracy was measured on the split that is named above and nowhere else.")
    else:
        lines.append("Its accuracy is not known here.")
    return [*lines, "How it fares on images from elsewhere was not measured."]
