"""gs:// as a place for workdirs, against an emulator on the loopback: the same files, bits and promises as on a disk."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import test_hosts
from conftest import identical, made_up
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save
from test_commands import ROOT, TINY, command, final
from test_sweep import toml

from pwkd_jax import convert, evaluate, export, models, report, storage, sweep, train
from pwkd_jax.errors import UserError
from pwkd_jax.training import writers
from pwkd_jax.training.checkpoints import Checkpoints
from pwkd_jax.weights import pytorch


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, bucket):
    return tmp_path if request.param == "disk" else storage.path(f"gs://bucket/{tmp_path.name}")


def test_files_of_a_bucket_are_as_those_of_a_disk(place):
    assert storage.names(place / "a") == [] and not storage.exists(place / "a") and not storage.is_folder(place / "a")
    with pytest.raises(FileNotFoundError, match="a/b") as raised:
        storage.read(place / "a" / "b")
    assert raised.value.strerror
    content = bytes(range(256)) * 100 + b"\r\n--==0==\n"
    storage.replace(place / "a" / "b", content)
    storage.replace(place / "a" / "c" / "b", "é")
    assert storage.read_bytes(place / "a" / "b") == content and storage.read(place / "a" / "c" / "b") == "é"
    assert storage.size(place / "a" / "b") == len(content)
    assert storage.names(place / "a") == ["b", "c"] and storage.names(place) == ["a"]
    assert storage.is_folder(place / "a") and storage.is_file(place / "a" / "b") and not storage.is_file(place / "a")
    assert storage.holding(place, "b") == [place / "a", place / "a" / "c"] and storage.holding(place, "c") == [place / "a"]
    assert storage.put_aside(place / "a", ".old") == place / "a.old"
    storage.replace(place / "a" / "b", "new")
    storage.put_aside(place / "a", ".old")
    assert storage.names(place) == ["a.old"] and storage.names(place / "a.old") == ["b"]
    storage.remove(place / "a.old")
    assert storage.names(place) == []
    storage.remove(place / "a.old", missing_ok=True)
    with pytest.raises(FileNotFoundError):
        storage.remove(place / "a.old")


def test_lines_are_added(place):
    file = storage.lines(place / "m.jsonl", "1\n")
    file.write("2\n")
    file.flush()
    assert storage.read(place / "m.jsonl") == "1\n2\n"
    file.write("3\n")
    file.close()
    assert storage.read(place / "m.jsonl") == "1\n2\n3\n"
    storage.lines(place / "m.jsonl", "1\n").close()
    assert storage.read(place / "m.jsonl") == "1\n"


def test_an_outbox_sends_what_is_in_it(place, capsys, bucket):
    box = storage.outbox(place / "events")
    (box.local / "x").mkdir(parents=True)
    (box.local / "x" / "y").write_text("1")
    box.push()
    (box.local / "x" / "y").write_text("12")
    box.close()
    assert storage.read(place / "events" / "x" / "y") == "12"
    assert isinstance(place, Path) or not box.local.exists()
    bucket("refuse?code=403")
    try:
        box = storage.outbox(place / "more")
        box.local.mkdir(exist_ok=True)
        (box.local / "y").write_text("1")
        box.close()
    finally:
        bucket("refuse?code=0")
    said = capsys.readouterr().err
    assert said == ("" if isinstance(place, Path) else f"warning: {place / 'more'}: cannot be written "
                    "(access is forbidden: not yours)\n")  # fmt: skip


def test_a_checkpoint_that_a_kill_tore_is_none(place):
    marks = ("8/commit_success.txt", "9/state/commit_success.txt", "8.damaged/commit_success.txt")
    for name in ("8/state/x", "9/state/x", *marks):
        storage.replace(place / "checkpoints" / name, "")
    assert storage.saved_steps(place / "checkpoints") == ([8, 9] if isinstance(place, Path) else [8])
    if not isinstance(place, Path):
        storage.put_aside(place / "checkpoints" / "8", ".damaged")
        assert storage.saved_steps(place / "checkpoints") == [] and storage.names(place / "checkpoints") == ["8.damaged", "9"]


def test_places_are_told_apart_and_put_together(bucket, tmp_path):
    run = storage.path("gs://bucket/runs//w/")
    assert str(run) == "gs://bucket/runs/w" and storage.path(run) is run and storage.absolute(run) is run
    assert [str(p) for p in storage.above(run)] == ["gs://bucket/runs", "gs://bucket"]
    assert storage.same(run, storage.path("gs://bucket/runs/w")) and not storage.same(run, tmp_path)
    assert storage.same(tmp_path, tmp_path / "x" / "..") and storage.above(tmp_path)[-1] == Path("/")


@pytest.mark.parametrize("text", ["gs://", "gs:/bucket/x", "gs://b/x", "s3://bucket/x", "file:///x", "hdfs://host:9000/x"])
def test_other_addresses_are_refused(text):
    with pytest.raises(UserError, match=r"--workdir: '.*' is an address that is not known here; give a folder or gs://"):
        storage.path(text, "--workdir")


def test_without_gcsfs_a_sentence_says_how_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else found(name))
    with pytest.raises(UserError, match="needs gcsfs, which is not installed: pip install gcsfs"):
        storage.path("gs://bucket/x")


def test_nothing_of_it_is_loaded_for_a_disk(tmp_path):
    code = "import sys; from pwkd_jax import storage as s\nwith s.lock(s.path(sys.argv[1])): s.names(s.path('x'))"
    code += "\nsys.exit(any(m.partition('.')[0] in ('fsspec', 'gcsfs', 'etils', 'google') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "l")], cwd=ROOT).returncode == 0


HOLD = "import sys, time; from pwkd_jax import storage\n"
HOLD += "with storage.lock(storage.path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def test_a_lock_on_a_bucket_ends_with_its_holder(bucket, tmp_path):
    path = storage.path(f"gs://bucket/{tmp_path.name}/.lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(storage.Held) as raised, storage.lock(path):
        pass
    assert raised.value.holder["pid"] == holder.pid and raised.value.holder["since"]
    holder.kill()
    holder.wait()
    with storage.lock(path), pytest.raises(storage.Held) as raised, storage.lock(path):
        pass
    assert raised.value.holder["pid"] == os.getpid()
    assert storage.names(path.parent) == []


def test_a_lock_of_another_machine_is_waited_for(bucket, tmp_path, monkeypatch, capsys):
    """Renewed, it is refused; not renewed, it is taken over when its lease ends, by one alone."""
    from pwkd_jax.storage import lease

    monkeypatch.setattr(lease, "POLL", 0.05)
    path = storage.path(f"gs://bucket/{tmp_path.name}/.lock")
    name = f"{tmp_path.name}/.lock"
    content = json.dumps({"host": "far", "pid": 1, "since": "then", "process": None})
    storage.replace(path, content)
    begun, renewed = threading.Event(), threading.Thread(target=lambda: (begun.wait(), storage.replace(path, content)))
    renewed.start()
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: (begun.set(), sleep(seconds + 0.2)))
    with pytest.raises(storage.Held) as raised, storage.lock(path):
        pass
    renewed.join()
    assert raised.value.holder["host"] == "far" and "is held by far: waiting until it is renewed" in capsys.readouterr().err
    bucket(f"age?name={name}&seconds={lease.LEASE + 1}")
    taken = []

    def take() -> None:
        try:
            with storage.lock(path):
                taken.append("took")
                time.sleep(1)
        except storage.Held:
            taken.append("refused")

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ["refused", "refused", "took"]
    assert [n for n in storage.names(path.parent) if n == ".lock"] == []


def test_a_lock_is_renewed_and_its_loss_ends_the_holder(bucket, tmp_path):
    path = storage.path(f"gs://bucket/{tmp_path.name}/.lock")
    hold = HOLD.replace("\n", "; from pwkd_jax.storage import lease; lease.RENEW = 0.1\n", 1)
    holder = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    holder.stdout.readline()
    bucket("forget")
    time.sleep(1)
    assert bucket("counts")[f"POST {tmp_path.name}/.lock"] >= 2 and holder.poll() is None
    storage.replace(path, "{}")
    assert holder.wait(60) == 75 and b"another command has taken" in holder.stderr.read()
    assert storage.read(path) == "{}"


def on_bucket(workdir: Path, run: str, step: int):
    return jax.tree.map(np.asarray, ocp.load_checkpointables(workdir / run / "checkpoints" / str(step))["state"])


def numbers(workdir: Path, run: str) -> list[dict]:
    lines = storage.read(workdir / run / "metrics.jsonl").splitlines()
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def trained(bucket, tmp_path_factory):
    """(workdir on a disk, the same on a bucket, which was killed in the middle of a checkpoint, terminated while the student
    learns, killed once more, and given again)."""
    options, disk = ["--config.arms=pwkd", "--config.student.reset=momentum"], tmp_path_factory.mktemp("disk") / "w"
    workdir = storage.path("gs://bucket/runs/w")
    teacher, pupil = (workdir / run / "checkpoints" for run in ("teacher/slimmable", "students/pwkd/seed0"))

    def stopped(number: signal.Signals, there: Callable[[], bool]) -> int:
        """The exit code of a run that gets a signal once something is there."""
        line, environment = command(*options, f"--workdir={workdir}")
        bucket("latency?ms=30")
        process = subprocess.Popen(line, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not there() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait()
        bucket("latency?ms=0")
        return code

    assert stopped(signal.SIGKILL, lambda: "10" in storage.names(teacher)) == -signal.SIGKILL
    assert "10" in storage.names(teacher) and storage.saved_steps(teacher) == [5]
    assert stopped(signal.SIGTERM, lambda: storage.names(pupil)) == 75
    before = storage.saved_steps(pupil)
    assert stopped(signal.SIGKILL, lambda: len(storage.saved_steps(pupil)) > len(before)) == -signal.SIGKILL
    assert not storage.exists(workdir / "summary.json")
    assert train.main([*TINY, *options, f"--workdir={disk}"]) == 0
    assert train.main([*TINY, *options, f"--workdir={workdir}"]) == 0
    return disk, workdir


def test_training_on_a_bucket_ends_as_on_a_disk(trained):
    disk, workdir = trained
    for run in ("teacher/slimmable", "students/pwkd/seed0"):
        assert identical(final(disk, run, 24), on_bucket(workdir, run, 24)) and numbers(disk, run) == numbers(workdir, run)
        assert storage.saved_steps(disk / run / "checkpoints") == storage.saved_steps(workdir / run / "checkpoints")
        assert any("tfevents" in name for name in storage.names(workdir / run))
    for width in ("0.5", "1"):
        name = f"teacher/slimmable/width_{width}.safetensors"
        assert storage.read_bytes(disk / name) == storage.read_bytes(workdir / name)
    assert storage.names(workdir) == sorted(n for n in storage.names(disk) if n != ".lock")


def test_a_finished_run_on_a_bucket_trains_nothing_again_and_is_reported(trained, bucket, capsys):
    _, workdir = trained
    bucket("forget")
    assert train.main([*TINY, "--config.arms=pwkd", "--config.student.reset=momentum", f"--workdir={workdir}"]) == 0
    changed = {name for name in bucket("counts") if name.startswith("POST")}
    assert changed == {f"POST runs/w/{name}" for name in (".lock", "config.json", "summary.json", "report.html")}
    capsys.readouterr()
    assert report.main([str(workdir), f"--out={workdir}/again.html"]) == 0
    assert "pwkd" in (said := capsys.readouterr().out) and f"Report: {workdir}/again.html" in said
    assert "<svg" in storage.read(workdir / "again.html")
    assert report.main([str(workdir), f"{workdir}/"]) == 2 and "is given twice" in capsys.readouterr().err


def test_runs_and_exports_on_a_bucket_score_as_on_a_disk(trained, tmp_path, capsys):
    disk, workdir = trained
    student, teacher = "students/pwkd/seed0", "teacher/slimmable"
    timed = {"target", "teacher", "images_per_second"}
    for target, more in ((student, {"teacher": teacher}), (f"{student}/checkpoints/12", {}), (f"{teacher}", {"width": 0.5})):
        own, other = (
            evaluate.evaluate(str(w / target), **{k: str(w / v) if k == "teacher" else v for k, v in more.items()})
            for w in (disk, workdir)
        )
        assert {k: v for k, v in own.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    for out in (tmp_path / "out", workdir / "out"):
        assert export.main([str(workdir / student), f"--out={out}", "--platforms=cpu", "--model=test_training:Tiny"]) == 0
    assert f"{workdir}/out/model.stablehlo (" in capsys.readouterr().out
    for name in ("model.safetensors", "model.json", "model.stablehlo"):
        assert storage.read_bytes(tmp_path / "out" / name) == storage.read_bytes(workdir / "out" / name)
    for target in ("out", "out/model.stablehlo"):
        found = evaluate.evaluate(str(workdir / target), model="" if "stable" in target else "test_training:Tiny")
        assert found["top1"] == pytest.approx(evaluate.evaluate(str(disk / student))["top1"])
    for target, sentence in ((workdir, "there are students/pwkd/seed0, teacher/slimmable in it"),
                             (workdir / "nothing", "there is no such file or directory"),
                             (f"{workdir}/{student}/checkpoints/13", "no such file")):  # fmt: skip
        assert evaluate.main([str(target)]) == 2
        assert sentence in capsys.readouterr().err


def test_weights_are_converted_from_and_to_a_bucket(bucket, tmp_path):
    model, place = models.create("resnet8", num_classes=100), storage.path(f"gs://bucket/{tmp_path.name}")
    content = save(pytorch.to_torch(model, made_up(model, (32, 32, 3))))
    found = []
    for folder in (tmp_path, place):
        storage.replace(folder / "given.safetensors", content)
        assert convert.main([f"{folder}/given.safetensors", "--model=resnet8", f"--out={folder}/r.safetensors"]) == 0
        found.append((storage.read_bytes(folder / "r.safetensors"), storage.read(folder / "r.json")))
    assert found[0] == found[1]
    assert convert.main([f"{place}/nothing.pth", "--model=resnet8", f"--out={place}/r.safetensors"]) == 2


def test_a_sweep_on_a_bucket_shares_its_teacher_and_takes_weights(trained, capsys):
    """Points borrow the teacher of another workdir there (teacher.run); that one is a file there (teacher.weights)."""
    root, given = storage.path("gs://bucket/sweep"), trained[1] / "teacher/slimmable/width_1.safetensors"
    text = toml("'student.schedule.peak' = [0.1, 0.2]", arms="kd_standard", **{
        "teacher.weights": str(given), "teacher.order": "none", "student.duration": "8 steps",
    })  # fmt: skip
    storage.replace(root.parent / "points.toml", text)
    assert sweep.main([f"{root.parent}/points.toml", f"--root={root}", "--run=all"]) == 0
    assert storage.names(root) == ["peak=0.1", "peak=0.2", "sweep.json", "teachers"]
    (lender,) = storage.holding(root / "teachers", "summary.json")
    kept = (lender / "teacher/standard/width_1.safetensors", root / "peak=0.1/teacher/standard/width_1.safetensors")
    assert storage.read_bytes(kept[0]) == storage.read_bytes(kept[1])
    capsys.readouterr()
    assert report.main([str(root)]) == 0
    assert "2 experiments" in capsys.readouterr().out and storage.is_file(root / "results.csv")


@pytest.mark.parametrize(
    ("code", "workdir", "sentence"),
    [
        (403, "gs://bucket/closed", r"--workdir: 'gs://bucket/closed' cannot be written \(access is forbidden: not yours\)"),
        (0, "gs://nowhere/w", r"--workdir: 'gs://nowhere/w' cannot be written \(there is no such object or bucket\)"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_said_first(code, workdir, sentence, bucket, capsys):
    bucket(f"refuse?code={code}")
    try:
        assert train.main([*TINY, "--config.arms=alone", f"--workdir={workdir}"]) == 2
        assert re.fullmatch(rf"error: {sentence}\n", capsys.readouterr().err)
        assert report.main([workdir]) == 2
        assert re.fullmatch(r"error: gs://[^\n]*\n", capsys.readouterr().err)
    finally:
        bucket("refuse?code=0")


@pytest.mark.parametrize(
    "where, method, file", [(writers.Writer, "flush", "/students/alone/seed0/metrics.jsonl"), (Checkpoints, "save", "")]
)
def test_a_bucket_that_stops_to_answer_asks_to_be_resumed(where, method, file, bucket, monkeypatch, capsys):
    known, workdir = getattr(where, method), f"gs://bucket/lost-{method}"

    def refused(self, *arguments) -> None:
        bucket("refuse?code=403")
        known(self, *arguments)

    monkeypatch.setattr(where, method, refused)
    options = [*TINY, "--config.arms=alone", "--config.student.duration=8 steps", f"--workdir={workdir}"]
    try:
        assert train.main(options) == 75
    finally:
        bucket("refuse?code=0")
    error = f"error: {workdir}{file}: cannot be read or written (access is forbidden: not yours)\n"
    assert error in (said := capsys.readouterr().err) and "Traceback" not in said
    monkeypatch.undo()
    storage.remove(storage.path(f"{workdir}/.lock"))  # it could not be removed then, and its holder is this process
    assert train.main(options) == 0


def test_a_checkpoint_that_cannot_be_reached_is_not_taken_for_a_damaged_one(bucket):
    place, state = storage.path("gs://bucket/whole/checkpoints"), {"w": jax.numpy.arange(3.0)}
    saved = Checkpoints(place)
    for step in (1, 2):
        saved.save(step, state)
    saved.close()
    later = Checkpoints(place)
    bucket("refuse?code=403")
    try:
        with pytest.raises(storage.Unreachable, match="access is forbidden"):
            later.restore(state)
    finally:
        bucket("refuse?code=0")
    assert storage.names(place) == ["1", "2"] and identical(later.restore(state), state)
    later.close()


@pytest.mark.slow
def test_compiled_programs_may_be_kept_on_a_bucket(bucket, tmp_path):
    line, environment = command("--config.arms=alone", f"--workdir={tmp_path / 'w'}")
    environment |= {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02"}
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("jit_") for name in storage.listed(storage.path("gs://bucket/cache")))


def start(place: Path, devices: int, *options: str) -> subprocess.Popen:
    line, environment = command(*options, f"--workdir={place}")
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    return subprocess.Popen(line, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pair(workdir: Path, *options: str) -> list[subprocess.Popen]:
    address = f"--coordinator=localhost:{test_hosts.free_port()}"
    return [start(workdir, 1, *options, address, "--processes=2", f"--process={i}") for i in (0, 1)]


@pytest.mark.slow
def test_two_processes_train_on_a_bucket_as_one_on_a_disk(trained, bucket):
    disk, workdir = trained[0], storage.path("gs://bucket/pair/w")
    found = test_hosts.ends(pair(workdir, "--config.arms=pwkd", "--config.student.reset=momentum"))
    assert [code for code, _ in found] == [0, 0], found
    for run in test_hosts.RUNS:
        ours, theirs = numbers(workdir, run), numbers(disk, run)
        assert [row.keys() for row in ours] == [row.keys() for row in theirs]
        for a, b in zip(ours, theirs, strict=True):  # one image of 50 may lie on the edge
            assert all(v == pytest.approx(b[k], rel=1e-3, abs=2.001 if "top1" in k else 1e-4) for k, v in a.items()), (a, b)
        assert storage.saved_steps(workdir / run / "checkpoints") == storage.saved_steps(disk / run / "checkpoints")
    assert storage.names(workdir) == sorted(n for n in storage.names(disk) if n != ".lock")


@pytest.mark.slow
def test_two_processes_stopped_on_a_bucket_go_on(bucket, tmp_path):
    """Both stopped by a SIGTERM to one, and given again: as one process of two devices on a disk."""
    whole, workdir = tmp_path / "whole", storage.path("gs://bucket/two/w")
    assert [code for code, _ in test_hosts.ends([start(whole, 2, *test_hosts.ARMS)])] == [0]
    processes = pair(workdir, *test_hosts.ARMS)
    saved, deadline = workdir / "teacher/slimmable/checkpoints", time.monotonic() + 300
    while 5 not in storage.saved_steps(saved) and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in test_hosts.ends(processes)] == [75, 75]
    assert ".lock" not in storage.names(workdir) and not storage.exists(workdir / "summary.json")
    assert [code for code, _ in test_hosts.ends(pair(workdir, *test_hosts.ARMS))] == [0, 0]
    for run in test_hosts.RUNS:
        assert identical(test_hosts.final(whole, run), test_hosts.final(workdir, run))
        assert numbers(whole, run) == numbers(workdir, run)
