"""A long run ends as it began: no memory, thread, file or compiled program more. 20,000 steps with --all, 3,000 without."""

import os
from pathlib import Path

import jax
import pytest
from test_library import SHAPE, drawn
from test_training import Tiny

import pwkd_jax as pwkd

PROC = Path("/proc/self")


def taken() -> dict[str, int]:
    """What this process holds: resident MiB, threads, open files."""
    resident = int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return {"MiB": resident, "threads": len(os.listdir(PROC / "task")), "files": len(os.listdir(PROC / "fd"))}


@pytest.mark.skipif(not PROC.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("steps", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_it_takes_no_more_at_its_end(steps, tmp_path):
    """Every 200 steps a row, an evaluation, TensorBoard and a checkpoint, as a run of days has them."""
    task = pwkd.task(drawn(96), test=drawn(40, 1))
    net, compiled, held = pwkd.make_slimmable(Tiny, (0.5, 1.0), SHAPE, num_classes=3), [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **more: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    )

    def note(step, state, found):
        if step % 500 == 0:
            held[step] = taken() | {"programs": len(compiled)}

    pwkd.train_teacher(
        net, task, duration=steps, batch_size=8, learning_rate=0.01, directory=tmp_path / "run", callback=note, label="",
        cadence=pwkd.Cadence(200, 200, 200, True),
    )  # fmt: skip
    first, last = held[1000], held[steps]
    assert last["programs"] == first["programs"], held
    # A checkpoint is being written, or none is; Orbax kept a thread and three files of each one.
    assert last["threads"] <= first["threads"] + 8, held
    assert last["files"] <= first["files"] + 15, held
    assert last["MiB"] <= first["MiB"] + 20 + steps // 1000, held  # rows are kept: some bytes a row
    assert len([p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]) <= 3
