"""Every built-in distiller beside its authors' code: `python tests/audit/audit.py --clones=DIR [--only=dkd,rld]`.

Needs torch beside jax. `--repositories` prints what to clone into DIR, each as OWNER+NAME.
Prints a table and writes results.json.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Compiling costs more than running here.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import compare  # noqa: E402
import defaults  # noqa: E402
import official  # noqa: E402

ABSENT = {"student_friendly": "no public code: ours is a reading of the abstract, and its own tests are all there is"}
ABOUT = (
    "The authors' numbers in double precision, by tests/audit/audit.py: each loss with the setting of ours that it equals, and "
    "of each gradient its length and its product with a fixed array. Arrays and weights are those of tests/audit/inputs.py."
)


def cases(only: list[str]) -> list[compare.Case]:
    import crld_cases
    import diffkd_cases
    import fcfd_cases
    import feature_cases
    import logit_cases
    import module_cases
    import recent_cases
    import relation_cases
    import scalekd_cases
    import sokd_cases

    modules = (logit_cases, relation_cases, feature_cases, module_cases, sokd_cases, recent_cases, diffkd_cases, fcfd_cases,
               scalekd_cases, crld_cases)  # fmt: skip
    found = [c for m in modules for c in m.CASES]
    return [c for c in found if not only or c.method in only]


def verdict(row: dict) -> str:
    if "error" in row:
        return f"FAILED: {row['error']}"
    word = "equal" if row["equal"] else "differs"
    if row["equal"] != row["expected"]:
        word = f"UNEXPECTED: {word}"
    return f"{word}{': ' if row['says'] else ''}{row['says']}"


def line(row: dict) -> str:
    def pair(key: str) -> str:
        if "float64" not in row or key not in row["float64"]:
            return ""
        return " / ".join(f"{row[p][key]:.0e}" for p in ("float32", "float64"))

    part = f" ({row['part']})" if row.get("part") else ""
    weights = pair("weights")
    gradient = pair("gradient") + (f"; weights {weights}" if weights else "")
    return f"| `{row['method']}`{part} | {row['source']} | {pair('value')} | {gradient} | {verdict(row)} |"


def defaults_line(rows: list[dict]) -> str:
    text = "{method}.{field} is {ours:g}, theirs {official} ({source})"
    wrong = [text.format(**row) for row in rows if not same(row)]
    return f"{len(rows)} defaults read in the authors' scripts and configs: " + ("; ".join(wrong) or "all as ours")


def same(row: dict) -> bool:
    return row["ours"] == row["official"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=Path, help="folder of clones OWNER+NAME")
    parser.add_argument("--only", default="", help="methods, by commas")
    parser.add_argument("--repositories", action="store_true", help="print what to clone")
    parser.add_argument("--golden", type=Path, help="write the authors' numbers that the tests keep to this file")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="numbers, where every method is run")
    flags = parser.parse_args(argv)
    if flags.repositories or not flags.clones:
        for name, commit in official.REPOSITORIES.items():
            print(f"https://github.com/{name} {commit}")
        return 0 if flags.repositories else 2
    for name in official.use(flags.clones):
        print(f"missing: {official.folder(name)}", file=sys.stderr)
    warnings.simplefilter("ignore")
    official.without_cuda()
    only, rows, golden = [name for name in flags.only.split(",") if name], [], {}
    print("| method | official code | value | gradient | verdict |\n|---|---|---|---|---|")
    for case in cases(only):
        try:
            row, numbers = compare.run(case)
        except Exception as e:
            if only:
                raise
            row = {"method": case.method, "part": case.part, "source": " ".join(case.source)}
            row["error"] = f"{type(e).__name__}: {e}"
        rows.append(row)
        if case.golden and "error" not in row:
            golden[f"{case.method}, {case.part}"] = numbers
        print(line(row), flush=True)
    for name, why in ABSENT.items():
        print(f"| `{name}` | none | | | {why} |")
    found = defaults.check(only)
    print("\n" + defaults_line(found))
    if not only:
        flags.out.write_text(json.dumps({"losses": rows, "absent": ABSENT, "defaults": found}, indent=1) + "\n")
        if flags.golden:
            flags.golden.write_text(json.dumps({"about": ABOUT, **golden}, indent=1) + "\n")
    return int(any("error" in r or r["equal"] != r["expected"] for r in rows) or not all(map(same, found)))


if __name__ == "__main__":
    sys.exit(main())
