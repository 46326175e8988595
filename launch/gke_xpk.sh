#!/usr/bin/env bash
# gke_xpk.sh [--dry-run] run|sweep|list|logs|delete [-- ARGUMENTS]: train on GKE TPU slices through xpk, as a JobSet.
#
#   run      submit python -m pwkd_jax.train ARGUMENTS as workload NAME; GKE restarts it by itself where it ends with 75
#   sweep    ARGUMENTS are SWEEP.toml --root=ROOT: one workload a point, NAME-I; teachers first, the others when these are done
#   list     the workloads of the cluster
#   logs     the output of workload NAME
#   delete   delete workload NAME (of a sweep: NAME-I, one by one). The cluster stays, and costs money while it has nodes
#
# --dry-run prints the commands and runs none. Needs xpk (pip install xpk), gcloud, kubectl, docker or crane, and a cluster.
# Example:  CLUSTER=mine NAME=run1 TYPE=v6e-16 ZONE=us-east5-b bash launch/gke_xpk.sh run -- \
#             --config=configs/imagenet.py:resnet34-resnet18 --workdir=gs://BUCKET/runs/a \
#             --config.data.data_dir=gs://BUCKET/tfds --config.data.copy=/tmp/data
#
# CLUSTER, NAME, TYPE         the cluster, the workload (small letters, digits, -), and the TPU type
# ZONE, PROJECT               default: gcloud's own
# SLICES                      slices of the workload, default 1
# IMAGE                       a container with the requirements in its python; default: python:3.12-slim, which installs at start
# MAX_RESTARTS                default 100
# XPK_ARGS                    further options of xpk workload create, such as --priority=high; the nodes' service account
#                             reads and writes the bucket; a file system is attached once with xpk storage
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
    run|sweep|list|logs|delete) [ -z "$what" ] || die "give one of run, sweep, list, logs and delete"; what=$1 ;;
    *) die "'$1' is not known; give run, sweep, list, logs or delete, and the arguments of training after --" ;;
  esac
  shift
done
[ -n "$what" ] || die "say what: run, sweep, list, logs or delete"
need CLUSTER
[ "$what" = list ] || need NAME
case $what in run|sweep) need TYPE; [ $# -gt 0 ] || die "give the arguments of training after --" ;; esac
where=(--cluster="$CLUSTER" ${ZONE:+--zone="$ZONE"} ${PROJECT:+--project="$PROJECT"})
read -ra extra <<<"${XPK_ARGS:-}"
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

submit() {
  local workload=$1 python=python command; shift
  local image=(--docker-image="${IMAGE:-}") prepare='cd /app && '
  if [ -z "${IMAGE:-}" ]; then
    [ -e "$stage/launch" ] || do_it cp -R "${CODE[@]/#/$root/}" "$stage"
    image=(--base-docker-image=python:3.12-slim --script-dir="$stage")
    prepare='bash launch/worker.sh tpu && ' python=.venv/bin/python
  fi
  # exec: xpk sends SIGTERM to the shell that it starts, and training must be that process to save and end with 75.
  command="${prepare}exec $(quoted "$python" -m "$@")"
  do_it xpk workload create "${where[@]}" --workload="$workload" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" "${image[@]}" \
    --restart-on-exit-codes=75 --max-restarts="${MAX_RESTARTS:-100}" --termination-grace-period-seconds=120 \
    ${extra[@]+"${extra[@]}"} --command="$command"
}
points() { "${PYTHON:-python3}" -m pwkd_jax.sweep "$@"; }
sweep() {
  local teachers all i
  cd "$root"
  teachers=$(points "$@" --count=teachers)
  all=$(points "$@" --count)
  for ((i = 0; i < teachers; i++)); do submit "$NAME-$i" pwkd_jax.sweep "$@" --run="$i"; done
  for ((i = 0; i < teachers; i++)); do do_it xpk workload list "${where[@]}" --wait-for-job-completion="$NAME-$i"; done
  for ((i = teachers; i < all; i++)); do submit "$NAME-$i" pwkd_jax.sweep "$@" --run="$i"; done
}
case $what in
  run) submit "$NAME" pwkd_jax.train "$@"; say "to stop it: CLUSTER=$CLUSTER NAME=$NAME bash launch/gke_xpk.sh delete" ;;
  sweep) sweep "$@" ;;
  list) do_it xpk workload list "${where[@]}" ;;
  logs) do_it kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --all-containers --prefix --tail="${LINES:-50}" ;;
  delete) do_it xpk workload delete "${where[@]}" --workload="$NAME" --force ;;
esac
