"""All arms in one program end as each student does by itself on the same batches, and sub-networks predict once for all."""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import identical
from test_commands import TINY, command, rows
from test_hosts import terminated_at
from test_together import alike, state

from pwkd_jax import config, models, stages, train
from pwkd_jax.experiment import definition, programs, students
from pwkd_jax.training import study

# The log's rows, the evaluations and the checkpoints fall on other steps than the stages' ends, 12 and 24.
STUDY = [*TINY, "--config.student.batches=shared", "--config.log.tensorboard=false",
         "--config.evaluation.every=9 steps"]  # fmt: skip
ALL = "--config.arms=" + ",".join(stages.ARMS)
RUNS = [f"students/{arm}/seed0" for arm in stages.ARMS]
FEW = ("--config.arms=alone,pwkd", "--config.seeds=2")
FEW_RUNS = [f"students/{arm}/seed{seed}" for arm in ("alone", "pwkd") for seed in range(2)]
SINGLE = ("alone", "kd_standard", "kd_whole")


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Every student by itself."""
    workdir = tmp_path_factory.mktemp("apart") / "work"
    assert train.main([*STUDY, ALL, "--config.student.together=none", f"--workdir={workdir}"]) == 0
    return workdir


def run(apart, workdir, *options) -> int:
    """In one program, under the teachers that the others had."""
    given = [*STUDY, ALL, "--config.student.study=true", f"--config.teacher.run={apart}", *options, f"--workdir={workdir}"]
    return train.main(given)


@pytest.fixture(scope="module")
def joined(apart, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("joined") / "work"
    assert run(apart, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def few(apart, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("few") / "work"
    assert run(apart, workdir, *FEW) == 0
    return workdir


def test_each_ends_as_by_itself(apart, joined):
    """Parameters and momenta at the ends of its own stages, and rows at the same steps: to 1e-5 and 1e-4 of themselves."""
    for name in RUNS:
        alike(apart, joined, [name], (24,) if name.split("/")[1] in SINGLE else (12, 24))
        assert (joined / name / "checkpoints/12").exists() is (name.split("/")[1] not in SINGLE)
    assert sorted(p.name for p in (joined / "students").iterdir()) == sorted(stages.ARMS)


def test_results_are_those_of_each(apart, joined):
    for name in RUNS:
        here, there = (json.loads((w / name / "result.json").read_text()) for w in (apart, joined))
        assert here.keys() == there.keys()
        for key in ("arm", "seed", "plan", "cycles", "steps", "learning_rates"):
            assert here[key] == there[key], (name, key)
        assert [point["step"] for point in here["curve"]] == [point["step"] for point in there["curve"]]
    summary = json.loads((joined / "summary.json").read_text())
    assert summary.keys() == json.loads((apart / "summary.json").read_text()).keys()


def test_seeds_are_those_of_one_arm_alone(joined, few):
    alike(joined, few, ["students/pwkd/seed0"])
    one, two = (state(few, f"students/pwkd/seed{seed}", 24)["params"] for seed in (0, 1))
    assert not identical(one, two)


def test_stopped_again_and_again_it_ends_the_same(apart, few, tmp_path, monkeypatch):
    codes = []
    while not codes or codes[-1]:
        with monkeypatch.context() as patch:
            terminated_at(20, patch)  # later than a command's own looks before and after training, so that all get on
            codes.append(run(apart, tmp_path / "w", *FEW))
        assert codes[-1] in (0, 75) and len(codes) < 40
    assert len(codes) > 2
    for name in FEW_RUNS:
        assert identical(state(few, name, 24), state(tmp_path / "w", name, 24)), name
        assert rows(few, name) == rows(tmp_path / "w", name)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["student.together=vmap", "steps_per_dispatch=5"])
def test_other_ways_equal_apart(option, apart, tmp_path):
    assert run(apart, tmp_path / "w", f"--config.{option}") == 0
    for name in RUNS:
        alike(apart, tmp_path / "w", [name], (24,))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "leaving"])
def test_killed_it_goes_on_to_the_same_bits(moment, apart, few, tmp_path):
    """Of results that are half written too: the study is still there to write them again."""
    given = [*STUDY[len(TINY):], *FEW, "--config.student.study=true", f"--config.teacher.run={apart}"]
    line, environment = command(*given, f"--workdir={tmp_path / 'w'}")
    students = tmp_path / "w/students"
    begun = students / {"training": "alone+pwkd/seeds0+1/checkpoints/10", "leaving": "alone/seed0/result.json"}[moment]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not begun.exists():
        pass
    process.kill()
    process.wait()
    if moment == "leaving":  # whenever the kill came
        (students / "alone+pwkd").exists() or pytest.skip("it had finished before it could be killed")
    assert run(apart, tmp_path / "w", *FEW) == 0
    assert sorted(p.name for p in students.iterdir()) == ["alone", "pwkd"]
    for name in FEW_RUNS:
        assert identical(state(few, name, 24), state(tmp_path / "w", name, 24)), name
        assert rows(few, name) == rows(tmp_path / "w", name)


@pytest.mark.slow
def test_what_began_together_goes_on_so(apart, few, tmp_path, monkeypatch):
    """A study that is stopped, then given with an arm more, which trains beside nobody."""
    with monkeypatch.context() as patch:
        terminated_at(20, patch)
        assert run(apart, tmp_path / "w", *FEW) == 75
    assert (tmp_path / "w/students/alone+pwkd/seeds0+1/checkpoints").exists()
    assert run(apart, tmp_path / "w", *FEW, "--config.arms=alone,pwkd,kd_whole") == 0
    assert sorted(p.name for p in (tmp_path / "w/students").iterdir()) == ["alone", "kd_whole", "pwkd"]
    for name in FEW_RUNS:
        assert identical(state(few, name, 24), state(tmp_path / "w", name, 24)), name


def test_those_with_the_same_seeds_left_train_together():
    settings, _ = config.load([*STUDY, ALL, "--config.seeds=2", "--config.student.study=true"])
    experiment = definition.prepare(settings)
    found = students.groups(experiment, Path("none"), {"alone": (0, 1), "pwkd": (1,), "kd_whole": (0, 1), "kd_standard": ()})
    assert [tuple(group) for group in found] == [(("alone", "kd_whole"), (0, 1)), (("pwkd",), (1,))]


def test_spans_are_divided_where_an_arm_is():
    plans = [[stages.Stage("none", (), 0, 10)],
             [stages.Stage("slimmable", (0.5,), 0, 5), stages.Stage("slimmable", (1.0,), 5, 10)],
             [stages.Stage("slimmable", (1.0,), 0, 3), stages.Stage("slimmable", (0.5,), 3, 10)]]  # fmt: skip
    assert study.spans(plans) == [
        ((0, 0, 0), ((), (0.5,), (1.0,)), 0, 3),
        ((0, 0, 1), ((), (0.5,), (0.5,)), 3, 5),
        ((0, 1, 1), ((), (1.0,), (0.5,)), 5, 10),
    ]


def test_rows_between_go_into_the_next():
    told = [{"step": 4, "epoch": 1.0, "seconds": 8.0, "images_per_second": 2.0, "train_loss": 9.0, "a/train_loss": 1.0},
            {"step": 6, "epoch": 1.5, "seconds": 4.0, "images_per_second": 1.0, "train_loss": 9.0, "a/train_loss": 4.0,
             "b/top1": 7.0, "a/top1": 5.0}]  # fmt: skip
    assert study.own_rows(told, "a", 2, [4, 6])[1] == {
        "step": 6, "epoch": 1.5, "seconds": 2.0, "images_per_second": 2.0, "train_loss": 4.0, "top1": 5.0
    }  # fmt: skip
    # (4 * 1 + 2 * 4) / 6; 6 steps in 4 / 2 + 2 / 1 of a time; 12 s for two.
    assert study.own_rows(told, "a", 2, [6]) == [
        {"step": 6, "epoch": 1.5, "seconds": 6.0, "images_per_second": 3.0, "train_loss": 2.0, "top1": 5.0}
    ]


def convolutions(lowered: jax.stages.Lowered) -> int:
    return lowered.as_text().count("stablehlo.convolution")


def test_each_sub_network_predicts_once():
    """Of a study's convolutions, those that are no student's are one forward pass of the ordinary teacher and of each width."""
    found, programs_of = {}, {}
    for seeds in (1, 3):
        settings, _ = config.load([*STUDY, ALL, "--config.student.study=true", f"--config.seeds={seeds}"])
        experiment = definition.prepare(settings)
        plans = {arm: experiment.plan(arm) for arm in settings.arms}
        fitted = {name: experiment.distillation(name, w) for name, w in (("slimmable", (0.5, 1.0)), ("standard", (1.0,)))}
        create, steps = programs.study_steps(experiment, plans, fitted, experiment.several(seeds, len(plans)))
        frozen = {
            name: {w: programs._frozen(experiment, net, w) for w in net.members} for name, net in experiment.teachers.items()
        }
        for widths, step in steps.items():
            found[seeds, widths] = convolutions(step.lower(create.like, programs._batch(experiment, 16), teacher=frozen))
        programs_of[seeds] = [*steps]
    assert len(programs_of[1]) == 2 and programs_of[1] == programs_of[3]  # one a segment: the first stage, and the second
    net = experiment.teachers["standard"].members[1.0]
    images = jnp.zeros((16, *experiment.task.image_shape))
    one = convolutions(jax.jit(lambda v: models.apply(net, v, images, train=False)[0]).lower(frozen["standard"][1.0]))
    for widths in programs_of[1]:
        students_own = (found[3, widths] - found[1, widths]) * 7 // 14
        assert found[1, widths] - students_own == 3 * one > 0
