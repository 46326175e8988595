"""The benchmark command on tiny networks, and traces of named steps."""

import contextlib
import gzip
import io
import json
import re

import pytest
from test_commands import TINY, rows

from pwkd_jax import benchmark, train
from pwkd_jax.cost import chips
from pwkd_jax.errors import UserError
from pwkd_jax.reporting import benchmark as report
from pwkd_jax.training import profile

QUICK = [*TINY, "--config.arms=alone,pwkd", "--rounds=2", "--seconds=0.02"]


def tiny_macs(width: float) -> int:
    """Of test_training's Tiny on 8x8x1: a 3x3 convolution to 8 * width channels, and a classifier of 10 classes."""
    channels = int(8 * width)
    return 64 * 9 * channels + 10 * channels


@pytest.fixture(scope="module")
def result():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert benchmark.main([*QUICK, "--peak=0.5", "--json"]) == 0
    return json.loads(out.getvalue())


def test_every_program_of_training_is_timed(result):
    assert [row["name"] for row in result["programs"]] == [
        "teacher step, plain", "teacher step, sliced", "teacher step, masked", "student step, no teacher",
        "student step, teacher 0.5", "student step, teacher 1", "teacher 0.5 evaluation", "teacher 1 evaluation",
        "student evaluation",
    ]  # fmt: skip
    assert result["notes"] == [] and result["command"].startswith("python -m pwkd_jax.benchmark --config=configs/digits.py")
    for row in result["programs"]:
        assert len(row["step_seconds_rounds"]) == 2
        assert min(row["step_seconds_rounds"]) <= row["step_seconds"] <= max(row["step_seconds_rounds"])
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["fed_step_seconds"])
        assert row["traffic_per_second"] == pytest.approx(row["traffic_bytes"] / row["step_seconds"])
        assert 0 <= row["input_wait"] < 1 and row["memory_bytes"] > 0 and row["compile_seconds"] > 0


def test_work_is_counted_by_hand(result):
    narrow, whole = tiny_macs(0.5), tiny_macs(1.0)
    step = {"plain": 6 * whole, "sliced": 6 * (narrow + whole), "masked": 6 * (narrow + whole)}
    expected = {f"teacher step, {form}": 16 * work for form, work in step.items()}
    expected |= {"student step, no teacher": 16 * 6 * narrow, "student step, teacher 0.5": 16 * (6 * narrow + 2 * narrow),
                 "student step, teacher 1": 16 * (6 * narrow + 2 * whole)}  # fmt: skip
    expected |= {"teacher 0.5 evaluation": 512 * 2 * narrow, "teacher 1 evaluation": 512 * 2 * whole,
                 "student evaluation": 512 * 2 * narrow}  # fmt: skip
    assert {row["name"]: row["model_flops"] for row in result["programs"]} == expected
    assert (result["peak_flops"], result["peak_source"]) == (0.5e12, "as given")
    for row in result["programs"]:
        assert row["utilisation"] == pytest.approx(row["model_flops"] / row["step_seconds"] / 0.5e12)
    assert result["forms"]["sliced"]["work"] == pytest.approx((narrow + whole) / whole)
    by_name = {row["name"]: row for row in result["programs"]}
    sliced, plain = (by_name[f"teacher step, {form}"]["step_seconds_rounds"] for form in ("sliced", "plain"))
    ratios = [a / b for a, b in zip(sliced, plain, strict=True)]
    assert result["forms"]["sliced"]["plain_steps"][1:] == [min(ratios), max(ratios)]


def test_the_table_says_it_in_lines(result):
    lines = report.text(result).splitlines()
    assert max(map(len, lines)) <= 120
    row = next(line for line in lines if line.startswith("teacher step, sliced"))
    assert f"{result['programs'][1]['images_per_second']:,.0f}" in row
    assert any(line.startswith("The sliced step takes") for line in lines)


def test_synthetic_images_and_students_together(capsys, tmp_path):
    options = ["--synthetic", "--config.data.name=cifar100", "--config.seeds=3", "--config.student.batches=shared"]
    line = [*QUICK, *options, "--config.data.train_split=train", "--config.data.test_split=test", "--only=step, teacher 1"]
    assert benchmark.main(line) == 0
    out = capsys.readouterr().out
    assert "images of 32x32x3 from random numbers" in out and "3 students' step, teacher 1" in out
    assert re.search(r"utilisation is of \S+ TFLOP/s a device, the best of five float32 products of 2048 x 2048 here", out)


def test_a_study_is_timed_by_its_spans(capsys):
    options = ["--config.seeds=2", "--config.student.batches=shared", "--config.student.study=true", "--config.arms=alone,pwkd"]
    assert benchmark.main([*QUICK, *options, "--only=2 students each, from step 0"]) == 0
    assert "2 arms' step, 2 students each, from step 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only=nothing"], "--only: no program has 'nothing' in its name; there are teacher step, plain; "),
        (["--rounds=0"], "--rounds, --seconds and --peak: take 1 or more rounds"),
        (["--fast"], "'--fast' is not an option; see --help"),
        (["--config.data.name=cifar100", "--config.data.data_dir=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, capsys):
    assert benchmark.main([*QUICK, *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_what_cannot_be_masked_is_noted(capsys):
    line = [*QUICK, "--config.teacher.model=test_slimmable:LayerNormed", "--only=teacher step, masked", "--json"]
    assert benchmark.main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["programs"] == [] and "use 'take'" in found["notes"][0]


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v4", "v4"),
                       ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100")],
)  # fmt: skip
def test_devices_are_known_by_what_jax_calls_them(kind, name):
    assert chips.of_kind(kind) == (chips.TPUS | chips.GPUS)[name]
    assert chips.of_kind("cpu") is None
    assert chips.of_kind("TPU v3").peak == chips.TPUS["v3"].peak / 2


# Traces.


def test_named_steps_are_traced_and_change_nothing(tmp_path, capsys):
    line = [*TINY, "--config.arms=pwkd", "--config.log.tensorboard=false"]
    assert train.main([*line, "--config.profile=teacher/slimmable:5-7", f"--workdir={tmp_path / 'a'}"]) == 0
    traced = tmp_path / "a" / "teacher" / "slimmable" / "profile"
    assert f"profile: steps 6 to 7 are in {traced}" in capsys.readouterr().out
    assert list(traced.glob("plugins/profile/*/*.xplane.pb"))
    with gzip.open(next(traced.glob("plugins/profile/*/perfetto_trace.json.gz"))) as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    # A program's every call leaves an event of this name, or two; there were 24 calls.
    assert 2 <= names.count("PjitFunction(run)") <= 4
    assert not (tmp_path / "a" / "students" / "pwkd" / "seed0" / "profile").exists()
    assert train.main([*line, f"--workdir={tmp_path / 'b'}"]) == 0
    for run in ("teacher/slimmable", "students/pwkd/seed0"):
        assert rows(tmp_path / "a", run) == rows(tmp_path / "b", run)


def test_steps_that_a_run_does_not_have_are_said(tmp_path, capsys):
    line = [*TINY, "--config.arms=alone", "--config.log.tensorboard=false", "--config.profile=alone:30-31"]
    assert train.main([*line, f"--workdir={tmp_path / 'w'}"]) == 0
    assert "profile: this run took no step from 31 to 31, so nothing was traced" in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["pwkd", "pwkd:7", "pwkd:9-9", "pwkd:9-3", "a:b:1-2"])
def test_a_profile_that_names_no_steps_is_refused(spec, tmp_path, capsys):
    with pytest.raises(UserError, match=r"profile: .* should be part of a run's name and steps"):
        profile.parse(spec)
    assert train.main([*TINY, f"--config.profile={spec}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert not (tmp_path / "w").exists()
