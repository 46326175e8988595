"""The launch scripts: what their dry runs print, and their logic against stubs of gcloud, xpk, sbatch and srun.

The gcloud stub has a slice of two workers, each a directory in which what is sent by ssh really runs; a stub of the worker's
Python ends as a list of exit codes says. So starting, following, resuming and replacing a slice are played to the end.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("tpu_pod.sh", "gke_xpk.sh", "slurm.sbatch", "worker.sh", "quickstart.sh", "test.sh")
TPU = {"NAME": "mine", "ZONE": "us-east5-b", "TYPE": "v6e-16", "RUNTIME": "v2-alpha-tpuv6e", "SPOT": "1", "POLL": "0.1"}
TRAIN = ["--config=configs/digits.py", "--workdir=/mnt/a b", "--config.name=it's $HOME"]

GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path({here!r})
line = sys.argv[1:]
with open(here / "calls", "a") as f:
    f.write(json.dumps(["gcloud", *line]) + "\\n")
state = (here / "state").read_text() if (here / "state").exists() else "NONE"
verb, rest = " ".join(line[:4]), line[4:]
workers = [here / f"worker{{i}}" for i in range(2)]
def pop(name):
    known = (here / name).read_text().split()
    (here / name).write_text(" ".join(known[1:] or known))
    return known[0]
if verb == "compute tpus queued-resources create":
    (here / "state").write_text("WAITING_FOR_RESOURCES")
elif verb == "compute tpus queued-resources describe":
    if state == "NONE":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    if state == "WAITING_FOR_RESOURCES":
        (here / "state").write_text("ACTIVE")
        for w in workers:
            w.mkdir()
    print(state)
elif verb == "compute tpus queued-resources delete":
    (here / "state").unlink()
    for w in workers:
        shutil.rmtree(w, ignore_errors=True)
elif verb == "compute tpus tpu-vm describe":
    print("READY")
elif verb == "compute tpus tpu-vm scp":
    for w in workers:
        shutil.copy(rest[0], w)
elif verb.startswith("storage cp "):
    source, target = (here / p.replace("gs://", "bucket/") if "gs://" in p else pathlib.Path(p) for p in line[2:4])
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
elif verb == "compute tpus tpu-vm ssh":
    if state != "ACTIVE":
        sys.exit("ssh: no such host")
    command = next(a for a in rest if a.startswith("--command=")).removeprefix("--command=")
    fake = f"mkdir -p .venv/bin; cp {{here}}/python .venv/bin/python"
    command = command.replace("bash launch/worker.sh tpu", fake)
    which = workers if "--worker=all" in rest else workers[:1]
    sys.exit(max(subprocess.run(["bash", "-c", command], cwd=w).returncode for w in which))
else:
    sys.exit(f"gcloud knows no {{verb}}")
"""

PYTHON = """#!{python}
import json, pathlib, sys
here = pathlib.Path({here!r})
worker = pathlib.Path.cwd().parent.name
with open(here / f"trained-{{worker}}", "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
turn = len((here / f"trained-{{worker}}").read_text().splitlines()) - 1
code = (here / "codes").read_text().split()[turn]
if code == "preempted":
    (here / "state").write_text("SUSPENDED")
    code = 1
print("the last line of", worker)
sys.exit(int(code))
"""

RECORD = """#!{python}
import json, pathlib, sys
here, name = pathlib.Path({here!r}), pathlib.Path(sys.argv[0]).name
with open(here / "calls", "a") as f:
    f.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "sbatch":
    print("4711;cluster")
if name == "srun":
    sys.exit(int((here / "codes").read_text()))
"""


@pytest.fixture
def stubs(tmp_path):
    """A directory of stubs; call it to run a script: stubs(script, *arguments, codes=..., **environment)."""
    here = tmp_path / "stubs"
    (here / "bin").mkdir(parents=True)

    def write(path: Path, text: str) -> None:
        path.write_text(text.format(python=sys.executable, here=str(here)))
        path.chmod(0o755)

    write(here / "bin" / "gcloud", GCLOUD)
    write(here / "python", PYTHON)
    for name in ("xpk", "kubectl", "sbatch", "srun", "scontrol"):
        write(here / "bin" / name, RECORD)

    def run(script: str, *arguments: str, codes: str = "0", expect: int = 0, **environment: str):
        (here / "codes").write_text(codes)
        known = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        path = f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**known, "PATH": path, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", **environment}
        line = ["bash", str(ROOT / "launch" / script), *arguments]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == expect, done.stdout + done.stderr
        calls = [json.loads(x) for x in (here / "calls").read_text().splitlines()] if (here / "calls").exists() else []
        return done, calls

    run.here = here
    return run


def verbs(calls: list[list[str]]) -> list[str]:
    """What was done to the slice, without the looks at it."""
    return [c[4] for c in calls if c[0] == "gcloud" and c[4] in ("create", "delete", "scp")]


def trained(here: Path, worker: int) -> list[list[str]]:
    path = here / f"trained-worker{worker}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_shellcheck_passes():
    found = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(found).exists():
        pytest.skip("shellcheck is not installed; launch/test.sh installs it")
    files = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])
    done = subprocess.run([found, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_it_is(script, stubs):
    done, calls = stubs(script, "--help")
    assert script in done.stdout and "set -euo" not in done.stdout and "#SBATCH" not in done.stdout and not calls


def test_tpu_dry_run_prints_every_command_and_runs_none(stubs):
    done, calls = stubs("tpu_pod.sh", "--dry-run", "all", "--", *TRAIN, **TPU, SETUP="sudo mount x /mnt")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert not calls and [" ".join(line[:5]) for line in lines if line[4:5] in (["create"], ["scp"], ["delete"])] == [
        "gcloud compute tpus queued-resources create", "gcloud compute tpus tpu-vm scp",
        "gcloud compute tpus queued-resources delete",
    ]  # fmt: skip
    create = next(line for line in lines if "create" in line)
    assert create[5:7] == ["mine", "--node-id=mine"] and create[7:] == [
        "--zone=us-east5-b", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"
    ]  # fmt: skip
    sent = [line[-1] for line in lines if line[4:5] == ["ssh"]]
    assert any("sudo mount x /mnt; bash launch/worker.sh tpu" in command for command in sent)
    assert any("pwkd_jax.train" in command for command in sent)


def test_tpu_training_runs_once_on_every_worker_and_the_slice_goes(stubs):
    done, calls = stubs("tpu_pod.sh", "all", "--", *TRAIN, **TPU)
    assert [trained(stubs.here, w) for w in (0, 1)] == [[["-m", "pwkd_jax.train", *TRAIN]]] * 2  # quoted to the letter
    assert verbs(calls) == ["create", "scp", "delete"] and not (stubs.here / "state").exists()
    assert "is deleted: it costs nothing any more" in done.stderr and "may still exist" not in done.stderr


def test_tpu_code_goes_by_way_of_a_bucket_which_holds_the_workdir_too(stubs):
    given = ["--config=configs/digits.py"]
    _, calls = stubs("tpu_pod.sh", "run", "--", *given, **TPU, BUCKET="gs://ours/team/")
    expected = ["-m", "pwkd_jax.train", *given, "--workdir=gs://ours/team/runs/mine"]
    assert [trained(stubs.here, w) for w in (0, 1)] == [[expected]] * 2
    assert "scp" not in verbs(calls) and (stubs.here / "bucket/ours/team/code/mine.tar.gz").exists()
    assert all((stubs.here / f"worker{w}/pwkd/launch/worker.sh").exists() for w in (0, 1))
    stubs("tpu_pod.sh", "down", **TPU)
    stubs("tpu_pod.sh", "run", "--", *TRAIN, **TPU, BUCKET="gs://ours", codes="0 0")
    assert trained(stubs.here, 0)[-1] == ["-m", "pwkd_jax.train", *TRAIN]  # a workdir that is given stays
    done, _ = stubs("tpu_pod.sh", "run", "--", *given, **TPU, BUCKET="ours", expect=2)
    assert "BUCKET: 'ours' should be gs://BUCKET" in done.stderr


def test_tpu_training_that_ends_with_75_is_resumed_on_the_same_slice(stubs):
    _, calls = stubs("tpu_pod.sh", "run", "--", *TRAIN, **TPU, codes="75 75 0")
    assert [len(trained(stubs.here, w)) for w in (0, 1)] == [3, 3] and verbs(calls) == ["create", "scp"]


def test_tpu_slice_that_is_preempted_is_made_again_and_training_resumed(stubs):
    _, calls = stubs("tpu_pod.sh", "all", "--", *TRAIN, **TPU, codes="preempted 0")
    assert verbs(calls) == ["create", "scp", "delete", "create", "scp", "delete"]
    assert trained(stubs.here, 0) == [["-m", "pwkd_jax.train", *TRAIN]] * 2


def test_tpu_failures_end_it_and_what_still_costs_money_is_said(stubs):
    done, calls = stubs("tpu_pod.sh", "run", "--", *TRAIN, **TPU, codes="1", expect=1)
    assert verbs(calls) == ["create", "scp"] and "the last line of worker0" in done.stdout
    assert "may still exist and cost money" in done.stderr and len(trained(stubs.here, 0)) == 1
    done, calls = stubs("tpu_pod.sh", "down", **TPU)
    assert verbs(calls)[-1] == "delete" and "costs nothing any more" in done.stderr
    assert "does not exist" in stubs("tpu_pod.sh", "down", **TPU)[0].stderr  # again: nothing to do


def test_tpu_mistakes_of_the_config_are_not_retried(stubs):
    stubs("tpu_pod.sh", "run", "--", *TRAIN, **TPU, codes="2 0", expect=2)
    assert len(trained(stubs.here, 0)) == 1


def test_tpu_gives_up_after_max_restarts(stubs):
    done, _ = stubs("tpu_pod.sh", "run", "--", *TRAIN, **TPU, codes="75 75 75 75", MAX_RESTARTS="2", expect=1)
    assert len(trained(stubs.here, 0)) == 3, done.stdout + done.stderr
    assert "gave up after 2 restarts" in done.stderr


def test_tpu_up_twice_asks_once_and_status_tells(stubs):
    stubs("tpu_pod.sh", "up", **TPU)
    done, calls = stubs("tpu_pod.sh", "up", **TPU)
    assert verbs(calls).count("create") == 1 and "may still exist and cost money" in done.stderr
    assert "mine: ACTIVE\n2 workers: none" in stubs("tpu_pod.sh", "status", **TPU)[0].stdout


@pytest.mark.parametrize(
    "script, arguments, environment, sentence",
    [
        ("tpu_pod.sh", ["up"], {}, "NAME is not set"),
        ("tpu_pod.sh", ["fly"], TPU, "'fly' is not known"),
        ("tpu_pod.sh", ["run"], TPU, "give the arguments of training after --"),
        ("gke_xpk.sh", ["run", "--", "x"], {"CLUSTER": "c"}, "NAME is not set"),
        ("slurm.sbatch", ["--config=c"], {}, "submit it: sbatch"),
        ("slurm.sbatch", ["sweep", "x"], {}, "give a sweep and the root"),
    ],
)
def test_mistakes_are_one_sentence(script, arguments, environment, sentence, stubs):
    done, calls = stubs(script, *arguments, expect=2, **environment)
    assert done.stderr.startswith("error: ") and sentence in done.stderr and done.stderr.count("\n") == 1 and not calls


GKE = {"CLUSTER": "c", "NAME": "run1", "TYPE": "v6e-16", "ZONE": "us-east5-b"}


def test_gke_workload(stubs):
    _, calls = stubs("gke_xpk.sh", "run", "--", *TRAIN, **GKE, XPK_ARGS="--priority=high", IMAGE="gcr.io/p/i:1")
    (line,) = calls
    assert line[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--workload=run1", "--tpu-type=v6e-16", "--restart-on-exit-codes=75", "--max-restarts=100",
            "--docker-image=gcr.io/p/i:1", "--priority=high"} <= {*line}  # fmt: skip
    command = line[-1].removeprefix("--command=")
    assert shlex.split(command) == ["cd", "/app", "&&", "exec", "python", "-m", "pwkd_jax.train", *TRAIN]
    _, calls = stubs("gke_xpk.sh", "run", "--", *TRAIN, **GKE)
    assert calls[-1][-1].startswith("--command=bash launch/worker.sh tpu && exec .venv/bin/python -m pwkd_jax.train")
    for what, program in (("list", "xpk"), ("logs", "kubectl"), ("delete", "xpk")):
        done, _ = stubs("gke_xpk.sh", "--dry-run", what, **GKE)
        assert done.stdout.startswith(program)
    assert stubs("gke_xpk.sh", "--dry-run", "list", **GKE)[1] == calls


SWEEP = "config = 'configs/digits.py'\n[grid]\n'student.width' = [0.125, 0.25]\n"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(a sweep, a Python that answers from memory what it was asked before: pwkd_jax takes seconds to import)."""
    here = tmp_path_factory.mktemp("sweep")
    (here / "s.toml").write_text(SWEEP)
    (here / "python").write_text(
        f'#!/usr/bin/env bash\nknown="{here}/$(printf %s "$*" | cksum | tr -d " ")"\n'
        f'[ -f "$known" ] || {shlex.quote(sys.executable)} "$@" >"$known" && cat "$known"\n'
    )
    (here / "python").chmod(0o755)
    return str(here / "s.toml"), {"PYTHON": str(here / "python")}


def test_gke_sweep_waits_for_the_teachers(stubs, sweep):
    path, python = sweep
    _, calls = stubs("gke_xpk.sh", "sweep", "--", path, "--root=runs/r", **GKE, **python, IMAGE="i")
    assert [c[2] for c in calls] == ["create", "list", "create", "create"]
    assert "--wait-for-job-completion=run1-0" in calls[1]
    assert [c[-1].rpartition("--run=")[2] for c in calls if c[2] == "create"] == ["0", "1", "2"]


def test_slurm_sweep_is_two_arrays_of_which_one_waits(stubs, sweep):
    path, python = sweep
    done, calls = stubs("slurm.sbatch", "--dry-run", "sweep", path, "runs/r", "--partition=gpu", **python)
    assert not calls and len(done.stdout.splitlines()) == 2 and "afterok:JOB" in done.stdout
    _, calls = stubs("slurm.sbatch", "sweep", path, "runs/r", "--partition=gpu", **python)
    end = ["--partition=gpu", "launch/slurm.sbatch", "sweep", path, "runs/r"]
    assert calls == [
        ["sbatch", "--parsable", "--array=0-0", *end],
        ["sbatch", "--parsable", "--array=1-2", "--dependency=afterok:4711", "--kill-on-invalid-dep=yes", *end],
    ]


def test_slurm_job_runs_and_is_queued_again_on_75_alone(stubs):
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(ROOT)}
    _, calls = stubs("slurm.sbatch", *TRAIN, **job)
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=120", "--gpu-bind=none", sys.executable, "-m"]
    assert calls == [[*srun, "pwkd_jax.train", *TRAIN]]
    assert stubs("slurm.sbatch", *TRAIN, **job, codes="1", expect=1)[1][1:] == calls
    assert stubs("slurm.sbatch", *TRAIN, **job, codes="75")[1][-1] == ["scontrol", "requeue", "12"]
    array = {**job, "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}
    _, calls = stubs("slurm.sbatch", "sweep", "s.toml", "r", **array, codes="75")
    assert calls[-2:] == [
        [*srun, "pwkd_jax.sweep", "s.toml", "--root=r", "--run=3"], ["scontrol", "requeue", "11_3"]
    ]  # fmt: skip
    done, after = stubs("slurm.sbatch", *TRAIN, **job, codes="75", SLURM_RESTART_COUNT="100", expect=1)
    assert after[len(calls) :][-1][0] == "srun" and "gave up" in done.stderr


def test_slurm_job_that_is_cancelled_is_not_queued_again(stubs):
    """scancel sends SIGTERM to the batch script too; training then ends with 75 all the same."""
    srun = stubs.here / "bin" / "srun"
    srun.write_text("#!/usr/bin/env bash\nkill -TERM $PPID\nexit 75\n")
    _, calls = stubs("slurm.sbatch", *TRAIN, SLURM_JOB_ID="12", SLURM_SUBMIT_DIR=str(ROOT), expect=75)
    assert calls == []


def test_slurm_dry_run(stubs):
    done, calls = stubs("slurm.sbatch", "--dry-run", *TRAIN)
    assert not calls and shlex.split(done.stdout)[-len(TRAIN) :] == TRAIN
