#!/usr/bin/env bash
# worker.sh EXTRA: on a machine of a cluster, make .venv beside the code, of requirements.txt, jax[EXTRA] (tpu, cuda13) and gcsfs
# (workdirs on gs://); a second time it is instant. Without a Python 3.11 to 3.13 (Cloud TPU images have 3.10), uv brings one.
set -euo pipefail
case "${1:-}" in -h|--help|"") sed -n '2,3s/^# //p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh
if ! python=$(find_python 2>/dev/null); then
  python3 -m pip install --quiet --user uv
  uv=$(python3 -m site --user-base)/bin/uv
  "$uv" python install 3.12
  python=$("$uv" python find 3.12)
fi
make_venv .venv "$python" "jax[$1]" 'gcsfs>=2026.10'
