"""Kill the training command at random moments, give it again, and compare what it leaves with an unbroken run's, bit by bit.

    python -m tests.faults.kills --count 60 --seed 0 --out tests/faults/kills.json

A moment is the nth time that something begins (see `marked`), and a random delay after it; start-up is counted from the
command's first line, and what compiles has an empty compilation cache. The signal comes from outside. Every third trial kills
twice. Exits with 1 where a run ended otherwise than it should, or in other bits.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.faults import tiny

# {phase: the most seconds after its mark}.
PHASES = {"start": 5.0, "compile": 0.5, "teacher": 0.05, "pwkd 1": 0.05, "pwkd 2": 0.05, "control": 0.05, "evaluation": 0.05,
          "save": 0.1, "report": 0.05}  # fmt: skip
STEPS = ("teacher", "pwkd 1", "pwkd 2", "control")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LEFT = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGINT: 130}
# What is trained: an arm with stages and its controls, and the same by two seeds in one program.
VARIANTS = {
    "one by one": ("--config.arms=pwkd,kd_whole,alone",),
    "together": ("--config.arms=pwkd,kd_whole", "--config.seeds=2", "--config.student.batches=shared"),
}
MARKED = ("-m", "tests.faults.marked")


class Broken:
    """A command that a signal may end, and what came of it."""

    def __init__(self, options: tuple[str, ...], workdir: Path, cache: Path | None, phase: str = ""):
        reader, writer = os.pipe()
        program = ("-m", "pwkd_jax.train") if phase == "start" else MARKED
        more = {"MARKS": str(writer), **({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {})}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            tiny.command(*options, workdir=workdir, program=program), env=tiny.environment(**more), cwd=tiny.ROOT,
            pass_fds=(writer,), stdout=subprocess.DEVNULL, stderr=self._errors,
        )  # fmt: skip
        os.close(writer)
        self._marks = os.fdopen(reader)
        self.code, self.seconds, self.steps = None, 0.0, 0

    def wait_for(self, phase: str, number: int) -> bool:
        """Whether `phase` has begun for the `number`th time; False where the command ended before."""
        if phase == "start":
            return self._answers()
        return any((number := number - (line.strip() == phase)) == 0 for line in self._marks)

    def _answers(self) -> bool:
        """Whether it has come to its first line, and answers a SIGTERM."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                caught = Path(f"/proc/{self.process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
                if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
                    return True
            time.sleep(0.005)
        return False

    def counts(self) -> collections.Counter:
        """How often each phase begins, to the end."""
        return collections.Counter(line.strip() for line in self._marks)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, timeout: float = 600) -> str:
        """What it said on standard error; `code`, `seconds` that it took and training `steps` that it made are then known."""
        after = []
        reading = threading.Thread(target=lambda: after.extend(line.strip() for line in self._marks))
        reading.start()  # a full pipe would hold the command
        begun = time.monotonic()
        try:
            self.code = self.process.wait(timeout)
        finally:
            self.process.kill()
        self.seconds = time.monotonic() - begun
        reading.join()
        self.steps = sum(line in STEPS for line in after)
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")


def reference(variant: str, folder: Path) -> tuple[Path, collections.Counter]:
    """(workdir of an unbroken run by the command itself, how often each phase begins in one that tells)."""
    folder.mkdir()
    workdir, told = folder / "unbroken", folder / "told"
    done = tiny.run(*VARIANTS[variant], workdir=workdir)
    if done.returncode:
        raise SystemExit(done.stderr)
    command = Broken(VARIANTS[variant], told, folder / "told_cache")
    counts = command.counts()
    said = command.end()
    if command.code or (found := tiny.differences(workdir, told)):
        raise SystemExit(said or f"a run that tells where it is is another run: {found}")
    return workdir, counts


def kill(rng: random.Random, options: tuple[str, ...], workdir: Path, phase: str, number: signal.Signals, counts) -> dict:
    """One kill, and how the command left."""
    nth, delay = rng.randint(1, max(1, counts[phase])), rng.uniform(0, PHASES[phase])
    with tempfile.TemporaryDirectory() as empty:
        command = Broken(options, workdir, Path(empty) if phase == "compile" else None, phase)
        came = command.wait_for(phase, nth)
        time.sleep(delay)
        ended = command.process.poll() is not None
        command.send(number)
        said = command.end()
    moment = {"phase": phase, "signal": number.name, "moment": f"{delay:.3f} s after " + (
        "the first line" if phase == "start" else f"beginning {nth} of {counts[phase]}")}  # fmt: skip
    left = "ended before" if ended or not came else command.code
    # A command that has nothing left to train ends well, whatever it was sent; a few marks are older than the signal.
    well = command.code == LEFT[number] or (command.code == 0 and (left == "ended before" or command.steps < 9))
    right = well and "Traceback" not in said
    return moment | {"code": left, "seconds": round(command.seconds, 2), "right": right,
                     **({} if right else {"said": _without_paths(said, workdir)[-2000:]})}  # fmt: skip


def trial(index: int, seed: int, folder: Path, references: dict, plan: tuple[str, signal.Signals], finish) -> dict:
    """One workdir, killed once or twice, then finished and compared."""
    rng = random.Random(f"{seed} {index}")
    variant = "together" if index % 4 == 3 and len(references) > 1 else "one by one"
    (unbroken, counts), workdir, kills = references[variant], folder / f"trial{index}", []
    for phase, number in (plan, (rng.choice([*PHASES][2:]), rng.choice(SIGNALS)))[: 1 + (index % 3 == 2)]:
        kills.append(kill(rng, VARIANTS[variant], workdir, phase, number, counts))
    done, others = finish(*VARIANTS[variant], workdir=workdir), 0
    while done.returncode in (75, 130, *(-n for n in SIGNALS)) and others < 3:  # somebody else's signal: nobody here sent one
        done, others = finish(*VARIANTS[variant], workdir=workdir), others + 1
    found = tiny.differences(unbroken, workdir) if done.returncode == 0 else ["it did not end"]
    again = {"code": done.returncode, "identical": not found, "right": not found and "Traceback" not in done.stderr}
    if others:
        again["stopped by others before"] = others
    if not again["right"]:
        again |= {"differences": found, "said": _without_paths(done.stderr, workdir)[-2000:]}
    shutil.rmtree(workdir, ignore_errors=True)
    return {"trial": index, "variant": variant, "kills": kills, "again": again}


def _without_paths(text: str, workdir: Path) -> str:
    for path, name in ((workdir, "WORKDIR"), (tiny.ROOT, "."), (Path(sys.prefix), ".venv")):
        text = text.replace(str(path), name)
    return text


def plans(count: int, seed: int) -> list[tuple[str, signal.Signals]]:
    """(phase, signal) of every trial: each phase as often as any other, and in it each signal."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        shift = len(found) // len(PHASES) + rng.randrange(3)
        found += rng.sample([(p, SIGNALS[(i + shift) % 3]) for i, p in enumerate(PHASES)], len(PHASES))
    return found[:count]


def totals(trials: list[dict]) -> dict:
    kills = [k for t in trials for k in t["kills"]]
    answered = [k["seconds"] for k in kills if k["code"] in (75, 130)]
    return {
        "trials": len(trials), "kills": len(kills), "identical": sum(t["again"]["identical"] for t in trials),
        "right": sum(t["again"]["right"] and all(k["right"] for k in t["kills"]) for t in trials),
        "codes": dict(collections.Counter(f"{k['signal']}: {k['code']}" for k in kills).most_common()),
        "phases": dict(collections.Counter(k["phase"] for k in kills).most_common()),
        "seconds to leave": {"median": sorted(answered)[len(answered) // 2], "most": max(answered)} if answered else {},
    }  # fmt: skip


def trials(count: int, seed: int, folder: Path, references: dict, finish=tiny.run, say=print, jobs: int = 1) -> list[dict]:
    """references: {variant: what `reference` gave}. finish(*options, workdir=) gives the command again, to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored, and so would commands

    def one(index: int, plan: tuple) -> dict:
        found = trial(index, seed, folder, references, plan, finish)
        say(json.dumps(found), flush=True)
        return found

    if jobs == 1:
        return [one(index, plan) for index, plan in enumerate(plans(count, seed))]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(count), plans(count, seed)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        references = {variant: reference(variant, folder / variant) for variant in VARIANTS}
        found = trials(options.count, options.seed, folder, references, jobs=options.jobs)
    result = totals(found)
    print(json.dumps(result, indent=1))
    if options.out:
        lines = ",\n".join(f"  {json.dumps(t)}" for t in found)
        counts = {variant: dict(counts) for variant, (_, counts) in references.items()}
        head = json.dumps({"seed": options.seed, "totals": result, "counts": counts}, indent=1)[:-2]
        options.out.write_text(f'{head},\n "trials": [\n{lines}\n ]\n}}\n')
    return 0 if result["right"] == result["trials"] else 1


if __name__ == "__main__":
    sys.exit(main())
