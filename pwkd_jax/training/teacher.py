"""The teacher: one sandwich-rule step over all its widths, its training, and what is left of it when that ends."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from clu import parameter_overview

from pwkd_jax import data, models, slimmable, storage, weights
from pwkd_jax.errors import UserError
from pwkd_jax.models import contract, precision
from pwkd_jax.slimmable import Slimmable
from pwkd_jax.training import (
    accumulation,
    arguments,
    averaging,
    calibration,
    device_gradients,
    dispatch,
    distributed,
    freezing,
    loop,
    metrics,
    optimizers,
    record,
    schedules,
    sharding,
)
from pwkd_jax.training import state as states
from pwkd_jax.training.ahead import compile_ahead
from pwkd_jax.training.evaluation import Evaluator
from pwkd_jax.training.non_finite import skipping
from pwkd_jax.training.sandwich import sandwich_gradient
from pwkd_jax.training.sharding import place
from pwkd_jax.training.state import State, apply_gradients, rng
from pwkd_jax.training.task import Task
from pwkd_jax.weights import Network


def make_step(
    net: Slimmable, tx: optax.GradientTransformation, schedule: Callable | None, preprocess: Callable,
    mesh: jax.sharding.Mesh | None = None, mix: data.Mixing | None = None, accumulate: int = 1,
    fixed: Sequence[str] = (), **sandwich
) -> Callable:
    """step(state, batch) -> (state, metrics): one optimiser update from the gradients of all sub-networks together.

    preprocess(key, uint8 images) -> float images, augmented. sandwich: the keywords of `sandwich.sandwich_loss`. mesh: that of
    the state's arrays where each device along `data` has the parameters whole; the step then communicates less.
    mix: what becomes of images and labels after that. accumulate: parts of a batch, see `accumulation`.
    fixed: parts of the network that stay as they are, see `freezing`.
    """

    def widths(params, statistics, key, rows):
        with freezing.as_predicting(fixed):
            return sandwich_gradient(net, params, statistics, *rows, key=key, view=view, **sandwich)

    view = functools.partial(_each, freezing.stopped, fixed)
    gradient = accumulation.accumulate(widths, accumulate)
    if mesh:
        gradient = device_gradients.over_devices(gradient, net, mesh, accumulate)

    def step(state: State, batch: dict):
        images, labels = preprocess(rng(state, 0), batch["image"]), batch["label"]
        if mix:
            images, labels = mix(rng(state, 2), images, labels)
            labels = mix.weigh(labels)
        (loss, (statistics, values)), grads = gradient(state.params, state.collections, rng(state, 1), (images, labels))
        before = state.params
        state, used = apply_gradients(state, grads, statistics, tx, schedule)
        state = state.replace(params=_each(freezing.kept, fixed, before, state.params))
        return state, metrics.collect({"train_loss": loss, **used, **values})

    return step


def _each(change: Callable, names: Sequence[str], *params: dict) -> dict:
    """change(*trees, names) of a slimmable network's parameters: the shared ones, and each width's batch norm."""
    if not names:
        return params[-1]
    shared = change(*(p["shared"] for p in params), names)
    norms = {key: change(*(p["batch_norm"][key] for p in params), names) for key in params[0]["batch_norm"]}
    return {**params[-1], "shared": shared, "batch_norm": norms}


def freeze(net: Slimmable, params: dict, statistics: dict) -> dict[float, dict]:
    """{width: variables of the standalone narrow model} of a trained teacher: what students and export read."""
    return {w: net.extract(params, statistics, w) for w in net.table}


def make_calibration(net: Slimmable, split: data.Split, preprocess, mesh, *, images: int, batch_size: int, seed: int):
    """calibrate(frozen) -> frozen with every width's statistics measured anew under its own weights.

    True cumulative mean over at least `images` training images in batches of `batch_size` through the training
    transform, always the same ones for a seed; nothing of the old statistics remains.
    """
    count = calibration.calibration_batches(images, batch_size)
    pipeline = data.batches(split, batch_size, seed, jax.process_index(), jax.process_count(), cycle=count)

    def one(member, variables, step, batch):
        key = jax.random.fold_in(jax.random.key(seed), step)
        images = preprocess(key, batch["image"])
        noise = jax.random.fold_in(key, 1) if models.draws(member, images.shape[1:]) else None
        return calibration.batch_statistics(member, variables, images, noise)

    compiled = jax.jit(one, static_argnums=0, out_shardings=sharding.replicated(mesh))

    def calibrate(frozen: dict[float, dict]) -> dict[float, dict]:
        result = {}
        for width, variables in frozen.items():
            stats = calibration.calibrate(
                lambda i, w=width, v=variables: compiled(
                    net.members[w], v, np.int32(i), sharding.put_batch(mesh, pipeline(i))
                ),
                count,
            )
            result[width] = {**variables, "batch_stats": stats}
        return result

    return calibrate


def programs(
    net: Slimmable, task: Task, rule: optimizers.Rule, *, sharding_how: str = "replicated", start: dict | None = None,
    skip: bool = False, ema: float = 0.0, **sandwich
) -> tuple[Callable, Callable]:  # fmt: skip
    """(creator of the first state from (seed, variables to start from or None), compiled step(state, batch)).

    sharding_how: of parameters and optimiser state, see `sharding.shardings`. start: variables like those to come. skip: steps
    that are not finite, see `non_finite.skipping`. ema: see `averaging`; 0 is off. sandwich: the rest of `make_step`.
    """
    mesh = task.mesh if sharding_how == "replicated" else None
    step = make_step(net, *rule, task.preprocess, mesh, **sandwich)
    step = averaging.averaging(step, ema) if ema else step
    step = skipping(step) if skip else step

    def make(seed, given):
        first = net.spread(given) if given else net.init(jax.random.key(seed), task.image_shape)
        made = states.create(seed, *first, rule.direction)
        return made.replace(average=averaging.begin(*first)) if ema else made

    create = sharding.creator(task.mesh, make, sharding_how, 0, start)
    return create, sharding.jit_step(task.mesh, dispatch.many(step, task.image_shape), create.layout)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen slimmable teacher. variables: {width: those of the standalone narrow model}. cards: {width: its card, see
    `weights`}. rows: what was logged while it trained, [] of one that was loaded."""

    net: Slimmable
    variables: dict[float, dict]
    cards: dict[float, dict]
    rows: list[dict] = dataclasses.field(default_factory=list)

    @property
    def widths(self) -> tuple[float, ...]:
        """Of its sub-networks, narrow to wide."""
        return tuple(sorted(self.variables))

    def at(self, width: float | None = None) -> Network:
        """Its sub-network at `width`, the widest by default: an ordinary network. Raises UserError for a width it has not."""
        width = max(self.variables) if width is None else width
        if width not in self.variables:
            raise UserError(f"width: this teacher has {', '.join(f'{w:g}' for w in self.widths)}, not {width:g}")
        return Network(self.net.members[width], self.variables[width], self.cards[width])

    def __repr__(self) -> str:
        name = self.cards[max(self.variables)]["model"]
        return f"Teacher({name} at widths {', '.join(f'{w:g}' for w in self.widths)}, {len(self.rows)} rows)"

    def logits(self, images: jax.Array, width: float | None = None) -> jax.Array:
        """Logits [B, classes] of its sub-network at `width`, see `Network.logits`."""
        return self.at(width).logits(images)

    def save(self, directory: str | Path) -> None:
        """Write width_W.safetensors for every width, and their cards, into a folder. Raises UserError, OSError."""
        if Path(directory).suffix == ".safetensors":
            raise UserError(f"{directory}: a teacher is saved as a folder, of one file a width; give a folder's name")
        if any("ensemble" in card for card in self.cards.values()):
            raise UserError(f"{directory}: several teachers combined are not saved as one; save each of them")
        fetched = {w: distributed.fetch(v) for w, v in self.variables.items()}
        if distributed.primary():
            found = {w: Network(self.net.members[w], v, self.cards[w]) for w, v in fetched.items()}
            weights.write_widths(storage.path(directory), found)


def load_teacher(directory: str | Path, net: Slimmable) -> Teacher:
    """The teacher that `Teacher.save`, or a training command, left in `directory`, for the network that it was trained as.

    Raises UserError where a file is missing or does not fit."""
    likes = {w: net.likes[w] for w in net.table}
    found = weights.read_widths(storage.path(directory), likes, lambda path, w: weights.read(path, network=net.members[w]))
    return Teacher(net, {w: v for w, (v, _) in found.items()}, {w: card for w, (_, card) in found.items()})


def as_teacher(given: "Teacher | Network") -> Teacher:
    """Any trained network as a teacher of one width, 1."""
    if isinstance(given, Teacher):
        return given
    if not hasattr(given, "card"):
        raise UserError(f"teacher: should be a Teacher or a Network, trained or loaded, and this is a {type(given).__name__}")
    given = getattr(given, "network", given)
    variables = models.whole(given.variables)
    shape = tuple(given.card["image_shape"])
    net = Slimmable({1.0: given.model}, {1.0: models.abstract(given.model, shape)}, (1.0,), "switchable", False)
    return Teacher(net, {1.0: variables}, {1.0: given.card})


def train_teacher(
    net: Slimmable,
    task: Task,
    *,
    duration: str | int = "60 epochs",
    batch_size: int | None = None,
    optimizer: optax.GradientTransformation | optimizers.Rule | None = None,
    learning_rate: float | Callable[[jax.Array], jax.Array] | None = None,
    loss: str = "hard",
    sampling: str = "all",
    subnetworks: int = 4,
    reduction: str = "sum",
    calibration: Mapping[str, int] | None = None,
    seed: int = 0,
    start: dict | None = None,
    metrics: Callable[[models.Outputs, jax.Array], dict[str, jax.Array]] | None = None,
    callback: Callable[[int, State, dict[str, jax.Array]], None] | None = None,
    directory: str | Path | None = None,
    label: str = "teacher",
    cadence: loop.Cadence | None = None,
    sharding: str = "replicated",
    frozen_sharding: str = "replicated",
    profiled: str = "",
    cards: Callable[[float, list[dict]], dict] | None = None,
    non_finite: str = "stop",
    mix: data.Mixing | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
    fixed: Sequence[str] = (),
    compiled: tuple[Callable, Callable] | None = None,
) -> Teacher:
    """Train all widths of `net` together by the sandwich rule and freeze them.

    duration: '60 epochs', '5000 steps', '1e6 examples', or a number of steps. optimizer: an optax chain with its learning rate
    in it; by default SGD (momentum 0.9, weight decay 5e-4) at `learning_rate`: the peak of one cosine, 0.05 by default, or a
    schedule on the global step. loss, sampling, subnetworks, reduction: see `sandwich.sandwich_loss`. calibration: {"images",
    "batch_size", "seed"} measures batch-norm statistics anew, see `make_calibration`. start: variables of the widest network.
    metrics(outputs, labels) -> {name: per-image values [B]}, logged for every width. callback(step, state, {name: mean}): after
    every step. directory: where checkpoints and metrics go, and where a stopped run goes on; nothing is kept without one.
    label: '' prints nothing. sharding, frozen_sharding: replicated or fsdp, of the state and of what is frozen. cards(width,
    rows) -> the card of a sub-network, see `weights`. non_finite: `stop` at a step whose loss or gradient is not finite, or
    `skip` and count it. mix: mixup, CutMix, label smoothing. accumulate: parts of a batch that are learnt from in turn, see
    `accumulation`. ema: decay of a mean of the weights that is frozen in their place, see `averaging`; 0 is off. fixed: parts
    of a network of one width that stay as `start` has them, see `freezing`. compiled: of `programs`, to use again. Raises
    UserError where something does not fit or is not finite.
    """
    if not isinstance(net, Slimmable):
        raise UserError(f"net: should come of pwkd_jax.make_slimmable, and this is a {type(net).__name__}")
    arguments.task(task)
    arguments.optimizer(optimizer, learning_rate)
    arguments.duration(duration)
    arguments.one_of("loss", loss, ("hard", "inplace", "inplace_mix"))
    arguments.one_of("sampling", sampling, ("all", "sandwich"))
    arguments.one_of("reduction", reduction, ("sum", "mean"))
    arguments.averaging(ema)
    if fixed and len(net.widths) > 1:
        raise UserError("fixed: no part of a slimmable network can stay as it is, for its narrow widths are to be trained")
    freezing.check("fixed", fixed, net.likes[net.widest])
    arguments.one_of("non_finite", non_finite, ("stop", "skip"))
    images, size = len(task.train), arguments.batch_size(task, batch_size)
    arguments.parts(accumulate, size, task.mesh)
    if not compiled:
        arguments.seed(seed)
        for member in net.members.values():
            contract.check(member, task.image_shape, "teacher.model", task.num_classes)
        if misfit := slimmable.misfit(models.abstract(net.members[net.widest], task.image_shape), net.likes[net.widest]):
            raise UserError(f"net: was made for other images than the task's {list(task.image_shape)} ('{misfit}' differs)")
    total = schedules.steps(duration, "duration", batch_size=size, images=images) if isinstance(duration, str) else duration
    spans = [(0, int(total))]
    rule = optimizers.rule(optimizer, learning_rate, lambda p: schedules.learning_rate(spans, form="cosine", peak=p))
    sandwich = {"loss": loss, "sampling": sampling, "subnetworks": subnetworks, "reduction": reduction}
    sandwich |= {"own": arguments.own_metrics(metrics), "mix": mix, "accumulate": accumulate, "ema": ema}
    sandwich |= {"fixed": tuple(fixed)}
    skip = non_finite == "skip"
    create, step = compiled or programs(net, task, rule, sharding_how=sharding, start=start, skip=skip, **sandwich)
    calibrate = calibration and calibration.get("images") and make_calibration(
        net, task.train, task.preprocess, task.mesh, **{"batch_size": size, "seed": 0, **calibration}
    )  # fmt: skip

    def frozen(state: State) -> dict[float, dict]:
        found = freeze(net, state.params, state.collections)
        return place(task.mesh, calibrate(found) if calibrate else found, frozen_sharding)

    def evaluate(state: State) -> dict[str, float]:
        if not (task.evaluator or task.validator):
            return {}
        judged = frozen(averaging.outcome(state))
        found = scores(task.evaluator, "top1", judged) | scores(task.validator, "validation_top1", judged)
        return found | (scores(task.evaluator, "raw_top1", frozen(state)) if averaging.averages(state) else {})

    def scores(evaluator: Evaluator | None, name: str, judged: dict[float, dict]) -> dict[str, float]:
        if evaluator is None:
            return {}
        return {f"{name}_{slimmable.width_key(w)}": evaluator(net.members[w], v)["top1"] for w, v in judged.items()}

    directory, batches = directory and storage.path(directory, "directory"), task.batches(size, seed)
    begun = directory and storage.saved_steps(directory / "checkpoints")  # it may have no step left
    step = step if begun else compile_ahead(step, create.like, batches)
    state = create(seed, start)
    widest = net.extract(state.params, state.collections, net.widest)["params"]
    overview = parameter_overview.get_parameter_overview(widest)
    if directory and not compiled:
        record.claim(directory, {
            "kind": "teacher", **record.of_data(task), "model": repr(precision.plain(net.members[net.widest])),
            "widths": list(net.widths), "table": list(net.table), "batch norm": net.batch_norm, "masked": net.masked,
            "steps": int(total), "batch size": size, "seed": int(seed), "loss": loss, "sampling": sampling,
            "subnetworks": subnetworks, "reduction": reduction, "optimizer": str(jax.tree.structure(state.opt_state)),
            "learning rate": record.schedule(rule.schedule, total),
            "start": None if start is None else record.digest(start), **({"mix": repr(mix)} if mix else {}),
            **({"ema": ema} if ema else {}), **({"accumulate": accumulate} if accumulate > 1 else {}),
            **({"fixed": list(fixed)} if fixed else {}),
        })  # fmt: skip
    if directory:
        distributed.write(directory / "parameters.txt", overview + "\n")
    state, rows = loop.run(
        directory, label, state, [loop.Segment(total, step, lambda s: s)], batches, evaluate,
        cadence or loop.usual(total, -(-images // size)), images=images, batch_size=size, texts={"parameters": overview},
        profiled=profiled, callback=callback, held=functools.partial(task.held, size, seed),
    )  # fmt: skip
    variables = frozen(averaging.outcome(state))
    make = cards or (lambda w, rows: task.card(precision.plain(net.members[w]), {"steps": total}))
    found = Teacher(net, variables, {w: make(w, rows) for w in variables}, rows)
    if directory and not compiled:
        found.save(directory)
    return found
