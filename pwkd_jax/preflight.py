"""Whether a config compiles and fits a pod, and what it costs, on a machine without that pod.

    python -m pwkd_jax.preflight --config=configs/cifar100.py --topology=v5e:2x2
    python -m pwkd_jax.preflight --config=configs/imagenet.py:resnet50-mobilenetv1 --topology=v5e:16x16 --price=1.20
    python -m pwkd_jax.preflight --config=configs/cifar100.py --topology=h100 --json
    python -m pwkd_jax.preflight --config=configs/imagenet.py --topology=v5e:4x4 --images-per-core-second=500

Compiles the very programs that training runs (the teacher's step, every student stage, the evaluations) with the TPU's own
compiler, which `pip install "jax[tpu]"` brings and which needs no TPU, and no data set either. --full gives the compiler all
the effort that training does. What was compiled once is remembered. For a GPU, whose compiler needs the card, it says what can
be known without. Of streamed images it says how many cores of a host decode them as fast as its chips consume them, at the
images a second that one core makes (tests/bench/input.py measures yours). Exits with code 2 and one sentence on a mistake, and
with code 1 where a program does not fit.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from absl import logging

from pwkd_jax import config
from pwkd_jax.cost import input_rate
from pwkd_jax.cost.preflight import preflight
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.reporting import preflight as report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m pwkd_jax.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--topology", help="v5e:4x4, v5p:4x4x4 and the like; h100, h100:8 or cuda")
    parser.add_argument("--price", type=float, default=0.0, help="of one chip for one hour, in your currency")
    parser.add_argument("--suggest", action="store_true", help="find the largest batches that fit")
    parser.add_argument("--images", type=int, default=0, help="in training, of a set that is not well known")
    parser.add_argument("--image-size", type=int, default=0, help="height and width, likewise")
    parser.add_argument(
        "--images-per-core-second", "--images_per_core_second", type=float, default=input_rate.IMAGES_PER_CORE_SECOND,
        help="that one core of a host decodes, of streamed images (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="programs whose name has this word: teacher, student, evaluation, ...")
    parser.add_argument("--full", action="store_true", help="the TPU compiler's full effort: minutes a program")
    parser.add_argument("--no-cache", action="store_true", help="compile also what was compiled before")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", help="the config file and its argument; --config.KEY=VALUE overrides")
    logging.set_verbosity(logging.ERROR)
    if {"-h", "--help"} & {*argv}:
        parser.print_help()
        return 0
    try:
        settings, rest = config.load(argv)
        options, unknown = parser.parse_known_args(rest)
        if unknown:
            raise UserError(f"'{unknown[0]}' is not an option; see --help")
        if not options.topology:
            raise UserError("--topology: say for which machine, as in --topology=v5e:4x4")
        if min(options.images, options.image_size, options.price) < 0:
            raise UserError("--images, --image-size and --price: cannot be negative")
        if not options.images_per_core_second > 0:
            raise UserError("--images-per-core-second: should be above 0, as tests/bench/input.py measures it")
        result = preflight(
            settings, options.topology, price=options.price, suggest=options.suggest, images=options.images,
            image_size=options.image_size, only=options.only, full=options.full, cache=not options.no_cache,
            core_rate=options.images_per_core_second,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was compiled is remembered", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2) if options.json else report.text(result))
    return 1 if result["fits"] is False else 0














if __name__ == "__main__":
    sys.exit(run_command(main))
