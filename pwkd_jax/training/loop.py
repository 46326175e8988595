"""The only training loop, and a run around it: one directory that resumes by itself."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from pwkd_jax.training import distributed, preemption, profile, selection
from pwkd_jax.training.checkpoints import Checkpoints
from pwkd_jax.training.metrics import Running, means
from pwkd_jax.training.non_finite import Watch
from pwkd_jax.training.state import State
from pwkd_jax.training.writers import Progress, Writer, refuse_without


def fit(
    state: State,
    step: Callable,
    pipeline: Callable,
    until: int,
    hooks: Sequence[Callable] = (),
    due: Callable[[int], bool] = lambda at: True,
) -> State:
    """Train to global step `until`: state, metrics = step(state, pipeline(n)), then every hook(n + 1, state, metrics).

    A hook that returns True has training end there. Hooks run in the order given, before the next batch is taken: log and
    evaluate first, save last, so that a checkpoint never stands without the metrics that led to it. A pipeline with `most`
    gives up to so many batches at once, pipeline(n, count), to one call of `step`; hooks run after such a chunk, and one ends
    at every step that is due.
    """
    at, most = int(state.step), getattr(pipeline, "most", 1)
    while at < until:
        count = 1
        while count < most and at + count < until and not due(at + count):
            count += 1
        state, metrics = step(state, pipeline(at) if count == 1 else pipeline(at, count))
        at += count
        ended = [hook(at, state, metrics) for hook in hooks]
        if any(ended):
            break
    return state


class Segment(NamedTuple):
    """Part of a run under one step function. enter(state) -> state is applied at its first step. name: in words."""

    end: int
    step: Callable
    enter: Callable
    name: str = ""


class Cadence(NamedTuple):
    """Everything that happens every so many steps."""

    log: int
    evaluate: int
    save: int
    tensorboard: bool
    tracker: str = ""


def usual(total: int, epoch: int) -> Cadence:
    """Of a run of `total` steps: logs every 50, evaluates every `epoch`, saves ten times."""
    return Cadence(50, epoch, max(1, total // 10), False)


def run(
    directory: Path | None,
    label: str,
    state: State,
    segments: Sequence[Segment],
    pipeline: Callable,
    evaluate: Callable[[State], dict[str, float]],
    cadence: Cadence,
    *,
    images: int,
    batch_size: int,
    texts: dict[str, str],
    keep: Sequence[int] = (),
    profiled: str = "",
    callback: Callable[[int, State, dict[str, jax.Array]], None] | None = None,
    held: Callable[[int], Sequence | None] = lambda step: None,
    chosen: Sequence[str] = (),
    patience: int = 0,
) -> tuple[State, list[dict]]:
    """Train `state` through all segments in `directory`, from its latest checkpoint if it has one; without one nothing is kept.

    Evaluates and saves at the end of every segment besides the cadence. images: in one epoch. texts: written once. profiled:
    see `profile.parse`. callback(step, state, {name: mean over the step's images}): after every dispatch, before anything is
    saved. held(step): what images the batch of a step holds, for the error where its loss is not finite. chosen: keys of rows,
    of each of which the best checkpoint is kept. patience: see `selection.over`, of the last segment. Returns the final state
    and the rows of metrics.jsonl: {"step", "epoch", "seconds", "train_loss", ..., "images_per_second"}, and what `evaluate`
    returned where it ran. Raises UserError when the loss or a parameter is not finite (see `non_finite`), and Preempted once it
    has saved what a resumed run needs to write the same rows as an unbroken one.
    """
    ends = [s.end for s in segments]
    checkpoints = Checkpoints(directory and directory / "checkpoints", keep=[*keep, ends[-1]])
    # A checkpoint replaces the state given, which then only lends its shapes and placement.
    restored = checkpoints.restore(state)
    state = state if restored is None else restored
    begin = int(state.step)
    note = checkpoints.note(begin) if restored is not None else None
    # The row of the restored step is still to be written where its evaluation was interrupted.
    owed = bool(note and note["due"])
    if begin and directory:
        rows = [at for at in range(1, begin + 1 - owed) if at % cadence.evaluate == 0 or at in ends]
        rows += [] if note else [begin]  # a save comes after its row
        distributed.decide(lambda: refuse_without(directory / "metrics.jsonl", rows))
    writer = Writer(directory, begin - owed, cadence.tensorboard, cadence.tracker)
    if not begin:
        writer.write_texts(0, texts)
    last_stage = ends[-2] if len(ends) > 1 else 0
    best = {selection.best(writer.rows, key) for key in chosen} - {None}
    checkpoints.choose(best)
    over = selection.over(writer.rows, chosen, patience, last_stage)
    progress = Progress(label, ends[-1], begin)
    running, clock = Running(), _Clock(begin)
    watch = Watch(directory, label, held, lambda at: next((s.name for s in segments if at <= s.end), ""))
    trace = profile.trace(profiled if directory else "", label, (directory or Path()) / "profile")
    if note:
        running.load(note["window"])
        clock.load(begin, note["clock"])

    def unwritten(at: int, due: bool) -> dict | None:
        window = running.dump()
        return window and {"due": due, "window": window, "clock": clock.dump(at)}

    def due(at: int) -> bool:
        # A row at every checkpoint too: the next window then starts there, resumed or not.
        return at in ends or any(at % every == 0 for every in (cadence.log, cadence.evaluate, cadence.save))

    def record(at: int, state: State, metrics) -> None:
        if metrics is not None:
            running.add(metrics)
        evaluating = at % cadence.evaluate == 0 or at in ends
        if not due(at):
            return progress.update(at)
        window = unwritten(at, True) if evaluating else None
        first, since = running.first(), clock.begun
        found = running.flush()
        watch.loss(since, at, found, first and (since + first[0] + 1, first[1]), at == ends[-1])
        watch.params(at, state.params)
        watch.passed(at)
        row = {"epoch": at * batch_size / images, **found, "images_per_second": clock.rate(at, batch_size)}
        if evaluating:
            try:
                row |= evaluate(state)
            except preemption.Preempted:
                writer.flush()
                checkpoints.save(at, state, window)
                raise
        row["seconds"] = clock.lap(at)
        writer.write_scalars(at, row)
        if evaluating and chosen:
            nonlocal best, over
            best = {selection.best(writer.rows, key) for key in chosen} - {None}
            checkpoints.choose(best)
            over = selection.over(writer.rows, chosen, patience, last_stage)
        note = f"loss {found['train_loss']:.3f}"
        progress.update(at, note + "".join(f", {k} {v:.2f}" for k, v in row.items() if k.startswith("top1")))

    def told(at: int, state: State, metrics) -> None:
        if callback:
            callback(at, state, means(metrics))

    def save(at: int, state: State, metrics) -> None:
        if at % cadence.save == 0 or at in ends or at in best or over:
            writer.flush()
            checkpoints.save(at, state)
        elif watch.near(at):
            watch.params(at, state.params)
            if watch.ahead(at):
                checkpoints.save(at, state, unwritten(at, False))

    def stop(at: int, state: State, metrics) -> bool:
        if preemption.reached():
            watch.params(at, state.params)
            writer.flush()
            checkpoints.save(at, state, unwritten(at, False))
            raise preemption.Preempted
        return over

    try:
        if owed:
            record(begin, state, None)
        trace.begin(begin)
        start = 0
        for segment in segments:
            if begin < segment.end and not over:
                if int(state.step) == start:
                    state = segment.enter(state)
                state = fit(state, segment.step, pipeline, segment.end, (trace, record, told, save, stop),
                            lambda at: due(at) or trace.due(at) or watch.near(at))  # fmt: skip
            start = segment.end
    except jax.errors.JaxRuntimeError as e:
        distributed.leave(e)  # rather than wait for a save in which a dead process has a part
        raise
    finally:
        trace.close()
        writer.flush()
        writer.close()
        checkpoints.close()
    last = writer.rows[-1]
    scores = ", ".join(f"{k} {v:.2f}" for k, v in last.items() if k.startswith("top1") and "train" not in k)
    early = f" of {ends[-1]}, the last {patience} evaluations without a better one" if over and last["step"] < ends[-1] else ""
    progress.close(f"{last['step']} steps{early}, {sum(r['seconds'] for r in writer.rows):.1f} s, {scores}")
    return state, writer.rows


class _Clock:
    """Seconds since the last row, and the rate of training without evaluation."""

    def __init__(self, step: int):
        self._step, self._lap, self._since = step, time.monotonic(), time.monotonic()

    @property
    def begun(self) -> int:
        """The step of the last row."""
        return self._step

    def dump(self, step: int) -> list[float]:
        now = time.monotonic()
        return [step - self._step, now - self._lap, now - self._since]

    def load(self, step: int, dumped: list[float]) -> None:
        now = time.monotonic()
        self._step, self._lap, self._since = step - dumped[0], now - dumped[1], now - dumped[2]

    def rate(self, step: int, batch_size: int) -> float:
        now = time.monotonic()
        return (step - self._step) * batch_size / max(1e-9, now - self._since)

    def lap(self, step: int) -> float:
        now = time.monotonic()
        seconds = now - self._lap
        self._step, self._lap, self._since = step, now, now
        return seconds


def snapshots(directory: Path, like: State, steps: Sequence[int]) -> list[State]:
    """The states saved at `steps` of a finished run, placed as `like`."""
    checkpoints = Checkpoints(directory / "checkpoints", keep=steps)
    try:
        return [checkpoints.restore(like, step) for step in steps]
    finally:
        checkpoints.close()
