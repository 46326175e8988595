"""How a config is read and what is refused; `defaults` has the schema, every key with its default and its meaning.

configs/*.py import `default()` from here. `load(argv)` reads `--config=FILE[:ARG]` and `--config.key=value` overrides and
returns a checked ConfigDict; a mistake is a UserError that names the key. After this the code sees plain arguments.
Durations are strings: '60 epochs', '5000 steps', '1e6 examples'; where they divide a whole, also '10 %'.
"""

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from pwkd_jax import distillers, models, slimmable, stages
from pwkd_jax.defaults import default, leaves
from pwkd_jax.errors import UserError
from pwkd_jax.models import compute
from pwkd_jax.training import profile, together

# Reading.


def load(argv: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """(checked config, remaining arguments) of a command line without the program's name.

    `--config=configs/digits.py:arg` calls that file's get_config('arg'); `--config.a.b=value` overrides a key.
    """
    paths = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
    # The last of several settings of a key holds; ml_collections would append one list to the other.
    given = [a for a in argv if a.startswith(("--config.", "--noconfig."))]
    overrides = list({_key(a): a for a in given}.values())
    rest = [a for a in argv if not a.startswith(("--config=", "--config.", "--noconfig."))]
    if len(paths) != 1 or not paths[0]:
        raise UserError("give one config file, as in --config=configs/digits.py")
    config = complete(_from_file(paths[0]), overrides, paths[0])
    known = dict(leaves(config))
    for override in overrides:
        if (key := _key(override)) not in known:
            raise UserError(f"--config.{key}: {_unknown(key, config)}")
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["train", *overrides])
        values(["train", *overrides])
    except (flags.Error, ValueError, TypeError) as e:
        named = next((o for o in overrides if o in str(e)), overrides[-1])
        key = _key(named)
        raise UserError(f"{named}: the key takes {_kind(known[key])}, as in --config.{key}={known[key]!r}") from e
    config = _normalise(values.config)
    check(config)
    return config, rest


def _key(override: str) -> str:
    return override.partition("=")[0].removeprefix("--no").removeprefix("--").removeprefix("config.")


def _from_file(spec: str) -> ConfigDict:
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file '{path}'")
    module_spec = importlib.util.spec_from_file_location("config_file", path)
    if module_spec is None:
        raise UserError(f"--config: '{path}' is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # As a script can, a config file may import those beside it; of modules of these names, only the ones that lie there.
    folder = Path(path).resolve().parent
    cached = {file.stem: sys.modules.get(file.stem) for file in folder.glob("*.py")}
    for name, neighbour in cached.items():
        if neighbour and Path(getattr(neighbour, "__file__", None) or "").resolve() != folder / f"{name}.py":
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(arg) if arg else module.get_config()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--config: '{spec}' fails with {type(e).__name__}: {str(e).strip().splitlines()[0]}") from e
    finally:
        sys.dont_write_bytecode = dont_write
        sys.path.remove(str(folder))
        for name, neighbour in cached.items():
            sys.modules.pop(name, None)
            if neighbour:
                sys.modules[name] = neighbour
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config of '{path}' should return a ConfigDict, not {type(config).__name__}")
    return config


def complete(given: ConfigDict, overrides: Sequence[str], source: str) -> ConfigDict:
    """The defaults with `given` written over them, key by key; distiller keys are those of the distiller named."""
    name = given.get("student", {}).get("distiller", {}).get("name", "kd")
    chosen = [o.partition("=")[2] for o in overrides if o.startswith("--config.student.distiller.name=")]
    config = default().unlock()
    config.student.distiller = ConfigDict({"name": (chosen or [name])[-1], **distillers.fields((chosen or [name])[-1])})
    known = dict(leaves(config))
    for key, value in leaves(given):
        if chosen and key.startswith("student.distiller."):
            continue  # another distiller was asked for: the file's options belong to its own
        if key not in known:
            raise UserError(f"{source}: {_unknown(key, config)}")
        if isinstance(value, list):
            value = tuple(value)
        if type(value) is int and type(known[key]) is float:
            value = float(value)
        if type(value) is not type(known[key]):
            raise UserError(f"{source}: {key} takes {_kind(known[key])}, as in {known[key]!r}, not {value!r}")
        config.update_from_flattened_dict({key: value})
    return config.lock()


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}
    return kinds[type(value)]


def _unknown(key: str, config: ConfigDict) -> str:
    known = dict(leaves(config))
    inside = sorted(k for k in known if k.startswith(f"{key}."))
    if inside:
        return f"'{key}' is a group of keys; set one of them, as in {inside[0]}"
    # Word by word: first the nearest group, then the nearest of its keys; people say lr for the schedule's peak.
    words = [{"lr": "peak", "learning_rate": "peak", "epochs": "duration", "steps": "duration"}.get(w, w)
             for w in key.split(".")]  # fmt: skip
    groups = sorted({k.partition(".")[0] for k in known})
    group = (difflib.get_close_matches(words[0], groups, 1, 0.7) or [""])[0]
    inside = [k for k in known if k.startswith(f"{group}.") or k == group] if group else list(known)
    last = {k.rpartition(".")[2]: k for k in reversed(inside)}
    close = difflib.get_close_matches(words[-1], last, 1, 0.7)
    if close:
        return f"there is no key '{key}'; did you mean '{last[close[0]]}'?"
    return f"there is no key '{key}'; known are {', '.join(inside if group else groups)}"


def _normalise(config: ConfigDict) -> ConfigDict:
    """Lists of names may be written with commas; an empty string in a list is no entry."""
    for key, value in list(leaves(config)):
        if isinstance(value, tuple) and any(isinstance(v, str) for v in value):
            parts = tuple(p.strip() for v in value for p in str(v).split(",") if p.strip())
            with config.unlocked():
                config.update_from_flattened_dict({key: parts})
    return config


# Checking.


def check(config: ConfigDict) -> None:
    """Raise a UserError for the first value that cannot be, or contradicts another; compiles and reads nothing."""
    c, t, s = config, config.teacher, config.student

    def need(key: str, ok: bool, right: str) -> None:
        if not ok:
            value = dict(leaves(config))[key]
            raise UserError(f"{key}: {value!r} is not possible; it should be {right}")

    def one_of(key: str, values: Sequence[str]) -> None:
        need(key, dict(leaves(config))[key] in values, "one of " + ", ".join(v or "''" for v in values))

    def numbers(key: str) -> None:
        values = dict(leaves(config))[key]
        need(key, all(type(v) in (int, float) for v in values), "a list of numbers, as in (0.5,1.0)")

    need("seeds", c.seeds >= 0, "0 (teachers alone) or more")
    need("seed", 0 <= c.seed < 2**31, "between 0 and 2^31 - 1")
    need("arms", bool(c.arms) and len(set(c.arms)) == len(c.arms), "a list of different arms")
    for arm in c.arms:
        need("arms", arm in stages.ARMS, "from " + ", ".join(stages.ARMS))
    one_of("dtype", compute.DTYPES)
    if c.profile:
        profile.parse(c.profile)
    need("batch_norm_group", c.batch_norm_group >= 0, "0 (the global batch) or a number of images")
    need("mesh.model", c.mesh.model >= 1, "1 (pure data parallelism) or the number of devices that share a network")
    for key in ("teacher.sharding", "student.sharding", "student.teacher_sharding"):
        one_of(key, ("replicated", "fsdp"))
    need("steps_per_dispatch", c.steps_per_dispatch >= 0, "0 (chosen for you) or the most steps of one dispatch")
    one_of("data.on_device", ("auto", "always", "never"))
    need("data.on_device", c.data.on_device != "always" or not c.data.image_size,
         "auto or never where images are streamed, which is where data.image_size is above 0")  # fmt: skip
    need("steps_per_dispatch", c.steps_per_dispatch <= 1 or not (c.data.on_device == "never" or c.data.image_size),
         "0 or 1 where images are streamed or data.on_device is 'never'")  # fmt: skip
    need("data.num_classes", c.data.num_classes >= 0, "0 (as the data set says) or its number of classes")
    need("data.crop_padding", c.data.crop_padding >= 0, "0 or more pixels")
    for key in ("data.mean", "data.std", "teacher.widths", "teacher.pool", "student.widths", "student.stage_shares",
                "teacher.schedule.milestones", "student.schedule.milestones"):  # fmt: skip
        numbers(key)
    need("data.std", all(v > 0 for v in c.data.std) and len(c.data.std) == len(c.data.mean),
         "one number above 0 for each channel, given together with data.mean")  # fmt: skip

    d = c.data
    numbers("data.scale")
    need("data.image_size", d.image_size >= 0, "0 (of one size, in RAM) or the pixels each way of streamed images")
    need("data.scale", len(d.scale) == 2 and 0 < d.scale[0] <= d.scale[1] <= 1,
         "the smallest and the largest part of the area, as in (0.08,1.0)")  # fmt: skip
    need("data.resize", d.resize >= d.image_size, f"at least data.image_size, which is {d.image_size}")
    need("data.workers", d.workers >= -1, "-1 (one a core), 0 (none but this process) or a number of processes")
    need("data.unreadable", 0 <= d.unreadable < 1, "in [0, 1)")
    if d.image_size:
        need("data.crop_padding", not d.crop_padding, "0 where data.image_size streams random crops of its own")
        need("data.mean", bool(d.mean), "given, with data.std, where data.image_size streams images, which cannot be measured "
             "first, as in (0.485,0.456,0.406)")  # fmt: skip
        need("student.same_crop", s.same_crop, "true where data.image_size streams images, which come cropped to both")

    for key, widths in (("teacher.widths", t.widths), ("teacher.pool", t.pool)):
        need(key, all(0 < w <= 1 for w in widths) and len(set(widths)) == len(widths), "different widths in (0, 1]")
    need("teacher.widths", bool(t.widths), "at least one width")
    one_of("teacher.order", ("bn_scale", "l1", "none"))
    one_of("teacher.execution", ("take", "mask"))
    one_of("teacher.sampling", ("all", "sandwich"))
    one_of("teacher.loss", ("hard", "inplace", "inplace_mix"))
    one_of("teacher.reduction", ("sum", "mean"))
    one_of("teacher.batch_norm", slimmable.BATCH_NORMS)
    need("teacher.divisor", t.divisor >= 0, "0 (exact) or the number that channels should be multiples of")
    need("teacher.subnetworks", t.subnetworks >= 2, "at least 2: the widest and the narrowest")
    need("teacher.loss", len(t.widths) > 1 or t.loss == "hard", "'hard' where teacher.widths has a single width")
    need("teacher.sampling", len(t.widths) > 1 or t.sampling == "all", "'all' where teacher.widths has a single width")
    need("teacher.pool", not t.pool or t.sampling == "sandwich", "() unless teacher.sampling is 'sandwich'")
    need("teacher.pool", not t.pool or t.batch_norm != "switchable",
         "() where teacher.batch_norm is 'switchable', which has no state for widths outside teacher.widths")  # fmt: skip
    need("teacher.pool", all(min(t.widths) < w < max(t.widths) for w in t.pool), "between the ends of teacher.widths")
    need("teacher.calibration.images", t.calibration.images >= 0, "0 (off) or a number of images")
    need("teacher.calibration.batch_size", t.calibration.batch_size >= 1, "at least 1")
    need("teacher.calibration.batch_size", not (c.batch_norm_group and t.calibration.images)
         or t.calibration.batch_size % c.batch_norm_group == 0,
         f"a multiple of batch_norm_group, which is {c.batch_norm_group}")  # fmt: skip
    need("teacher.calibration.seed", t.calibration.seed >= 0, "0 or more")

    one_of("student.budget", ("total", "per_stage"))
    one_of("student.connectors", ("leading", "reinit"))
    one_of("student.batches", ("own", "shared"))
    one_of("student.teacher_dtype", ("", *compute.DTYPES))
    one_of("student.together", together.HOW)
    need("student.together", s.together in ("auto", "none") or s.batches == "shared",
         "auto or none where student.batches is 'own', for students in one program share their batches")  # fmt: skip
    need("student.together", s.together != "devices" or (s.sharding == s.teacher_sharding == "replicated" and
         c.mesh.model == 1), "another where networks are split over devices")  # fmt: skip
    one_of("student.schedule.cycles", ("per_stage", "single"))
    one_of("student.schedule.single_form", ("", *stages.CYCLES))
    need("student.reset", set(s.reset) <= {"momentum", "batch_norm", "weights"}, "from momentum, batch_norm, weights")
    need("student.widths", set(s.widths) <= set(t.widths), f"from teacher.widths, which are {t.widths}")
    count = len(s.widths or t.widths)
    need("student.stage_shares", not s.stage_shares or (len(s.stage_shares) == count and min(s.stage_shares) > 0),
         f"() or {count} numbers above 0, one for each stage")  # fmt: skip
    need("student.width", 0 < s.width <= 1, "in (0, 1]")
    need("student.ensemble", s.ensemble >= 1, "at least 1")
    need("student.schedule.peak_decay", s.schedule.peak_decay > 0, "above 0")

    for who in ("teacher", "student"):
        g = config[who]
        o, r = g.optimizer, g.schedule
        one_of(f"{who}.optimizer.name", ("sgd", "adamw"))
        one_of(f"{who}.optimizer.decay", ("all", "kernels"))
        need(f"{who}.optimizer.momentum", 0 <= o.momentum < 1, "in [0, 1)")
        need(f"{who}.optimizer.nesterov", not o.nesterov or o.momentum > 0, "false where momentum is 0")
        need(f"{who}.optimizer.weight_decay", o.weight_decay >= 0, "0 or more")
        need(f"{who}.optimizer.clip_norm", o.clip_norm >= 0, "0 (off) or the largest norm")
        one_of(f"{who}.schedule.form", stages.CYCLES)
        need(f"{who}.schedule.peak", r.peak > 0, "above 0")
        need(f"{who}.schedule.floor", 0 <= r.floor <= 1, "in [0, 1]")
        need(f"{who}.schedule.factor", r.factor > 0, "above 0")
        need(f"{who}.schedule.milestones", all(0 < m < 1 for m in r.milestones) and list(r.milestones) ==
             sorted(set(r.milestones)), "rising fractions of the cycle between 0 and 1")  # fmt: skip
        need(f"{who}.batch_size", g.batch_size >= 1, "at least 1")
        need(f"{who}.batch_size", not c.batch_norm_group or g.batch_size % c.batch_norm_group == 0,
             f"a multiple of batch_norm_group, which is {c.batch_norm_group}")  # fmt: skip
        stages.steps(g.duration, f"{who}.duration", batch_size=1, images=1)
        stages.steps(r.warmup, f"{who}.schedule.warmup", batch_size=1, images=1, total=1, zero=True)
    need("evaluation.batch_size", c.evaluation.batch_size >= 1, "at least 1")
    for key in ("evaluation", "checkpoint", "log"):
        stages.steps(config[key].every, f"{key}.every", batch_size=1, images=1, total=100)

    for key, name in (("teacher.model", t.model), ("student.model", s.model)):
        try:
            models.create(name)
        except models.WidthError:
            pass
        except UserError as e:
            raise UserError(f"{key}: {e}") from e
    options = {k: v for k, v in s.distiller.items() if k != "name"}
    try:
        distillers.create(s.distiller.name, **options)
    except UserError as e:
        raise UserError(f"student.distiller: {e}") from e
