"""What XLA makes of the training steps for an H100, without one: python tests/bench/gpu_structure.py [--only=NAME]
[--json=FILE] [--config=configs/cifar100.py, and its keys]

Needs `pip install "jax[cuda12]"` (5 GB) and no card: XLA compiles for a described one. For each program, what a step launches:
kernels (fusions, and what was not fused), copies and transposes among them, calls of cuBLAS and cuDNN; and loops and branches,
whose insides count once. Of command buffers (CUDA graphs) nothing is told: XLA makes them later. Nothing is tuned on the card,
so that the choice between kernels, and with it a few of these numbers, may be another there.
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
from pwkd_jax.reporting.environment import environment

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


def structure(text: str) -> dict[str, int]:
    """What a compiled module launches, of what its entry calls too; what is in a loop or a branch once."""
    bodies, name, entry = collections.defaultdict(list), "", ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head["name"]
            entry = name if head["entry"] else entry
        elif found := LINE.match(line):
            bodies[name].append(found)
    counts = collections.Counter()

    def visit(computation: str) -> None:
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
                    visit(each)
                continue
            library = op == "custom-call" and re.search(r'custom_call_target="__(cudnn|cublas)', rest)
            counts["launches"] += 1
            counts["library calls" if library else "kernels"] += 1
            counts["copies"] += op == "copy" or re.search(r"copy|transpose", found["name"]) is not None

    visit(entry)
    return dict(counts)


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
            lowered = program.function.trace(*program.args, **program.kwargs).lower(lowering_platforms=("cuda",))
            row = structure(lowered.compile().as_text())
            rows.append({"name": program.name, **row})
            print(f"{program.name}: " + ", ".join(f"{value} {key}" for key, value in row.items() if value), flush=True)
    if options.json:
        command = " ".join(["python tests/bench/gpu_structure.py", *arguments])
        options.json.write_text(json.dumps({"rows": rows, "environment": environment(), "command": command}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
