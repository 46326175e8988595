"""What training left, from whatever names it: a run's directory, one of its checkpoints, or a file of weights."""

import re
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax

from pwkd_jax import slimmable, stages, storage, weights
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition
from pwkd_jax.experiment.workdir import changed_since, config_of
from pwkd_jax.reporting.environment import versions
from pwkd_jax.training import averaging, checkpoints, selection, student
from pwkd_jax.training.writers import read_rows
from pwkd_jax.weights import Network

KINDS = "a run (WORKDIR/teacher/slimmable, WORKDIR/students/pwkd/seed0), a checkpoint or RUN/best, or a .safetensors file"


def load(target: str, width: float | None = None, model: str = "", kinds: str = KINDS) -> tuple[Network, dict]:
    """(the network that `target` names, its data as a config has them), at `width` of a slimmable teacher (default: its
    widest).

    model: the `module:Name` that a file may import, where its model is one's own. kinds: what to offer for a target that is
    none. Raises UserError.
    """
    path = storage.absolute(storage.path(target), straight=True)
    if storage.is_file(path / "model.safetensors"):  # the directory of an export
        path = path / "model.safetensors"
    if storage.is_file(path):
        variables, card = weights.read(path, model)
        if width not in (None, card["width"]):
            raise UserError(f"--width: {target} holds width {card['width']:g} alone")
        return Network(weights.build(card), variables, card), known(card["source"], card.get("classes", ()))
    if path.name == "best" and storage.exists(path.parent / "metrics.jsonl"):
        best = selection.best(read_rows(path.parent / "metrics.jsonl"))
        if best is None or best not in storage.saved_steps(path.parent / "checkpoints"):
            raise UserError(f"{target}: this run kept no best weights, for want of a data.validation_split; name the run")
        path = path.parent / "checkpoints" / str(best)
    if not storage.exists(path):
        raise UserError(f"{target}: there is no such file or directory; give {kinds}")
    inside = path.parent.name == "checkpoints" and path.name.isdigit()
    run, step = (path.parents[1], int(path.name)) if inside else (path, None)
    both = ("config.json", "data.json")
    workdir = next((p for p in storage.above(run) if all(storage.exists(p / name) for name in both)), None)
    place = run.relative_to(workdir).as_posix() if workdir else ""
    if not re.fullmatch(rf"teacher/(slimmable|standard)|students/({'|'.join(stages.ARMS)})/seed\d+", place):
        inside = sorted(p.relative_to(path).as_posix() for p in storage.holding(path, "checkpoints"))
        hint = f"there are {', '.join(inside)} in it" if inside else f"give {kinds}"
        raise UserError(f"{target}: is no run of an experiment; {hint}")
    parts = place.split("/")
    made = changed_since(workdir)
    config, facts = config_of(workdir), definition.read_facts(workdir / "data.json")
    source = {"experiment": config.name, "data": facts["name"], "test_split": config.data.test_split, "run": "/".join(parts),
              "digests": facts.get("digests", {}), "made_with": {k: made[k] for k in versions() if k in made}}  # fmt: skip
    split = {key: config.data[key] for key in ("name", "data_dir", "test_split")}
    split |= {key: config.data[key] for key in ("copy", "image_size", "resize", "pixel_range")}
    read = _teacher if parts[0] == "teacher" else _student
    found, variables, about = read(target, workdir, run, step, width, config, facts)
    card = weights.card(
        about.pop("model"), about.pop("width"), about.pop("divisor"), facts["num_classes"], facts["image_shape"],
        facts["mean"], facts["std"], source | about.pop("source"), sees=about.pop("sees", None),
    )  # fmt: skip
    card["classes"] = split["classes"] = list(facts.get("classes", ()))
    split["digest"] = facts.get("digests", {}).get("test")
    return Network(found, variables, card | about), split


def open_network(target: str | Path, width: float | None = None, model: str | nn.Module = "") -> Network:
    """The trained network that `target` names: a run of a workdir, a checkpoint in it, or a .safetensors file.

    width: of a slimmable teacher, its widest by default. model: the Flax module of a file that holds your own, or its
    `module:Name`. A directory that the library's `distil` was given is a target too. Raises UserError.
    """
    inside = storage.path(target) / weights.STUDENT
    target = inside if storage.is_file(inside) else target
    if isinstance(model, str):
        return load(str(target), width, model)[0]
    variables, card = weights.read(storage.path(target), network=model)
    return Network(model, variables, card)


def known(source: dict, classes: Sequence[str] = ()) -> dict:
    """The data that a card's `source` names, as a config has them, and the names of their classes in the labels' order."""
    return {"name": source.get("data", ""), "data_dir": "", "test_split": source.get("test_split", "test"),
            "classes": list(classes), "digest": source.get("digests", {}).get("test")}  # fmt: skip


def _teacher(target: str, workdir: Path, run: Path, step: int | None, width: float | None, config, facts):
    c = config.teacher
    net = definition.networks(config, facts)[0][run.name]
    width = net.table[0] if width is None else width
    if width not in net.table:
        raise UserError(f"--width: {target} has the widths {', '.join(f'{w:g}' for w in sorted(net.table))}, not {width:g}")
    about = {"model": c.model, "width": width, "divisor": c.divisor, "sees": definition.sees(config, facts)}
    if step is None:
        path = run / f"width_{slimmable.width_key(width)}.safetensors"
        if not storage.exists(path):
            raise UserError(f"{target}: this teacher's training has not ended; name one of its checkpoints, or train on")
        variables, card = weights.read(path, c.model)
        weights.refuse_another(path, card, c.model, width, facts)
        return net.members[width], variables, about | {"source": card["source"]}
    if c.calibration.images:
        raise UserError(f"{target}: its batch norm is calibrated when training ends; name the finished run instead")
    state = _checkpoint(run, step)
    variables = net.extract(*averaging.read(state), width)
    return net.members[width], variables, about | {"source": {"steps": step}}


def _student(target: str, workdir: Path, run: Path, step: int | None, width: float | None, config, facts):
    c = config.student
    if width not in (None, c.width):
        raise UserError(f"--width: {target} is a student, of one width")
    steps = storage.saved_steps(run / "checkpoints")
    if not steps:
        raise UserError(f"{target}: has no checkpoint yet")
    step = steps[-1] if step is None else step
    state = _checkpoint(run, step)
    nets, pupil = definition.networks(config, facts)
    params, collections = averaging.read(state)
    variables = student.read(params, collections)
    source = {"steps": step, "arm": run.parent.name, "seed": int(run.name.removeprefix("seed"))}
    about = {"model": c.model, "width": c.width, "divisor": 0, "source": source}
    stage = next(s for s in definition.plan(config, facts, run.parent.name) if step <= s.end)
    if stage.widths:
        source["distiller"] = c.distiller.name
        distillation = definition.fit_distiller(config, facts, nets[stage.teacher], pupil, stage.widths)
        if distillation.predicts:
            taught = max(stage.widths)
            file = workdir / "teacher" / stage.teacher / f"width_{slimmable.width_key(taught)}.safetensors"
            model = student.Assisted(pupil, nets[stage.teacher].members[taught], distillation, taught)
            variables = {
                "student": variables, "params": params["distiller"], "state": collections["distiller"],
                "teacher": weights.read(file, config.teacher.model)[0],
            }  # fmt: skip
            about["assisted"] = {"distiller": c.distiller.name, "teacher": config.teacher.model, "width": taught}
            return model, variables, about
    return pupil, variables, about


def _checkpoint(run: Path, step: int) -> dict:
    from orbax.checkpoint import v1 as ocp

    path = run / "checkpoints" / str(step)
    try:
        metadata = ocp.checkpointables_metadata(path)
        saved = metadata.metadata["state"]
        # Placed anew: it may have been saved on other devices than these.
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved)
        state = ocp.load_checkpointables(path, {"state": abstract})["state"]
        checkpoints.refuse_damage(path, state, checkpoints.facts(path, metadata)["crc32c"])
        return state
    except checkpoints.Damaged:
        raise
    except Exception as e:  # Orbax and TensorStore raise of everything
        raise checkpoints.damaged(path, e) from e
