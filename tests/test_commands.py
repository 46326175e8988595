"""The command line as a user meets it: a whole experiment, mistakes, and kill -9 at any time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import identical
from orbax.checkpoint import v1 as ocp
from PIL import Image

from pwkd_jax import evaluate, export, report, stages, storage, train
from pwkd_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "tfds"
TINY = [
    "--config=configs/digits.py",
    *(
        f"--config.{override}"
        for override in (
            "teacher.model=test_training:Tiny", "student.model=test_training:Tiny", "student.width=0.5", "seeds=1",
            "teacher.widths=(0.5,1.0)", "data.train_split=train[:150]", "data.test_split=test[:50]",
            "teacher.duration=24 steps", "student.duration=24 steps", "teacher.batch_size=16", "student.batch_size=16",
            "evaluation.every=8 steps", "log.every=4 steps", "checkpoint.every=5 steps",
        )
    ),
]  # fmt: skip


def command(*arguments: str) -> tuple[list[str], dict]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return [sys.executable, "-m", "pwkd_jax.train", *TINY, *arguments], environment


def final(workdir: Path, run: str, step: int):
    directory = workdir / run / "checkpoints" / str(step)
    return jax.tree.map(np.asarray, ocp.load_checkpointables(directory)["state"])


def rows(workdir: Path, run: str) -> list[dict]:
    lines = (workdir / run / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir in which every arm ran."""
    workdir = tmp_path_factory.mktemp("all") / "work"
    arms = "--config.arms=" + ",".join(stages.ARMS)
    assert train.main([*TINY, arms, "--config.student.schedule.cycles=per_stage", f"--workdir={workdir}"]) == 0
    return workdir


def test_every_arm_reports(finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["arms"]) == set(stages.ARMS)
    assert set(summary["teachers"]) == {"slimmable", "standard"}
    assert [w["width"] for w in summary["teachers"]["slimmable"]["widths"]] == [0.5, 1.0]
    for run in summary["runs"]:
        assert run["steps"] == 24 and run["plan"][-1]["end"] == 24
        assert len(run["stage_ends"]) == len(run["plan"]) and run["stage_ends"][-1] == run["top1_last"]
        assert [row["step"] for row in run["curve"]] == sorted({8, 16, 24} | {s["end"] for s in run["plan"]})
        assert run["top1_best"] == max(row["top1"] for row in run["curve"])
        assert len(run["ensemble"]) == (len(run["plan"]) if len(run["plan"]) > 1 else 0)
        if run["ensemble"]:
            assert run["ensemble"][0]["top1"] == run["top1_last"]  # an ensemble of one is the student itself
    by_arm = {run["arm"]: run for run in summary["runs"]}
    assert by_arm["kd_whole"]["cycles"] == [[0, 24]] and by_arm["pwkd"]["cycles"] == [[0, 12], [12, 24]]
    assert summary["gain"]["partial_to_whole"]["n"] == 1
    assert "<svg" in (finished / "report.html").read_text()
    # Again: nothing is trained anew, and report reads what is there.
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("metrics.jsonl")}
    assert train.main([*TINY, "--config.arms=alone,pwkd", f"--workdir={finished}"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("metrics.jsonl")}
    assert report.main([str(finished)]) == 0
    assert "pwkd" in capsys.readouterr().out


def test_one_whole_stage_is_plain_distillation(tmp_path):
    """K = 1, width 1, one cycle: the arms pwkd and kd_whole are the same run, bit for bit."""
    one = ["--config.student.widths=(1.0,)", "--config.arms=kd_whole,pwkd", f"--workdir={tmp_path / 'w'}"]
    assert train.main([*TINY, *one]) == 0
    a, b = (final(tmp_path / "w", f"students/{arm}/seed0", 24) for arm in ("kd_whole", "pwkd"))
    assert identical(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simkd", "kd+crd", "ft"])
def test_methods_with_connectors_state_and_phases_go_through_the_stages(name, tmp_path):
    options = [f"--config.student.distiller.name={name}", "--config.arms=pwkd", "--config.student.standardise_logits=true"]
    options += [f"--config.{who}.duration=300 steps" for who in ("teacher", "student")]
    options += [f"--config.{key}.every=100 steps" for key in ("evaluation", "checkpoint", "log")]
    if name == "ft":
        options += ["--config.student.distiller.initial_epochs=2", "--config.student.distiller.initial_each_stage=true"]
    assert train.main([*TINY, *options, f"--workdir={tmp_path / 'w'}"]) == 0
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    run = summary["runs"][0]
    assert run["ensemble"][0]["top1"] == run["top1_last"]
    assert run["curve"][-1]["train_loss"] < run["curve"][0]["train_loss"] or name == "ft"  # whose last phase is another loss


def test_arms_and_seeds_can_be_added_to_a_workdir(tmp_path, capsys):
    where = f"--workdir={tmp_path / 'w'}"
    assert train.main([*TINY, "--config.arms=alone", where]) == 0
    first = final(tmp_path / "w", "students/alone/seed0", 24)
    assert train.main([*TINY, "--config.arms=alone,kd_whole", "--config.seeds=2", where]) == 0
    assert identical(first, final(tmp_path / "w", "students/alone/seed0", 24))
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert {(r["arm"], r["seed"]) for r in summary["runs"]} == {(a, s) for a in ("alone", "kd_whole") for s in (0, 1)}
    capsys.readouterr()
    assert train.main([*TINY, "--config.student.schedule.peak=0.3", where]) == 2
    assert "holds runs with student.schedule.peak = 0.1, not 0.3; give another workdir" in capsys.readouterr().err


KILLS = [("teacher/slimmable", 10), ("students/pwkd/seed0", 15), ("students/pwkd/seed0", 12)]


@pytest.mark.slow  # of every run are the six of tests/faults/test_kills.py
@pytest.mark.parametrize("kills", [KILLS[:2], KILLS[::2]], ids=["within", "at the end"])
def test_killed_at_any_time_ends_like_an_unbroken_run(kills, tmp_path):
    """kill -9 in the teacher's training, and within stage 2 or at a stage's end; the same command again ends bit-identical."""
    options = ["--config.arms=pwkd", "--config.student.reset=momentum"]
    assert train.main([*TINY, *options, f"--workdir={tmp_path / 'whole'}"]) == 0
    line, environment = command(*options, f"--workdir={tmp_path / 'broken'}")
    killed = 0
    for run, step in kills:
        process = subprocess.Popen(line, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        waiting = tmp_path / "broken" / run / "checkpoints" / str(step)
        deadline = time.monotonic() + 240
        while not waiting.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not (tmp_path / "broken" / "summary.json").exists() or process.returncode == 0
    assert killed  # the runs are short: one may be over before it is shot
    subprocess.run(line, env=environment, cwd=ROOT, check=True, capture_output=True, timeout=300)
    for run in ("teacher/slimmable", "students/pwkd/seed0"):
        assert identical(final(tmp_path / "whole", run, 24), final(tmp_path / "broken", run, 24))
        assert rows(tmp_path / "whole", run) == rows(tmp_path / "broken", run)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config.studnet.lr=1"], r"there is no key 'studnet\.lr'; did you mean"),
        (["--config.student.distiller.name=nope"], r"there is no distiller 'nope'"),
        (["--config.teacher.widths=(0.3,1.0)"], r"teacher\.widths: width 0\.3 makes 2\.4 of 8 channels"),
        (["--config.student.width=0.3"], r"student\.width: width 0\.3 makes 2\.4 of 8 channels"),
        (["--config.data.num_classes=100"], r"data\.num_classes.*\b100\b.*\b10\b"),
        (["--config.data.name=cifar10", "--config.data.data_dir=/nowhere"], r"data\.data_dir.*/nowhere"),
        (["--config.data.train_split=trian"], r"data\.train_split.*trian"),
        (["--config.data.mean=(0.5,0.5,0.5)", "--config.data.std=(1,1,1)"], r"data\.mean: has 3 numbers.*1 channels"),
        (["--config.data.mean=127.5", "--config.data.std=127.5"], r"data\.mean: 127\.5 is in units of .* divided by 255: 0\.5"),
        (["--config.student.schedule.warmup=12 steps"], r"student\.schedule\.warmup: 12 steps leave nothing of a cycle of 12"),
        (["--config.teacher.schedule.warmup=100 %"], r"teacher\.schedule\.warmup: 24 steps leave nothing of the cycle of 24"),
        (["--config.student.schedule.warmup=1 epoch", "--config.student.schedule.form=one_cycle"], r"one_cycle, which rises"),
        (["--config.student.duration=1 step"], r"student\.duration: 1 steps are too few for 2 stages"),
        (["--config.student.distiller.name=ab"], r"initial_epochs: 30 epochs in which no label is seen fill the run, of 2\.56"),
        (["--config.student.distiller.name=fsp", "--config.student.distiller.initial_epochs=1"],
         r"student\.distiller: FSP needs 2 maps in 'stages'"),
        (["--verbose"], r"'--verbose' is not an option"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_nothing(arguments, sentence, tmp_path, capsys):
    assert train.main([*TINY, *arguments, f"--workdir={tmp_path / 'w'}"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: [^\n]*{sentence}[^\n]*\n", error), error
    assert not (tmp_path / "w").exists()


def test_mistakes_end_the_process_with_2(tmp_path):
    line, environment = command("--config.studnet.lr=1", f"--workdir={tmp_path / 'w'}")
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert train.main(TINY) == 2 and train.main(["--help"]) == 0


def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([*TINY, f"--workdir={tmp_path / 'file' / 'w'}"]) == 2
    assert "--workdir" in capsys.readouterr().err


def test_a_workdir_is_one_commands_at_a_time(tmp_path, capsys):
    """Held by this process, it is refused by name; its holder killed, it is free."""
    workdir = tmp_path / "w"
    options = [*TINY, "--config.arms=alone", "--config.student.duration=8 steps", f"--workdir={workdir}"]
    with storage.lock(workdir / ".lock"):
        assert train.main(options) == 2
        sentence = rf"error: --workdir: '.*' is in use by process {os.getpid()} on .* since .*\n"
        assert re.fullmatch(sentence, capsys.readouterr().err)
        assert os.listdir(workdir) == [".lock"]
    hold = "import pathlib, sys, time; from pwkd_jax import storage\n"
    hold += "with storage.lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(workdir / ".lock")], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    assert train.main(options) == 2 and f"process {holder.pid} on" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert train.main(options) == 0


def pictures(folder: Path, split: str, name: str, count: int, shade: int) -> None:
    rng = np.random.default_rng(shade)
    (folder / split / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = rng.integers(0, 60, (8, 8, 3)) + shade
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{shade}_{i}.png")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: pictures(f, "train", "cat", 6, 190), "train_images was 16 and is 22"),
        (lambda f: pictures(f, "test", "ant", 2, 10), "num_classes was 2 and is 3|classes"),
        (lambda f: shutil.copy(f / "train/cat/20_0.png", f / "train/cat/20_1.png"), "mean was .*|train split holds other"),
        (lambda f: (f / "train/dog/120_3.png").rename(f / "train/cat/z.png"), "the train split holds other"),
        (lambda f: shutil.copy(f / "test/cat/20_0.png", f / "test/dog/120_1.png"), "the test split holds other"),
    ],
)
def test_data_that_changed_under_a_workdir_are_named(change, sentence, tmp_path, capsys):
    """More seeds, or what is left of a stopped run, would mix runs of two data sets; the first one's facts stay."""
    folder, workdir = tmp_path / "d", tmp_path / "w"
    for split in ("train", "test"):
        pictures(folder, split, "cat", 8, 20)
        pictures(folder, split, "dog", 8, 120)
    options = [TINY[0], *(o for o in TINY[1:] if "_split" not in o), "--config.data.name=folder",
               f"--config.data.data_dir={folder}", "--config.arms=alone", "--config.student.duration=8 steps",
               f"--workdir={workdir}"]  # fmt: skip
    assert train.main(options) == 0
    before = {name: (workdir / name).read_bytes() for name in ("data.json", "config.json", "summary.json")}
    change(folder)
    capsys.readouterr()
    assert train.main([*options, "--config.seeds=2"]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert before == {name: (workdir / name).read_bytes() for name in before}
    assert not (workdir / "students/alone/seed1").exists()
    if "test split" in sentence:
        assert evaluate.main([str(workdir / "students/alone/seed0")]) == 0
        assert "warning: the test split of 'folder' holds other images or labels" in capsys.readouterr().err


def test_classes_are_known_by_name(tmp_path, capsys):
    """A run, its exports and its program on data of the same classes in another order, of others, and of other networks'."""
    folder, workdir = tmp_path / "d", tmp_path / "w"
    for split in ("train", "test"):
        for n, name in enumerate(("ant", "bee", "cat")):
            pictures(folder, split, name, 8, 20 + 80 * n)
    options = [TINY[0], *(o for o in TINY[1:] if "_split" not in o), "--config.data.name=folder",
               "--config.student.duration=40 steps", "--config.arms=pwkd"]  # fmt: skip
    assert train.main([*options, f"--config.data.data_dir={folder}", f"--workdir={workdir}"]) == 0
    run, out = workdir / "students/pwkd/seed0", tmp_path / "out"
    assert export.main([str(run), f"--out={out}", "--platforms=cpu", "--model=test_training:Tiny"]) == 0
    assert json.loads((out / "model.json").read_text())["classes"] == ["ant", "bee", "cat"]
    targets = [(run, ""), (out / "model.safetensors", "test_training:Tiny"), (out / "model.stablehlo", "")]
    truth = evaluate.evaluate(str(run))["top1"]
    assert truth > 50
    other, fewer = tmp_path / "other", tmp_path / "fewer"
    for split in ("train", "test"):
        for n, name in enumerate(("ant", "bee", "dog")):
            pictures(other, split, name, 8, 20 + 80 * n)
        shutil.copytree(folder / split, fewer / split)
    for target, model in targets:
        found = evaluate.evaluate(str(target), data="folder", data_dir=str(fewer), split="test", model=model)
        assert found["top1"] == pytest.approx(truth)
        with pytest.raises(UserError, match="do not share the class 'dog'"):
            evaluate.evaluate(str(target), data="folder", data_dir=str(other), split="test", model=model)
    # The same classes by name, in another order: as if the folder had been sorted otherwise when the network was trained.
    card, arrays = json.loads((workdir / "data.json").read_text()), workdir / "data.json"
    arrays.write_text(json.dumps(card | {"classes": ["bee", "ant", "cat"]}))
    swapped = evaluate.evaluate(str(run))
    assert "in another order" in capsys.readouterr().err and swapped["top1"] < truth
    lent = [*options, f"--config.data.data_dir={folder}", f"--config.teacher.run={workdir}", f"--workdir={tmp_path / 'v'}"]
    assert train.main(lent) == 2 and "classes was" in capsys.readouterr().err
    arrays.write_text(json.dumps(card))
    given = f"--config.teacher.weights={workdir / 'teacher/slimmable/width_1.safetensors'}"
    lent = [*options, f"--config.data.data_dir={other}", given, "--config.teacher.order=none", f"--workdir={tmp_path / 'u'}",
            "--config.data.mean=(0.5,0.5,0.5)", "--config.data.std=(0.25,0.25,0.25)"]  # fmt: skip
    assert train.main(lent) == 2 and "do not share the class 'dog'" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["s3://bucket/x", "hdfs://host:9000/x", "file:///x"])
def test_addresses_are_refused_and_make_no_folder(path, tmp_path, capsys, monkeypatch):
    config = f"--config={ROOT}/configs/digits.py"
    monkeypatch.chdir(tmp_path)
    assert train.main([config, *TINY[1:], f"--workdir={path}"]) == 2
    assert f"--workdir: '{path}' is an address" in capsys.readouterr().err
    assert export.main(["nowhere", f"--out={path}"]) == 2 and "--out: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.main([*TINY, "--config.arms=alone", "--config.student.duration=8 steps", "--workdir=~/runs/x"]) == 0
    assert (tmp_path / "runs/x/summary.json").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the shared TFDS data sets are not beside this checkout")
def test_tfds_images_train_through_the_same_road(tmp_path):
    overrides = [
        f"data.data_dir={SHARED}", "data.train_split=train[:160]", "data.test_split=test[:40]", "arms=pwkd", "seeds=1",
        "teacher.model=test_training:Tiny", "student.model=test_training:Tiny", "student.width=0.5",
        "teacher.widths=(0.5,1.0)", "teacher.duration=4 steps", "student.duration=8 steps",
    ]  # fmt: skip
    arguments = ["--config=configs/cifar10.py", *(f"--config.{o}" for o in overrides), f"--workdir={tmp_path / 'w'}"]
    assert train.main(arguments) == 0
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    facts = {"name": "cifar10", "train_images": 160, "test_images": 40, "num_classes": 10, "image_shape": [32, 32, 3]}
    assert facts.items() <= summary["data"].items() and len(summary["data"]["mean"]) == 3


EIGHT = """
import sys, jax, numpy as np
sys.path.insert(0, "tests")
from test_training import SHAPE, Tiny, optimizer, preprocess, split, two_stages, Bench
from pwkd_jax import data, slimmable
from pwkd_jax.training import loop, sharding, state as states, teacher
assert jax.device_count() == int(sys.argv[1])
jax.config.update("jax_default_matmul_precision", "highest")
mesh = sharding.make_mesh()
put = lambda pipeline: lambda n: sharding.put_batch(mesh, {k: v for k, v in pipeline(n).items() if k != "dataset_label"})
net = slimmable.build(lambda w: Tiny(width=w), (0.25, 0.5, 1.0), SHAPE)
tx = optimizer()
step = sharding.jit_step(mesh, teacher.make_step(net, tx, lambda s: 0.1, preprocess, loss="inplace_mix"))
state = jax.device_put(states.create(0, *net.init(jax.random.key(0), SHAPE), tx), sharding.replicated(mesh))
state = loop.fit(state, step, put(data.Pipeline(split(40), 16, 0)), 5)
bench = Bench(two_stages())
labels = bench.pipeline(0)["dataset_label"]
pupil = jax.device_put(bench.fresh(), sharding.replicated(mesh))
batches = put(bench.pipeline)
for stage in bench.plan:
    pupil = loop.fit(pupil, bench.step(stage.widths), lambda n: batches(n) | {"dataset_label": labels}, stage.end)
leaves = [np.asarray(x) for x in jax.tree.leaves((state.params, state.collections, pupil.params, pupil.collections))]
np.savez(sys.argv[2], *leaves)
"""


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    found = []
    for count in (1, 8):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-c", EIGHT, str(count), str(tmp_path / f"{count}.npz")]
        subprocess.run(line, env=environment, cwd=ROOT, check=True, timeout=300)
        found.append(np.load(tmp_path / f"{count}.npz"))
    for name in found[0].files:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)
