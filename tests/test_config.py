"""Configs: every mistake is one sentence that names the key, before anything is compiled."""

import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from pwkd_jax import config
from pwkd_jax.errors import UserError

DIGITS = "--config=configs/digits.py"


def load(*overrides: str):
    return config.load([DIGITS, *(f"--config.{o}" for o in overrides)])[0]


def test_defaults_pass_and_can_all_be_overridden():
    default = config.default()
    config.check(default)
    for key, value in config.leaves(default):
        assert value is not None, key  # ml_collections cannot override a bare None
        if type(value) in (int, float):
            assert dict(config.leaves(load_unchecked(f"{key}={value}")))[key] == value


def load_unchecked(override):
    try:
        return load(override)
    except UserError as e:
        raise AssertionError(override) from e


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("seeds=5", "seeds", 5),
        ("arms=pwkd,alone", "arms", ("pwkd", "alone")),
        ("arms=pwkd", "arms", ("pwkd",)),
        ("arms=('pwkd','alone')", "arms", ("pwkd", "alone")),
        ("student.reset=momentum", "student.reset", ("momentum",)),
        ("student.widths=1.0,0.25", "student.widths", (1.0, 0.25)),
        ("teacher.widths=(0.5,1.0)", "teacher.widths", (0.5, 1.0)),
        ("student.schedule.peak=1", "student.schedule.peak", 1.0),
        ("student.same_crop=false", "student.same_crop", False),
        ("student.teachers=runs/b", "student.teachers", ("runs/b",)),
        ("student.teachers=/my/b,gs://c/d-1", "student.teachers", ("/my/b", "gs://c/d-1")),
        ("student.teachers=('/my/b','/my/c')", "student.teachers", ("/my/b", "/my/c")),
        ("data.train_split=train[:50]", "data.train_split", "train[:50]"),
        ("student.distiller.temperature=2", "student.distiller.temperature", 2.0),
    ],
)
def test_overrides(override, key, value):
    assert dict(config.leaves(load(override)))[key] == value


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("studnet.lr=1", r"no key 'studnet.lr'; did you mean 'student.schedule.peak'\?"),
        ("student.distiler.temperature=2", r"did you mean 'student.distiller.temperature'\?"),
        ("nonsense=2", r"no key 'nonsense'; known are arms, "),
        ("student=3", r"'student' is a group of keys"),
        ("student.distiller.name=nope", r"student.distiller.name: there is no distiller 'nope': known are .*kd"),
        ("student.distiller.temperature=0", r"student.distiller: temperature: 0 is not possible"),
        ("seeds=2.5", r"seeds=2.5: the key takes a whole number"),
        ("seeds", r"seeds: the key takes a whole number"),
        ("seeds=-1", r"seeds: -1 is not possible; it should be 0 \(teachers alone\) or more"),
        ("teacher.schedule.peak=high", r"peak=high: the key takes a number"),
        ("teacher.optimizer.nesterov=maybe", r"the key takes true or false"),
        ("arms=pwkd,best", r"arms: .* it should be from alone, kd_standard"),
        ("arms=pwkd,pwkd", r"arms: .* different arms"),
        ("arms=", r"arms: \(\) is not possible"),
        ("teacher.widths=(0.5,1.5)", r"teacher.widths: .* different widths in \(0, 1\]"),
        ("teacher.widths=wide", r"teacher.widths: .* a list of numbers"),
        ("teacher.widths=(1.0,)", None),
        ("teacher.loss=soft", r"teacher.loss: 'soft' is not possible; it should be one of hard, inplace, inplace_mix"),
        ("teacher.batch_norm=group", r"teacher.batch_norm: .* one of switchable, private_stats, shared"),
        ("teacher.pool=(0.3,)", r"teacher.pool: .* unless teacher.sampling is 'sandwich'"),
        ("teacher.model=resnet9", r"teacher.model: there is no model 'resnet9'"),
        ("teacher.duration=5", r"teacher.duration: '5' is not a duration"),
        ("teacher.duration=5 %", r"teacher.duration: .* percentage"),
        ("teacher.schedule.milestones=(0.5,0.2)", r"teacher.schedule.milestones: .* rising"),
        ("teacher.calibration.images=-1", r"teacher.calibration.images: -1 is not possible"),
        ("student.widths=(0.3,)", r"student.widths: .* from teacher.widths, which are"),
        ("student.temperatures=(1,2)", r"student.temperatures: .* 4 numbers above 0"),
        ("student.temperatures=(1,2,3,0)", r"student.temperatures: .* 4 numbers above 0"),
        ("teacher.mix.mixup=-1", r"teacher.mix.mixup: -1.* from 0 to 100"),
        ("student.mix.smoothing=1", r"student.mix.smoothing: 1.* from 0 to 0.999"),
        ("student.stage_shares=(1,2)", r"student.stage_shares: .* 4 numbers above 0"),
        ("student.reset=memory", r"student.reset: .* from momentum, batch_norm, weights"),
        ("student.budget=free", r"student.budget: .* one of total, per_stage"),
        ("student.optimizer.momentum=1.0", r"student.optimizer.momentum: 1.0 is not possible"),
        ("arms=([1],)", r"arms: \(\[1\],\) is not possible; it should be a list of names"),
        ("student.reset=({},)", r"student.reset: \(\{\},\) is not possible; it should be a list of names"),
        ("teacher.widths=(0.5,0.5000001)", r"teacher.widths: .* different widths in \(0, 1\], which differ in six digits"),
        ("student.widths={1.0,0.5}", r"student.widths=\{1.0,0.5\}: the key takes a list"),
        ("student.stage_shares=(1,1,1,inf)", r"student.stage_shares=\(1,1,1,inf\): the key takes a list|a list of numbers"),
        ("student.stage_shares=(1,1,1,1e400)", r"student.stage_shares: .* a list of numbers"),
        ("student.schedule.peak=inf", r"student.schedule.peak: inf is not possible; it should be a number within 1e30"),
        ("student.distiller.weight=nan", r"student.distiller.weight: nan is not possible; it should be a number within 1e30"),
        ("student.batch_size=9223372036854775808", r"student.batch_size: .* a whole number below 2\^31"),
        ("student.duration=1e400 steps", r"student.duration: '1e400 steps' is inf steps; give fewer than 2\^31"),
        ("teacher.duration=1e18 steps", r"teacher.duration: '1e18 steps' is 1e\+18 steps; give fewer than 2\^31"),
        ("teacher.duration=1e10 examples", None),
        ("log.every=1e400 steps", r"log.every: '1e400 steps' is inf steps"),
        ("teacher.model=:Net", r"teacher.model: ':Net' cannot be imported \(ValueError: Empty module name\)"),
        ("checkpoint.every=never", r"checkpoint.every: 'never' is not a duration"),
        ("data.std=(1.0,)", r"data.std: .* given together with data.mean"),
        ("student.schedule.single_form=one_cycle", None),
    ],
)
def test_mistakes_are_named(override, sentence):
    if sentence is None:
        load(override)
        return
    with pytest.raises(UserError) as e:
        load(override)
    assert re.search(sentence, str(e.value)), str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("teacher.widths=(1.0,)", "teacher.loss=inplace"), r"teacher.loss: .* 'hard' where teacher.widths has a single"),
        (("teacher.sampling=sandwich", "teacher.pool=(0.3,)"), r"teacher.pool: .*'switchable'"),
        (("teacher.sampling=sandwich", "teacher.batch_norm=shared", "teacher.pool=(0.1,)"), r"between the ends"),
        (("student.widths=(0.5,0.5,1)", "student.temperatures=(1,2,3)"), r"temperatures: .* the same for a width that teaches"),
        (("student.optimizer.nesterov=true", "student.optimizer.momentum=0"), r"nesterov: .* false where momentum is 0"),
        (("teacher.schedule.form=triangular", "teacher.schedule.warmup=1 epochs"), r"warmup: .* is triangular, which rises"),
        (("student.schedule.single_form=one_cycle", "student.schedule.warmup=5 %"), r"warmup: .* is one_cycle, which rises"),
        (("student.study=true",), r"student.study: True .* false unless student.batches is 'shared'"),
        (("student.study=true", "student.batches=shared", "student.together=devices"), r"neither 'devices' nor"),
        (("student.study=true", "student.batches=shared", "non_finite=skip"), r"student.study: .* each student go its own way"),
        (("data.mean=123.675,116.28,103.53", "data.std=58.395,57.12,57.375"),
         r"^data\.mean: 123\.675,116\.28,103\.53 is in units of pixels up to 255, .* divided by 255: 0\.485,0\.456,0\.406$"),
        (("data.mean=0.485,0.456,0.406", "data.std=58.395,57.12,57.375"),
         r"^data\.std: 58\.395,57\.12,57\.375 is in units .* divided by 255: 0\.229,0\.224,0\.225$"),
        (("data.mean=127.5", "data.std=127.5"), r"^data\.mean: 127\.5 is in units of pixels up to 255, .* by 255: 0\.5$"),
        (("data.mean=0.5", "data.std=0"), r"^data\.std: 0 is not possible; each should be in \[0\.001, 1\], .* as in 0\.229"),
        (("data.mean=0.5", "data.std=1e-6"), r"^data\.std: 1e-06 is not possible"),
        (("data.mean=0.5,0.5,0.5", "data.std=0.2,-0.2,0.2"), r"^data\.std: 0\.2,-0\.2,0\.2 is not possible"),
        (("data.mean=0.5", "data.std=1000"), r"^data\.std: 1000 is not possible"),
        (("data.mean=-0.5", "data.std=0.5"), r"^data\.mean: -0\.5 is not possible; each should be in \[0, 1\]"),
        (("data.mean=32896", "data.std=0.5"), r"^data\.mean: 32896 is not possible"),
    ],
)
def test_contradictions_are_named(overrides, sentence):
    with pytest.raises(UserError) as e:
        load(*overrides)
    assert re.search(sentence, str(e.value)), str(e.value)


@pytest.mark.parametrize(
    "mean, std",
    # ImageNet's; Inception's, pixels in [-1, 1]; pixels as they are; Caffe's, pixels up to 255 less a mean.
    [("0.485,0.456,0.406", "0.229,0.224,0.225"), ("0.5", "0.5"), ("0", "1"), ("0.485", "0.00392156862745098")],
)
def test_normalisations_that_are_in_use(mean, std):
    assert load(f"data.mean={mean}", f"data.std={std}").data.mean == tuple(map(float, mean.split(",")))


def test_config_files_that_are_wrong(tmp_path):
    def file(body: str) -> str:
        path = tmp_path / "own.py"
        path.write_text(f"from ml_collections import ConfigDict\nfrom pwkd_jax.config import default\n{body}\n")
        return f"--config={path}"

    with pytest.raises(UserError, match=r"there is no file 'configs/nothing\.py'"):
        config.load(["--config=configs/nothing.py"])
    with pytest.raises(UserError, match="give one config file"):
        config.load([])
    with pytest.raises(UserError, match="fails with ZeroDivisionError"):
        config.load([file("def get_config():\n    return 1 / 0")])
    with pytest.raises(UserError, match="should return a ConfigDict, not int"):
        config.load([file("def get_config():\n    return 1")])
    with pytest.raises(UserError, match=r"own.py: there is no key 'student.epochs'; did you mean 'student.duration'"):
        config.load([file("def get_config():\n    return ConfigDict({'student': {'epochs': 3}})")])
    with pytest.raises(UserError, match=r"seeds takes a whole number, as in 3, not '3'"):
        config.load([file("def get_config():\n    return ConfigDict({'seeds': '3'})")])
    # A file may set a few keys only, pass an argument on, and leave the rest at the defaults.
    partly = "def get_config(arg):\n    return ConfigDict({'seeds': int(arg), 'teacher': {'widths': [0.5, 1.0]}})"
    loaded, rest = config.load([file(partly) + ":7", "--workdir=x"])
    assert (loaded.seeds, loaded.teacher.widths, loaded.student.model, rest) == (7, (0.5, 1.0), "resnet8", ["--workdir=x"])


def test_the_last_of_several_settings_holds():
    assert load("teacher.widths=(0.5,1.0)", "teacher.widths=(0.25,1.0)").teacher.widths == (0.25, 1.0)


def test_another_distiller_brings_its_own_keys():
    own = "student.distiller.name=test_distillers:Hint"
    assert load(own).student.distiller.to_dict() == {"name": "test_distillers:Hint", "ce_weight": 1.0, "weight": 0.5}
    assert load(own, "student.distiller.weight=3").student.distiller.weight == 3.0
    summed = load("student.distiller.name=kd+at", "student.distiller.at.weight=7").student.distiller
    assert (summed.ce_weight, summed.kd.temperature, summed["at"].weight) == (0.1, 4.0, 7.0)
    with pytest.raises(UserError, match=r"no key 'student\.distiller\.temperature'"):
        load(own, "student.distiller.temperature=2")


def test_unknown_keys_cannot_be_set_in_a_file():
    with pytest.raises((AttributeError, KeyError)):
        config.default().student.epochs = 3
    assert isinstance(config.default(), ConfigDict)


def test_a_side_that_is_written_in_two_ways_is_one_config():
    """A workdir of before 0 meant 8/7 of image_size says 256, and is still the same experiment's."""
    digits = f"--config={Path(__file__).parents[1]}/configs/digits.py"
    for size, resize, expected in ((0, 256, 0), (0, 0, 0), (224, 256, 0), (224, 0, 0), (224, 232, 232), (64, 256, 256)):
        streamed = ["--config.data.crop_padding=0", "--config.data.mean=(0.5,)", "--config.data.std=(0.5,)"] if size else []
        given = [digits, *streamed, f"--config.data.image_size={size}", f"--config.data.resize={resize}"]
        assert config.load(given)[0].data.resize == expected
    old = ConfigDict({"data": {"resize": 256, "image_size": 224}})
    assert config.complete(old, (), "old").data.resize == 0
