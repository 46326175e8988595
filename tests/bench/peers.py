"""Our training steps beside PyTorch's: python tests/bench/peers.py [--only=ROWS] [--rounds=N] [--json=FILE]

    eager      KD of resnet32x4 into resnet8x4, float32, as RepDistiller trains: eager, contiguous, its meters read every step
    compiled   the same in PyTorch channels-last under torch.compile, with its fused optimiser
    autocast   that in bfloat16 (ours: --config.dtype=bfloat16), as the best user of a GPU has it
    slimmable  a step of the slimmable teacher: resnet32x4 at four widths, switchable batch norm, eager, float32
    mobilenet  MobileNetV2, whose convolutions are depthwise, from labels alone, eager, float32
    shufflenet ShuffleV2, likewise

Also --steps (of a round, 2; on a GPU 100 or a multiple, for training makes so many in a dispatch there), --batch (64),
--threads (0: a core each), --against=CHECKOUT (this code as it was there takes turns with the two, for the rows that its
peers.py knows). Images of 32x32, 100 classes; the networks' parameters and multiply-accumulates must agree. Ours is the step
that training runs (configs/cifar100.py, arm kd_standard, images drawn at random) and crops, mirrors and normalises as well;
PyTorch is given normalised float32 images, for its DataLoader does that elsewhere. On a GPU the time to send them is counted.

Each side is a process of its own, and they take turns: while one runs, the other waits for a message and spins no threads, and
each has the threads, flags and memory it has in real use, which in one process they would not. Both are held to the
same cores. A ratio is PyTorch's time over ours in one round, so above 1 we are faster: median (smallest to largest). CPU is
the ratio of processor time, which other load on the machine disturbs less than the wall clock's.

PyTorch is no requirement of ours: pip install torch beside requirements.txt; without it this says so and measures nothing.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

WIDTHS = (1.0, 0.75, 0.5, 0.25)
# row: (teacher, student or none; a slimmable teacher itself has no student; PyTorch compiled; dtype)
ROWS = {
    "eager": ("resnet32x4", "resnet8x4", False, "float32"),
    "compiled": ("resnet32x4", "resnet8x4", True, "float32"),
    "autocast": ("resnet32x4", "resnet8x4", True, "bfloat16"),
    "slimmable": ("resnet32x4", "", False, "float32"),
    "mobilenet": ("", "MobileNetV2", False, "float32"),
    "shufflenet": ("", "ShuffleV2", False, "float32"),
}


class Ours:
    """run(n): n steps of training's own program, on batches of training's own pipeline."""

    def __init__(self, batch: int, teacher: str, student: str, dtype: str):
        import jax
        import numpy as np

        from pwkd_jax import config, data
        from pwkd_jax.cost import compilation_cache, host_memory
        from pwkd_jax.experiment import definition, programs
        from pwkd_jax.models import costs, precision
        from pwkd_jax.training import sharding

        compilation_cache.enable()
        host_memory.keep()
        names = [f"--config.{who}.model={name}" for who, name in (("teacher", teacher), ("student", student)) if name]
        c = config.load([f"--config={ROOT}/configs/cifar100.py", f"--config.dtype={dtype}", *names])[0]
        c.teacher.batch_size = c.student.batch_size = batch
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (max(1024, batch), 32, 32, 3)).astype(np.uint8)
        split = data.Split(images, rng.integers(0, 100, len(images)).astype(np.int32))
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        s = definition.build(c, mesh, data.Dataset("drawn", split, split, 100))
        self.jax, self.batches, self.at = jax, s.batches(batch, 0), 0
        if not student:
            create, self.step = programs.teacher_step(s, "slimmable")
            model, self.frozen = s.teachers["slimmable"].members[1.0], {}
        else:
            plan, model, net = s.plan("kd_standard" if teacher else "alone"), s.student, s.teachers["standard"]
            distillation = s.distillation("standard", (1.0,)) if teacher else None
            create, steps = programs.student_steps(s, plan, distillation)
            self.step, self.frozen = steps[plan[0].widths], {"teacher": {}}
            if teacher:
                variables = net.members[1.0].init(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
                self.frozen = {"teacher": {1.0: s.place(variables)}}
        self.state = create(0, None)
        trained = sum(x.size for x in jax.tree.leaves(self.state.params))
        self.facts = {"parameters": trained, "macs": costs.macs(precision.plain(model), (32, 32, 3))}

    def run(self, steps: int) -> None:
        most = getattr(self.batches, "most", 1)
        for left in range(steps, 0, -most):
            count = (min(left, most),) if most > 1 else ()
            self.state, metrics = self.step(self.state, self.batches(self.at, *count), **self.frozen)
            self.at += min(left, most)
        self.jax.block_until_ready((self.state, metrics))


def other(checkout: Path):
    """peers.py of another checkout, whose pwkd_jax is the one to be imported from then on."""
    spec = importlib.util.spec_from_file_location("other_peers", checkout / "tests" / "bench" / "peers.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def work(pipe, side: str, row: str, batch: int, threads: int, against: Path | None) -> None:
    """A side's process: says what it is, then for each n that it is sent runs n steps and says (seconds, processor seconds)."""
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    teacher, student, compiled, dtype = ROWS[row]
    if side == "torch":
        import peers_torch

        runner = peers_torch.Runner(batch, teacher, student, WIDTHS, compiled, dtype, threads)
        known, run = peers_torch.versions(), runner.run
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for all
        code = sys.modules[__name__] if side == "ours" else other(against)
        *networks, _, dtype = code.ROWS[row]
        runner = code.Ours(batch, *networks, dtype)
        known = {name: importlib.import_module(name).__version__ for name in ("jax", "jaxlib", "flax")}
        known["jax_device"] = runner.jax.devices()[0].device_kind
        run = partial(Ours.run, runner)
    run(2)  # compiles, and again for what only the second step settles
    pipe.send((known, runner.facts))
    while steps := pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        run(steps)
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu))


def knows(checkout: Path, row: str) -> bool:
    return f'"{row}": (' in (checkout / "tests" / "bench" / "peers.py").read_text()


def measure(row: str, rounds: int, steps: int, batch: int, threads: int, against: Path | None) -> tuple[dict, dict]:
    """(row of the table, versions) of `rounds` rounds in which ours, PyTorch's and a checkout's run `steps` steps each."""
    context, pipes, processes, facts, known = multiprocessing.get_context("spawn"), {}, [], {}, {}
    for side in ("ours", "torch", *(("before",) if against and knows(against, row) else ())):
        pipes[side], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(theirs, side, row, batch, threads, against), daemon=True))
        processes[-1].start()
        theirs.close()
        versions, facts[side] = pipes[side].recv()  # one compiles at a time
        known |= versions
    if any(found != facts["ours"] for found in facts.values()):
        raise SystemExit(f"the networks of '{row}' are not the same: {facts}")
    times = {side: [] for side in pipes}
    for turn in range(rounds):
        for side in list(pipes)[:: -1 if turn % 2 else 1]:
            pipes[side].send(steps)
            times[side].append(pipes[side].recv())
    for side, process in zip(pipes, processes, strict=True):
        pipes[side].send(0)
        process.join()
    found = {side: statistics.median(wall / steps for wall, _ in times[side]) for side in pipes}
    result = {"row": row, **facts["ours"], "seconds_a_step": found}
    result |= {"speed": spread(times["torch"], times["ours"], 0), "cpu": spread(times["torch"], times["ours"], 1)}
    if "before" in times:
        result |= {"speed_over_before": spread(times["before"], times["ours"], 0)}
        result |= {"speed_before": spread(times["torch"], times["before"], 0)}
    return result | {"rounds": times}, known


def spread(theirs: list[tuple], ours: list[tuple], clock: int) -> dict[str, float]:
    ratios = [t[clock] / o[clock] for o, t in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROWS), metavar="ROWS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if unknown := {*options.only.split(",")} - {*ROWS}:
        parser.error(f"--only: there is no '{min(unknown)}'; there are {', '.join(ROWS)}")
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed here, so nothing was measured: pip install torch, and run this again")
        return
    if options.against and not (options.against / "tests" / "bench" / "peers.py").exists():
        parser.error(f"--against: {options.against} is no checkout of this repository with a tests/bench/peers.py")
    count, steps, batch, threads = options.rounds, options.steps, options.batch, options.threads
    cores = min(threads or os.cpu_count(), len(os.sched_getaffinity(0)))
    machine = {"processor": processor(), "cores": cores, "load": os.getloadavg()[0]}
    print(f"{machine['processor']}, {cores} cores, load {machine['load']:.1f}; batch {batch}, {count} rounds of {steps} steps")
    last = "before, PyTorch's being 1" if options.against else ""
    print(f"{'row':<12}{'ours':>9}{'PyTorch':>10}   {'speed, PyTorch being 1':<25}{'CPU':<25}{last}")
    rows, known = [], {}
    for row in options.only.split(","):
        found, versions = measure(row, count, steps, batch, threads, options.against)
        rows.append(found)
        known |= versions
        ms = found["seconds_a_step"]
        shown = [found[key] for key in ("speed", "cpu", "speed_before") if key in found]
        ratios = "".join("{:<25}".format("{median:.2f} ({least:.2f} to {most:.2f})".format(**ratio)) for ratio in shown)
        digits = 0 if ms["ours"] > 0.05 else 2
        print(f"{row:<12}{1e3 * ms['ours']:>6.{digits}f} ms{1e3 * ms['torch']:>7.{digits}f} ms   {ratios}".rstrip(), flush=True)
        if options.json:  # of every row, for the next may fail
            command = " ".join(["python tests/bench/peers.py", *arguments])
            after = machine | {"load_after": os.getloadavg()[0]}
            result = {"machine": after, "versions": known, "command": command, "rows": rows}
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in known.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
