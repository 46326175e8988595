"""Reports on experiments from their summaries: one again, several side by side, or a sweep.

    python -m pwkd_jax.report runs/digits
    python -m pwkd_jax.report runs/a runs/b --out comparison.html
    python -m pwkd_jax.report runs/sweep

One work directory: prints its result table and writes its page again (report.html in it, or --out). Several: prints a
comparison and writes its page (comparison.html here, or --out). The root of a sweep: prints its table, names the points that
are not finished, and writes results.csv, results.json and report.html into it. Of several processes that are told who they are,
as `train` is, the first reports. Exits with code 2 and one sentence on a mistake.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pwkd_jax import storage
from pwkd_jax.errors import UserError, run_command
from pwkd_jax.reporting import page, sweep
from pwkd_jax.reporting import summary as summaries
from pwkd_jax.reporting.comparison import compare, differing, name
from pwkd_jax.training import cluster


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pwkd_jax.report",
        description="Prints and writes the report of one experiment, or compares several.",
    )
    parser.add_argument("workdir", nargs="+", help="work directory of a training that has ended, or its summary.json")
    parser.add_argument("--out", help="the page: report.html in the one work directory, or comparison.html")
    try:
        who, rest = cluster.given(sys.argv[1:] if arguments is None else arguments)
        options = parser.parse_args(rest)
        if who and cluster.by_hand(who)["process_id"]:
            return 0
        _run(options.workdir, storage.path(options.out, "--out") if options.out else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(paths: Sequence[str], out: Path | None) -> None:
    places = {path: storage.path(path) for path in paths}
    if len(paths) == 1 and sweep.is_root(places[paths[0]]):
        _sweep(places[paths[0]], out)
        return
    found: dict[str, dict] = {}
    for path in paths:
        if any(storage.same(places[path], places[other]) for other in found):
            raise UserError(f"{path} is given twice: give each work directory once")
        found[path] = summaries.read(path)
    if len(found) == 1:
        path, summary = next(iter(found.items()))
        folder = places[path] if storage.is_folder(places[path]) else places[path].parent
        out = out or folder / "report.html"
        text, html = summaries.table(summary), page.report(summary)
    else:
        named = name(found)
        out = out or Path("comparison.html")
        text, html = compare(named), page.comparison(named, differing(named))
    _write({out: html})
    _say(text, out)


def _sweep(root: Path, out: Path | None) -> None:
    name, named, axes, unfinished = sweep.collect(root)
    rows = sweep.rows(named, axes)
    out = out or root / "report.html"
    html = page.sweep(name, named, *sweep.cells(rows), sweep.missing(unfinished) if unfinished else "")
    numbers = {root / "results.json": sweep.as_json(name, rows, unfinished), root / "results.csv": sweep.as_csv(rows)}
    _write({**numbers, out: html})
    _say(sweep.text(name, rows, unfinished), out)


def _write(files: dict[Path, str]) -> None:
    for path, content in files.items():
        try:
            storage.replace(path, content)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): give --out another file") from None


def _say(text: str, out: Path) -> None:
    # A terminal that cannot show a letter of someone's name must not cost the table.
    sys.stdout.reconfigure(errors="replace")
    print(f"{text}\n\nReport: {out}")




if __name__ == "__main__":
    sys.exit(run_command(main))
