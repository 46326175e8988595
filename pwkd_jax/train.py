"""Train teachers and students: python -m pwkd_jax.train --config=configs/digits.py --workdir=runs/digits

Overrides: --config.student.schedule.peak=0.1 and the like (pwkd_jax/config.py lists every key). The same command again
continues a stopped run, and adds what arms or seeds it newly asks for. Exit code 2: a mistake in the command, in words.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from pwkd_jax import cache, config, experiment
from pwkd_jax.errors import UserError
from pwkd_jax.reporting import summary


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax warn of things that a user here cannot act on
    cache.enable()
    try:
        settings, rest = config.load(argv)
        workdirs = [a.partition("=")[2] for a in rest if a.startswith("--workdir=")]
        if unknown := [a for a in rest if not a.startswith("--workdir=")]:
            raise UserError(f"'{unknown[0]}' is not an option; there are --config, --config.KEY and --workdir")
        if len(workdirs) != 1 or not workdirs[0]:
            raise UserError("give one directory for the results, as in --workdir=runs/digits")
        result = experiment.run(settings, Path(workdirs[0]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    print(summary.table(result))
    print(f"report: {Path(workdirs[0]) / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
