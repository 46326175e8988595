#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, v1: every asynchronous save whose result is not asked for keeps one thread and three open files, even
# after Checkpointer.close(), until the process ends.
#
# Training.Checkpointer.save_checkpointables_async (and save_pytree_async) return a response. Nothing in a training loop needs it,
# for the next save waits for the last one and close() waits for all. But the thread of the response's event loop, with its
# selector and its pair of sockets, ends only in response.result(). Saves that block, and those asked for their result, keep nothing.
# Who meets it: anyone who saves in the background from a loop. Where a process may open 1,024 files, some 330 saves end the run
# with "Too many open files", in whatever opens the next one: an event file, a record of the data, a checkpoint.
# Guessed before it ran: flat, since close() waits for every save.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 \
    orbax-checkpoint==0.12.8 tensorstore==0.1.86
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

folder, tree = Path(sys.argv[1]), {"state": {"w": jnp.ones(8)}}
print("orbax-checkpoint", version("orbax-checkpoint"))


def held():
    loops = sum("_run_loop" in thread.name for thread in threading.enumerate())
    return loops, len(os.listdir("/proc/self/fd"))


def saves(name, count, finish):
    checkpointer = ocp.training.Checkpointer(folder / name, preservation_policy=ocp.training.preservation_policies.LatestN(2))
    before = held()
    for step in range(count):
        finish(checkpointer.save_checkpointables_async(step, tree, force=True))
    checkpointer.close()
    after = held()
    found = tuple(b - a for a, b in zip(before, after))
    print(f"{name}: {count} saves and close() left {found[0]} threads of event loops and {found[1]} open files")
    return found


saves("first", 1, lambda response: response.result())  # what is opened once for all
asked = saves("asked for their result", 20, lambda response: response.result())
left = saves("not asked", 20, lambda response: None)
assert asked[0] == 0 and asked[1] <= 2, asked
assert left[0] == 20 and 55 <= left[1] <= 65, left
PYTHON
