#!/usr/bin/env bash
# quickstart.sh [WORKDIR]: make .venv, install, train teacher, students and controls on the embedded digits, and say
# where the report is. Run again, it continues or just prints the result. PYTHON=... chooses the interpreter.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,3s/^# //p' "$0"; exit 0 ;; esac
workdir=$(realpath -m "${1:-runs/digits}")
cd "$(dirname "$0")/.."
. launch/venv.sh
python=$(find_python)
make_venv .venv "$python"
exec .venv/bin/python -m pwkd_jax.train --config=configs/digits.py --workdir="$workdir"
