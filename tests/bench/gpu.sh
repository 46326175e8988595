#!/usr/bin/env bash
# What can be measured on a GPU alone: bash tests/bench/gpu.sh [CHECKOUT of commit 99093c7] [FOLDER]
#
# Meant to take ten minutes there; so far it was run on a CPU alone.
# The steps beside PyTorch's (and the checkout's), how full the card is at a batch of 256 and 1024, and a study beside its runs;
# with each, what is aimed at. Needs the GPU builds of jax and torch. JSON of each goes to FOLDER, tests/bench/results by default.
# PYTHON names the interpreter, STUDY gives the options of study.py, and ROUNDS, STEPS and BATCHES are what they say; for a trial
# without a card, ROUNDS=1 STEPS=1 BATCHES=8 STUDY="--teacher=resnet8 --student=resnet8 --seeds=1 --count".
set -euo pipefail
here=$(realpath "$(dirname "$0")/../..")
against=${1:+$(realpath "$1")} out=$(realpath -m "${2:-$here/tests/bench/results}") python=$(command -v "${PYTHON:-python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
rounds=${ROUNDS:-5} steps=${STEPS:-100} batches=${BATCHES:-256 1024}
study=${STUDY:---teacher=resnet32x4 --student=resnet8x4 --batch=64}
cd "$here"
mkdir -p "$out"
device=$("$python" -c 'import jax; print(jax.devices()[0].platform)')
echo "on $device; results go to $out"

failed=0
say() {
    printf '== python'
    printf ' %q' "$@"
    printf '\n'
}
# measured FILE: it was written, or else something failed.
measured() {
    test -s "$1" || { failed=1 && echo "nothing was measured" >&2; }
}

echo "aim: 8 times PyTorch eager (eager, slimmable), twice the checkout in bfloat16 (autocast)"
file=$out/peers_$device.json
rm -f "$file"
set -- tests/bench/peers.py --only=eager,autocast,slimmable --rounds="$rounds" --steps="$steps" \
    ${against:+--against="$against"} --json="$file"
say "$@"
"$python" "$@" || failed=1
measured "$file"

echo "aim: 40 % of the card's arithmetic (use), at 256 images and more"
for batch in $batches; do
    file=$out/use_${device}_$batch.json
    set -- -m pwkd_jax.benchmark --config=configs/cifar100.py --synthetic --only="student step" --rounds="$rounds" --seconds=2 \
        --json --config.arms=alone,kd_standard --config.dtype=bfloat16 --config.teacher.batch_size="$batch" \
        --config.student.batch_size="$batch"
    say "$@"
    "$python" "$@" | tee "$file" || failed=1
    measured "$file"
done

echo "aim: 0.35 of the time of 21 runs"
file=$out/study_$device.json
rm -f "$file"
# shellcheck disable=SC2086  # several words
set -- tests/bench/study.py $study --rounds="$rounds" --json="$file"
say "$@"
"$python" "$@" || failed=1
measured "$file"
exit $failed
