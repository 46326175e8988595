#!/usr/bin/env bash
# jaxlib 0.10.2, CPU: where several processes first meet in a collective, Gloo writes "[Gloo] Rank I is connected to N peer ranks ..."
# on standard output, from C++, whatever the program prints there.
#
# No option of jax.distributed keeps it from that, neither a log level nor sys.stdout, which is Python's alone. Programs whose output
# is read by others (JSON of an evaluation, a path, a number) give a first line that is none. On CUDA and TPU there is no Gloo, so it
# is met where things are tried: two processes of one machine, continuous integration, clusters without accelerators.
# Guessed before it ran: on standard error, like the other words of XLA and absl.
# What helps: give Python a copy of file descriptor 1, and let 2 take its place, before the first collective.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/both.py" <<'PYTHON'
import json
import os
import sys

import jax

address, process, kept = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kept"
jax.distributed.initialize(address, 2, process)
if kept:
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
from jax.experimental import multihost_utils

found = multihost_utils.process_allgather(jax.numpy.float32(process)).tolist()
print(json.dumps(found), flush=True)
PYTHON
cat >"$folder/run.py" <<'PYTHON'
import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

folder = Path(sys.argv[1])


def said(how):
    """The standard output of both processes."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    line = [sys.executable, str(folder / "both.py"), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*line, str(i), how], **pipes) for i in (0, 1)]
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    return outputs


print("jaxlib", version("jaxlib"))
for output in said("as it is"):
    lines = output.splitlines()
    print(lines)
    assert lines[0].startswith("[Gloo] Rank ") and json.loads(lines[-1]) == [0.0, 1.0]
for output in said("kept"):
    assert json.loads(output) == [0.0, 1.0], output
print("with a descriptor of its own, Python's output is what Python printed")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" "$folder"
