"""Whether a config compiles and fits a machine that is not here, and what it costs there."""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from pwkd_jax.cost import chips, compiler, input_rate
from pwkd_jax.data.shapes import outline
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition, programs
from pwkd_jax.training import sharding

# Cuts the compiler's search for speed short. One student stage of configs/cifar100.py for v5e:2x2 took 28 s (25 s of CPU) in
# place of 315 s (134 s) on two shared Xeon cores, libtpu 0.0.42.1: FLOP and collectives equal to 0.1 %, bytes 9 % fewer, but
# temporaries of 77 MiB where the full search kept all of them on the chip.
QUICK = {"exec_time_optimization_effort": -1.0}


def preflight(
    settings: ConfigDict, topology: str, *, price: float = 0.0, suggest: bool = False, images: int = 0, image_size: int = 0,
    only: str = "", full: bool = False, cache: bool = True, core_rate: float = input_rate.IMAGES_PER_CORE_SECOND,
    tell: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """What the command prints, as plain data; core_rate: images/s that a core of a host decodes; tell: called with a line
    before every program. Raises UserError."""
    where = chips.topology(topology)
    on_tpu = bool(where.shape)
    if suggest and not on_tpu:
        raise UserError("--suggest: needs a TPU's compiler; what a program needs on a GPU is not known without the card")
    _initialise(where)
    devices = chips.describe(where) if on_tpu else jax.devices()[: where.chips]
    dataset, source = outline(settings, images, image_size)
    built = _build(settings, devices, dataset)
    wanted = [p for p in programs.programs(built) if only in p.name]
    if not wanted:
        names = ", ".join(p.name for p in programs.programs(built))
        raise UserError(f"--only: no program has '{only}' in its name; there are {names}")
    options, directory = ({} if full else QUICK), compiler.directory() if cache else None

    def cost(program: programs.Program) -> compiler.Cost:
        if on_tpu:
            return compiler.cost(program, where.name, options, directory)
        return compiler.outline(program, len(devices), directory)

    rows = []
    for number, program in enumerate(wanted, 1):
        tell(f"{number}/{len(wanted)} {program.name} ...")
        rows.append(_row(program, cost(program), where, len(devices), settings.dtype, price))
    result = {
        "config": settings.name,
        "topology": where.name,
        "chips": where.chips,
        "devices": len(devices),
        "chip": where.chip._asdict() if where.chip else None,
        "data": built.facts | {"source": source},
        "dtype": settings.dtype,
        "programs": rows,
        "input": input_rate.feeding(rows, where, core_rate) if settings.data.image_size else None,
        "partial": bool(only),
        "full": full,
        "fits": None if any(r["fits"] is None for r in rows) else all(r["fits"] for r in rows),
        "compile_seconds": sum(r["compile_seconds"] for r in rows if not r["kept"]),
        "price": price,
        "chip_hours": _sum(r["chip_hours"] for r in rows),
        "cost": _sum(r["cost"] for r in rows),
    }
    if suggest:
        result["suggestions"] = _suggest(settings, built, where, devices, dataset, wanted, rows, cost, tell)
    return result


def _initialise(where: chips.Topology) -> None:
    """Before JAX meets a device: the host's CPU alone, and libtpu told that there is no TPU to ask for or to lock."""
    jax.config.update("jax_platforms", "cpu")
    if where.shape:
        quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                 "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3",
                 "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}  # fmt: skip
        os.environ.update({key: value for key, value in quiet.items() if key not in os.environ})
    elif where.chips > 1:
        with contextlib.suppress(RuntimeError):  # JAX runs already, with as many as it has
            jax.config.update("jax_num_cpu_devices", where.chips)
        if jax.device_count() < where.chips:
            raise UserError(f"--topology: '{where.name}' needs {where.chips} devices to stand in for it in this process")


def _build(settings: ConfigDict, devices: Sequence, dataset) -> definition.Experiment:
    """The setting as training would have it, but for what needs data or weights and does not change a shape."""
    mesh = sharding.make_mesh(settings.mesh.model, devices)
    definition.check_batches(settings, mesh)
    bare = copy.deepcopy(settings).unlock()
    bare.teacher.weights = bare.student.weights = ""
    bare.student.teachers = bare.student.teacher_shares = ()
    if not bare.data.mean:
        channels = dataset.image_shape[-1]
        bare.data.mean, bare.data.std = (0.5,) * channels, (0.25,) * channels
    return dataclasses.replace(definition.build(bare, mesh, dataset), config=settings)


def _row(program, cost: compiler.Cost, where: chips.Topology, devices: int, dtype: str, price: float) -> dict:
    row = {
        "name": program.name, "batch": program.batch, "batch_key": program.batch_key, "runs": program.runs,
        **cost._asdict(), "total": cost.total, "compile_seconds": cost.seconds,
    }  # fmt: skip
    del row["seconds"]
    row |= dict.fromkeys(("compute_seconds", "memory_seconds", "network_seconds", "step_seconds"))
    row |= dict.fromkeys(("bound", "chip_hours", "cost"))
    row["intensity"] = cost.flops / cost.traffic if cost.traffic else None
    if cost.fits is not False and where.chip:
        line = chips.roofline(
            where.chip, cost.flops, cost.traffic, cost.communication, dtype=dtype, parts=devices // where.chips, devices=devices
        )
        hours = program.runs * line.seconds * where.chips / 3600
        row |= {
            "compute_seconds": line.compute, "memory_seconds": line.memory, "network_seconds": line.communication,
            "step_seconds": line.seconds, "bound": line.bound, "chip_hours": hours, "cost": hours * price if price else None,
        }  # fmt: skip
    return row


def _sum(values) -> float | None:
    values = list(values)
    return None if any(v is None for v in values) else sum(values)


def _suggest(settings, built, where, devices, dataset, wanted, rows, cost, tell) -> list[dict]:
    """For every batch-size key, the largest batch at which its hungriest program fits."""
    found = []
    data = built.mesh.shape["data"]
    for key in dict.fromkeys(p.batch_key for p in wanted):
        own = [(r["total"], p) for p, r in zip(wanted, rows, strict=True) if p.batch_key == key]
        hungriest = max(own, key=lambda x: x[0])[1]
        # Every group of batch norm lies on one device; the evaluation's size is rounded to whole devices by itself.
        unit = built.mesh.size if key.startswith("evaluation") else data * max(1, settings.batch_norm_group)
        # What the compiler leaves to programs, where it said so of one that it refused; else the whole chip's.
        limit = max((r["limit"] for r in rows), default=0) or where.chip.memory * where.chips // len(devices)

        def need(batch: int, key=key, hungriest=hungriest) -> tuple[int, bool]:
            tell(f"{key}={batch}: {hungriest.name} ...")
            other = copy.deepcopy(settings).unlock()
            other.update_from_flattened_dict({key: batch})
            same = next(p for p in programs.programs(_build(other, devices, dataset)) if p.name == hungriest.name)
            result = cost(same)
            return result.total, result.fits

        largest, tried = compiler.largest(need, limit, unit, hungriest.batch)
        found.append({"key": key, "program": hungriest.name, "largest": largest, "unit": unit, "limit": limit,
                      "tried": {str(b): m for b, m in sorted(tried.items())}})  # fmt: skip
    return found
