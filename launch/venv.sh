# shellcheck shell=bash
# Sourced by the scripts beside it: makes or reuses $venv with $python and installs requirements.txt and "$@" into it.
# A second time it is instant: what was installed is remembered by the text of the requirements.
make_venv() {
  local venv=$1 python=$2; shift 2
  local stamp="$venv/installed" wanted
  wanted="$("$python" --version) $(cat requirements.txt) $*"
  [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0
  if [ ! -x "$venv/bin/python" ] || [ "$("$venv/bin/python" --version 2>&1)" != "$("$python" --version)" ]; then
    rm -rf "$venv"
    # Debian without python3-venv has no ensurepip; virtualenv, from pip, needs none.
    "$python" -m venv "$venv" >/dev/null 2>&1 || { rm -rf "$venv"; "$python" -m virtualenv --quiet "$venv" 2>/dev/null; } || {
      rm -rf "$venv"
      echo "error: $python cannot make a virtual environment; install python3-venv (apt-get install python3-venv)" >&2
      return 2
    }
  fi
  echo "installing into $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
  printf '%s' "$wanted" >"$stamp"
}
# The first Python that this project supports.
find_python() {
  local p
  for p in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    "$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { command -v "$p"; return 0; }
  done
  echo "error: no Python 3.11, 3.12 or 3.13 found; set PYTHON to one" >&2
  return 2
}
