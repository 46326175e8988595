"""How fast a config trains here, program by program: compile time, step time, images/s, utilisation, memory, waiting for input.

    python -m pwkd_jax.benchmark --config=configs/digits.py
    python -m pwkd_jax.benchmark --config=configs/cifar100.py --synthetic --only=teacher
    python -m pwkd_jax.benchmark --config=configs/imagenet.py:resnet50-mobilenetv1 --config.dtype=bfloat16 --json > speed.json

Times the very programs that training runs: the teacher's step at one width (plain) and at all of them, sliced and masked, every
student stage, and the evaluations. --synthetic needs no data: random images of the config's shapes. Programs take turns, round
by round, so that ratios hold on a busy machine too. Exits with code 2 and one sentence on a mistake.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from absl import logging

from pwkd_jax import config
from pwkd_jax.cost import host_memory
from pwkd_jax.cost.benchmark import benchmark
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.reporting import benchmark as report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m pwkd_jax.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--synthetic", action="store_true", help="random images in place of the data set")
    parser.add_argument("--only", default="", help="programs whose name has this word: teacher, sliced, student, ...")
    parser.add_argument("--rounds", type=int, default=5, help="every program once a round")
    parser.add_argument("--seconds", type=float, default=2.0, help="a program runs in a round, about")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of a device, in place of what is known or measured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", help="the config file and its argument; --config.KEY=VALUE overrides")
    logging.set_verbosity(logging.ERROR)
    if {"-h", "--help"} & {*argv}:
        parser.print_help()
        return 0
    try:
        host_memory.keep()
        settings, rest = config.load(argv)
        options, unknown = parser.parse_known_args(rest)
        if unknown:
            raise UserError(f"'{unknown[0]}' is not an option; see --help")
        if options.rounds < 1 or options.seconds <= 0 or options.peak < 0:
            raise UserError("--rounds, --seconds and --peak: take 1 or more rounds, more than 0 seconds and no negative peak")
        result = benchmark(
            settings, synthetic=options.synthetic, only=options.only, rounds=options.rounds, seconds=options.seconds,
            peak=options.peak * 1e12, tell=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    result["command"] = "python -m pwkd_jax.benchmark " + shlex.join(argv)
    print(json.dumps(result, indent=2) if options.json else report.text(result))
    return 0






# What is timed.














if __name__ == "__main__":
    sys.exit(run_command(main))
