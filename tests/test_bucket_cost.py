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


def share_of_waiting(bucket, name: str, monkeypatch, waited_for: bool) -> float:
    """Of 20 s of training at 100 ms a request the part in which it waits for the bucket. waited_for: as where every save and
    every event file is waited for as it comes."""
    waits, fit = [], loop.fit

    def timed(cls: type, method: str, after=lambda self: None) -> None:
        known = getattr(cls, method)

        def measured(self, *args, **options):
            begun = time.monotonic()
            try:
                known(self, *args, **options)
                after(self)
            finally:
                waits.append(time.monotonic() - begun)

        monkeypatch.setattr(cls, method, measured)

    def sent(writer) -> None:
        writer._outbox.push()
        writer._outbox._sending.result()

    timed(checkpoints.Checkpoints, "save", checkpoints.Checkpoints._wait if waited_for else lambda self: None)
    timed(writers.Writer, "flush", sent if waited_for else lambda self: None)
    slow = lambda state, step, *args, **options: fit(  # noqa: E731
        state, lambda *x: (time.sleep(0.2), step(*x))[1], *args, **options
    )
    monkeypatch.setattr(loop, "fit", slow)
    bucket("latency?ms=100")
    try:
        assert train.main(command(name, 100, 50)) == 0
    finally:
        bucket("latency?ms=0")
        monkeypatch.undo()
    print(f"waits {[round(w, 2) for w in waits]} s, {100 * sum(waits) / 20:.1f} % of 20 s")
    return sum(waits) / 20


@pytest.mark.slow
def test_training_hardly_waits_for_a_bucket_that_is_slow(bucket, tmp_path, monkeypatch):
    """A checkpoint takes seconds; training waits for a few requests of it, and at the end for the last."""
    before, after = (share_of_waiting(bucket, f"{tmp_path.name}{w}", monkeypatch, w) for w in (True, False))
    assert after < 0.15 and before > 2 * after
