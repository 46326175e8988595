"""The page for people: what its JSON card knows, in a header that YAML reads and text that no name can turn into markup."""

import json
import re

import numpy as np
import pytest
import yaml
from conftest import made_up
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_commands import TINY

from pwkd_jax import evaluate, export, models, train, weights
from pwkd_jax.reporting import model_card

CARD = {
    "model": "resnet8", "width": 0.5, "divisor": 0, "num_classes": 2, "image_shape": [8, 8, 1], "mean": [0.25], "std": [0.5],
    "parameters": 1234, "macs": 56789, "classes": ["cat", "dog"], "source": {"steps": 7},
    "program": {"file": "model.stablehlo", "platforms": ["cpu"], "jax": "0.10.2"},
}  # fmt: skip
NASTY = ["a: b", "- x", "---", "` `` `", "<script>", "](http://x)", 'say "no"', "line\nbreak", "\x85\u2028\x00", "# h", "\\",
         "*b*", "{{ 7 * 7 }}", "{% raw %}", "null", "1e3", "é 🦎", "&amp;", "```\n# x"]  # fmt: skip


def header(page: str) -> dict:
    _, found, _ = page.split("---\n", 2)
    return yaml.safe_load(found)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.sampled_from(NASTY), st.text(), st.text("`\n\t \\\"'<>[]")))
def test_any_name_stays_a_name(text):
    assert yaml.safe_load(f"- x: {model_card.quoted(text)}") == [{"x": text}]
    tokens = MarkdownIt().parse(f"- before {model_card.code(text)} after")
    kinds = [token.type for token in tokens]
    assert kinds == ["bullet_list_open", "list_item_open", "paragraph_open", "inline", "paragraph_close", "list_item_close",
                     "bullet_list_close"]  # fmt: skip
    inline = tokens[3].children
    assert [token.type for token in inline] == ["text", "code_inline", "text"]
    assert inline[1].content.split() == "".join(c if c.isprintable() else " " for c in text).split()


@pytest.mark.parametrize("name", NASTY)
def test_a_page_of_odd_names_has_the_sections_of_any_other(name):
    source = {"data": name, "experiment": name, "run": name, "distiller": name, "arm": "pwkd", "top1": 50.0, "steps": 7,
              "test_split": name, "teachers": [{"model": name, "widths": [0.5]}]}  # fmt: skip
    page = model_card.render({**CARD, "model": name, "classes": [name, "dog"], "source": source})
    found = header(page)
    assert found["model-index"][0]["results"][0]["dataset"] == {"name": name, "type": name, "split": name}
    tokens = MarkdownIt().parse(page.split("---\n", 2)[2] if "---\n" not in name else page)
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [t for t in titles if "classifier" not in t] == ["How it was trained", "How to use it", "Limits"]
    assert not [t for t in tokens if t.type == "html_block"] and sum(t.type == "fence" for t in tokens) == 2


def test_what_a_card_does_not_know_is_left_out():
    page = model_card.render(CARD)
    assert header(page) == {"library_name": "pwkd_jax", "pipeline_tag": "image-classification",
                            "tags": ["jax", "flax", "resnet8"]}  # fmt: skip
    assert "None" not in page and "Accuracy" not in page and "istil" not in page and "ONNX" not in page
    assert "Its accuracy is not known here." in page and "1,234 parameters, 56,789 multiply-accumulates" in page
    assert "`cat`, `dog`" in page and "at width 0.5" in page and "mean 0.25 and deviation 0.5" in page
    converted = model_card.render({**CARD, "source": {"file": "net.pth", "sha256": "ab"}})
    assert "converted from `net.pth` (SHA-256 `ab`)" in converted and "step" not in converted.split("## How to use")[0]
    assert "datasets" not in header(model_card.render({**CARD, "source": {"data": "folder"}}))


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", page, re.S)


def test_its_snippets_give_one_network(tmp_path, monkeypatch):
    with_onnx = []
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

        with_onnx = ["--onnx"]
    except ImportError:
        pass
    model, shape = models.create("resnet8", width=0.25), (8, 8, 1)
    card = weights.card("resnet8", 0.25, 0, 10, shape, [0.3], [0.4], {})
    weights.write(tmp_path / "net.safetensors", made_up(model, shape), card)
    assert export.main([str(tmp_path / "net.safetensors"), f"--out={tmp_path}", "--platforms=cpu", "--card", *with_onnx]) == 0
    monkeypatch.chdir(tmp_path)
    images, found = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8), []
    for snippet in snippets((tmp_path / "README.md").read_text()):
        names = {"images": images}
        exec(snippet, names)
        logits = np.asarray(names.get("logits", 0.0), np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) if "logits" in names else names["probabilities"]
        found.append(np.asarray(chances))
    assert len(found) == 2 + len(with_onnx) and found[0].shape == (3, 10)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    place = tmp_path_factory.mktemp("card") / "w"
    options = ["arms=pwkd", "student.distiller.name=simkd", "data.validation_split=train[150:200]"]
    assert train.main([*TINY, *(f"--config.{o}" for o in options), f"--workdir={place}"]) == 0
    return place


def test_the_page_of_a_run_says_what_was_measured(workdir, tmp_path, capsys):
    run = workdir / "students/pwkd/seed0"
    result = json.loads((run / "result.json").read_text())
    command = [str(run), f"--out={tmp_path / 'out'}", "--platforms=cpu", "--card"]
    assert export.main(command) == 0
    page = (tmp_path / "out/README.md").read_text()
    metric = header(page)["model-index"][0]["results"][0]
    assert metric["metrics"] == [{"type": "accuracy", "name": "top-1", "value": pytest.approx(result["top1_last"] / 100)}]
    assert metric["dataset"] == {"name": "digits", "type": "digits", "split": "test[:50]"}
    assert {"knowledge-distillation", "test_training:Tiny"} <= {*header(page)["tags"]}
    assert f"{result['top1_last']:.2f} % top-1 on its split `test[:50]`" in page
    assert "Distilled by `simkd` in the arm `pwkd`" in page and "Teacher: `test_training:Tiny` at width 0.5, 1" in page
    assert "24 steps of training" in page and "Seed 0" in page and len(snippets(page)) == 1
    # A checkpoint knows of its own step and of the stages up to it, and no more.
    assert export.main([str(run / "checkpoints/12"), f"--out={tmp_path / 'first'}", "--platforms=cpu", "--card"]) == 0
    first = (tmp_path / "first/README.md").read_text()
    assert "at width 0.5\n" in first and "12 steps" in first and "Teacher: `test_training:Tiny` at width 0.5, 1" not in first
    best = result["selected"]
    assert export.main([str(run / "best"), f"--out={tmp_path / 'best'}", "--platforms=cpu", "--card"]) == 0
    chosen = (tmp_path / "best/README.md").read_text()
    assert f"{best['top1']:.2f} % top-1" in chosen and f"{best['step']} steps of training" in chosen
    teacher = json.loads((workdir / "teacher/slimmable/result.json").read_text())["widths"][0]
    narrow = [str(workdir / "teacher/slimmable"), "--width=0.5", "--platforms=cpu", "--card", f"--out={tmp_path / 't'}"]
    assert export.main(narrow) == 0
    page = (tmp_path / "t/README.md").read_text()
    assert f"{teacher['top1_last']:.2f} % top-1" in page
    assert 'pwkd.load("model.safetensors", model="test_training:Tiny")' in page
    # Written again it is the same; one that was edited is left as it is, and so is everything else.
    assert export.main(command) == 0
    (tmp_path / "out/README.md").write_text("license: mine")
    before = (tmp_path / "out/model.json").read_bytes()
    capsys.readouterr()
    assert export.main([*command, "--names=flax"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: --card: ") and "remove it" in text and text.count("\n") == 1
    assert (tmp_path / "out/README.md").read_text() == "license: mine" and (tmp_path / "out/model.json").read_bytes() == before


def test_a_student_that_predicts_through_its_teacher_becomes_onnx(workdir, tmp_path, capsys):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed; launch/test.sh installs it")
    assert export.main([str(workdir / "students/pwkd/seed0"), f"--out={tmp_path}", "--platforms=cpu", "--onnx"]) == 0
    capsys.readouterr()
    scores = []
    for kind in ("onnx", "stablehlo"):
        assert evaluate.main([str(tmp_path / f"model.{kind}"), "--split=test[:50]", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["nll"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
