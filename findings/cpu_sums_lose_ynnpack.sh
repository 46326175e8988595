#!/usr/bin/env bash
# jaxlib 0.10.2 on CPU: without YNNPACK a sum over all but the last axis takes ten times as long and more.
#
# xla_cpu_experimental_ynn_fusion_type says what XLA hands to YNNPACK. It is emptied to have Eigen compute convolutions again, on
# all cores. But sums are handed over too, and XLA's own kernel takes one channel after another, each time through all of the
# memory. Guess before running: some percent, for adding is bound by memory. REDUCE by itself keeps them there.
# Who meets it: whoever turns that library off for a network with batch norm, whose statistics and gradients are such sums.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

NAMED = {"as it comes": None, "without": "", "sums alone": "LIBRARY_FUSION_TYPE_REDUCE"}
x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32, 32, 64)), jnp.float32)
sums = {}
for name, kinds in NAMED.items():
    options = {} if kinds is None else {"xla_cpu_experimental_ynn_fusion_type": kinds}
    sums[name] = jax.jit(lambda x: (jnp.sum(x, (0, 1, 2)), jnp.sum(x * x, (0, 1, 2))), compiler_options=options)
least = dict.fromkeys(NAMED, float("inf"))
for turn in range(12):
    for name, run in sums.items():
        begun = time.process_time()  # of all threads, so that other load on the machine disturbs less
        for _ in range(5):
            jax.block_until_ready(run(x))
        if turn:
            least[name] = min(least[name], time.process_time() - begun)
exact = np.asarray(x, np.float64).sum((0, 1, 2))
for name, run in sums.items():
    np.testing.assert_allclose(run(x)[0], exact, rtol=0, atol=0.05)
    print(f"{name}: {least[name] / least['as it comes']:.0f} times the processor time as it comes")
if not least["without"] > 5 * least["as it comes"] > 2 * least["sums alone"]:
    sys.exit(f"sums take other times now: {least}")
PYTHON
# Seen, on two cores of an Intel Xeon with AVX-512:
# as it comes: 1 times the processor time as it comes
# without: 39 times the processor time as it comes
# sums alone: 1 times the processor time as it comes
