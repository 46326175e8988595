#!/usr/bin/env bash
# test_pythons.sh: run launch/test.sh with every supported Python that is found besides the default one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
. launch/venv.sh
default=$(find_python) || exit 2
seen=$("$default" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
status=0 ran=0
for minor in 11 12 13; do
  version=3.$minor
  [ "$version" = "$seen" ] && continue
  # pyenv keeps its interpreters beside each other without putting them on the path.
  for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
    "$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null || continue
    echo "== Python $version: $python"
    ran=$((ran + 1))
    PYTHON=$python VENV=.venv-$version bash launch/test.sh "$@" || status=1
    break
  done
done
[ "$ran" -gt 0 ] || { echo "error: no other Python from 3.11 to 3.13 found" >&2; exit 2; }
exit $status
