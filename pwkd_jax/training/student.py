"""The student: one distillation step, taught by a frozen sub-network that was materialised once for its stage."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pwkd_jax import distillers, models, slimmable
from pwkd_jax.data import Mixing
from pwkd_jax.distillers import Distillation, Progress, reruns
from pwkd_jax.models import again, compute
from pwkd_jax.stages import Stage, place
from pwkd_jax.training import accumulation, averaging, dot, freezing, metrics
from pwkd_jax.training.fusion import Fusion
from pwkd_jax.training.mutual import Mutual
from pwkd_jax.training.state import State, apply_gradients, create, rng
from pwkd_jax.training.students_together import Several


def init(
    model: nn.Module, image_shape, distillation: Distillation | None, tx, seed: int, start: dict | None = None,
    fusion: Fusion | None = None,
) -> State:  # fmt: skip
    """A fresh student; the same seed gives the same weights in every arm. start: variables in place of fresh ones."""
    key = jax.random.key(seed)
    variables = start or model.init(jax.random.fold_in(key, 0), jnp.zeros((1, *image_shape)), train=False)
    params, state = distillation.init(jax.random.fold_in(key, 1)) if distillation else ({}, {})
    # A method may begin its state as its parameters; the step is given both to overwrite, so they may not share memory.
    state = jax.tree.map(jnp.copy, state)
    modules, statistics = {}, {}
    if fusion:
        images = jnp.zeros((1, *image_shape))
        like = jax.eval_shape(lambda v: models.apply(model, v, images, train=False)[0], variables)
        made, statistics = fusion.init(jax.random.fold_in(key, 2), like)
        modules = {"online": made}
    kept = _collections({"batch_stats": {}} | {k: v for k, v in variables.items() if k != "params"}, state, statistics)
    return create(seed, {"student": variables["params"], "distiller": params} | modules, kept, tx)


def _collections(kept: dict, distiller: dict, online: dict) -> dict:
    """A state's collections, of a student's {"batch_stats", its own}, its distiller's state and the statistics of its modules
    of `fusion`. What there is none of has no place, so that checkpoints are what they always were."""
    more = {"own": models.collections(kept), "online": online}
    return {"batch_stats": kept["batch_stats"], "distiller": distiller} | {name: tree for name, tree in more.items() if tree}


def read(params: dict, collections: dict) -> dict:
    """{"params", "batch_stats", its own collections} of the student alone, of a state's params and collections."""
    return {"params": params["student"], "batch_stats": collections.get("batch_stats", {}), **collections.get("own", {})}


def variables(state: State) -> dict:
    """{"params", "batch_stats", its own collections} of the student alone."""
    return read(state.params, state.collections)


def make_step(
    model: nn.Module,
    teachers: dict[float, nn.Module],
    widths: tuple[float, ...],
    distillation: Distillation | None,
    plan: Sequence[Stage],
    tx: optax.GradientTransformation,
    schedule,
    preprocess,
    *,
    images: int,
    same_crop: bool = True,
    data_seed: int | None = None,
    several: Several | None = None,
    own: Callable | None = None,
    mix: Mixing | None = None,
    accumulate: int = 1,
    fixed: Sequence[str] = (),
    mutual: Mutual | None = None,
    fusion: Fusion | None = None,
    strong: Callable | None = None,
) -> Callable:
    """step(state, batch, teacher, once) -> (state, metrics) for the stages that `widths` teach; no widths is no teacher.

    teacher: {width: frozen variables of the narrow model}, read in evaluation mode and never written. Several widths: one is
    drawn at each step. once: what the arms of a study, whose steps are traced one after another, compute but once, see `study`.
    One program serves every stage with the same widths: what differs between them (learning rate, steps
    seen in the stage) comes from the state's step. images: in one epoch. data_seed: of augmentation and drawn widths, in place
    of the state's own. several: the state is that of several students, see `students_together`. own(outputs, labels) -> {name:
    per-image values [B]}: metrics besides ours. mix: what becomes of images and labels; the teacher sees the same ones, unless
    it has crops of its own. accumulate: parts of a batch, see `accumulation`; the teacher sees one at a time too.
    fixed: parts of the student that stay as they are, see `freezing`. mutual, fusion: what several students learn from each
    other; at most one of these. strong: `preprocess` to a strong view, for methods that ask for one.
    """
    locate, name = place(plan), plan[0].teacher
    views = bool(widths) and getattr(distillation.distiller, "views", False)
    both, as_predicting = bool(widths) and reruns(distillation.distiller), functools.partial(freezing.as_predicting, fixed)

    def see(common: State, batch: dict) -> tuple[dict, jax.Array]:
        """The batch as students see it, and the teacher's images of it."""
        inputs = preprocess(rng(common, 0), batch["image"])
        teacher_images = inputs if same_crop else preprocess(rng(common, 2), batch["image"])
        if mix:
            inputs, targets = mix(rng(common, 5), inputs, batch["label"])
            teacher_images = inputs if same_crop else mix(rng(common, 6), teacher_images, batch["label"])[0]
            batch = batch | {"label": jnp.argmax(targets, -1), "target": mix.weigh(targets)}
        return batch | {"image": inputs}, teacher_images

    def train(state: State, batch: dict, teacher: dict[float, dict], once: dict):
        common = state if data_seed is None else state.replace(seed=jnp.uint32(data_seed))
        sent = batch
        batch, teacher_images = _once(once, "images", lambda: see(common, sent))
        if views:
            batch = batch | {"strong": _once(once, "strong", lambda: strong(rng(common, 7), sent["image"]))}
        inputs = batch["image"]
        stage, at = locate(state.step)
        progress = Progress(stage, at, at * (len(batch["label"]) / images))
        drawn = jax.random.randint(rng(common, 1), (), 0, len(widths)) if len(widths) > 1 else 0

        def of_drawn(branch: Callable[[float], Any]) -> Any:
            """branch(width) of the width that teaches. Of a student it holds no more than the loss: in a branch, as in a loop
            (see `dispatch`), XLA has no fast kernels on CPU for the gradients of convolutions."""
            return jax.lax.switch(drawn, [lambda w=w: branch(w) for w in widths]) if len(widths) > 1 else branch(widths[0])

        def look(images: jax.Array, known: dict) -> dict[float, models.Outputs]:
            """What the teacher says at each width, zeros at those that are not drawn. known: what it said already."""

            def at(width: float):
                with compute.layers():
                    return models.apply(teachers[width], teacher[width], images, train=False)[0]

            if len(widths) == 1:
                return {w: _once(known, (name, w), lambda w=w: at(w)) for w in widths}
            said = {w: known[name, w] for w in widths if (name, w) in known}
            like = {w: jax.eval_shape(lambda w=w: at(w)) for w in widths if w not in said}

            def one(width: float):
                return {w: at(w) if w == width else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like[w]) for w in like}

            return said | (of_drawn(one) if like else {})

        rows, rest = accumulation.rows_of(batch | {"teacher": teacher_images}, len(inputs))
        whole = look(teacher_images, once) if widths and accumulate == 1 else {}  # once for all students

        def forward(params, collections, keys, images):
            key = keys[1] if models.draws(model, inputs.shape[1:]) else None
            own_params = params | {"student": freezing.stopped(params["student"], fixed)}
            with as_predicting():
                return models.forward(model, read(own_params, collections), images, train=True, key=key)

        def with_themselves(width, out, taught, params, collections):
            """The outputs of student and teacher, with the networks where the method runs them once more."""
            if not both:
                return out, taught
            own_params = params | {"student": freezing.stopped(params["student"], fixed)}
            out = again.attach(out, model, read(own_params, collections), True, as_predicting)
            return out, again.attach(taught, teachers[width], teacher[width], train=False)

        def said(state: State, _):
            out = forward(state.params, state.collections, (rng(state, 3), rng(state, 4)), inputs)[0]
            return fusion.said(out) if fusion else out.logits

        # The same computation as in each student's loss, which the compiler makes once.
        everyone = several.everyone(said, state) if mutual or fusion else None

        def from_others(index, params, collections, out, batch):
            """(loss, statistics of the student's modules, metrics)."""
            if mutual:
                return (off := mutual(out.logits, everyone)), {}, {"mutual": off}
            if not fusion:
                return 0, {}, {}
            labels, epoch = batch.get("target", batch["label"]), state.step * (len(batch["label"]) / images)
            return fusion(params["online"], collections["online"], index, out, everyone, labels, epoch)

        def loss_fn(params, collections, keys, rows, index=0):
            taught = whole or (look(rows["teacher"], {}) if widths else {})
            batch = {name: value for name, value in (rest | rows).items() if name != "teacher"}
            out, kept = forward(params, collections, keys, batch["image"])
            seen = {"train_top1": metrics.top1(out.logits, batch["label"])} | (own(out, batch["label"]) if own else {})
            more, online, heard = from_others(index, params, collections, out, batch)
            if not widths:
                loss = jnp.mean(slimmable.cross_entropy(out.logits, batch.get("target", batch["label"])))
                values = {**seen, "cross_entropy": loss, **heard}
                return loss + more, (_collections(kept, collections["distiller"], online), values)
            loss, known, values = of_drawn(lambda width: distillation(
                params["distiller"], collections["distiller"], width,
                *with_themselves(width, out, taught[width], params, collections), batch, progress, keys[0],
            ))  # fmt: skip
            return loss + more, (_collections(kept, known, online), {**seen, **values, **heard})

        apart = isinstance(tx, dot.Apart) and bool(widths)
        weight = getattr(distillation.distiller, "ce_weight", 1.0) if apart else 0.0
        by_part = dot.gradient(loss_fn, lambda aux: weight * aux[1]["cross_entropy"]) if apart else None
        waiting = _waiting(distillation, fusion)
        gradient = by_part or accumulation.accumulate(jax.value_and_grad(loss_fn, has_aux=True), accumulate)

        def learn(state: State, index=0):
            keys, who = (rng(state, 3), rng(state, 4)), (index,) if fusion else ()
            (loss, (collections, values)), grads = gradient(state.params, state.collections, keys, rows, *who)
            before = state.params
            state, used = apply_gradients(state, grads, collections, tx, schedule)
            if waiting:
                grads = jax.tree.map(jnp.add, *grads) if apart else grads
                state = state.replace(params=state.params | _hold(before, state.params, grads, waiting))
            if fixed:
                student = freezing.kept(before["student"], state.params["student"], fixed)
                state = state.replace(params=state.params | {"student": student})
            return state, {"train_loss": loss, **used, **values}

        return (several.each(learn) if several else learn)(state)

    def step(state: State, batch: dict, teacher: dict[float, dict], once: dict | None = None):
        learn = functools.partial(train, once={} if once is None else once)
        state, values = (several.spread(learn) if several else learn)(state, batch, teacher)
        return state, metrics.collect(several.named(values) if several else values)

    return step


def _once(kept: dict, key: Any, make: Callable[[], Any]) -> Any:
    """make(), and the next time what it gave."""
    if key not in kept:
        kept[key] = make()
    return kept[key]


def _waiting(distillation: Distillation | None, fusion: Fusion | None) -> list[str]:
    """The parts of the parameters of which some may get no gradient at a step; to look costs a GPU a kernel for every array.

    Connectors outside a narrow stage's leading block, entry by entry; and whole arrays of the student that a distiller's
    initial phase, or a method without cross entropy, does not train, and of the modules of `fusion` that are another student's.
    """
    method = distillation and distillation.distiller
    held_back = bool(method) and (distillers.starts(method) or not getattr(method, "ce_weight", 1.0))
    return [*(["distiller"] if method else []), *(["student"] if held_back or fusion else []), *(["online"] if fusion else [])]


def _hold(before: dict, after: dict, grads: dict, parts: Sequence[str]) -> dict:
    """Those `parts` of parameters `after` a step, what it gave no gradient as it was `before`: weight decay would otherwise
    shrink what waits. PyTorch leaves such parameters alone too."""

    def keep(part: str) -> dict:
        def one(grad, old, new):
            return jnp.where(grad == 0 if part == "distiller" else jnp.all(grad == 0), old, new)

        return jax.tree.map(one, grads[part], before[part], after[part])

    return {part: keep(part) for part in parts}


def enter_stage(
    state: State, fresh: Callable[[], State], init: Callable, reset: Sequence[str], connectors: str
) -> State:
    """The state with which a stage after the first begins; step and seed always carry over.

    reset: any of `momentum`, `batch_norm` (the student's statistics), `weights` (and what the student keeps beside them, its
    modules of `fusion` too); the rest carries over. connectors: `leading` keeps the distiller's parameters, `reinit` starts
    them and its state anew. fresh: gives the initial state; init: the optimiser's, of parameters.
    Doing it twice is doing it once, so a run killed at a stage's first step resumes to the same bits.
    """
    params, collections = dict(state.params), dict(state.collections)
    if "weights" in reset:
        begun = fresh()
        params |= {part: begun.params[part] for part in ("student", "online") if part in params}
        collections |= {part: begun.collections[part] for part in ("own", "online") if part in collections}
    if "batch_norm" in reset or "weights" in reset:
        collections["batch_stats"] = fresh().collections["batch_stats"]
    if connectors == "reinit":
        params["distiller"] = fresh().params["distiller"]
        collections["distiller"] = fresh().collections["distiller"]
    opt_state = init(params) if "momentum" in reset else state.opt_state
    began = state.average and ("weights" in reset or "batch_norm" in reset or connectors == "reinit")
    average = averaging.begin(params, collections) if began else state.average
    return state.replace(params=params, collections=collections, opt_state=opt_state, average=average)


@dataclasses.dataclass(frozen=True)
class Assisted:
    """A student whose distiller has the last word on its logits (SimKD's projector and teacher head), as a model.

    Its variables are {"student", "params", "state", "teacher"}: the student's own, the distiller's and the frozen
    teacher's at `width`.
    """

    student: nn.Module
    teacher: nn.Module
    distillation: Distillation
    width: float

    def apply(self, variables: dict, images: jax.Array, train: bool = False) -> jax.Array:
        out, taught = (
            models.apply(getattr(self, who), variables[who], images, train=False)[0] for who in ("student", "teacher")
        )
        return self.distillation.predict(variables["params"], variables["state"], self.width, out, taught)

    @staticmethod
    def variables(state: State, teacher: dict) -> dict:
        own, kept = state.params["distiller"], state.collections["distiller"]
        return {"student": variables(state), "params": own, "state": kept, "teacher": teacher}
