"""A finished run made longer ends as one that was never short, and is refused where it could not."""

import json
import re

import pytest
from conftest import identical
from test_commands import TINY, final
from test_weights import error

from pwkd_jax import train
from pwkd_jax.training.writers import read_rows

CONSTANT = ["--config.student.schedule.form=constant", "--config.teacher.schedule.form=constant", "--config.student.ema=0.9"]
OPTIONS = [*TINY, *CONSTANT, "--config.arms=alone,kd_whole"]


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """What was never short: 40 steps of a teacher, then 40 of its students."""
    workdir = tmp_path_factory.mktemp("long") / "w"
    options = ["--config.teacher.duration=40 steps", "--config.student.duration=40 steps"]
    assert train.main([*OPTIONS, *options, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_longer_run_has_the_bits_of_one_that_was_never_short(long, tmp_path, capsys):
    workdir = f"--workdir={tmp_path}/w"
    assert train.main([*OPTIONS, "--config.seeds=0", workdir]) == 0  # the teacher alone
    longer = [*OPTIONS, "--config.teacher.duration=40 steps"]
    assert train.main([*longer, "--config.seeds=0", workdir]) == 0
    assert "1 runs of" in capsys.readouterr().err
    assert train.main([*longer, workdir]) == 0
    assert train.main([*longer, "--config.student.duration=40 steps", workdir]) == 0
    assert "2 runs of" in capsys.readouterr().err
    for run in ("teacher/slimmable", "students/alone/seed0", "students/kd_whole/seed0"):
        assert identical(final(tmp_path / "w", run, 40), final(long, run, 40)), run
        assert read_rows(tmp_path / "w" / run / "metrics.jsonl")[-1]["step"] == 40
    here, there = (json.loads((w / "summary.json").read_text()) for w in (tmp_path / "w", long))
    for one, other in zip(here["runs"], there["runs"], strict=True):
        assert (one["top1_last"], one["steps"]) == (other["top1_last"], 40)
    assert json.loads((tmp_path / "w/config.json").read_text())["student"]["duration"] == "40 steps"


@pytest.mark.parametrize(("options", "sentence"), [
    (["student.duration=20 steps"], "student.duration: 'alone' has had 40 steps, more than these 20; give another workdir"),
    (["teacher.duration=60 steps"], "teacher.duration: the students of .* were taught by a teacher of 40 steps"),
    (["student.duration=60 steps", "student.batch_size=8"], "holds runs with student.batch_size = 16, not 8"),
])  # fmt: skip
def test_what_cannot_go_on_is_refused(options, sentence, long, capsys):
    base = [*OPTIONS, "--config.teacher.duration=40 steps", "--config.student.duration=40 steps"]
    before = {p: p.read_bytes() for p in long.rglob("*") if p.is_file() and p.name != ".lock"}
    text = error(train.main, *base, *[f"--config.{o}" for o in options], f"--workdir={long}", capsys=capsys)
    assert re.search(sentence, text), text
    assert before == {p: p.read_bytes() for p in long.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_schedule_or_stages_that_depend_on_the_length_are_named(tmp_path, capsys):
    for arms, sentence in (("alone", "the learning rates of 'alone' depend on its length"),
                           ("pwkd", "the stages of 'pwkd' would begin and end at other steps")):  # fmt: skip
        options = [*TINY, f"--config.arms={arms}", f"--workdir={tmp_path}/{arms}"]
        assert train.main(options) == 0
        capsys.readouterr()
        assert sentence in error(train.main, *options, "--config.student.duration=40 steps", capsys=capsys)
