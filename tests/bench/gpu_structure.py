"""What XLA makes of the training steps for an H100, without one: python tests/bench/gpu_structure.py [--only=NAME]
[--json=FILE] [--config=configs/cifar100.py, and its keys]

Of a training step, as it is within the loop of 100 that training makes a dispatch on a GPU, and what a dispatch launches
besides. Needs `pip install "jax[cuda12]"` (5 GB) and no card: XLA compiles for a described one. For each program, what a step
launches: kernels (fusions, and what was not fused), copies and transposes among them, calls of cuBLAS and cuDNN; other loops
and branches too, whose insides count once. Of command buffers (CUDA graphs) nothing is told: XLA makes them later. Nothing is
tuned on the card, so that the choice between kernels, and with it a few of these numbers, may be another there.
"""

import argparse
import collections
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies

from pwkd_jax import config
from pwkd_jax.cost import preflight
from pwkd_jax.data.shapes import outline
from pwkd_jax.experiment import programs
from pwkd_jax.models import compute
from pwkd_jax.reporting.environment import environment
from pwkd_jax.training import dispatch

# NVIDIA's published figures of the SXM5 card, as XLA wants them.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" cuda_compute_capability { major: 9 } core_count: 132
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128 clock_rate_ghz: 1.98
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Of these a GPU launches nothing.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
LINE = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = .*? (?P<op>[a-z][a-z\-]*)\((?P<rest>.*)$")
HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")


def card() -> jax.Device:
    try:
        return topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=H100).devices[0]
    except Exception as e:  # the plug-in's absence has no type of its own
        why = str(e).splitlines()[0]
        raise SystemExit(f'compiling for a GPU needs no GPU but its compiler; pip install "jax[cuda12]" ({why})') from e


def structure(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """What a compiled module launches: in one turn of its largest loop, and besides; where there is no loop, {} and all of it.

    What other loops and branches hold counts once."""
    bodies, name, entry = collections.defaultdict(list), "", ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head["name"]
            entry = name if head["entry"] else entry
        elif found := LINE.match(line):
            bodies[name].append(found)

    def launches(computation: str, left_out: str = "") -> collections.Counter:
        counts = collections.Counter()
        for found in bodies[computation]:
            op, rest = found["op"], found["rest"]
            if op in FREE:
                continue
            if op in ("call", "while", "conditional"):
                counts["loops"] += op == "while"
                counts["branches"] += op == "conditional"
                inner = re.findall(r"(?:to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", rest)
                for group in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                    inner += [name.strip(" %") for name in group.split(",")]
                for each in inner:
                    counts += launches(each, left_out) if each != left_out else collections.Counter()
                continue
            library = op == "custom-call" and re.search(r'custom_call_target="__(cudnn|cublas)', rest)
            counts["launches"] += 1
            counts["library calls" if library else "kernels"] += 1
            counts["copies"] += op == "copy" or re.search(r"copy|transpose", found["name"]) is not None
        return counts

    turns = [re.search(r"body=%?([\w.\-]+)", f["rest"])[1] for b in [*bodies.values()] for f in b if f["op"] == "while"]
    step = max(turns, key=lambda body: launches(body)["launches"], default="")
    return dict(launches(step)) if step else {}, dict(launches(entry, step))


def looped(program: programs.Program) -> tuple:
    """A program's arguments for as many steps as training makes in a dispatch on a GPU."""
    if len(program.args) < 2 or not isinstance(program.args[1], dict) or "rows" not in program.args[1]:
        return program.args
    state, batch = program.args
    rows = batch["rows"]
    shape = (dispatch.MOST, *rows.shape[1:])
    return state, batch | {"rows": jax.ShapeDtypeStruct(shape, rows.dtype, sharding=rows.sharding)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options, rest = parser.parse_known_args(arguments)
    if not any(a.startswith("--config=") for a in rest):
        rest = [f"--config={Path(__file__).parents[2] / 'configs' / 'cifar100.py'}", *rest]
    settings, _ = config.load(rest)
    device = card()
    built = preflight._build(settings, [device], outline(settings)[0])
    rows = []
    for program in programs.programs(built):
        if options.only in program.name:
            with compute.left_to_xla():
                lowered = program.function.trace(*looped(program), **program.kwargs).lower(lowering_platforms=("cuda",))
            step, besides = structure(lowered.compile().as_text())
            rows.append({"name": program.name, "step": step, "besides": besides})
            tell = [", ".join(f"{value} {key}" for key, value in found.items() if value) for found in (step, besides)]
            print(f"{program.name}: " + "; besides, once a dispatch: ".join(filter(None, tell)), flush=True)
    if options.json:
        command = " ".join(["python tests/bench/gpu_structure.py", *arguments])
        options.json.write_text(json.dumps({"rows": rows, "environment": environment(), "command": command}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
