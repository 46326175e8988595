"""Students in one program beside as many runs: python tests/bench/seeds.py [--seeds=5] [--rounds=5] [--batch=64]
[--ways=unroll,scan,vmap] [--json=FILE]

The distillation step of resnet32x4 into resnet8x4 (configs/cifar100.py, random images), one student at a time and all in one
program, each way of `student.together`. Rounds take turns; a ratio is of one round, the time of a step of all over that of as
many steps of one: median, smallest and largest.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pwkd_jax import config
from pwkd_jax.cost import benchmark, timing
from pwkd_jax.reporting.environment import environment
from pwkd_jax.training import students_together

CONFIG = str(Path(__file__).parents[2] / "configs" / "cifar100.py")


def timer(seeds: int, way: str, batch: int) -> timing.Timer:
    options = [f"seeds={seeds}", "arms=kd_whole", "student.batches=shared", f"student.together={way}",
               f"student.batch_size={batch}"]  # fmt: skip
    settings, _ = config.load([f"--config={CONFIG}", *(f"--config.{o}" for o in options)])
    cases = benchmark.find_cases(benchmark.synthetic_setting(settings))
    name = next(name for name in cases if "step, teacher 1" in name)
    print(f"compiling {way} ...", file=sys.stderr, flush=True)
    return timing.Timer(f"{name} ({way})", cases[name](), 2.0)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--ways", default="unroll")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    seeds, ways = options.seeds, options.ways.split(",")
    known = [way for way in students_together.HOW if way != "none"]
    if unknown := {*ways} - {*known}:
        parser.error(f"--ways: there is no '{min(unknown)}'; there are {', '.join(known)}")
    with timing.nothing_kept():
        one = timer(1, "none", options.batch)
        several = {way: timer(seeds, way, options.batch) for way in ways}
    for number in range(options.rounds):
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        for each in (one, *several.values()):
            each.round()
    rows = []
    print(f"one student: {statistics.median(a for a, _ in one.found):.3f} s a step, compiled in {one.compile_seconds:.0f} s")
    for way, each in several.items():
        ratios = sorted(a / (seeds * b) for (a, _), (b, _) in zip(each.found, one.found, strict=True))
        found = [statistics.median(ratios), ratios[0], ratios[-1]]
        rows.append({"together": way, "of_one_by_one": found, "compile_seconds": each.compile_seconds,
                     "rounds": [a for a, _ in each.found]})  # fmt: skip
        print(f"{seeds} students, {way}: {found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f}) of {seeds} runs, "
              f"compiled in {each.compile_seconds:.0f} s")  # fmt: skip
    if options.json:
        machine = environment() | {"processor": timing.processor(), "load": os.getloadavg()[0]}
        result = {"seeds": seeds, "one": [a for a, _ in one.found], "rows": rows, "environment": machine,
                  "command": " ".join(["python tests/bench/seeds.py", *arguments])}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
