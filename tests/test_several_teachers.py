"""Several teachers as one: the mean of their logits at each width, in a notebook and from a config."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import identical
from test_commands import TINY, final
from test_training import SHAPE, Tiny, split
from test_weights import error

import pwkd_jax as pwkd
from pwkd_jax import models, train
from pwkd_jax.errors import UserError

ARMS = ["--config.arms=pwkd,kd_standard", "--config.evaluation.every=24 steps"]


@pytest.fixture(scope="module")
def task():
    return pwkd.task((split(40).images, split(40).labels), test=(split(20, 1).images, split(20, 1).labels))


@pytest.fixture(scope="module")
def pair(task):
    nets = [pwkd.make_slimmable(Tiny, widths, SHAPE, num_classes=3) for widths in ((0.5, 1.0), (0.25, 0.5, 1.0))]
    return [pwkd.train_teacher(net, task, duration=6, batch_size=8, seed=i, label="") for i, net in enumerate(nets)]


def test_logits_are_the_weighted_mean_at_every_width_in_common(pair):
    both = pwkd.combine(pair, shares=(1, 3))
    images = split(7, 5).images
    assert both.widths == (0.5, 1.0)
    for width in both.widths:
        one, other = (np.float64(teacher.logits(images, width)) for teacher in pair)
        np.testing.assert_allclose(both.logits(images, width), 0.25 * one + 0.75 * other, atol=1e-5)
        assert [x["share"] for x in both.cards[width]["ensemble"]] == [0.25, 0.75]
    even = pwkd.combine([both, pair[0]])  # one of them several itself
    expected = 0.5 * np.float64(both.logits(images)) + 0.5 * np.float64(pair[0].logits(images))
    np.testing.assert_allclose(even.logits(images), expected, atol=1e-5)


def test_they_teach_in_stages_and_stay_as_they_were(pair, task):
    both = pwkd.combine(pair)
    before = jax.tree.map(np.array, both.variables)
    found = pwkd.distil(Tiny(width=0.25), both, task, duration=12, batch_size=8, label="")
    alone = pwkd.distil(Tiny(width=0.25), pair[0], task, duration=12, batch_size=8, label="")
    twice = pwkd.distil(Tiny(width=0.25), pwkd.combine([pair[0], pair[0]]), task, duration=12, batch_size=8, label="")
    assert identical(before, both.variables) and not identical(found.variables, alone.variables)
    for x, y in zip(*map(jax.tree.leaves, (twice.variables, alone.variables)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"AT needs 'stages', which the teacher's model does not return"):
        pwkd.distil(Tiny(width=0.25), both, task, distiller="at", duration=12, batch_size=8, label="")


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda pair, task: pair[:1], "teachers: 1 cannot be combined; give two or more"),
    (lambda pair, task: [pair[0], pair[1].at(0.25)], None),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused(make, sentence, pair, task, tmp_path):
    if sentence:
        with pytest.raises(UserError, match=sentence):
            pwkd.combine(make(pair, task))
    else:  # a network of any width is a teacher of one width, 1
        assert pwkd.combine(make(pair, task)).widths == (1.0,)
    with pytest.raises(UserError, match=r"shares: \(1, 0\) is not possible; it should be \(\) or 2 numbers above 0"):
        pwkd.combine(pair, shares=(1, 0))
    with pytest.raises(UserError, match="several teachers combined are not saved as one"):
        pwkd.combine(pair).save(tmp_path / "both")
    other = pwkd.task((split(40).images, np.minimum(split(40).labels, 1)))
    net = pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, num_classes=2)
    two = pwkd.train_teacher(net, other, duration=2, batch_size=8, label="")
    with pytest.raises(UserError, match=r"teachers: differ in num_classes: 3 of .*, and 2 of"):
        pwkd.combine([pair[0], two])


@pytest.fixture(scope="module")
def lenders(tmp_path_factory):
    """Two workdirs of teachers alone, which begin differently."""
    place = tmp_path_factory.mktemp("lenders")
    for seed in (0, 7):
        options = [*TINY, *ARMS, f"--config.seed={seed}", "--config.seeds=0", f"--workdir={place}/{seed}"]
        assert train.main(options) == 0
    return place


def students(tmp_path, lenders, name, *options):
    workdir = tmp_path / name
    assert train.main([*TINY, *ARMS, f"--config.teacher.run={lenders}/0", *options, f"--workdir={workdir}"]) == 0
    return {arm: final(workdir, f"students/{arm}/seed0", 24)["params"]["student"] for arm in ("pwkd", "kd_standard")}


def test_a_config_names_the_workdirs_whose_teachers_join(lenders, tmp_path, capsys):
    alone = students(tmp_path, lenders, "alone")
    both = students(tmp_path, lenders, "both", f"--config.student.teachers={lenders}/7")
    assert f"the slimmable teacher teaches together with test_training:Tiny of {lenders}/7" in capsys.readouterr().out
    mostly = students(tmp_path, lenders, "mostly", f"--config.student.teachers={lenders}/7",
                      "--config.student.teacher_shares=(1,1e-9)")  # fmt: skip
    for arm in alone:
        for x, y in zip(*map(jax.tree.leaves, (alone[arm], mostly[arm])), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        assert not identical(alone[arm], both[arm])
    summary = json.loads((tmp_path / "both/summary.json").read_text())
    assert summary["config"]["student"]["teachers"] == [f"{lenders}/7"]
    assert models.create("test_training:Tiny")  # and nothing of the lender was changed
    assert (tmp_path / "both/report.html").exists()


@pytest.mark.parametrize(("options", "sentence"), [
    (["student.teachers={0}/nowhere"], r"student.teachers: '.*nowhere' holds no finished (slimmable|standard) teacher"),
    (["student.teachers={0}/7", "teacher.widths=(0.25,0.5,1.0)"], r"teacher of '.*7' has no width 0.25"),
    (["student.teachers={0}/7", "student.teacher_shares=(1,)"], "student.teacher_shares: .* one for this teacher and one for"),
    (["student.teachers={0}/7", "student.distiller.name=at"], "AT needs 'stages', which the teacher"),
])  # fmt: skip
def test_teachers_that_cannot_join_are_refused(options, sentence, lenders, tmp_path, capsys):
    given = [f"--config.{option.format(lenders)}" for option in options]
    assert re.search(sentence, error(train.main, *TINY, *ARMS, *given, f"--workdir={tmp_path}/w", capsys=capsys))
    assert not (tmp_path / "w").exists()
