"""Whether a config compiles and fits a pod, and what it costs, on a machine without that pod.

    python -m pwkd_jax.preflight --config=configs/cifar100.py --topology=v5e:2x2
    python -m pwkd_jax.preflight --config=configs/imagenet.py:resnet50-mobilenetv1 --topology=v5e:16x16 --price=1.20
    python -m pwkd_jax.preflight --config=configs/cifar100.py --topology=h100 --json
    python -m pwkd_jax.preflight --config=configs/imagenet.py --topology=v5e:4x4 --images-per-core-second=500

Compiles the very programs that training runs (the teacher's step, every student stage, the evaluations) with the TPU's own
compiler, which `pip install "jax[tpu]"` brings and which needs no TPU, and no data set either. --full gives the compiler all
the effort that training does. What was compiled once is remembered. For a GPU, whose compiler needs the card, it says what can
be known without. Of streamed images it says how many cores of a host decode them as fast as its chips consume them, at the
images a second that one core makes (tests/bench/input.py measures yours). Exits with code 2 and one sentence on a mistake, and
with code 1 where a program does not fit.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence

import jax
from absl import logging
from ml_collections import ConfigDict

from pwkd_jax import chips, config, costing, feeding, programs, setting
from pwkd_jax.data.outline import outline
from pwkd_jax.errors import UserError
from pwkd_jax.reporting import preflight as report
from pwkd_jax.training import sharding

# Cuts the compiler's search for speed short. One student stage of configs/cifar100.py for v5e:2x2 took 28 s (25 s of CPU) in
# place of 315 s (134 s) on two shared Xeon cores, libtpu 0.0.42.1: FLOP and collectives equal to 0.1 %, bytes 9 % fewer, but
# temporaries of 77 MiB where the full search kept all of them on the chip.
QUICK = {"exec_time_optimization_effort": -1.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m pwkd_jax.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--topology", help="v5e:4x4, v5p:4x4x4 and the like; h100, h100:8 or cuda")
    parser.add_argument("--price", type=float, default=0.0, help="of one chip for one hour, in your currency")
    parser.add_argument("--suggest", action="store_true", help="find the largest batches that fit")
    parser.add_argument("--images", type=int, default=0, help="in training, of a set that is not well known")
    parser.add_argument("--image-size", type=int, default=0, help="height and width, likewise")
    parser.add_argument(
        "--images-per-core-second", "--images_per_core_second", type=float, default=feeding.IMAGES_PER_CORE_SECOND,
        help="that one core of a host decodes, of streamed images (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="programs whose name has this word: teacher, student, evaluation, ...")
    parser.add_argument("--full", action="store_true", help="the TPU compiler's full effort: minutes a program")
    parser.add_argument("--no-cache", action="store_true", help="compile also what was compiled before")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", help="the config file and its argument; --config.KEY=VALUE overrides")
    logging.set_verbosity(logging.ERROR)
    if {"-h", "--help"} & {*argv}:
        parser.print_help()
        return 0
    try:
        settings, rest = config.load(argv)
        options, unknown = parser.parse_known_args(rest)
        if unknown:
            raise UserError(f"'{unknown[0]}' is not an option; see --help")
        if not options.topology:
            raise UserError("--topology: say for which machine, as in --topology=v5e:4x4")
        if min(options.images, options.image_size, options.price) < 0:
            raise UserError("--images, --image-size and --price: cannot be negative")
        if not options.images_per_core_second > 0:
            raise UserError("--images-per-core-second: should be above 0, as tests/bench/input.py measures it")
        result = preflight(
            settings, options.topology, price=options.price, suggest=options.suggest, images=options.images,
            image_size=options.image_size, only=options.only, full=options.full, cache=not options.no_cache,
            core_rate=options.images_per_core_second,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was compiled is remembered", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2) if options.json else report.text(result))
    return 1 if result["fits"] is False else 0


def preflight(
    settings: ConfigDict, topology: str, *, price: float = 0.0, suggest: bool = False, images: int = 0, image_size: int = 0,
    only: str = "", full: bool = False, cache: bool = True, core_rate: float = feeding.IMAGES_PER_CORE_SECOND,
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
    options, directory = ({} if full else QUICK), costing.directory() if cache else None

    def cost(program: programs.Program) -> costing.Cost:
        if on_tpu:
            return costing.cost(program, where.name, options, directory)
        return costing.outline(program, len(devices), directory)

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
        "input": feeding.feeding(rows, where, core_rate) if settings.data.image_size else None,
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


def _build(settings: ConfigDict, devices: Sequence, dataset) -> setting.Setting:
    """The setting as training would have it, but for what needs data or weights and does not change a shape."""
    mesh = sharding.make_mesh(settings.mesh.model, devices)
    setting.check_batches(settings, mesh)
    bare = copy.deepcopy(settings).unlock()
    bare.teacher.weights = bare.student.weights = ""
    if not bare.data.mean:
        channels = dataset.image_shape[-1]
        bare.data.mean, bare.data.std = (0.5,) * channels, (0.25,) * channels
    return dataclasses.replace(setting.build(bare, mesh, dataset), config=settings)


def _row(program, cost: costing.Cost, where: chips.Topology, devices: int, dtype: str, price: float) -> dict:
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

        largest, tried = costing.largest(need, limit, unit, hungriest.batch)
        found.append({"key": key, "program": hungriest.name, "largest": largest, "unit": unit, "limit": limit,
                      "tried": {str(b): m for b, m in sorted(tried.items())}})  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
