"""A disk that is full, and one that can no longer be written: a small one of our own, in a namespace of its own."""

import errno
import functools
import json
import subprocess
from pathlib import Path

import pytest

from pwkd_jax import storage
from tests.faults import kills, tiny

OPTIONS = kills.VARIANTS["one by one"]


@functools.cache
def permitted() -> bool:
    """Whether this user may mount a disk that this process alone sees."""
    try:
        return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path):
    """disk(script, size) runs a shell's script where $D is a disk of that size and `train` gives the command, whose workdir is
    $D/w; what is left there afterwards, and [(exit code, standard error)] of each `train`."""
    if not permitted():
        pytest.skip("mounting a small disk needs user namespaces (unshare -rm)")
    where, left = tmp_path / "disk", tmp_path / "left"
    where.mkdir()

    def run(script: str, size: str, *options: str) -> tuple[Path, list[tuple[int, str]]]:
        line = tiny.command(*OPTIONS, *options, workdir=where / "w")
        before = (
            'D=$1; L=$2; shift 2; n=0; mount -t tmpfs -o size=' + size + ' none "$D" || exit 99\n'
            'say() { n=$((n + 1)); echo "$1" > "$L.$n"; }\n'
            'train() { "${line[@]}" > /dev/null 2> "$L.err"; say $?; cp "$L.err" "$L.$n.err"; }\n'
            'line=("$@")\n'
        )
        command = ["unshare", "-rm", "bash", "-c", f'{before}{script}\ncp -r "$D/w" "$L"', "bash", str(where), str(left), *line]
        done = subprocess.run(command, env=tiny.environment(), cwd=tiny.ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        names = [tmp_path / f"left.{n}" for n in range(1, 9)]
        return left, [(int(p.read_text()), p.with_name(f"{p.name}.err").read_text()) for p in names if p.exists()]

    return run


def is_sentence(said: str, *phrases: str) -> bool:
    return said.startswith("error: ") and said.count("\n") == 1 and all(phrase in said for phrase in phrases)


FULL = ("No space left on device", "the same command continues from the last checkpoint once it can")


@pytest.mark.slow
@pytest.mark.parametrize("events", ["false", "true"])
def test_a_disk_that_fills_up_while_checkpoints_are_saved(events, unbroken, disk):
    script = """
        train
        [ -d "$D/w/teacher/slimmable/checkpoints/5" ] || exit 98
        mount -o remount,size=50m "$D"
        train
    """
    left, ((code, said), (again, _)) = disk(script, "80k", f"--config.log.tensorboard={events}")
    assert code == 2 and is_sentence(said, "--workdir: '", *FULL), said
    said_elsewhere = ("config.json differs", "summary.json differs") if events == "true" else ()  # that there are events
    found = [d for d in tiny.differences(unbroken, left) if "events" not in d and d not in said_elsewhere]
    assert again == 0 and not found


@pytest.mark.slow
@pytest.mark.parametrize("free, name", [(1, "parameters.txt"), (8, "report.html")])
def test_a_disk_that_fills_up_while_results_are_written(free, name, unbroken, disk):
    """free: pages of 4 KiB. All is trained, but no student has its result yet: there is room for the first one's."""
    script = f"""
        cp -r {unbroken} "$D/w"
        rm "$D"/w/summary.json "$D"/w/report.html "$D"/w/students/*/seed0/result.json
        free=$(df -k --output=avail "$D" | tail -1)
        dd if=/dev/zero of="$D/filler" bs=1k count=$((free - 4 * {free})) status=none
        train
        rm "$D/filler"
        train
    """
    left, ((code, said), (again, _)) = disk(script, "8m")
    assert code == 2 and is_sentence(said, "--workdir: '", *FULL, name), said
    assert again == 0 and not tiny.differences(unbroken, left) and (left / "report.html").exists()


def test_a_workdir_that_is_read_only_is_refused_before_anything_is_trained(unbroken, disk):
    script = f"""
        cp -r {unbroken} "$D/w"
        mount -o remount,ro "$D"
        train
    """
    _, ((code, said),) = disk(script, "8m")
    assert code == 2 and is_sentence(said, "--workdir: '", "cannot be written (Read-only file system)"), said


def test_a_disk_that_becomes_read_only(disk):
    script = """
        C="$D/w/teacher/slimmable/checkpoints"
        { while [ ! -d "$C/5" ]; do sleep 0.01; done; mount --bind "$C" "$C" && mount -o remount,bind,ro "$C"; } &
        train
        umount "$C"
    """
    left, ((code, said),) = disk(script, "8m", "--config.teacher.duration=2000 steps")
    assert code == 2 and is_sentence(said, "--workdir: '", "Read-only file system", "the same command continues"), said
    assert json.loads((left / "teacher/slimmable/metrics.jsonl").read_text().splitlines()[0])["step"] == 4


def test_only_the_disk_of_the_workdir_is_blamed(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    there, elsewhere = (OSError(errno.EROFS, "Read-only file system", str(p / "x")) for p in (tmp_path, tmp_path.parent))
    assert storage.failure(full, tmp_path) == "No space left on device"
    assert storage.failure(there, tmp_path) == f"Read-only file system: {tmp_path / 'x'}"
    told = ValueError(f'RESOURCE_EXHAUSTED: Error writing "{tmp_path}/x" [OS error 28: ENOSPC No space left on device]')
    behind = RuntimeError("save failed")
    behind.__cause__ = ExceptionGroup("saves", [TypeError("x"), told])
    assert storage.failure(behind, tmp_path) == "No space left on device"
    for other in (elsewhere, ValueError("No space left on device"), FileNotFoundError(errno.ENOENT, "gone", str(tmp_path))):
        assert storage.failure(other, tmp_path) is None
