"""Several processes: what they compute is what one does, whatever happens to them; and a SIGTERM at any time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import identical
from orbax.checkpoint import v1 as ocp
from test_commands import ROOT, TINY, rows

from pwkd_jax import train
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import exporting, scoring
from pwkd_jax.training import cluster, distributed, preemption

ARMS = ["--config.arms=pwkd", "--config.log.tensorboard=false"]
RUNS = ("teacher/slimmable", "students/pwkd/seed0")
PATIENCE = 400


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(workdir: Path, *options: str, devices: int, by_hand: tuple[str, ...] = ()) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": str(devices)}
    line = [sys.executable, "-m", "pwkd_jax.train", *TINY, *ARMS, *options]
    line += [f"--workdir={workdir}", *by_hand]
    with open(f"{workdir}.{len(list(workdir.parent.glob(f'{workdir.name}.*')))}.log", "w") as log:
        return subprocess.Popen(line, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)


def pair(workdir: Path, *options: str, differing: str = "") -> list[subprocess.Popen]:
    """Two processes of four devices each; `differing` is an option of the second alone."""
    address = f"--coordinator=localhost:{free_port()}"
    extra = ([], [differing] if differing else [])
    return [
        start(workdir, *options, *extra[i], devices=4, by_hand=(address, "--processes=2", f"--process={i}")) for i in (0, 1)
    ]


def ends(processes: list[subprocess.Popen], timeout: float = PATIENCE) -> list[tuple[int, str]]:
    """[(exit code, standard error)]; none of them outlives the test."""
    deadline = time.monotonic() + timeout
    try:
        errors = [p.communicate(timeout=max(1, deadline - time.monotonic()))[1] for p in processes]
        return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]
    finally:
        for p in processes:
            p.kill()


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() and all(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists(), [p.communicate()[1] for p in processes if p.poll() is not None]


def final(workdir: Path, run: str):
    """The last state, on whatever devices it was saved, as NumPy arrays."""
    path, here = workdir / run / "checkpoints" / "24", jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = ocp.checkpointables_metadata(path).metadata["state"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    return jax.tree.map(np.asarray, ocp.load_checkpointables(path, {"state": like})["state"])


def saved(workdir: Path, run: str) -> list[int]:
    return sorted(int(p.name) for p in (workdir / run / "checkpoints").iterdir() if p.name.isdigit())


def same(a: Path, b: Path) -> None:
    for run in RUNS:
        assert identical(final(a, run), final(b, run))
        assert rows(a, run) == rows(b, run)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The experiment by one process on one device, unbroken."""
    workdir = tmp_path_factory.mktemp("alone") / "work"
    assert train.main([*TINY, *ARMS, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same by two processes of four devices, unbroken."""
    workdir = tmp_path_factory.mktemp("two") / "work"
    found = ends(pair(workdir))
    assert [code for code, _ in found] == [0, 0], found
    return workdir


def close_to(a: Path, b: Path) -> None:
    """Same rows and final states within float tolerance; 50 test images do not divide over 8 devices."""
    for run in RUNS:
        here, there = rows(a, run), rows(b, run)
        assert [r.keys() for r in here] == [r.keys() for r in there]
        for r, s in zip(here, there, strict=True):
            for key, value in r.items():
                # An image on the edge may fall to either side; counted twice or not at all, test_loss would show it.
                assert value == pytest.approx(s[key], rel=1e-3, abs=2.001 if "top1" in key else 1e-4), (key, r["step"])
        for x, y in zip(*(jax.tree.leaves(final(w, run)) for w in (a, b)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_two_processes_equal_one(alone, two):
    close_to(alone, two)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["environment"]["device_count"] == 8 and (two / "report.html").exists()
    for run in RUNS:
        classes, last = json.loads((two / run / "result.json").read_text())["classes"], rows(two, run)[-1]
        assert sum(classes["images"]) == 50 == sum(map(sum, classes["matrix"]))
        assert 2 * sum(classes["correct"]) == pytest.approx(last.get("top1", last.get("top1_1")))
    assert not Path(f"{two}.1.log").read_text().count("pwkd"), "only process 0 prints"


def both(command: str, *options: str) -> list[tuple[int, str, str]]:
    """[(exit code, standard output, standard error)] of two processes of two devices each that give one command."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": "2"}
    line = [sys.executable, "-m", f"pwkd_jax.{command}", *options, f"--coordinator=localhost:{free_port()}", "--processes=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*line, f"--process={i}"], env=environment, cwd=ROOT, **pipes) for i in (0, 1)]
    try:
        return [(p.returncode, *said) for p in processes if (said := p.communicate(timeout=PATIENCE))]
    finally:
        for p in processes:
            p.kill()


def test_two_processes_share_the_images_of_evaluate(alone, tmp_path):
    student, teacher = str(alone / RUNS[1]), str(alone / RUNS[0])
    options = ["--batch-size=16", "--json", "--per-class", f"--confusion={tmp_path / 'two.csv'}"]
    (code, said, _), (other, nothing, error) = both("evaluate", student, "--teacher", teacher, *options)
    assert (code, other, nothing) == (0, 0, ""), error
    one = str(tmp_path / "one.csv")
    found = json.loads(said)
    expected = scoring.evaluate(student, teacher=teacher, batch_size=16, per_class=True, confusion=one)
    assert Path(found.pop("confusion")).read_bytes() == Path(expected.pop("confusion")).read_bytes()
    assert found.pop("classes") == expected.pop("classes")
    pairs = [(found.pop("teacher"), expected.pop("teacher")), (found, expected)]
    for own, single in pairs:
        own.pop("images_per_second", 0), single.pop("images_per_second", 0)
        assert own.keys() == single.keys()
        assert all(own[k] == (v if isinstance(v, str) else pytest.approx(v, rel=1e-4)) for k, v in single.items()), own


@pytest.mark.slow
def test_two_processes_export_and_report_once(alone, tmp_path):
    out = tmp_path / "out"
    (code, said, error), (other, nothing, _) = both("export", str(alone / RUNS[1]), "--platforms=cpu", f"--out={out}")
    assert (code, other, nothing) == (0, 0, "") and said.count("bytes)") == 3, error
    single = exporting.export(str(alone / RUNS[1]), tmp_path / "one", None, "cpu", "flax", "")
    assert [(out / p.name).read_bytes() for p in single] == [p.read_bytes() for p in single]
    page = tmp_path / "page.html"
    (code, said, error), (other, nothing, _) = both("report", str(alone), f"--out={page}")
    assert (code, other, nothing) == (0, 0, "") and str(page) in said and page.exists(), error
    found = both("evaluate", str(tmp_path / "missing"))
    assert [code for code, _, _ in found] == [2, 2] and all("no such file" in error for _, _, error in found)


@pytest.mark.slow
def test_two_processes_take_weights(alone, tmp_path):
    """teacher.weights of a file: trained on, and as it is where the arm is taught by it alone."""
    weights = f"--config.teacher.weights={alone / RUNS[0] / 'width_1.safetensors'}"
    one, other = tmp_path / "one", tmp_path / "two"
    assert train.main([*TINY, *ARMS, weights, f"--workdir={one}"]) == 0
    assert [code for code, _ in ends(pair(other, weights))] == [0, 0]
    close_to(one, other)


# SIGTERM to one process alone, at every kind of place.


def terminated_at(look: int, monkeypatch) -> None:
    """A real SIGTERM to this process when it looks for the `look`th time whether it should stop."""
    true, count = preemption.reached, iter(range(1, 10_000))

    def reached() -> bool:
        if next(count) == look:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not preemption._Notice.asked and time.monotonic() < deadline:
                time.sleep(0.001)
        return true()

    monkeypatch.setattr(preemption, "reached", reached)


# Looks of an unbroken run: two before the teacher; then one after each step, and one for each batch of an evaluation before.
@pytest.mark.parametrize(
    "look, step",
    [
        pytest.param(1, None, id="before the first run", marks=pytest.mark.slow),
        pytest.param(3, 1, id="compiling", marks=pytest.mark.slow),
        pytest.param(9, 7, id="within a window", marks=pytest.mark.slow),
        pytest.param(10, 8, id="evaluating"),
    ],
)
def test_a_sigterm_saves_and_the_rest_is_as_if_it_had_not_come(look, step, alone, tmp_path, monkeypatch, capsys):
    command = [*TINY, *ARMS, f"--workdir={tmp_path / 'w'}"]
    terminated_at(look, monkeypatch)
    assert train.main(command) == 75
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err
    if step is not None:
        assert saved(tmp_path / "w", RUNS[0])[-1] == step
    monkeypatch.undo()
    assert train.main(command) == 0
    same(alone, tmp_path / "w")


@pytest.mark.slow
def test_a_sigterm_again_and_again(alone, tmp_path, monkeypatch):
    """Stopped at every 12th look, through both runs, the gap between them and the ensemble: still the unbroken run."""
    command, codes = [*TINY, *ARMS, f"--workdir={tmp_path / 'w'}"], []
    while not codes or codes[-1]:
        with monkeypatch.context() as patch:
            terminated_at(12, patch)
            codes.append(train.main(command))
        assert codes[-1] in (0, 75) and len(codes) < 40
    assert len(codes) > 4
    same(alone, tmp_path / "w")


def test_a_second_sigterm_ends_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; from pwkd_jax.training import preemption\n"
         "with preemption.watching(): print('ready', flush=True); time.sleep(60)"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


# Two processes, and what may happen to one of them.


@pytest.mark.slow
def test_a_sigterm_to_one_of_two_stops_both_at_the_same_step(two, tmp_path):
    processes = pair(tmp_path / "w")
    wait_for(tmp_path / "w" / RUNS[0] / "checkpoints" / "5", processes)
    processes[1].send_signal(signal.SIGTERM)
    for code, error in ends(processes):
        assert code == 75 and "stopped by SIGTERM" in error and "Traceback" not in error, error
    assert [code for code, _ in ends(pair(tmp_path / "w"))] == [0, 0]
    same(two, tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_stops_the_other_and_a_restart_ends_the_same(victim, two, tmp_path):
    processes = pair(tmp_path / "w")
    wait_for(tmp_path / "w" / RUNS[0] / "checkpoints" / "10", processes)
    processes[victim].kill()
    code, error = ends([processes[1 - victim]], timeout=60)[0]
    assert code == 75 and f"error: {distributed.LOST}" in error, error
    if victim:
        assert [code for code, _ in ends(pair(tmp_path / "w"))] == [0, 0]
        same(two, tmp_path / "w")
    else:  # one process of eight devices goes on as well
        assert ends([start(tmp_path / "w", devices=8)])[0][0] == 0
        close_to(two, tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, sentence",
    [
        ("--config.student.schedule.peak=0.3", "config student.schedule.peak is 0.3, not 0.1"),
        ("--config.studnet.lr=1", "process 1 ({host}): --config.studnet.lr: there is no key"),
    ],
)
def test_a_process_that_disagrees_is_named(option, sentence, tmp_path):
    for code, error in ends(pair(tmp_path / "w", differing=option)):
        assert code == 2 and sentence.format(host=socket.gethostname()) in error and "Traceback" not in error, error
    assert not (tmp_path / "w").exists()


# How they find each other.


@pytest.mark.parametrize(
    "options",
    [
        ["--processes=2"],
        ["--coordinator=here:1234", "--process=0"],
        ["--coordinator=here", "--processes=2", "--process=0"],
        ["--coordinator=here:1234", "--processes=2", "--process=2"],
        ["--coordinator=here:1234", "--processes=two", "--process=0"],
    ],
)
def test_options_that_do_not_fit_are_refused(options, tmp_path, capsys):
    assert train.main([*TINY, *options, f"--workdir={tmp_path / 'w'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and ("--process" in error or "--coordinator" in error)
    assert not (tmp_path / "w").exists()


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # a shell of one task in an allocation of two
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # salloc's own shell
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_a_cluster_of_one_is_alone(environment, several):
    assert cluster.known(environment) is several


@pytest.mark.parametrize(
    "environment, several",
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({}, True),  # only its metadata say
        ({"JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_a_tpu_machine_asks_its_pod(environment, several, monkeypatch):
    monkeypatch.setattr(cluster, "_tpu_machine", lambda: True)
    assert cluster.known(environment) is several


def test_processes_agree_on_everything_named(monkeypatch):
    said = [{"config seed": "0", "version jax": "1"}, {"config seed": "0", "version jax": "2", "code a.py": "x"}]
    monkeypatch.setattr(distributed, "gather", lambda text: [json.dumps([f"h{i}", facts]) for i, facts in enumerate(said)])
    sentence = r"process 1 \(h1\) differs from process 0 \(h0\): version jax is 2, not 1 \(and 1 more\)"
    with pytest.raises(UserError, match=sentence):
        distributed.agree(said[0])
