# shellcheck shell=bash
# Sourced by the scripts beside it: how they print, run and pack. DRY=1 makes `do_it` print its command and run nothing.
say() { echo "$(basename "$0" .sh): $*" >&2; }
die() { echo "error: $*" >&2; exit 2; }
# The comment at the head of the script, as its help.
help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
need() {
  local wanted
  for wanted in "$@"; do [ -n "${!wanted:-}" ] || die "$wanted is not set; bash $0 --help says what it is"; done
}
# A command so that a shell would read it back the same.
quoted() {
  local word out=
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_@%+=:,./-]*|"") word=\'${word//\'/\'\\\'\'}\' ;; esac
    out+="${out:+ }$word"
  done
  printf '%s\n' "$out"
}
do_it() { if [ -n "${DRY:-}" ]; then quoted "$@"; else "$@"; fi; }
# The code as it lies here, committed or not; no data, no results, no environment.
# shellcheck disable=SC2034  # of the scripts that source this
CODE=(pwkd_jax configs launch requirements.txt pyproject.toml README.md LICENSE)
