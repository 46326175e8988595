"""How a config is read; `schema` has every key with its default and its meaning, `checks` what is refused.

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

from pwkd_jax import distillers
from pwkd_jax.config.checks import check
from pwkd_jax.config.schema import default, leaves
from pwkd_jax.errors import UserError

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
        if isinstance(known[key], tuple) and override.partition("=")[2].lstrip().startswith("{"):  # a set keeps no order
            raise UserError(f"{override}: the key takes a list, as in --config.{key}={known[key]!r}")
    overrides = [_quoted(o) if isinstance(known[_key(o)], tuple) else o for o in overrides]
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


def _quoted(override: str) -> str:
    """A list of bare paths with each in quotes: ml_collections 1.1 reads a/b,c/d so, but neither /a,/b nor gs://a,gs://b."""
    key, _, value = override.partition("=")
    if not any(mark in value for mark in "/:") or any(mark in value for mark in "'\"()[]"):
        return override
    return f"{key}=({''.join(f'{word.strip()!r},' for word in value.split(',') if word.strip())})"


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
    return _one_way(config.lock())


def _one_way(config: ConfigDict) -> ConfigDict:
    """What can be written in two ways in one, so that a workdir knows its own: data.resize was 256 once where it is 0 now."""
    d = config.data
    if d.resize == round(d.image_size * 8 / 7) or not d.image_size:
        with config.unlocked():
            config.data.resize = 0
    return config


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
    # What is in the innermost group that is there, as in student.distiller; of groups in it the name.
    outer = key.rpartition(".")[0]
    while outer and not any(k.startswith(f"{outer}.") for k in inside):
        outer = outer.rpartition(".")[0]
    within = [k.removeprefix(f"{outer}.") for k in inside if k.startswith(f"{outer}.")]
    shown = dict.fromkeys(f"{outer}.{k.partition('.')[0]}" for k in within)
    return f"there is no key '{key}'; known are {', '.join((shown or inside) if group else groups)}"


def _normalise(config: ConfigDict) -> ConfigDict:
    """Lists of names may be written with commas; an empty string in a list is no entry."""
    for key, value in list(leaves(config)):
        if isinstance(value, tuple) and any(isinstance(v, str) for v in value):
            parts = tuple(p.strip() for v in value for p in str(v).split(",") if p.strip())
            with config.unlocked():
                config.update_from_flattened_dict({key: parts})
    return _one_way(config)


# Checking.


