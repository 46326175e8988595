"""Seconds from a fresh process to its first step, without and with what an earlier one compiled, of this code and another's.

    python tests/bench/start.py --against=OTHER/CHECKOUT --out=tests/bench/results/start_cpu.json

The process is `python -m pwkd_jax.train --config=configs/digits.py`; its first step is the teacher's, at four widths. In every
round each code starts once with an empty folder of compiled programs, and once with what that left. Rounds are added to those
in a file that exists.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHILD = """
import os, runpy, sys, time
from importlib.machinery import PathFinder
sys.path.insert(0, os.getcwd())

class Watched(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "pwkd_jax.training.loop":
            return None
        spec = super().find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(loop):
            run(loop)
            fit = loop.fit

            def until_first(state, step, pipeline, *rest, **options):
                import jax

                def first(at, *made):
                    jax.block_until_ready(made)
                    print(time.time())
                    sys.stdout.flush()
                    os._exit(0)

                return fit(state, step, pipeline, rest[0], (first,), *rest[2:], **options)

            loop.fit = until_first

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Watched)
sys.argv[0] = "train"
runpy.run_module("pwkd_jax.train", run_name="__main__", alter_sys=True)
"""


def start(code: Path, compiled: Path) -> float:
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-c", CHILD, "--config=configs/digits.py", f"--workdir={workdir}/run"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
        begun = time.time()
        done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{code}: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1]) - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {how: {"ours": [], "theirs": []} for how in ("cold", "warm")}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text())["seconds"]
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for how in found:
                for whose, code in (("ours", ROOT), ("theirs", options.against)):
                    found[how][whose].append(start(code, Path(folder) / whose))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    sys.path.insert(0, str(ROOT))
    from pwkd_jax.cost.timing import processor
    from pwkd_jax.reporting.environment import environment

    result = {"environment": environment() | {"processor": processor()}, "seconds": found, "ratio": {}}
    for how, each in found.items():
        ratios = sorted(a / b for a, b in zip(each["ours"], each["theirs"], strict=True))
        result["ratio"][how] = [statistics.median(ratios), ratios[0], ratios[-1]]
    print(json.dumps(result["ratio"]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
