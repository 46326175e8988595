"""What a topology's chips can do, from their makers' pages, and the roofline that follows from it."""

import math
import re
from typing import NamedTuple

from pwkd_jax.errors import UserError

GIB = 1 << 30


class Chip(NamedTuple):
    """One chip or card. peak: FLOP/s of dense products, bfloat16 inputs. peak_float32: the same for JAX's default precision of
    float32 inputs (TPU: one bfloat16 pass, GPU: TF32). memory: bytes. bandwidth: bytes/s of that memory. links: bytes/s out of
    the chip over all its links to others, 0 where we have no published number."""

    name: str
    peak: float
    peak_float32: float
    memory: int
    bandwidth: float
    links: float = 0.0


def _tpu(name: str, peak: float, memory: int, bandwidth: float, both_ways: float = 0.0) -> Chip:
    return Chip(name, peak * 1e12, peak * 1e12, memory * GIB, bandwidth * 1e9, both_ways * 1e9 / 2)


# docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}: bfloat16 TFLOP/s, HBM capacity (it writes GB or GiB for the same
# powers of two) and GB/s, and bidirectional inter-chip GB/s where it is given.
TPUS = {c.name: c for c in (
    _tpu("v3", 123, 32, 900),
    _tpu("v4", 275, 32, 1200),
    _tpu("v5e", 197, 16, 819, 400),
    _tpu("v5p", 459, 95, 2765, 1200),
    _tpu("v6e", 918, 32, 1638, 800),
    _tpu("tpu7x", 2307, 192, 7380, 1200),
)}  # fmt: skip

# NVIDIA's data sheets of the SXM cards, dense, where they print twice that with sparsity.
GPUS = {c.name: c for c in (
    Chip("a100", 312e12, 156e12, 80 * 10**9, 2039e9),
    Chip("h100", 989.4e12, 494.7e12, 80 * 10**9, 3350e9),
    Chip("h200", 989.4e12, 494.7e12, 141 * 10**9, 4800e9),
)}  # fmt: skip

# {chip: {chips of a host: its virtual cores}}. docs.cloud.google.com/tpu/docs/v5e, "VM types"; a third type has eight chips and
# 224 cores, which is as many a chip. The other chips' pages do not say.
HOST_CORES = {"v5e": {1: 24, 4: 112}}


# What JAX calls the devices of these.
_KINDS = {"TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p",
          "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "A100": "a100", "H100": "h100", "H200": "h200"}  # fmt: skip


def of_kind(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, or None. Of a v3 or tpu7x, whose chip is two devices, half of it."""
    name = next((chip for words, chip in _KINDS.items() if words in kind), None)
    chip = TPUS.get(name) or GPUS.get(name)
    if name in ("v3", "tpu7x"):
        halves = {key: getattr(chip, key) / 2 for key in ("peak", "peak_float32", "bandwidth", "links")}
        return chip._replace(memory=chip.memory // 2, **halves)
    return chip


class Topology(NamedTuple):
    """shape: chips along each axis; () of a machine with GPUs. chip: None of `cuda`, a card that is not named."""

    name: str
    chip: Chip | None
    chips: int
    shape: tuple[int, ...]

    @property
    def host(self) -> tuple[int, int | None]:
        """(chips of one host, its virtual cores, None where we have no published number); cards are all in one."""
        chips = min(self.chips, 4) if self.shape else self.chips
        return chips, HOST_CORES.get(self.chip.name, {}).get(chips) if self.chip else None


def topology(name: str) -> Topology:
    """`v5e:4x4`, `v5p:4x4x4`, `h100`, `h100:8` or `cuda` understood. Raises UserError."""
    chip, _, rest = name.strip().lower().partition(":")
    if chip in TPUS:
        axes = 2 if chip in ("v3", "v5e", "v6e") else 3
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest) or rest.count("x") != axes - 1:
            example = f"{chip}:{'x'.join('4' * axes)}"
            raise UserError(f"--topology: '{name}' should give the chips along {axes} axes, as in {example}")
        shape = tuple(map(int, rest.split("x")))
        if chip in ("v5e", "v6e") and max(shape) > 16:
            raise UserError(f"--topology: '{name}' is more than a whole pod, which is {chip}:16x16")
        return Topology(name.strip().lower(), TPUS[chip], math.prod(shape), shape)
    if (chip in GPUS or chip == "cuda") and re.fullmatch(r"|[1-9]\d*", rest) and not name.endswith(":"):
        return Topology(name.strip().lower(), GPUS.get(chip), int(rest or 1), ())
    raise UserError(
        f"--topology: there is no '{name}'; known are {', '.join(TPUS)} with their chips, as in v5e:4x4 or v5p:4x4x4, and "
        f"{', '.join(GPUS)} or cuda, as in h100:8"
    )


def describe(topology: Topology) -> list:
    """The devices of a TPU topology, to compile for and not to run on. Raises UserError.

    Hosts and wrapped links are the real pods': four chips a host, an axis of 16 chips (v3, v5e, v6e) or three axes that are
    multiples of 4 closed into rings. A v4 chip is one device of two cores (megacore), as v4 pods run.
    """
    from jax.experimental import topologies

    shape, flat = topology.shape, len(topology.shape) == 2
    # v3's layout is left to the compiler: its hosts and rings are not documented as the others' are.
    layout = {} if topology.chip.name == "v3" else {
        "chips_per_host_bounds": (1, 1, 1) if topology.chips == 1 else (2, 2, 1),
        "wrap": (*(n == 16 for n in shape), False) if flat else (all(n % 4 == 0 for n in shape),) * 3,
    }  # fmt: skip
    if topology.chip.name == "v4":
        layout["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **layout).devices)
    except Exception as e:  # libtpu's absence and its refusals have no type in common
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if not _has_libtpu():
            raise UserError(
                '--topology: compiling for a TPU needs no TPU but its compiler, libtpu; pip install "jax[tpu]"'
            ) from e
        raise UserError(f"--topology: this libtpu has no '{topology.name}' ({text})") from e


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


# The roofline. Williams, Waterman and Patterson, CACM 2009: no program is faster than its work at the chip's peak, nor than its
# memory traffic at the chip's bandwidth.


class Roofline(NamedTuple):
    """compute, memory, communication: seconds that each alone would take on one chip. bound: which of the first two is more."""

    compute: float
    memory: float
    communication: float | None

    @property
    def seconds(self) -> float:
        """The least that the step takes: computing, reading and communicating can overlap at best."""
        return max(self.compute, self.memory, self.communication or 0.0)

    @property
    def bound(self) -> str:
        sides = {"compute": self.compute, "memory": self.memory, "network": self.communication or 0.0}
        return max(sides, key=sides.get)


def roofline(
    chip: Chip, flops: float, traffic: float, collectives: dict[str, tuple[int, int]], *, dtype: str, parts: int, devices: int
) -> Roofline:
    """The roofline of a program with `flops` and bytes of memory `traffic` on one of `devices` devices.

    parts: devices that one chip makes (a v3 or tpu7x chip is two), which share it. collectives: {kind: (count, bytes)} as
    `training.collectives` counts them.
    """
    peak = chip.peak if dtype == "bfloat16" else chip.peak_float32
    links = chip.links / parts
    sent = sum(_sent(kind, size, devices) for kind, (_, size) in collectives.items())
    communication = sent / links if links else None if sent else 0.0
    return Roofline(flops / (peak / parts), traffic / (chip.bandwidth / parts), communication)


def _sent(kind: str, size: float, devices: int) -> float:
    """Bytes that each device sends for a collective whose result has `size` bytes on it, by the ring algorithms."""
    share = (devices - 1) / devices
    return {"all-reduce": 2 * size * share, "all-gather": size * share, "reduce-scatter": size * (devices - 1)}.get(kind, size)
