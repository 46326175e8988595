"""Exported programs that are read again, and those that cannot be: each is one sentence, and nothing else on standard error."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import made_up
from jax import export as jax_export

from pwkd_jax import evaluate, export, models, weights
from pwkd_jax.experiment import exported, exporting

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def program():
    """The bytes of an exported resnet8 for the digits."""
    card = {"mean": [0.3], "std": [0.4], "image_shape": list(SHAPE)}
    model = models.create("resnet8")
    return bytes(exporting.program(weights.Network(model, made_up(model, SHAPE), card), ["cpu"]).serialize())


def sentence(path, capfd) -> str:
    assert evaluate.main([str(path), "--data=digits", "--split=test[:20]"]) == 2
    text = capfd.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


def later(content: bytes, operation: bytes) -> bytes:
    """A program with an operation of a version that no JAX knows yet, as one of a later JAX has to an older."""
    changed = re.sub(operation + rb"_v\d", operation + b"_v9", content)
    assert changed != content
    return changed


def card(path, **program) -> None:
    path.with_suffix(".json").write_text(json.dumps({"source": {"data": "digits"}, "program": program}))


@pytest.mark.parametrize("operation", [b"custom_call", b"convolution", b"divide"])
def test_programs_of_a_newer_jax_name_both_versions(operation, program, tmp_path, capfd):
    path = tmp_path / "model.stablehlo"
    path.write_bytes(later(program, operation))
    card(path, jax="0.12.0.1")
    expected = f"was exported by jax 0.12.0.1, and jax {jax.__version__} here cannot read it; use that one, or export it anew"
    assert expected in sentence(path, capfd)
    path.with_suffix(".json").unlink()
    text = sentence(path, capfd)
    assert re.search(r"is damaged, or was exported by a newer jax \(for StableHLO \d+\.\d+\.\d+ or later\), and jax \d", text)
    card(path, jax=jax.__version__)
    assert f"is not a whole exported program for jax {jax.__version__}" in sentence(path, capfd)


def test_programs_of_another_jax_that_can_be_read_are(program, tmp_path):
    path = tmp_path / "model.stablehlo"
    path.write_bytes(program)
    card(path, jax="0.4.1")
    found = exported.open_program(path)
    assert found.image_shape == SHAPE and found.num_classes == 10 and found.data["name"] == "digits"
    images = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), np.uint8)
    np.testing.assert_allclose(np.exp(found.log_probabilities(images)).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("content", [b"", b"nothing" * 9, b"\x00" * 64, b"module @jit_f {}", b"ML\xefR\rStableHLO_v1.15.0\x00"])
def test_what_is_no_program(content, tmp_path, capfd):
    (tmp_path / "model.stablehlo").write_bytes(content)
    assert f"is not a whole exported program for jax {jax.__version__} (" in sentence(tmp_path / "model.stablehlo", capfd)


def test_damaged_programs_without_a_checksum_give_a_sentence_or_numbers(program, tmp_path):
    """Of a file without its card no one can tell what is right, but it never ends in a traceback."""
    path, rng = tmp_path / "model.stablehlo", np.random.default_rng(0)
    for at in rng.integers(0, len(program), 40):
        damaged = bytearray(program)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            exported.open_program(path)
        except exported.UserError as e:
            assert "\n" not in str(e)
    path.write_bytes(program[: len(program) // 2])
    with pytest.raises(exported.UserError, match=r"is not a whole|is damaged"):
        exported.open_program(path)


def test_a_program_beside_another_ones_card(program, tmp_path, capfd):
    path = tmp_path / "model.stablehlo"
    path.write_bytes(program)
    card(path, jax=jax.__version__, sha256="0" * 64)
    assert "is not the program of " in sentence(path, capfd)


def _foreign(function, *like, platforms=("cpu",)) -> bytes:
    return bytes(jax_export.export(jax.jit(function), platforms=platforms)(*like).serialize())


def _images(batch="b", dtype=jnp.uint8, shape=SHAPE):
    return jax.ShapeDtypeStruct((*jax_export.symbolic_shape(batch), *shape), dtype)


def _mean(x):
    return jnp.zeros((x.shape[0], 10), jnp.float32) + x.reshape(x.shape[0], -1).astype(jnp.float32).mean(1)[:, None]


FOREIGN = {
    "a sine": (jnp.sin, jax.ShapeDtypeStruct((), jnp.float32)),
    "float images": (_mean, _images(dtype=jnp.float32)),
    "a fixed batch": (_mean, jax.ShapeDtypeStruct((8, *SHAPE), jnp.uint8)),
    "two arguments": (lambda x, y: _mean(x) + y, _images(), jax.ShapeDtypeStruct((), jnp.float32)),
    "a dictionary of two": (lambda x: {"logits": _mean(x), "features": _mean(x)}, _images()),
    "one number an image": (lambda x: _mean(x)[:, 0], _images()),
    "any size": (lambda x: _mean(x), jax.ShapeDtypeStruct(jax_export.symbolic_shape("b, h, h, 1"), jnp.uint8)),
    "nothing": (lambda: jnp.zeros(3),),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_programs_of_another_kind_are_told_apart(kind, tmp_path, capfd):
    (tmp_path / "model.stablehlo").write_bytes(_foreign(*FOREIGN[kind]))
    text = sentence(tmp_path / "model.stablehlo", capfd)
    assert "a program of this project takes uint8[batch,H,W,C] and gives float32[batch,classes] on one" in text


def test_programs_for_other_platforms(tmp_path, capfd):
    (tmp_path / "model.stablehlo").write_bytes(_foreign(_mean, _images(), platforms=("tpu", "cuda")))
    assert "was exported for tpu, cuda, and this is cpu" in sentence(tmp_path / "model.stablehlo", capfd)


def test_a_model_that_counts_its_images_is_refused_in_a_sentence(tmp_path, capfd):
    """What jax says of a symbol where a number is needed is of no use to a user, and was a traceback."""
    network = models.create("own_modules:Counted")
    card = weights.card("own_modules:Counted", 1.0, 0, 10, (8, 8, 3), (0.5,) * 3, (0.25,) * 3, {}, network=network)
    path = tmp_path / "counted.safetensors"
    weights.write(path, made_up(network, (8, 8, 3)), card)
    for more in ([], ["--onnx"]):
        assert export.main([str(path), "--model=own_modules:Counted", f"--out={tmp_path / 'out'}", *more]) == 2
        text = capfd.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", text), text
        assert "'own_modules:Counted' cannot be exported for batches of any size" in text and "x.shape[0]" in text
        assert not (tmp_path / "out").exists()
