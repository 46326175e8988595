"""Train teachers and students: python -m pwkd_jax.train --config=configs/digits.py --workdir=runs/digits

Overrides: --config.student.schedule.peak=0.1 and the like (pwkd_jax/config/schema.py has every key). The same command again
continues a stopped run, and adds what arms or seeds it newly asks for.

On several machines the same command runs on each, with one --workdir that all share. Cloud TPU, SLURM, Kubernetes and Open MPI
say by themselves who is who; elsewhere add --coordinator=HOST:PORT --processes=N --process=I (0 to N - 1, 0 being HOST).

Exit codes: 2, a mistake, in words; 75, stopped by SIGTERM or by the death of another process, and 130, by Ctrl-C: give the same
command again.
"""

import gc
import os
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":  # the imports below take seconds, in which there is nothing to save
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has put this in the background
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    gc.set_threshold(100_000, 20, 20)  # imports, and later tracing, make millions of objects that stay

from absl import logging
from ml_collections import ConfigDict

from pwkd_jax import config, storage
from pwkd_jax.cost import compilation_cache, host_memory
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.experiment import fingerprint, run
from pwkd_jax.reporting import summary
from pwkd_jax.training import ahead, distributed, preemption


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    logging.set_verbosity(logging.FATAL)  # TFDS and Orbax warn of what a user here cannot act on; what fails is raised too
    try:
        compilation_cache.enable()
        host_memory.keep()
        rest = distributed.start(argv)
        with preemption.watching():
            settings, workdir = distributed.together(lambda: _read(rest))
            distributed.agree(fingerprint.facts(settings, workdir))
            result = run.run(settings, storage.path(workdir))
        print(summary.table(result))
        print(f"report: {storage.path(workdir) / 'report.html'}")
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        # A bucket that answered before will again.
        return distributed.RESUMABLE if isinstance(e, storage.Unreachable) and e.began else 2
    except preemption.Preempted:
        print("stopped by SIGTERM; the same command continues from the step that was saved", file=sys.stderr)
        return distributed.RESUMABLE
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as e:
        distributed.leave(e)
        raise


def _read(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    """(config, workdir) of a command line."""
    settings, rest = config.load(argv)
    workdirs = [a.partition("=")[2] for a in rest if a.startswith("--workdir=")]
    if unknown := [a for a in rest if not a.startswith("--workdir=")]:
        raise UserError(
            f"'{unknown[0]}' is not an option; there are --config, --config.KEY, --workdir and, for several processes, "
            "--coordinator, --processes and --process"
        )
    if len(workdirs) != 1 or not workdirs[0]:
        raise UserError("give one directory for the results, as in --workdir=runs/digits")
    return settings, str(storage.path(workdirs[0], "--workdir"))


def _command() -> int:
    """The command of a process of its own, in which a signal is answered until Python has ended."""
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    if signal.SIGINT in heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main(sys.argv[1:])
    sys.stdout.flush()
    if code == 130 and ahead.compiling():  # nothing is being saved, and it may take minutes
        os._exit(code)
    if code == 2 and not distributed.several():
        os._exit(code)  # threads of a save that failed would have more to say
    for number in heard:  # all is done and said
        signal.signal(number, lambda *_: os._exit(code))
    return code


if __name__ == "__main__":
    sys.exit(run_command(_command))
