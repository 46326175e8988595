"""Batches gathered on the devices and many steps a dispatch: the same batches, steps and rows as one by one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, identical
from test_training import SHAPE, Tiny, optimizer, preprocess, split

from pwkd_jax import config, data, slimmable
from pwkd_jax.errors import UserError
from pwkd_jax.training import dispatch, loop, metrics, sharding, teacher
from pwkd_jax.training import state as states

ROOT = Path(__file__).parents[1]
IMAGES, BATCH = 40, 16

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)


class Bench:
    """A teacher whose steps run one by one from the host, or in chunks from the device; programs are made once."""

    def __init__(self):
        self.mesh, self.split, self.traces = sharding.make_mesh(), split(IMAGES), 0
        self.pipeline = data.Pipeline(self.split, BATCH, 5)
        self.net = slimmable.build(lambda w: Tiny(width=w), (0.5, 1.0), SHAPE)
        self.tx, self.stored = optimizer(), dispatch.store(self.mesh, self.split)
        step = teacher.make_step(self.net, self.tx, lambda s: 0.1 / (1 + s), preprocess)

        def counted(state, batch):
            self.traces += 1
            return step(state, batch)

        self.many = sharding.jit_step(self.mesh, dispatch.many(counted, SHAPE))

    def fresh(self):
        state = states.create(3, *self.net.init(jax.random.key(3), SHAPE), self.tx)
        return jax.device_put(state, sharding.replicated(self.mesh))

    def resident(self, most):
        return dispatch.Resident(self.mesh, self.pipeline, self.stored, most)

    def host(self, step):
        return sharding.put_batch(self.mesh, self.pipeline(step)) | {"dataset_label": self.stored["label"]}

    def fit(self, pipeline, until, due=lambda at: False, state=None):
        """(state, the steps at which hooks ran, means of all metrics)."""
        seen, running = [], metrics.Running()

        def hook(at, state, found):
            seen.append(at)
            running.add(found)

        return loop.fit(state or self.fresh(), self.many, pipeline, until, [hook], due), seen, running.flush()


@pytest.fixture(scope="module")
def bench():
    return Bench()


def test_indices_are_those_of_the_pipeline(bench):
    """By hand: epochs of the permutation laid end to end; 16 of 40 images, so every third batch straddles."""
    laid = np.concatenate([data.pipeline.permutation(5, epoch, IMAGES) for epoch in range(4)])
    resident = bench.resident(7)
    for start, count in ((0, 7), (7, 2), (2, 1), (1, 6)):
        chunk = resident(start, count)
        assert chunk["rows"].shape == (7, BATCH) and int(chunk["count"]) == count
        for i in range(count):
            wanted = laid[(start + i) * BATCH : (start + i + 1) * BATCH]
            assert np.array_equal(chunk["rows"][i], wanted) and np.array_equal(bench.pipeline(start + i)["index"], wanted)
    # Larger than the split: one batch is several epochs.
    several = data.Pipeline(bench.split, 90, 5).index(0, 1)[0]
    assert np.array_equal(several, laid[:90])
    halves = [data.Pipeline(bench.split, BATCH, 5, p, 2).index(3, 4) for p in (0, 1)]
    assert np.array_equal(np.concatenate(halves, 1).ravel(), np.concatenate([bench.pipeline(3 + i)["index"] for i in range(4)]))


def test_steps_see_the_images_of_their_index(bench):
    """A step that records what it was given, against the split itself."""

    def record(state, batch):
        seen = jnp.sum(batch["image"].astype(jnp.int32), (1, 2, 3)) * 10 + batch["label"]
        return state + 1, {"seen": seen, "all": jnp.sum(batch["dataset_label"])}

    for most, count in ((1, 1), (5, 5), (5, 3)):
        state, found = jax.jit(dispatch.many(record, SHAPE))(jnp.zeros((), jnp.int32), bench.resident(most)(2, count))
        assert int(state) == count
        found = jax.tree.map(lambda x, most=most: np.asarray(x).reshape(most, -1), found)
        for i in range(count):
            index = bench.pipeline.index(2 + i)[0]
            wanted = bench.split.images[index].sum((1, 2, 3)).astype(int) * 10 + bench.split.labels[index]
            assert np.array_equal(found["seen"][i], wanted) and found["all"][i] == bench.split.labels.sum()
        assert not found["seen"][count:].any()


def test_chunked_equals_one_by_one(bench):
    """Bits do not depend on where chunks end. Of other programs, fed by the host or one dispatch a step, rounding may: 1e-5."""
    single = bench.fit(bench.host, 13)
    assert single[1] == list(range(1, 14))
    gathered = bench.fit(bench.resident(1), 13)
    close(gathered[0], single[0], 1e-5)
    assert gathered[2] == pytest.approx(single[2], rel=1e-5)
    chunked = bench.fit(bench.resident(6), 13)
    assert chunked[1] == [6, 12, 13]
    close(chunked[0], single[0], 1e-5)
    assert chunked[2] == pytest.approx(single[2], rel=1e-5)
    for due in (lambda at: at in (1, 5), lambda at: True):
        again = bench.fit(bench.resident(6), 13, due)
        assert identical(again[0], chunked[0]) and again[2] == chunked[2]


def test_chunks_end_where_something_is_due(bench):
    assert bench.fit(bench.resident(6), 23, lambda at: at % 10 == 0)[1] == [6, 10, 16, 20, 23]
    assert bench.fit(bench.resident(6), 9, lambda at: at in (2, 3))[1] == [2, 3, 9]


def test_one_compilation_for_all_chunks(bench):
    fresh = Bench()
    state = fresh.fit(fresh.resident(6), 12)[0]  # two chunks, for metrics are merged by another program from the second on
    assert fresh.traces == 1 and fresh.many._cache_size() == 1
    before = len(compiled)
    fresh.fit(fresh.resident(6), 29, lambda at: at % 5 == 0, state)
    assert before and len(compiled) == before and fresh.traces == 1


def test_an_experiment_compiles_each_program_once(tmp_path, monkeypatch):
    """Two stages, two seeds: one program for the teacher and one for each stage's widths."""
    from test_commands import TINY

    from pwkd_jax import train

    programs = []
    jit = sharding.jit_step
    monkeypatch.setattr(sharding, "jit_step", lambda *a: programs.append(jit(*a)) or programs[-1])
    options = ["--config.steps_per_dispatch=3", "--config.arms=pwkd", "--config.seeds=2", "--config.log.tensorboard=false"]
    assert train.main([*TINY, *options, f"--workdir={tmp_path / 'w'}"]) == 0
    assert [p._cache_size() for p in programs] == [1, 1, 1]


class Stop(Exception):
    pass


def rows(directory):
    timed = ("seconds", "images_per_second")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def test_stopped_and_resumed_in_chunks_gives_the_same_rows_and_bits(bench, tmp_path):
    def run(name, most, stop_at=None):
        evaluations = []

        def evaluate(state):
            evaluations.append(int(state.step))
            if stop_at in evaluations:
                raise Stop
            return {"top1": 1.0}

        segments = [loop.Segment(end, bench.many, lambda s: s) for end in (11, 20)]
        return loop.run(
            tmp_path / name, name, bench.fresh(), segments, bench.resident(most), evaluate, loop.Cadence(4, 7, 3, False),
            images=IMAGES, batch_size=BATCH, texts={},
        )[0]  # fmt: skip

    whole = run("whole", 6)
    with pytest.raises(Stop):
        run("broken", 6, stop_at=14)
    assert identical(run("broken", 2), whole)  # chunks of another size, too
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    run("single", 1)
    ours, singly = rows(tmp_path / "whole"), rows(tmp_path / "single")
    assert [r["step"] for r in ours] == [r["step"] for r in singly] == [3, 4, 6, 7, 8, 9, 11, 12, 14, 15, 16, 18, 20]
    for a, b in zip(ours, singly, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_sums_do_not_tell_which_steps_came_together():
    values = np.random.default_rng(0).random(11).astype(np.float32)
    one, chunked = metrics.Running(), metrics.Running()
    for v in values:
        one.add(metrics.collect({"x": v}))
    for part in np.split(values, [3, 4, 9]):
        each = [metrics.collect({"x": v}) for v in part]
        chunked.add(jax.tree.map(lambda *x: jnp.stack([*x, jnp.zeros_like(x[0])]), *each))
    by_hand = np.float32(0)
    for v in values:
        by_hand += v
    assert one.flush() == chunked.flush() == {"x": float(by_hand) / 11}


EIGHT = """
import sys, numpy as np, jax
sys.path.insert(0, "tests")
from test_dispatch import Bench
assert jax.device_count() == int(sys.argv[1])
bench = Bench()
chunk = bench.resident(6)(0, 6)
text = bench.many.lower(bench.fresh(), chunk).compile().as_text()
# Images are everywhere: devices add their sums up but send each other no rows, and each computes only its own.
assert "u8[40,16]" in text
if jax.device_count() == 8:
    assert "all-reduce" in text and not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    assert "[2,4,4," in text and "[16,4,4," not in text
state = bench.fit(bench.resident(6), 13)[0]
np.savez(sys.argv[2], *[np.asarray(x) for x in jax.tree.leaves((state.params, state.collections))])
"""


def test_eight_devices_equal_one(tmp_path):
    found = []
    for count in (1, 8):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-c", EIGHT, str(count), str(tmp_path / f"{count}.npz")]
        subprocess.run(line, env=environment, cwd=ROOT, check=True, timeout=300)
        found.append(np.load(tmp_path / f"{count}.npz"))
    for name in found[0].files:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_what_lies_on_the_devices_and_how_many_steps_a_dispatch_has(monkeypatch):
    sizes = np.zeros((2, 4, 4, 1), np.uint8), np.broadcast_to(np.uint8(0), (1 << 15, 182, 182, 3))
    small, large = (data.Split(images, np.zeros(len(images), np.int32)) for images in sizes)
    assert [dispatch.on_device(c, small) for c in ("auto", "always", "never")] == [True, True, False]
    assert [dispatch.on_device(c, large) for c in ("auto", "always", "never")] == [False, True, False]
    assert [dispatch.most(n, True) for n in (0, 1, 9)] == [1, 1, 9] and dispatch.most(0, False) == 1  # tests run on CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.most(0, True) == dispatch.MOST and dispatch.most(0, False) == 1
    with pytest.raises(UserError, match=r"steps_per_dispatch: 9 .* set data\.on_device=always or steps_per_dispatch=0"):
        dispatch.most(9, False)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("steps_per_dispatch=-1",), r"steps_per_dispatch: -1 .*0 \(chosen for you\)"),
        (("data.on_device=yes",), r"data\.on_device: 'yes' .*auto, always, never"),
        (("data.on_device=never", "steps_per_dispatch=4"), r"steps_per_dispatch: 4 .*0 or 1 where .*data\.on_device"),
    ],
)
def test_mistakes(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        config.load(["--config=configs/digits.py", *(f"--config.{o}" for o in overrides)])


@pytest.mark.slow
def test_a_small_step_is_dispatched_five_times_as_often():
    line = [sys.executable, "tests/bench/dispatch.py", "--json"]
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(line, env=clean, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)["models"]["linear"]
    assert found["milliseconds"]["loop"]["median"] < 0.1 and found["times_host"]["loop"]["least"] >= 5


CACHE = """
import jax
from pwkd_jax.cost import compilation_cache
compilation_cache.enable()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3)(2.0)
"""


@pytest.mark.parametrize("given", ["", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "unwritable"])
def test_compiled_programs_are_kept(given, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment = {**clean, "XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    if given == "unwritable":
        (tmp_path / "home").write_text("")
    elif given:
        environment[given] = str(tmp_path / "own") if given.endswith("DIR") else "0"
    subprocess.run([sys.executable, "-c", CACHE], env=environment, cwd=ROOT, check=True, timeout=120)
    kept = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*-cache")}
    assert kept == {"": {"home"}, "JAX_COMPILATION_CACHE_DIR": {"own"}}.get(given, set())
