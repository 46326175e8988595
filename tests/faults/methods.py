"""Every built-in method for twenty steps of `kd_whole` and of `pwkd` on real images: killed, given again, compared bit by bit.

    python -m tests.faults.methods --data-dir=DIR [--data=cifar10] [--only=kd,dkd] [--out tests/faults/methods.json]

One slimmable resnet8 of widths 0.5 and 1, trained for as many steps, teaches all. Of each method: a run that is left alone, and
one that is killed (SIGKILL) at a drawn step of `pwkd` and given again. What is told: whether every number that was written is
finite, whether the two workdirs hold the same bits, and whether a byte of the teacher changed. Methods that need a teacher of
the student's own channels are tried at its full width alone. Exits with 1 where one does not pass.
"""

import argparse
import hashlib
import json
import math
import random
import signal
import sys
import tempfile
from pathlib import Path

from pwkd_jax import distillers
from tests.faults import tiny
from tests.faults.kills import Broken

STEPS = 20
# Of the student's own channels alone: the teacher's full width.
SAME = ("fsp", "kdsvd")
# An initial phase, by default longer than such a run: a quarter of it.
PHASES = ("ab", "fsp", "ft")
# Its weight of 400 wants a lower rate than the digits'; at 0.1 its numbers grow until they are none.
STEEP = ("semckd",)


def settings(data: str, data_dir: str) -> tuple[str, ...]:
    return tuple(f"--config.{s}" for s in (
        f"data.name={data}", f"data.data_dir={data_dir}", "data.train_split=train[:640]", "data.test_split=test[:200]",
        "teacher.model=resnet8", "student.model=resnet8", "teacher.batch_size=32", "student.batch_size=32",
        f"teacher.duration={STEPS} steps", f"student.duration={STEPS} steps", "evaluation.every=10 steps", "log.every=1 step",
        "checkpoint.every=4 steps",
    ))  # fmt: skip


def bytes_of(folder: Path) -> str:
    """A digest of all files below a folder."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def finite(value) -> bool:
    """Whether every number of a JSON value is."""
    if isinstance(value, dict | list):
        return all(finite(v) for v in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def of_method(name: str, options: tuple[str, ...], teacher: Path, folder: Path, rng: random.Random) -> dict:
    more = ("--config.student.width=1.0", "--config.student.widths=(1.0,1.0)") if name in SAME else ()
    more += ("--config.student.distiller.initial_epochs=0.25",) if name in PHASES else ()
    more += ("--config.student.schedule.peak=0.01",) if name in STEEP else ()
    own = (*options, *more, "--config.arms=kd_whole,pwkd", f"--config.teacher.run={teacher}",
           f"--config.student.distiller.name={name}")  # fmt: skip
    before, unbroken, killed = bytes_of(teacher / "teacher"), folder / name, folder / f"{name}_killed"
    whole = tiny.run(*own, workdir=unbroken)
    if whole.returncode:
        return {"method": name, "passes": False, "said": whole.stderr[-600:]}
    at = rng.randint(2, STEPS - 2)
    command = Broken(own, killed, None)
    phase = "pwkd 1" if at <= STEPS // 2 else "pwkd 2"
    command.wait_for(phase, at if phase == "pwkd 1" else at - STEPS // 2)
    command.send(signal.SIGKILL)
    command.end()
    again = tiny.run(*own, workdir=killed)
    rows = [json.loads(line) for path in killed.glob("students/*/*/metrics.jsonl") for line in path.read_text().splitlines()]
    found = {
        "method": name, "killed at": at, "code": command.code, "finite": len(rows) >= 2 * STEPS and finite(rows),
        "identical": again.returncode == 0 and not tiny.differences(unbroken, killed),
        "teacher untouched": bytes_of(teacher / "teacher") == before,
    }  # fmt: skip
    passes = command.code == -signal.SIGKILL and all(found[k] for k in ("finite", "identical", "teacher untouched"))
    return found | {"passes": passes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", default=",".join(sorted(distillers.BUILTIN)))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    options, rng, rows = settings(given.data, str(Path(given.data_dir).resolve())), random.Random(0), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = tiny.run(*options, "--config.arms=kd_whole", workdir=folder / "teacher")
        if done.returncode:
            raise SystemExit(done.stderr)
        for method in given.only.split(","):
            rows.append(of_method(method, options, folder / "teacher", folder, rng))
            print(json.dumps(rows[-1]), flush=True)
            if given.out:
                given.out.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")
    passed = sum(row["passes"] for row in rows)
    print(f"{passed} of {len(rows)} methods pass")
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
