"""What a bucket costs a run: requests, none of them for a step, and the time that training waits for them."""

import time

import pytest
from test_commands import TINY

from pwkd_jax import train
from pwkd_jax.training import checkpoints, loop, writers

# Of a run of one student with one checkpoint: what it reads of its workdir, claims, and writes at its end; Orbax makes some 80.
MOST = 150


def command(name: str, steps: int, save: int, *options: str) -> list[str]:
    every = [f"--config.{key}.every={value} steps" for key, value in
             (("evaluation", steps), ("log", 10), ("checkpoint", save))]  # fmt: skip
    return [*TINY, "--config.arms=alone", f"--config.student.duration={steps} steps", *every, *options,
            f"--workdir=gs://bucket/{name}"]  # fmt: skip


def test_requests_are_few_and_none_is_of_a_step(bucket, tmp_path):
    made = []
    for steps in (100, 200):
        bucket("forget")
        assert train.main(command(f"{tmp_path.name}/{steps}", steps, steps)) == 0
        made.append({name: n for name, n in bucket("counts").items() if not name.endswith((".lock", ".lock/"))})
    events = [sum(n for name, n in counts.items() if "tfevents" in name) for counts in made]
    totals = [sum(counts.values()) - n for counts, n in zip(made, events, strict=True)]
    # Orbax looks for its files once more or less; events are not sent again while they are being sent.
    assert abs(totals[0] - totals[1]) <= 10 and max(totals) <= MOST and max(events) <= 3, (totals, events)
    metrics = [counts[f"POST {tmp_path.name}/{steps}/students/alone/seed0/metrics.jsonl"]
               for counts, steps in zip(made, (100, 200), strict=True)]  # fmt: skip
    assert metrics == [2, 2]


@pytest.mark.slow
def test_training_hardly_waits_for_a_bucket_that_is_slow(bucket, tmp_path, monkeypatch):
    """At 100 ms a request. A checkpoint takes seconds; training waits for a few requests of it, and at the end for the last."""
    waits, ends = [], []

    def timed(cls: type, name: str, into: list) -> None:
        method = getattr(cls, name)

        def measured(self, *args, **options):
            begun = time.monotonic()
            try:
                return method(self, *args, **options)
            finally:
                into.append(time.monotonic() - begun)

        monkeypatch.setattr(cls, name, measured)

    timed(checkpoints.Checkpoints, "save", waits)
    timed(writers.Writer, "flush", waits)
    timed(checkpoints.Checkpoints, "close", ends)
    fit, begun = loop.fit, []

    def slow(state, step, *args, **options):
        begun.append(time.monotonic())
        return fit(state, lambda *x: (time.sleep(0.2), step(*x))[1], *args, **options)

    monkeypatch.setattr(loop, "fit", slow)
    bucket("latency?ms=100")
    try:
        assert train.main(command(tmp_path.name, 100, 50)) == 0
    finally:
        bucket("latency?ms=0")
    # Two saves and two flushes, and the flush of what is left, of nothing, at the end.
    share = sum(waits) / 20
    print(f"waits {[round(w, 2) for w in waits]} s, {100 * share:.1f} % of 20 s; the last save ended after {ends[-1]:.1f} s")
    assert share < 0.15 and max(waits) < ends[-1] / 2
