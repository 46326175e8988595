#!/usr/bin/env bash
# What can be measured on a GPU alone, in some ten minutes: bash tests/bench/gpu.sh [CHECKOUT of commit 99093c7] [FOLDER]
#
# The steps beside PyTorch's (and the checkout's), how full the card is at a batch of 256 and 1024, and a study beside its runs.
# Needs the GPU builds of jax and, for the first, torch. Results as JSON go to FOLDER, tests/bench/results by default.
# PYTHON names the interpreter, and ROUNDS, STEPS and BATCHES what it says; for a trial without a card,
# ROUNDS=1 STEPS=1 BATCHES=8 STUDY="--teacher=resnet8 --student=resnet8 --seeds=1 --count".
set -euo pipefail
cd "$(dirname "$0")/../.."
against=${1:-} out=${2:-tests/bench/results}
python=${PYTHON:-python} rounds=${ROUNDS:-5} steps=${STEPS:-100} batches=${BATCHES:-256 1024}
study=${STUDY:---teacher=resnet32x4 --student=resnet8x4 --batch=64}
device=$("$python" -c 'import jax; print(jax.devices()[0].platform)')
echo "on $device"

failed=0
try() {
    echo "== $*"
    "$python" "$@" || { failed=1; echo "that failed, with $?" >&2; }
}

# 8 times PyTorch eager, twice the checkout in bfloat16.
try tests/bench/peers.py --only=eager,autocast,slimmable --rounds="$rounds" --steps="$steps" \
    ${against:+--against="$against"} --json="$out/peers_$device.json"
# 40 % of the card's arithmetic.
for batch in $batches; do
    try -m pwkd_jax.benchmark --config=configs/cifar100.py --synthetic --only="student step" --rounds="$rounds" --seconds=2 \
        --config.arms=alone,kd_standard --config.dtype=bfloat16 --config.teacher.batch_size="$batch" --config.student.batch_size="$batch"
done
# 0.35 of the time of 21 runs.
# shellcheck disable=SC2086  # several words
try tests/bench/study.py $study --rounds="$rounds" --json="$out/study_$device.json"
exit $failed
