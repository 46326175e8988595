#!/usr/bin/env bash
# tpu_pod.sh [--dry-run] up|run|all|status|logs|down [-- ARGUMENTS]: train on a Cloud TPU slice by a queued resource.
#
#   up       ask for the slice, wait until it is ACTIVE, copy the code to all workers and install
#   run      up, then python -m $MODULE ARGUMENTS on all workers, in the background there; follows it to its end, starts it again
#            where it ended with 75 ("resume me"), and asks for a new slice where this one was preempted. Stopped here, it goes
#            on there: the same command follows it again
#   all      run, then down, however it ended
#   status   the state of the slice and what each worker does
#   logs     the last lines of a worker's output (WORKER, default 0; LINES, default 50)
#   down     stop and delete everything that was asked for
#
# A slice costs money from ACTIVE until `down` says it is deleted, idle or not. --dry-run prints the commands and runs none.
# Example:  NAME=mine ZONE=us-east5-b TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e SPOT=1 BUCKET=gs://ours bash launch/tpu_pod.sh all -- \
#             --config=configs/imagenet.py:resnet34-resnet18 \
#             --config.data.data_dir=gs://ours/tfds --config.data.copy=/dev/shm/data
#
# NAME, ZONE, TYPE, RUNTIME   of the slice: its name, zone, accelerator type and TPU software version
# PROJECT                     default: gcloud's own
# SPOT                        1: a Spot slice, which may be preempted at any time
# BUCKET                      gs://BUCKET or a folder in one: the code goes by way of it, to all workers at once, and the
#                             workdir is BUCKET/runs/NAME where ARGUMENTS give none
# SETUP                       a command for every worker before training, such as mounting a file system
# MODULE                      default pwkd_jax.train; pwkd_jax.sweep runs a sweep
# POLL, MAX_RESTARTS          seconds between two looks, default 30; restarts before it gives up, default 100
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"
DRY='' what=''
while [ $# -gt 0 ]; do
  case $1 in
    -h|--help) help; exit 0 ;;
    --dry-run) DRY=1 ;;
    --) shift; break ;;
    up|run|all|status|logs|down) [ -z "$what" ] || die "give one of up, run, all, status, logs and down"; what=$1 ;;
    *) die "'$1' is not known; give up, run, all, status, logs or down, and the arguments of training after --" ;;
  esac
  shift
done
[ -n "$what" ] || die "say what: up, run, all, status, logs or down"
need NAME ZONE
case $what in up|run|all) need TYPE RUNTIME ;; esac
case $what in run|all) [ $# -gt 0 ] || die "give the arguments of training after --, as in run -- --config=... --workdir=..." ;; esac
BUCKET=${BUCKET:-} BUCKET=${BUCKET%/}
case $BUCKET in ''|gs://[a-z0-9]*) ;; *) die "BUCKET: '$BUCKET' should be gs://BUCKET or a folder in one" ;; esac
SPOT=${SPOT:-} SETUP=${SETUP:-} MODULE=${MODULE:-pwkd_jax.train} POLL=${POLL:-30} MAX_RESTARTS=${MAX_RESTARTS:-100}
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
again=0 asked='' simulated=NONE
exec 3>&1
temporary=$(mktemp -d)

farewell() {
  local code=$?
  rm -rf "$temporary"
  [ -z "$asked" ] || say "$NAME in $ZONE may still exist and cost money; to delete it: NAME=$NAME ZONE=$ZONE bash launch/tpu_pod.sh down"
  exit "$code"
}
trap farewell EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# NONE, ACTIVE, LOST (it will not come back), UNKNOWN (gcloud fails), or what else Google calls its state.
state() {
  local queued node
  local describe=(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" '--format=value(state.state)')
  if [ -n "$DRY" ]; then quoted "${describe[@]}" >&3; echo "$simulated"; return; fi
  if ! queued=$("${describe[@]}" 2>"$temporary/error"); then
    if grep -Eqi 'NOT_FOUND|was not found' "$temporary/error"; then echo NONE; else cat "$temporary/error" >&2; echo UNKNOWN; fi
    return
  fi
  case $queued in
    FAILED|SUSPENDED|SUSPENDING) echo LOST ;;
    ACTIVE)
      # A preempted node may be seen before its request is SUSPENDED.
      node=$(gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" '--format=value(state)' 2>/dev/null) || node=UNKNOWN
      case $node in READY) echo ACTIVE ;; PREEMPTED|TERMINATED|STOPPED|DELETING) echo LOST ;; *) echo "ACTIVE, node $node" ;; esac ;;
    *) echo "$queued" ;;
  esac
}
on_all() { do_it gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }
nap() { [ -n "$DRY" ] || sleep "$POLL"; }
count_restart() {
  again=$((again + 1))
  [ "$again" -le "$MAX_RESTARTS" ] || { say "gave up after $MAX_RESTARTS restarts"; exit 1; }
}
create() {
  say "asking for $NAME: $TYPE in $ZONE${SPOT:+, Spot}; it costs money from ACTIVE on"
  asked=1
  do_it gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
  simulated=ACTIVE
}
down() {
  local s
  s=$(state)
  if [ "$s" = NONE ] && [ -z "$DRY" ]; then say "$NAME does not exist: nothing costs money"; asked=''; return; fi
  asked=1
  do_it gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
  while [ -z "$DRY" ] && s=$(state) && [ "$s" != NONE ]; do say "deleting: $s"; nap; done
  asked='' simulated=NONE
  say "$NAME is deleted: it costs nothing any more"
}
# The exit codes of the workers, a line each: a number, running, or none where training was not started.
codes() {
  # shellcheck disable=SC2016  # the worker expands it
  on_all 'cd pwkd 2>/dev/null; if [ -f exit ]; then c=$(cat exit); elif [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; then c=running; else c=none; fi; echo "pwkd-exit $c"' 2>/dev/null |
    if [ -n "$DRY" ]; then cat >&3; else sed -n 's/.*pwkd-exit \([a-z0-9]*\).*/\1/p'; fi
}
install() {
  local fetch=
  say "copying the code and installing on all workers"
  do_it tar -czf "$temporary/pwkd.tar.gz" -C "$root" "${CODE[@]}"
  if [ -n "$BUCKET" ]; then
    do_it gcloud storage cp "$temporary/pwkd.tar.gz" "$BUCKET/code/$NAME.tar.gz"
    fetch="gcloud storage cp $(quoted "$BUCKET/code/$NAME.tar.gz") pwkd.tar.gz; "
  else
    do_it gcloud compute tpus tpu-vm scp "$temporary/pwkd.tar.gz" "$NAME:" "${where[@]}" --worker=all
  fi
  on_all "set -e; ${fetch:-}mkdir -p pwkd; tar -xzf pwkd.tar.gz -C pwkd; cd pwkd; ${SETUP:+$SETUP; }bash launch/worker.sh tpu"
}
up() {
  local s failures=0
  while :; do
    s=$(state)
    case $s in
      NONE) create ;;
      ACTIVE) asked=1; break ;;
      LOST) say "$NAME is lost (preempted or failed): asking for a new one"; count_restart; down; continue ;;
      UNKNOWN) failures=$((failures + 1)); [ "$failures" -lt 5 ] || { say "gcloud fails, see above"; exit 1; } ;;
      *) asked=1; say "waiting: $s" ;;
    esac
    nap
  done
  # Code is not exchanged under a training that runs.
  grep -q running <<<"$(codes)" || install
}
start() {
  local command
  case "$MODULE $*" in
    *--workdir*) ;;
    "pwkd_jax.train "*) [ -z "$BUCKET" ] || set -- "$@" "--workdir=$BUCKET/runs/$NAME" ;;
  esac
  command=$(quoted .venv/bin/python -m "$MODULE" "$@")
  say "training on all workers"
  # shellcheck disable=SC2016  # the worker expands it
  on_all "cd pwkd; if [ ! -f exit ] && [ -f pid ] && kill -0 \"\$(cat pid)\" 2>/dev/null; then exit 0; fi; rm -f exit; nohup setsid bash -c $(
    quoted "$command; echo \$? >exit.new; mv exit.new exit"
  ) >>log 2>&1 </dev/null & echo \$! >pid"
}
run() {
  local found s unreachable=0
  up
  while :; do
    found=$(codes || true)
    if [ -n "$found" ]; then unreachable=0; else unreachable=$((unreachable + 1)); fi
    if [ -n "$DRY" ]; then start "$@"; codes; return 0; fi
    if grep -q running <<<"$found"; then
      :
    elif grep -qx none <<<"$found"; then
      start "$@"
    elif [ -n "$found" ] && ! grep -qvx 0 <<<"$found"; then
      say "training is done"; return 0
    elif grep -qx 2 <<<"$found"; then
      logs; return 2
    else
      # Unreachable, stopped, or failed: first whether there is still a slice.
      s=$(state)
      if [ "$s" = LOST ] || [ "$s" = NONE ]; then up; start "$@"
      elif grep -qx 75 <<<"$found"; then say "training asks to be resumed"; count_restart; start "$@"
      elif [ "$s" = ACTIVE ] && [ -n "$found" ]; then
        nap; s=$(state)
        [ "$s" = ACTIVE ] || continue
        logs; say "training failed with $(sort -rn <<<"$found" | head -1)"; return 1
      else
        [ "$unreachable" -lt 20 ] || { say "the workers cannot be reached; training may go on there"; return 1; }
        say "waiting: $s"
      fi
    fi
    nap
  done
}
status() {
  echo "$NAME: $(state)"
  codes | sort | uniq -c | sed 's/^ *\([0-9]*\) /\1 workers: /'
}
logs() {
  do_it gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="${WORKER:-0}" --command="tail -n ${LINES:-50} pwkd/log"
}
case $what in
  run) run "$@" ;;
  all) code=0; run "$@" || code=$?; down; exit "$code" ;;
  *) "$what" ;;
esac
