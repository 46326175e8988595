"""What a compiler says of a program: memory, work, communication. Kept between commands, for compiling takes minutes.

JAX's own compilation cache is of no use here: it stores programs compiled for a described TPU but cannot load them without one
(jax 0.10.2: "PjRtCompiler must be constructed with a Client"). What is kept is not the program but these numbers.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from pwkd_jax import storage
from pwkd_jax.cost.collectives import collectives
from pwkd_jax.errors import UserError
from pwkd_jax.experiment.programs import Program
from pwkd_jax.models import compute

KINDS = ("arguments", "outputs", "temporaries", "aliased", "code")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Cost(NamedTuple):
    """Of one program on one device.

    fits: whether it compiled; None is not known. memory: bytes by KINDS; of a program that does not fit, arguments and the
    temporaries that it would need. limit: bytes that the compiler had, 0 where it did not say. flops: products and sums of all
    kinds. traffic: bytes that the compiler says its operations read and write. communication: {kind: (count, bytes)}.
    seconds: of compiling, when it was compiled. kept: whether that was in an earlier command.
    """

    fits: bool | None
    memory: dict[str, int]
    limit: int
    flops: float
    traffic: float
    communication: dict[str, tuple[int, int]]
    seconds: float
    kept: bool = False

    @property
    def total(self) -> int:
        """Bytes needed at once: what is aliased (donated) is counted with the arguments and once."""
        m = self.memory
        return m["arguments"] + m["outputs"] - m["aliased"] + m["temporaries"] + m["code"]


def cost(program: Program, target: str, options: dict, directory: Path | None) -> Cost:
    """Compile a program for `target` (part of the key only) with XLA's `options`, or read what an earlier command found.

    directory: where results are kept; None keeps nothing.
    """
    return _kept(program, f"{target} {json.dumps(options, sort_keys=True)}", directory,
                 lambda lowered: _compile(program.name, lowered, options, program.argument_bytes))  # fmt: skip


def outline(program: Program, devices: int, directory: Path | None) -> Cost:
    """What the CPU's compiler can say of a program for another kind of device, `devices` of which share it: its arguments by
    their shapes, its work before, and its traffic after optimisation. Whether it fits, temporaries and code stay unknown."""

    def compile(lowered: jax.stages.Lowered) -> Cost:
        begun = time.monotonic()
        # Not to be run, so LLVM need not make it fast.
        compiled = lowered.compile({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
        memory = dict.fromkeys(KINDS, 0) | {"arguments": program.argument_bytes}
        flops = float(lowered.cost_analysis().get("flops", 0.0)) / devices
        traffic = float(compiled.cost_analysis().get("bytes accessed", 0.0))
        return Cost(None, memory, 0, flops, traffic, {}, time.monotonic() - begun)

    return _kept(program, f"cpu for {devices}", directory, compile)


def _kept(program: Program, target: str, directory: Path | None, compile: Callable[[jax.stages.Lowered], Cost]) -> Cost:
    with compute.left_to_xla():
        lowered = program.lower()
    versions = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", "libtpu")]
    text = "\n".join((lowered.as_text(), target, *versions))
    path = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json" if directory else None
    if path and (known := _read(path)):
        return known
    result = compile(lowered)
    if path:
        with contextlib.suppress(OSError):  # a home that cannot be written: the next command compiles again
            storage.replace(path, json.dumps(result._asdict()))
    return result


def directory() -> Path:
    """~/.cache/pwkd_jax/preflight, or below $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pwkd_jax" / "preflight"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _read(path: Path) -> Cost | None:
    try:
        found = Cost(**json.loads(storage.read(path)))
    except (OSError, ValueError, TypeError):
        return None
    return found._replace(kept=True, communication={k: tuple(v) for k, v in found.communication.items()})


def _compile(name: str, lowered: jax.stages.Lowered, options: dict, arguments: int) -> Cost:
    begun = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as e:
        if (found := exhausted(str(e))) is None:
            reason = str(e).strip().partition("\n")[0]
            raise UserError(f"--topology: this compiler, libtpu {_version('libtpu')}, fails on the {name} ({reason})") from e
        needed, limit = found
        # The compiler that gives up names the temporaries alone; the arguments are known from their shapes.
        memory = dict.fromkeys(KINDS, 0) | {"arguments": arguments, "temporaries": needed}
        return Cost(False, memory, limit, 0.0, 0.0, {}, time.monotonic() - begun)
    seconds = time.monotonic() - begun
    stats, work = compiled.memory_analysis(), compiled.cost_analysis()
    sizes = ("argument_size", "output_size", "temp_size", "alias_size", "generated_code_size")
    memory = {kind: int(getattr(stats, f"{size}_in_bytes")) for kind, size in zip(KINDS, sizes, strict=True)}
    flops, traffic = float(work.get("flops", 0.0)), float(work.get("bytes accessed", 0.0))
    return Cost(True, memory, 0, flops, traffic, collectives(compiled), seconds)


def exhausted(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there are) in what the compiler says of a program that does not fit; None of another error."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    size = r"([\d.]+)\s*([KMGT]?)(?:i?B)?"
    for pattern in (rf"Used {size} of {size} hbm", rf"\({size}\) exceeds available \w+ \({size}\)"):
        if match := re.search(pattern, message, re.IGNORECASE):
            needed, there = (int(float(match[i]) * _UNITS[match[i + 1].upper()]) for i in (1, 3))
            return needed, there
    return None


def largest(
    need: Callable[[int], tuple[int, bool]], limit: int, unit: int, start: int, compiles: int = 6
) -> tuple[int, dict[int, int]]:
    """(the largest batch found to fit, {batch: bytes} of every one tried), multiples of `unit`; 0 where not even `unit` fits.

    need(batch): (bytes, whether it fits); compiles. limit: bytes there are, about. Memory is near affine in the batch: two
    points give a line and the line a guess, until one within 5 % of the limit fits. Only what was compiled is returned; at
    most `compiles` are.
    """
    tried: dict[int, tuple[int, bool]] = {}

    def fits(batch: int) -> bool:
        if batch not in tried:
            tried[batch] = need(batch)
        return tried[batch][1]

    first = max(1, start // unit) * unit
    # The second point on the other side of the limit if it can be, and never where the first says that it is far beyond.
    fits(2 * first if fits(first) else max(unit, first // 2 // unit * unit))
    while len(tried) < compiles:
        low = max((b for b, (_, ok) in tried.items() if ok), default=0)
        high = min((b for b, (_, ok) in tried.items() if not ok), default=0)
        if (low and tried[low][0] >= 0.95 * limit) or (high and high - low <= unit):
            break
        guess = _cross(tried, limit) // unit * unit
        if high:
            guess = min(guess, high - unit)
        guess = max(guess, low + unit)
        if guess in tried:
            break
        fits(guess)
    return max((b for b, (_, ok) in tried.items() if ok), default=0), {b: m for b, (m, _) in sorted(tried.items())}


def _cross(tried: dict[int, tuple[int, bool]], limit: int) -> int:
    """Where the line through the two points nearest the limit meets it."""
    (a, ma), (b, mb) = sorted(((b, m) for b, (m, _) in tried.items()), key=lambda p: abs(p[1] - limit))[:2]
    return int(a + (limit - ma) * (b - a) / (mb - ma)) if ma != mb else max(a, b)
