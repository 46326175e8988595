"""Six of the random kills of `kills`, which makes sixty by hand; and what a signal does while JAX compiles."""

import collections
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pwkd_jax import train
from tests.faults import kills, tiny

# How often each phase begins in an unbroken run, as `kills.reference` counts.
COUNTS = {"compile": 35, "teacher": 24, "pwkd 1": 12, "pwkd 2": 12, "control": 48, "evaluation": 19, "save": 21, "report": 2}


def test_killed_at_random_it_ends_in_the_same_bits(unbroken, tmp_path):
    """Where the sixty had a command of its own go on, this process does."""

    def finish(*options, workdir):
        code = train.main([*tiny.OPTIONS, *options, f"--workdir={workdir}"])
        return subprocess.CompletedProcess((), code, stderr="")

    references = {"one by one": (unbroken, collections.Counter(COUNTS))}
    found = kills.trials(4, 0, tmp_path, references, finish, say=lambda *_, **__: None)
    assert all(t["again"]["right"] and all(k["right"] for k in t["kills"]) for t in found), json.dumps(found, indent=1)


def test_the_sixty_kills_that_were_made_ended_well():
    kept = json.loads(Path(__file__).with_name("kills.json").read_text())
    assert kept["totals"] == kills.totals(kept["trials"]) and len(kept["trials"]) >= 60
    assert kept["totals"]["right"] == kept["totals"]["identical"] == kept["totals"]["trials"]
    assert {k["phase"] for t in kept["trials"] for k in t["kills"]} == {*kills.PHASES}


def test_plans_are_spread_over_phases_and_signals():
    found = kills.plans(54, 0)
    assert found == kills.plans(60, 0)[:54] and found != kills.plans(54, 1)
    assert all(len({n for p, n in found if p == phase}) == 3 for phase in kills.PHASES)


# A command whose compiler, or whose step, takes `seconds`; the main thread then hears no signal, as in XLA.
SLOW = """
import runpy, signal, sys, time
import jax._src.compiler
from pwkd_jax.training import loop, preemption

what, grace = sys.argv[1], float(sys.argv[2])
preemption._GRACE = grace or preemption._GRACE
owner, name = {"compile": (jax._src.compiler, "backend_compile_and_load"), "step": (loop.Running, "add")}[what]
true, seen = getattr(owner, name), []

def slow(*args, **kwargs):
    if not seen:
        seen.append(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        print("slow", flush=True)
        time.sleep(60 if what == "compile" else 3)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    return true(*args, **kwargs)

setattr(owner, name, slow)
sys.argv[1:3] = []
runpy.run_module("pwkd_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "what, grace, number, code, sentence",
    [
        ("compile", 0, signal.SIGTERM, 75, "SIGTERM: left while compiling; the same command continues from the last"),
        pytest.param("compile", 1, signal.SIGINT, 130, "SIGINT: left while compiling; the same command continues from the last",
                     marks=pytest.mark.slow),
        pytest.param("step", 0.5, signal.SIGTERM, 75, "stopped by SIGTERM; the same command continues from the step that was",
                     marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "SIGINT", "a long step"],
)  # fmt: skip
def test_who_compiles_leaves_in_seconds_and_who_trains_saves(what, grace, number, code, sentence, tmp_path):
    program = ("-c", SLOW, what, str(grace))
    line = tiny.command("--config.arms=alone", workdir=tmp_path / "w", program=program)
    env = tiny.environment(JAX_ENABLE_COMPILATION_CACHE=str(int(what == "step")))
    process = subprocess.Popen(line, env=env, cwd=tiny.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any(said.strip() == "slow" for said in process.stdout)
        time.sleep(0.5)  # until it sleeps itself
        process.send_signal(number)
        begun = time.monotonic()
        assert process.wait(30) == code
        assert time.monotonic() - begun < 10
    finally:
        process.kill()
    errors = process.stderr.read()
    assert re.search(sentence, errors) and "Traceback" not in errors
    assert bool([*(tmp_path / "w").rglob("checkpoints/1")]) == (what == "step")


def test_a_signal_before_the_first_import_is_done(tmp_path):
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        command = kills.Broken((), tmp_path / "w", None, "start")
        assert command.wait_for("start", 1)
        command.send(number)
        assert command.end() == "" and command.code == code and not (tmp_path / "w").exists()
