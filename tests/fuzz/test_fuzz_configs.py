"""Configs that people might write: each trains, or is refused in one sentence that names a key.

How to run all of it: see `fuzzing`.
"""

import json
import math

import fuzzing
import pytest
from hypothesis import strategies as st

from pwkd_jax import config, distillers, stages, train
from pwkd_jax.experiment import definition
from pwkd_jax.training import schedules

BASE = {
    "teacher.model": "fuzz_models:Net", "student.model": "fuzz_models:Net", "student.width": "0.5", "seeds": "1",
    "teacher.widths": "(0.5,1.0)", "data.train_split": "train[:40]", "data.test_split": "test[:16]", "arms": "pwkd",
    "teacher.duration": "2 steps", "student.duration": "2 steps", "teacher.batch_size": "8", "student.batch_size": "8",
    "log.tensorboard": "false", "evaluation.batch_size": "16", "teacher.calibration.batch_size": "16",
}  # fmt: skip
KEYS = dict(config.leaves(config.default()))

# Values that somebody may well mean, by key; for others those of their type. Durations stay short, for they are trained.
DURATIONS = ("2 steps", "1 step", "3 steps", "16 examples", "0.2 epochs", "1e1 examples", "0.01 epochs")
PLAUSIBLE = {
    "arms": (*stages.ARMS, "alone,pwkd", "pwkd,kd_whole_cyclic", "('kd_standard','pwkd_random')"),
    "seeds": ("0", "1", "2"), "seed": ("0", "7", "2147483647"), "dtype": ("float32", "bfloat16"),
    "batch_norm_group": ("0", "4", "8"), "mesh.model": ("1",), "steps_per_dispatch": ("0", "1", "2", "100"),
    "data.name": ("digits",), "data.data_dir": ("", "/nowhere", "~/x"), "data.copy": ("",), "data.num_classes": ("0", "10"),
    "data.train_split": ("train[:40]", "stratified(train[:200], 20%)", "train[:5%]", "train[:30]+test[20:30]"),
    "data.test_split": ("test[:16]", "stratified(test, 5%)", "train[40:60]", "test[:1]"),
    "data.crop_padding": ("0", "1", "2", "9"), "data.pixel_range": ("()",),
    "data.mean": ("()", "(0.3,)", "0.5"), "data.std": ("()", "(0.4,)", "0.5"),
    "data.on_device": ("auto", "always", "never"), "data.image_size": ("0",), "data.scale": ("(0.08,1.0)", "(0.5,0.5)"),
    "data.resize": ("256", "8"), "data.workers": ("-1", "0", "1"), "data.unreadable": ("0", "0.5"),
    "teacher.model": ("fuzz_models:Net", "fuzz_models:Net", "fuzz_models:Plain", "resnet8"),
    "student.model": ("fuzz_models:Net", "fuzz_models:Net", "fuzz_models:Plain", "resnet8"),
    "teacher.weights": ("",), "student.weights": ("",), "teacher.run": ("",),
    "teacher.order": ("bn_scale", "l1", "none"), "teacher.widths": ("(0.5,1.0)", "(1.0,)", "1.0,0.25", "(0.25,0.5,1)"),
    "teacher.divisor": ("0", "2", "8"), "teacher.execution": ("take", "mask"), "teacher.sampling": ("all", "sandwich"),
    "teacher.subnetworks": ("2", "3", "4"), "teacher.pool": ("()", "(0.75,)"),
    "teacher.loss": ("hard", "inplace", "inplace_mix"),
    "teacher.reduction": ("sum", "mean"), "teacher.batch_norm": ("switchable", "private_stats", "shared"),
    "teacher.duration": DURATIONS, "student.duration": DURATIONS, "teacher.batch_size": ("8", "4", "16", "40"),
    "student.batch_size": ("8", "4", "40", "1", "41"), "teacher.calibration.images": ("0", "16", "1000"),
    "teacher.calibration.batch_size": ("16", "8"), "teacher.calibration.seed": ("0", "3"),
    "student.width": ("0.5", "1.0", "0.125"), "student.widths": ("()", "(1.0,)", "(1.0,0.5)", "(0.5,0.5)"),
    "student.budget": ("total", "per_stage"), "student.stage_shares": ("()", "(1,3)", "(1.5,)"),
    "student.temperatures": ("()", "(2,4)", "(1.5,2,2.5)"),
    "data.policy": ("", "rand", "trivial", "auto_cifar10"), "data.policy_layers": ("2", "1"),
    "data.policy_magnitude": ("9", "30"),
    "data.jitter": ("()", "(0.3,0.3,0.3,0.1)", "(0,0,1,0)"), "data.blur": ("0", "0.5"), "data.erasing": ("0", "0.25"),
    "teacher.head": ("keep",), "student.head": ("keep",), "student.teachers": ("()",), "student.teacher_shares": ("()",),
    "evaluation.patience": ("0", "1"), "data.validation_split": ("", "train[40:]", "train[:1]"),
    "student.reset": ("", "momentum", "batch_norm,weights", "()"), "student.connectors": ("leading", "reinit"),
    "student.ensemble": ("1", "2", "5"), "student.batches": ("own", "shared"),
    "student.together": ("auto", "unroll", "scan", "vmap", "devices", "none"), "student.study": ("true", "false"),
    "student.teacher_dtype": ("", "bfloat16"),
    "student.distiller.name": ("kd", "dkd", "kd+at", "fitnet", "simkd", "rkd", "crd"),
    "student.schedule.cycles": ("per_stage", "single"), "student.schedule.single_form": ("", *schedules.CYCLES),
    "evaluation.every": ("1 epoch", "1 steps", "50 %"), "checkpoint.every": ("10 %", "1 steps"),
    "log.tracker": ("",),
    "log.every": ("50 steps", "1 steps"),
    "non_finite": ("stop", "skip"), "profile": ("", "pwkd/seed0:0-1", "teacher:100-110"),
    "name": ("digits", "über\t<b>", "a/b"),
}  # fmt: skip
for who in ("teacher", "student"):
    PLAUSIBLE |= {
        f"{who}.sharding": ("replicated", "fsdp"),
        f"{who}.optimizer.name": ("sgd", "adamw", "lamb", "lars", "lion", "optax:adam", "optax.contrib:schedule_free_sgd"),
        f"{who}.accumulate": ("1", "2", "4"), f"{who}.ema": ("0", "0.9"), f"{who}.schedule.per_batch": ("0", "16"),
        f"{who}.optimizer.decay": ("all", "kernels"),
        f"{who}.optimizer.momentum": ("0.9", "0"), f"{who}.optimizer.weight_decay": ("0", "1e-4"),
        f"{who}.optimizer.clip_norm": ("0", "1"), f"{who}.schedule.form": schedules.CYCLES,
        f"{who}.schedule.peak": ("0.1", "1e-3"),
        f"{who}.schedule.floor": ("0", "0.1", "1"), f"{who}.schedule.factor": ("0.1", "1"),
        f"{who}.schedule.milestones": ("()", "(0.5,)"),
        f"{who}.mix.mixup": ("0", "0.8"), f"{who}.mix.cutmix": ("0", "1"), f"{who}.mix.chance": ("1", "0.5"),
        f"{who}.mix.switch": ("0.5", "0"), f"{who}.mix.smoothing": ("0", "0.1"),
        f"{who}.mix.balance": ("0", "1", "0.5"), f"{who}.mix.class_weights": ("()",),
        f"{who}.schedule.warmup": ("0 epochs", "1 step", "10 %"),
    }  # fmt: skip
PLAUSIBLE |= {"student.teacher_sharding": ("replicated", "fsdp"), "student.schedule.peak_decay": ("1.0", "0.5"),
              "student.online": ("", "fusion"), "student.mutual": ("0", "1"),
              "student.optimizer.dot": ("0", "0.075")}  # fmt: skip

NUMBERS = ("0", "-1", "1", "2", "3", "0.5", "1e-3", "-0.0", "2147483647", "2147483648", "9223372036854775808", "1e30",
    "1e308", "1e400",
           "1e-400", "nan", "inf", "-inf", "1_000", "0x10", "007", "1,5", "+1")  # fmt: skip
WORDS = ("", " ", "x", "None", "True", "false", "()", "[]", "{}", "(1", "'", '"a"', "ä", "a b", "a/b", "../x", "~", "1 2",
    "*", "a=b", "--x",
         "%", "{0}", "%s", "\\", "\t", "kd,kd", "a:b", "json:dumps", "os:path", "fuzz_models:", ":Net", "a:b:c", ".", "a..b",
         "+")  # fmt: skip
LISTS = ("()", "(0.5,)", "(0.5,1.0)", "(1.0,1.0)", "(0.5,0.5000001)", "(nan,)", "(inf,1)", "(1e400,)", "(1e-9,1)", "('a',)",
    "(1,'a')", "((1,),)",
         "([1],)", "({},)", "[0.5,1]", "{0.5,1}", "(True,)", "(None,)", "1,,2", "0.5;1", "(0,)", "(-1,1)", "(1e-400,1)",
         "(1j,)", "('',)",
         "(b'a',)", "(2**70,)", "(10**400,1)")  # fmt: skip
TIMES = ("0 steps", "-1 steps", "1e400 steps", "1e30 epochs", "1e18 steps", "1e9 steps", "nan steps", "inf steps",
    "1e-9 epochs", "5", "steps", "5 years", "1.5.2 steps",
         "100 %", "200 %", "1 %", "٣ steps", "2  steps ", "2steps", "2 Steps", "1e+1 steps", "1e-1 epochs", ". epochs",
         "1_0 steps")  # fmt: skip
SPLITS = ("train[", "train[:0]", "train[:99999999999]", "all", "test", "train[:1]", "nope", "stratified(train, 0%)",
    "stratified(train, 1%)",
          "stratified(train, 200%)", "stratified(train", "stratified(train, 50%, seed=99999999999999999999)", "train[-8:]",
          "train+train",
          "stratified(stratified(train, 50%), 50%)", "train[5:3]", "train[:1.5]", "test[:1%]", "train[:nan%]", "train+",
          "stratified(, 5%)",
          "train[:100000000000000000000000%]", "train[ : 9]")  # fmt: skip


def right(key: str) -> st.SearchStrategy[tuple[str, str]]:
    kinds = {bool: ("true", "false"), tuple: LISTS[:3], float: ("1", "0.5", "0.0", "2"), int: ("1", "2")}
    return st.sampled_from(PLAUSIBLE.get(key) or kinds[type(KEYS[key])]).map(lambda value: (key, value))


def wrong(key: str) -> st.SearchStrategy[tuple[str, str]]:
    """Mostly of the key's own kind, for those come further."""
    default = KEYS.get(key, 1.0)
    own = TIMES if isinstance(default, str) and default[:1].isdigit() else SPLITS if key.endswith("_split") else WORDS
    own = {bool: WORDS[3:6], int: NUMBERS, float: NUMBERS, tuple: LISTS}.get(type(default), own)
    every = st.sampled_from(NUMBERS + WORDS + LISTS + TIMES)
    return st.one_of(st.sampled_from(own), st.sampled_from(own), every).map(lambda value: (key, value))


ODD = ("studnet.lr", "nonsense", "student", "teacher.schedule", "student.distiller.margin", "student.distiller.at.weight",
    "", ".", "a.b.c",
       "data.name.x", "__class__", "student.distiller")  # fmt: skip
OPTIONS = tuple(f"student.distiller.{key}" for name in ("kd", "dkd", "fitnet", "crd",
    "simkd") for key in distillers.fields(name))


@st.composite
def overrides(draw, most: int, mistakes: st.SearchStrategy[int]) -> dict[str, str]:
    keys = sorted(set(KEYS) - {"student.distiller.ce_weight"})
    found = dict(draw(st.lists(st.sampled_from(keys).flatmap(right), max_size=most)))
    for _ in range(draw(mistakes)):
        key, value = draw(st.sampled_from((*keys, *OPTIONS, *ODD)).flatmap(wrong))
        found[key] = value
    return found


def arguments(given: dict[str, str]) -> list[str]:
    return ["--config=configs/digits.py", *(f"--config.{key}={value}" for key, value in (BASE | given).items())]


def names_a_key(text: str) -> str:
    """Refusals name a key, or an argument of the command, by the name under which the user finds it."""
    dotted = {part for key in KEYS if "." in key for part in (key, key.rpartition(".")[0])}
    named = any(key in text for key in (dotted - {"data", "log"}) | {"--config", "--workdir", "there is no key", "the loss is"})
    assert named or text.partition(":")[0] in KEYS or "schedule.peak" in text, f"names no key: {text}"
    return text


def read(given: dict[str, str]):
    """The experiment of a config, or None where it was refused."""
    loaded, text = fuzzing.refused(lambda: definition.prepare(config.load(arguments(given))[0]))
    if text:
        names_a_key(text)
    return loaded


def configs_read(given: dict[str, str]) -> str:
    return "refused" if read(given) is None else "accepted"


def short(experiment) -> bool:
    """Whether an experiment trains within seconds."""
    c, images = experiment.config, len(experiment.dataset.train)
    of = [schedules.steps(c[who].duration, "", batch_size=c[who].batch_size, images=images) for who in ("teacher", "student")]
    stages_ = len(c.student.widths or c.teacher.widths) if c.student.budget == "per_stage" else 1
    heavy = max(c.teacher.batch_size, c.student.batch_size, c.evaluation.batch_size, c.teacher.calibration.batch_size) > 4096
    return of[0] <= 5 and of[1] * stages_ <= 10 and c.seeds <= 2 and images <= 1200 and not heavy


@pytest.mark.parametrize("examples", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_configs_are_read_or_refused(examples, capsys, tmp_path, monkeypatch):
    tally = fuzzing.run(configs_read, overrides(4, st.integers(0, 3)), examples, capsys, 60)
    assert min(tally["refused"], tally["accepted"]) > examples / 10


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_configs_train_or_are_refused(examples, capsys, tmp_path):
    numbers = iter(range(10**6))

    def configs_trained(given: dict[str, str]) -> str:
        experiment = read(given)
        if experiment is None:
            return "refused"
        if not short(experiment):
            return "accepted, too long to train here"
        workdir = tmp_path / str(next(numbers))
        code = train.main([*arguments(given), f"--workdir={workdir}"])
        said = capsys.readouterr().err
        if code:
            assert code == 2, said
            [error] = [line for line in said.splitlines() if line.startswith("error: ")]
            names_a_key(fuzzing.sentence(error))
            return "refused in training"
        summary = json.loads((workdir / "summary.json").read_text())
        scores = [row["top1_last"] for teacher in summary["teachers"].values() for row in teacher["widths"]]
        losses = [point["train_loss"] for run in (*summary["runs"], *summary["teachers"].values()) for point in run["curve"]]
        assert all(x is not None and math.isfinite(x) for x in scores + losses + [run["top1_last"] for run in summary["runs"]])
        assert len(summary["runs"]) == experiment.config.seeds * len(experiment.config.arms)
        return "trained"

    tally = fuzzing.run(configs_trained, overrides(5, st.sampled_from((0, 0, 0, 1))), examples, capsys, 300)
    assert tally["trained"] > examples / 4

