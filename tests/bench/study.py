"""A study in one program beside its runs one after another: python tests/bench/study.py [--teacher=resnet110]
[--student=resnet8] [--batch=32] [--seeds=3] [--rounds=5] [--way=unroll] [--json=FILE]

All seven arms, four equal stages, with configs/cifar100.py on random images. Every program that either way runs takes turns; a
round's ratio is the time of the study's steps, each of its spans as long as it lasts, over that of all runs' steps. `--count`
compares operations in the same way in place of times, and runs nothing.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pwkd_jax import config, stages
from pwkd_jax.cost import benchmark, compilation_cache, host_memory, timing
from pwkd_jax.experiment import programs
from pwkd_jax.reporting.environment import environment
from pwkd_jax.training import study

CONFIG = str(Path(__file__).parents[2] / "configs" / "cifar100.py")


def setting(options: argparse.Namespace, *more: str):
    given = [f"teacher.model={options.teacher}", f"student.model={options.student}", f"student.batch_size={options.batch}",
             f"seeds={options.seeds}", "arms=" + ",".join(stages.ARMS), "student.batches=shared", *more]  # fmt: skip
    settings, _ = config.load([f"--config={CONFIG}", *(f"--config.{o}" for o in given)])
    return benchmark.synthetic_setting(settings)


def programs_of(options: argparse.Namespace, alone, together) -> tuple[dict, dict]:
    """({program: (its case, steps)} of all runs one by one, the same of the study)."""
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


def operations(experiment) -> float:
    """Of all steps of all students, as XLA counts them before it compiles; where a width is drawn, of the widest."""
    found = [p for p in programs.programs(experiment) if p.batch_key == "student.batch_size" and "eval" not in p.name]
    return sum(p.runs * p.lower().cost_analysis()["flops"] for p in found)


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
    host_memory.keep()
    alone = setting(options, "student.together=none")
    together = setting(options, f"student.together={options.way}", "student.study=true")
    runs = options.seeds * len(stages.ARMS)
    result = {"runs": runs}
    if options.count:
        result["operations"] = operations(together) / operations(alone)
        print(f"a study of {runs} students: {result['operations']:.2f} of the operations of {runs} runs")
    else:
        one, whole = programs_of(options, alone, together)
        timers = [timing.Timer(name, make(), 1.0) for name, (make, _) in (one | whole).items()]
        for number in range(options.rounds):
            print(f"round {number + 1}", file=sys.stderr, flush=True)
            for timer in timers:
                timer.round()
        found = {timer.name: [fed for _, fed in timer.found] for timer in timers}
        totals = [[sum(steps * found[name][r] for name, (_, steps) in group.items()) for r in range(options.rounds)]
                  for group in (one, whole)]  # fmt: skip
        rounds = [b / a for a, b in zip(*totals, strict=True)]
        result |= {"ratio": [statistics.median(rounds), min(rounds), max(rounds)], "rounds": rounds, "step_seconds": found}
        print("a study of {} students: {:.2f} ({:.2f} to {:.2f}) of {} runs".format(runs, *result["ratio"], runs))
    if options.json:
        machine = environment() | {"processor": timing.processor(), "load": os.getloadavg()[0]}
        result |= {"environment": machine, "command": " ".join(["python tests/bench/study.py", *arguments])}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
