"""A study in one program beside its runs one after another: python tests/bench/study.py [--teacher=resnet110]
[--student=resnet8] [--batch=32] [--seeds=3] [--rounds=5] [--way=unroll] [--json=FILE]

All seven arms, four equal stages, with configs/cifar100.py on random images. Every program that either way runs takes turns; a
round's ratio is the time of the study's steps, each of its spans as long as it lasts, over that of all runs' steps. Also the
compiler's counts of operations and of bytes, in the same way. `--count` leaves the timing away.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pwkd_jax import config, stages
from pwkd_jax.cost import benchmark, compilation_cache, timing
from pwkd_jax.experiment import programs
from pwkd_jax.reporting.environment import environment
from pwkd_jax.training import study

CONFIG = str(Path(__file__).parents[2] / "configs" / "cifar100.py")


def setting(options: argparse.Namespace, *more: str):
    given = [f"teacher.model={options.teacher}", f"student.model={options.student}", f"student.batch_size={options.batch}",
             f"seeds={options.seeds}", "arms=" + ",".join(stages.ARMS), "student.batches=shared", *more]  # fmt: skip
    settings, _ = config.load([f"--config={CONFIG}", *(f"--config.{o}" for o in given)])
    return benchmark.synthetic_setting(settings)


def programs_of(options: argparse.Namespace) -> tuple[dict, dict]:
    """({program: (its case, steps)} of all runs one by one, the same of the study)."""
    alone = setting(options, "student.together=none")
    together = setting(options, f"student.together={options.way}", "student.study=true")
    one, whole = {}, {}
    cases = benchmark.find_cases(alone)
    for arm in stages.ARMS:
        for stage in alone.plan(arm):
            name = programs.student_title(stage.widths, None, stage.teacher)
            before = one[name][1] if name in one else 0
            one[name] = cases[name], before + options.seeds * (stage.end - stage.start)
    plans = [together.plan(arm) for arm in stages.ARMS]
    several, cases = together.several(options.seeds, len(plans)), benchmark.find_cases(together)
    for span in study.spans(plans):
        name = programs.study_title(span, len(plans), several)
        whole[name] = cases[name], span.end - span.start
    return one, whole


def counts(case: timing.Case) -> tuple[float, float]:
    """(operations, bytes) of a step, by the compiler."""
    state, batch = case.make(), case.batches(0)
    found = case.lower(state, batch, **case.extra).compile().cost_analysis()
    return found["flops"], found["bytes accessed"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet110")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--way", default="unroll")
    for name, value in (("batch", 32), ("seeds", 3), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    compilation_cache.enable()
    one, whole = programs_of(options)
    runs, every = options.seeds * len(stages.ARMS), one | whole
    result = {"runs": runs}

    def ratio(found: dict[str, float]) -> float:
        """What the study takes of what all runs take, of what a step of each program does."""
        return total(whole, found) / total(one, found)

    def total(group: dict, found: dict[str, float]) -> float:
        return sum(steps * found[name] for name, (_, steps) in group.items())

    if options.count:
        found = {name: counts(make()) for name, (make, _) in every.items()}
        result |= {what: ratio({name: each[i] for name, each in found.items()}) for i, what in enumerate(("flops", "bytes"))}
        print(f"a study of {runs} students: {result['flops']:.2f} of the operations and {result['bytes']:.2f} of the bytes of "
              f"{runs} runs, by the compiler")  # fmt: skip
    else:
        timers = [timing.Timer(name, make(), 1.0) for name, (make, _) in every.items()]
        for number in range(options.rounds):
            print(f"round {number + 1}", file=sys.stderr, flush=True)
            for timer in timers:
                timer.round()
        rounds = [ratio({timer.name: timer.found[r][1] for timer in timers}) for r in range(options.rounds)]
        result |= {"ratio": [statistics.median(rounds), min(rounds), max(rounds)], "rounds": rounds,
                   "step_seconds": {timer.name: [fed for _, fed in timer.found] for timer in timers}}  # fmt: skip
        print("a study of {} students: {:.2f} ({:.2f} to {:.2f}) of {} runs".format(runs, *result["ratio"], runs))
    if options.json:
        machine = environment() | {"processor": timing.processor(), "load": os.getloadavg()[0]}
        result |= {"environment": machine, "command": " ".join(["python tests/bench/study.py", *arguments])}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
