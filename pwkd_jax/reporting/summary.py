"""The summary of an experiment, `summary.json` in the work directory: what every table and picture is made from.

All accuracies are top-1 in percent, times in seconds. A `stat` is {"mean", "std", "n"}: std is the sample standard
deviation (ddof = 1), null where n = 1. Numbers that are not finite are null.

    format, version     "pwkd_jax.summary", 1
    name, seconds       of the experiment, and of all its training
    config              as it was run, nested
    environment         versions of pwkd_jax, python, jax, jaxlib, flax, optax, orbax-checkpoint and numpy; device,
                        device_count, git_commit ("unknown" if none), git_dirty
    data                name, train_images, test_images, num_classes, image_shape; classes = their names, [] without
    teachers            {"slimmable": T, "standard": T}, either may be absent. T: model, steps, epochs, seconds,
                        images_per_second, widths = [{width, params, macs, top1_last, top1_best}],
                        curve = [{step, epoch, learning_rate, train_loss, top1: {width: %}}], classes = C of the widest
    student             model, params, macs
    runs                one for each arm and seed: arm, seed, top1_last, top1_best, seconds, images_per_second,
                        plan = [{teacher, widths, start, end}] in steps, cycles = [[start, end]],
                        stage_ends = [% at the end of each stage], ensemble = [{members, top1}] of the last snapshots,
                        curve = [{step, epoch, learning_rate, train_loss, top1}], learning_rates = [[step, rate]],
                        classes = C at the last epoch. C: images and correct, of each class among the test images, and its
                        matrix = [[images of the row's class taken for the column's]] up to 50 classes, else confused =
                        [[class, other, images]], the 30 pairs that are confused most. Runs of before this was kept lack it
                        selected = {step, validation_top1, top1} of the evaluation that was best on validation images
    ensemble_members    how many of the last snapshots make the ensemble that the tables show
    arms                {arm: A} in the order of the controls. A: plan and cycles (of its first seed),
                        runs = [{seed, top1_last, top1_best}], top1_last and top1_best: stats, stage_ends: a stat for
                        each stage, ensemble: a stat with `members`, or null
    gain                partial_to_whole: pwkd minus the better (by mean top1_last) of kd_whole and kd_whole_cyclic: a
                        stat of the differences seed by seed, with against (the control), per_seed ({seed: points}) and
                        note (null, or what was missing); null with a `reason` (else null). over_kd_standard: the
                        same over kd_standard, or null
    warnings            sentences: the teacher's sanity gates that failed
"""

import itertools
import json
import os
from typing import Any

import numpy as np

from pwkd_jax import storage
from pwkd_jax.errors import UserError
from pwkd_jax.reporting import per_class, phrases

FORMAT, VERSION = "pwkd_jax.summary", 1
ORDER = ("alone", "kd_standard", "kd_whole", "kd_whole_cyclic", "pwkd", "pwkd_reversed", "pwkd_random")

# The schema above, and what result.json of a teacher and of a student holds, as `storage.record` compares it.
_PLAN, _STAT = [{"teacher": str, "widths": [float], "start": int, "end": int}], {"mean": float, "std": (float, None), "n": int}
_EFFORT = {"seconds": float, "images_per_second": float}
_POINT = {"step": int, "epoch": float, "learning_rate": object, "train_loss": object}
_TOP1 = {"top1_last": float, "top1_best": float}
TEACHER = {"model": str, "widths": [{"width": float, "params": int, "macs": int, **_TOP1}],
           "curve": [{**_POINT, "top1": {"*": float}}], "steps": int, "epochs": float, "classes?": per_class.COUNTS,
           **_EFFORT}  # fmt: skip
STUDENT = {"arm": str, "seed": int, **_TOP1, "plan": _PLAN, "cycles": [[int]], "stage_ends": [float],
           "ensemble": [{"members": int, "top1": float}], "curve": [{**_POINT, "top1": float}], "learning_rates": [[float]],
           "classes?": per_class.COUNTS, "selected?": {"step": int, "validation_top1": float, "top1": float},
           **_EFFORT}  # fmt: skip
_ARM = {"plan": _PLAN, "cycles": [[int]], "runs": [{"seed": int, **_TOP1}], "top1_last": _STAT, "top1_best": _STAT,
        "stage_ends": [_STAT], "ensemble": ({"members": int, **_STAT}, None)}  # fmt: skip
_DIFFERENCE = ({**_STAT, "against": str, "per_seed": {"*": float}, "note": (str, None)}, None)
SHAPE = {
    "name": str, "config": {}, "environment": {}, "teachers": {"*": TEACHER}, "runs": [STUDENT], "arms": {"*": _ARM},
    "data": {"name": str, "train_images": int, "test_images": int, "num_classes": int, "image_shape": [int],
             "classes?": [str]},
    "student": {"model": str, "params": int, "macs": int}, "ensemble_members": int, "warnings": [str], "seconds": float,
    "gain": {"partial_to_whole": _DIFFERENCE, "reason": (str, None), "over_kd_standard": _DIFFERENCE},
}  # fmt: skip


def build(
    *,
    name: str,
    config: dict,
    environment: dict,
    data: dict,
    teachers: dict,
    student: dict,
    runs: list[dict],
    seconds: float,
    ensemble_members: int,
) -> dict:
    """The summary, by the schema above; plain JSON values only, so `read` gives back what `build` gave.

    ensemble_members: report the ensemble of this many last snapshots, where a run has it.
    Raises ValueError if two runs have the same arm and seed.
    """
    found = [(run["arm"], run["seed"]) for run in runs]
    if len(set(found)) != len(found):
        raise ValueError(f"each arm and seed once, got {sorted(found)}")
    names = sorted({arm for arm, _ in found}, key=lambda arm: (ORDER.index(arm) if arm in ORDER else len(ORDER), arm))
    arms = {arm: _arm([run for run in runs if run["arm"] == arm], ensemble_members) for arm in names}
    return _plain(
        {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "config": config,
            "environment": environment,
            "data": data,
            "teachers": teachers,
            "student": student,
            "runs": runs,
            "ensemble_members": ensemble_members,
            "arms": arms,
            "gain": _gain(arms),
            "warnings": gates(teachers, arms) + learnt_nothing(teachers, arms, data) + coupled(config),
            "seconds": seconds,
        }
    )


def write(summary: dict, workdir: str | os.PathLike) -> None:
    """Writes `summary.json` and `report.html` into `workdir`, each whole or not at all."""
    # The numbers first: no trouble with a picture may cost them.
    storage.replace(storage.path(workdir) / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    from pwkd_jax.reporting import page  # matplotlib, which nobody waits for before training begins

    storage.replace(storage.path(workdir) / "report.html", page.report(summary))


def read(path: str | os.PathLike) -> dict:
    """The summary in a work directory, or in a file. Raises UserError if there is none that this version can read."""
    path = storage.path(path)
    file = path / "summary.json" if storage.is_folder(path) else path
    try:
        summary = json.loads(storage.read(file))
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: give the work directory of a training that has ended, or its summary.json"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): give a summary.json as training wrote it") from None
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise UserError(f'{file} is not a summary: its "format" should be "{FORMAT}"')
    version = summary.get("version")
    if type(version) is not int or version < 1:
        raise UserError(f'{file} has version {version!r}: its "version" should be a whole number from 1 to {VERSION}')
    if version > VERSION:
        raise UserError(
            f"{file} has version {version}, and this pwkd_jax reads up to {VERSION}: use the pwkd_jax that wrote it, "
            "or a newer one"
        )
    if missing := [key for key in SHAPE if key not in summary]:
        raise UserError(f"{file} lacks {', '.join(missing)}: give a summary.json as training wrote it")
    if fault := storage.misfit(summary, SHAPE) or _contradiction(summary):
        raise UserError(f"{file} is not as training wrote it: {fault}; the same training command writes it again")
    return summary


def _contradiction(summary: dict) -> str:
    """Where the arms of a summary are not those of its runs, as a phrase."""
    runs = {arm: [run for run in summary["runs"] if run["arm"] == arm] for arm in {run["arm"] for run in summary["runs"]}}
    for arm in runs.keys() | summary["arms"].keys():
        said, own = summary["arms"].get(arm), [(run["seed"], run["top1_last"], run["top1_best"]) for run in runs.get(arm, [])]
        if not said or [(run["seed"], run["top1_last"], run["top1_best"]) for run in said["runs"]] != own:
            return f"its arm '{arm}' is not that of its runs"
        if any(abs(said[key]["mean"] - float(np.mean([run[key] for run in said["runs"]]))) > 1e-6 for key in _TOP1):
            return f"the mean of its arm '{arm}' is not that of its runs"
        if any(len(run["stage_ends"]) != len(run["plan"]) or not run["plan"] for run in runs[arm]):
            return f"a run of '{arm}' has another number of stages than its plan"
    if any(not teacher["widths"] for teacher in summary["teachers"].values()):
        return "a teacher has no widths"
    for counts in [of["classes"] for of in (*summary["runs"], *summary["teachers"].values()) if "classes" in of]:
        if len(counts["images"]) != summary["data"]["num_classes"]:
            return "a run counted another number of classes than its data have"
        if fault := per_class.fault(counts):
            return fault
    return ""


def table(summary: dict) -> str:
    """The results as plain text of at most 100 columns, as training prints them at its end."""
    parts = [phrases.wrap(f"{summary['name']}: {phrases.setting(summary)}")]
    if rows := phrases.teacher_rows(summary):
        parts.append(phrases.grid(("teacher", "width", "params", "MACs", "last", "best"), rows))
    if rows := phrases.arm_rows(summary):
        parts.append(phrases.grid(("arm", "teacher and schedule", "last", "best", "n"), rows, text=2, folded=1))
        parts.append("Top-1 in percent, mean ± sample standard deviation over n seeds; last epoch is the headline.")
    parts += [phrases.wrap(line) for line in (phrases.headline(summary), phrases.standard(summary)) if line]
    parts += [phrases.wrap(f"Warning: {line}", "  ") for line in summary["warnings"]]
    return "\n\n".join(parts)


def _arm(runs: list[dict], members: int) -> dict:
    ensemble = [e["top1"] for run in runs for e in run["ensemble"] if e["members"] == members]
    return {
        "plan": runs[0]["plan"],
        "cycles": runs[0]["cycles"],
        "runs": [{key: run[key] for key in ("seed", "top1_last", "top1_best")} for run in runs],
        "top1_last": phrases.stat([run["top1_last"] for run in runs]),
        "top1_best": phrases.stat([run["top1_best"] for run in runs]),
        "stage_ends": [phrases.stat(ends) for ends in zip(*(run["stage_ends"] for run in runs), strict=True)],
        "ensemble": {"members": members, **phrases.stat(ensemble)} if ensemble else None,
    }


def _gain(arms: dict) -> dict:
    controls = [arm for arm in phrases.CONTROLS if arm in arms]
    whole, reason = None, None
    if "pwkd" not in arms:
        reason = "pwkd did not run"
    elif not controls:
        reason = f"neither {' nor '.join(phrases.CONTROLS)} ran"
    else:
        missing = [f"{arm} did not run" for arm in phrases.CONTROLS if arm not in arms]
        whole = _difference(arms, max(controls, key=lambda arm: arms[arm]["top1_last"]["mean"]), missing)
        reason = None if whole else "pwkd and its better control share no seed"
    standard = _difference(arms, "kd_standard", []) if {"pwkd", "kd_standard"} <= arms.keys() else None
    return {"partial_to_whole": whole, "reason": reason, "over_kd_standard": standard}


def _difference(arms: dict, against: str, notes: list[str]) -> dict | None:
    """pwkd minus `against`, seed by seed over the seeds that both ran; None if there are none."""
    ours, theirs = ({run["seed"]: run["top1_last"] for run in arms[arm]["runs"]} for arm in ("pwkd", against))
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return None
    if len(both) < max(len(ours), len(theirs)):
        notes = [*notes, f"pwkd and {against} share only {phrases.plural(len(both), 'seed')}"]
    per_seed = {str(seed): ours[seed] - theirs[seed] for seed in both}
    note = "; ".join(notes) or None
    return {**phrases.stat(list(per_seed.values())), "against": against, "per_seed": per_seed, "note": note}


def gates(teachers: dict, arms: dict) -> list[str]:
    """The sanity gates of a slimmable teacher that fail, a sentence each, on last-epoch top-1. Source: the algorithm's A12."""
    if "slimmable" not in teachers:
        return []
    rows = sorted(teachers["slimmable"]["widths"], key=lambda row: row["width"])
    said = [
        f"The slimmable teacher is less accurate at width {phrases.width(wide['width'])} ({wide['top1_last']:.2f} %) "
        f"than at {phrases.width(narrow['width'])} ({narrow['top1_last']:.2f} %): a later stage may teach worse than an "
        "earlier one."
        for narrow, wide in itertools.pairwise(rows)
        if wide["top1_last"] < narrow["top1_last"]
    ]
    whole, narrowest = rows[-1]["top1_last"], rows[0]["top1_last"]
    if "standard" in teachers:
        ordinary = max(teachers["standard"]["widths"], key=lambda row: row["width"])["top1_last"]
        if ordinary - whole > 1:
            said.append(
                f"The slimmable teacher's full width ({whole:.2f} %) is more than 1 point under the standard teacher "
                f"({ordinary:.2f} %): it pays for its widths."
            )
    if "alone" in arms and narrowest < arms["alone"]["top1_last"]["mean"]:
        said.append(
            f"The narrowest teacher, width {phrases.width(rows[0]['width'])} ({narrowest:.2f} %), is below the student "
            f"trained alone ({arms['alone']['top1_last']['mean']:.2f} %): the first stage may hurt; start wider."
        )
    return said


def learnt_nothing(teachers: dict, arms: dict, data: dict) -> list[str]:
    """A sentence for every network whose last top-1 is that of guessing, by twice the deviation that so many images leave."""
    chance = 1 / data["num_classes"]
    most = 100 * (chance + 2 * (chance * (1 - chance) / data["test_images"]) ** 0.5)
    found = {
        f"The {name} teacher at width {phrases.width(row['width'])}": (row["top1_last"], "teacher")
        for name, teacher in teachers.items()
        for row in teacher["widths"]
    } | {f"The student of {arm}": (result["top1_last"]["mean"], "student") for arm, result in arms.items()}
    return [
        f"{who} ends at {top1:.2f} %, no better than a guess among {data['num_classes']} classes: it learnt nothing; look at "
        f"its loss, and try a lower {key}.schedule.peak or a longer {key}.duration."
        for who, (top1, key) in found.items()
        if top1 <= most
    ]


def coupled(config: dict) -> list[str]:
    """A sentence where the students of an arm learnt from each other, and one that names their leader, if they had one."""
    student = config.get("student", {})
    key = next((key for key in ("mutual", "online") if student.get(key)), None)
    if key is None:
        return []
    said = [f"The students of an arm learnt from each other (student.{key}): their deviation and its intervals are of one "
            "group of students, not of as many independent ones."]  # fmt: skip
    if key == "online":
        leader = config["seed"] + config["seeds"] - 1
        said.append(f"Seed {leader} is the leader of each arm, taught by the others' fused maps: its result is the method's, "
                    "and means are over leader and others alike.")  # fmt: skip
    return said


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back: lists for tuples and arrays, strings for keys, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
