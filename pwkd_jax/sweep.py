"""A grid of experiments from one file: python -m pwkd_jax.sweep configs/sweeps/digits.toml [--root=runs/digits] [what]

    (nothing)        check every point's config, and say how many there are
    --list           the command of every point, teachers first, after its number
    --count          how many points there are; --count=teachers, how many of them train teachers
    --run=I, =all    run point I (a SLURM_ARRAY_TASK_ID) or all, one after the other; --run=teachers, =students: those
    --dry-run        with --run: print the commands instead

The file is TOML: `config`, the same text as --config=, in which {name} stands for the axis of that name; [grid], lists to
cross, named so or by config keys; [set], keys that are the same for all. An entry of a list may be a table of keys with its
own `name`: pair = [{name = "big-small", "teacher.model" = "resnet56", "student.model" = "resnet20"}, ...]

chain = ["resnet56", "resnet32", "resnet20"] in place of [grid] makes a chain of teacher's assistants: each learns from the one
before it, with dense = true from all before it, in the one arm of [set], by default kd_standard. Its points need their order.

A point is one workdir, ROOT/POINT. Points whose data and teacher keys agree share a teacher, trained by a point of its own,
ROOT/teachers/MODEL; these come first, and the others need them finished. The axes `arms` and `seed` may split the runs of one
experiment over points; python -m pwkd_jax.report ROOT puts them together again.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pwkd_jax import export, storage, train
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.experiment.sweep import Point, chosen, command, load, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code: 2 for a mistake; otherwise that of the first point that did not end well."""
    parser = argparse.ArgumentParser(prog="python -m pwkd_jax.sweep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("file", type=storage.path, help="the sweep, a TOML file")
    parser.add_argument("--root", help="the directory of all workdirs; default runs/FILE's name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true")
    what.add_argument("--count", nargs="?", const="all", choices=("all", "teachers", "students"))
    what.add_argument("--run", metavar="I")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    try:
        root = storage.path(options.root or Path("runs") / options.file.stem, "--root")
        points = load(options.file, root)
        if options.count:
            print(len(chosen(points, options.count)))
            return 0
        if not options.run and not options.list:
            teachers = len(chosen(points, "teachers"))
            print(f"{options.file}: {teachers} teachers and {len(points) - teachers} points in {root}; every config is right")
            return 0
        wanted = points if options.list else chosen(points, options.run)
        if options.list or options.dry_run:
            for point in wanted:
                before = [] if not point.assistant else [["pwkd_jax.export", point.assistant[0], "--out", point.assistant[1]]]
                lines = [["python", "-m", *words] for words in (*before, ["pwkd_jax.train", *command(point, root)])]
                print(points.index(point), " && ".join(map(shlex.join, lines)))
            return 0
        try:
            write(points, root, options.file.stem)
        except OSError as e:
            raise UserError(f"--root: '{root}' cannot be written ({e.strerror})") from e
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _run(wanted, root)


def _run(points: Sequence[Point], root: Path) -> int:
    """Run points one after the other. A point's own mistake does not stop the others, unless they learn from it; being told to
    stop does."""
    first, goes_on = 0, (0,) if any(point.assistant for point in points) else (0, 2)
    for point in points:
        print(f"== {point.name}", flush=True)
        code = export.main([point.assistant[0], "--out", point.assistant[1]]) if point.assistant else 0
        code = code or train.main(command(point, root))
        first = first or code
        if code not in goes_on:
            break
    return first


if __name__ == "__main__":
    sys.exit(run_command(main))
