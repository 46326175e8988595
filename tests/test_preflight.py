"""Pre-flight: chips and rooflines by their makers' numbers, the search for a batch, what is printed and refused; with libtpu
installed, tiny programs compiled for pods that are not here."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pwkd_jax import config, preflight
from pwkd_jax.cost import chips, compiler, input_rate
from pwkd_jax.cost import preflight as measured
from pwkd_jax.data.shapes import outline
from pwkd_jax.errors import UserError
from pwkd_jax.experiment import definition, programs
from pwkd_jax.reporting import preflight as report
from pwkd_jax.training import sharding, teacher

ROOT = Path(__file__).parent.parent
LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason='the TPU compiler is not installed: pip install "jax[tpu]"')
SMALL = ["--config=configs/digits.py", "--config.teacher.model=resnet8", "--config.student.model=resnet8",
         "--config.teacher.widths=0.5,1.0", "--config.student.widths=0.5,1.0", "--config.arms=pwkd"]  # fmt: skip


def settings(*overrides: str):
    return config.load([f"--config={ROOT / 'configs/digits.py'}", *SMALL[1:], *overrides])[0]


# Chips: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read on the day this was written.


@pytest.mark.parametrize(
    "name, teraflops, gib, gigabytes, gigabits",
    [("v4", 275, 32, 1200, None), ("v5e", 197, 16, 819, 1600), ("v5p", 459, 95, 2765, 4800), ("v6e", 918, 32, 1638, 3200),
     ("tpu7x", 2307, 192, 7380, 4800)],
)  # fmt: skip
def test_chips_are_those_of_googles_pages(name, teraflops, gib, gigabytes, gigabits):
    chip = chips.TPUS[name]
    assert (chip.peak, chip.memory, chip.bandwidth) == (teraflops * 1e12, gib * 2**30, gigabytes * 1e9)
    # Older pages give the links one way in bits, newer ones both ways in bytes.
    assert chip.links == (gigabits or 0) * 1e9 / 8


@pytest.mark.parametrize(
    "name, count, shape", [("v5e:2x2", 4, (2, 2)), ("V5P:4x4x8", 128, (4, 4, 8)), ("h100:8", 8, ()), ("cuda", 1, ())]
)
def test_topologies_are_read(name, count, shape):
    found = chips.topology(name)
    assert (found.chips, found.shape) == (count, shape)


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5e", "v5e:4", "v5e:2x2x2", "v5p:4x4", "v5e:0x4", "h100:0", "h100:", "", "v5e:a", "v6e:32x8"]
)
def test_other_topologies_are_refused_by_name(name):
    with pytest.raises(UserError, match=r"--topology: .*(v5e|v5p).*4x4|--topology: .*known are|whole pod"):
        chips.topology(name)


# Rooflines.


def line(flops, traffic, collectives=None, **options):
    options = {"dtype": "float32", "parts": 1, "devices": 4} | options
    return chips.roofline(chips.TPUS["v5e"], flops, traffic, collectives or {}, **options)


def test_the_roofline_is_bound_by_the_larger_side():
    ridge = 197e12 / 819e9  # FLOP a byte at which both sides take the same
    assert line(ridge * 1.01 * 819e9, 819e9).bound == "compute"
    assert line(ridge * 0.99 * 819e9, 819e9).bound == "memory"
    assert math.isclose(line(197e12, 0).seconds, 1) and math.isclose(line(0, 819e9 / 2).seconds, 0.5)


def test_cores_of_a_chip_share_it():
    assert math.isclose(line(197e12, 0, parts=2).seconds, 2)


def test_a_ring_sends_each_array_almost_twice():
    """All-reduce: reduce-scatter, then all-gather, (n - 1) / n of the array each."""
    found = line(0, 0, {"all-reduce": (3, 200 * 10**9)}, devices=4)
    assert math.isclose(found.communication, 2 * 3 / 4) and found.bound == "network"
    assert math.isclose(line(0, 0, {"all-gather": (1, 200 * 10**9)}, devices=4).communication, 3 / 4)
    # The result of a reduce-scatter is one part of what is sent on.
    assert math.isclose(line(0, 0, {"reduce-scatter": (1, 50 * 10**9)}, devices=4).communication, 3 / 4)
    assert line(0, 0, {"all-reduce": (1, 10**9)}, devices=1).communication == 0


def test_communication_over_links_without_a_published_number_is_not_guessed():
    v4 = chips.TPUS["v4"]
    options = {"dtype": "bfloat16", "parts": 1, "devices": 4}
    assert chips.roofline(v4, 1e12, 1e9, {"all-reduce": (1, 8)}, **options).communication is None
    assert chips.roofline(v4, 1e12, 1e9, {}, **options).communication == 0


def test_a_gpu_multiplies_float32_at_half_its_rate():
    options = {"parts": 1, "devices": 1}
    half, full = (chips.roofline(chips.GPUS["h100"], 1e15, 0, {}, dtype=d, **options) for d in ("float32", "bfloat16"))
    assert math.isclose(half.seconds, 2 * full.seconds)


# The search for a batch.


@pytest.mark.parametrize("start", [8, 64, 512, 4096])
@pytest.mark.parametrize("unit", [1, 8, 24])
def test_an_affine_memory_gives_the_largest_batch_within_five_percent(start, unit):
    largest, tried = compiler.largest(lambda b: (1000 + 7 * b, 1000 + 7 * b <= 15_750), 15_750, unit, start)
    exact = 14_750 // 7 // unit * unit
    assert largest == exact or (exact > largest and 1000 + 7 * largest >= 0.95 * 15_750)
    assert len(tried) <= 4 and largest in tried and all(b % unit == 0 for b in tried)


def test_what_bends_is_never_promised_untried():
    def need(batch):  # as a compiler that pads to powers of two does
        size = 100 * 2 ** math.ceil(math.log2(batch))
        return size, size <= 60_000

    largest, tried = compiler.largest(need, 60_000, 8, 32)
    assert largest in tried and need(largest)[1] and len(tried) <= 6
    assert largest >= 256  # at least half the true 512


def test_the_compilers_word_counts_more_than_the_limit():
    """It keeps some of a chip's memory for itself: what the line promises may be refused."""
    largest, tried = compiler.largest(lambda b: (100 * b, 100 * b <= 9_700), 10_000, 1, 10)
    assert 95 <= largest <= 97 and 100 in tried


def test_a_batch_that_never_fits_gives_zero():
    largest, tried = compiler.largest(lambda b: (10**6 + b, False), 1000, 16, 64)
    assert largest == 0 and 16 in tried


@pytest.mark.parametrize(
    "message, found",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (80.00G) exceeds "
         "available HBM (15.75G).", (80 * 2**30, int(15.75 * 2**30))),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
         "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", (int(20.5 * 2**30), int(15.75 * 2**30))),
        ("INVALID_ARGUMENT: something else", None),
    ],
)  # fmt: skip
def test_the_compilers_refusal_is_read(message, found):
    assert compiler.exhausted(message) == found


class Refused:
    """A lowered program that the compiler refuses with `message`."""

    def __init__(self, message: str):
        self.message = message

    def compile(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_refused_program_is_known_by_its_arguments_and_temporaries():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, ... HLO temporaries (20.00G) exceeds available HBM (15.75G)."
    found = compiler._compile("teacher step", Refused(message), {}, 2**30)
    assert found.fits is False and found.total == 21 * 2**30 and found.limit == int(15.75 * 2**30)
    with pytest.raises(UserError, match=r"libtpu .* teacher step \(INTERNAL: arity\)"):
        compiler._compile("teacher step", Refused("INTERNAL: arity\nat somewhere"), {}, 2**30)


# The data set's outline.


def test_a_known_set_needs_no_files():
    c = config.load([f"--config={ROOT / 'configs/imagenet.py'}:resnet50-mobilenetv1"])[0]
    dataset, source = outline(c)
    assert dataset.image_shape == (224, 224, 3) and dataset.num_classes == 1000 and "known" in source
    assert (len(dataset.train), len(dataset.test)) == (1_281_167, 50_000)
    assert outline(c, images=1000, image_size=160)[0].train.images.shape == (1000, 160, 160, 3)


def test_the_digits_outline_is_that_of_the_digits():
    from pwkd_jax import data

    real, found = data.load("digits"), outline(settings())[0]
    assert found.image_shape == real.image_shape and found.num_classes == real.num_classes
    assert (len(found.train), len(found.test)) == (len(real.train), len(real.test))


def test_slices_are_counted_and_the_unknown_is_asked_for():
    assert len(outline(settings("--config.data.train_split=train[:100]"))[0].train) == 100
    with pytest.raises(UserError, match=r"mine.*--image-size"):
        outline(settings("--config.data.name=mine"))
    with pytest.raises(UserError, match=r"mine.*num_classes"):
        outline(settings("--config.data.name=mine"), image_size=16)
    mine = outline(settings("--config.data.name=mine", "--config.data.num_classes=7"), images=90, image_size=16)[0]
    assert mine.train.images.shape == (90, 16, 16, 3) and mine.num_classes == 7


def test_a_prepared_sets_metadata_count():
    shared = ROOT.parent / "shared"
    found = sorted(shared.glob("**/dataset_info.json"))
    if not found:
        pytest.skip("no prepared data set lies in ../shared")
    home = found[0].parent.parent
    info = json.loads(found[0].read_text())
    counts = {s["name"]: sum(map(int, s["shardLengths"])) for s in info["splits"]}
    split = next(iter(counts))
    c = settings(f"--config.data.name={home.name}", f"--config.data.data_dir={home.parent}",
                 f"--config.data.train_split={split}", f"--config.data.test_split={split}")  # fmt: skip
    dataset, source = outline(c, image_size=32)
    assert len(dataset.train) == counts[split] and "stored" in source


# Programs: those of training, as often as training runs them.


@pytest.fixture(scope="module")
def built():
    c = settings("--config.arms=alone,kd_whole,pwkd,pwkd_random", "--config.seeds=2")
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    return measured._build(c, jax.devices()[:1], outline(c)[0]), mesh


def test_every_step_of_the_experiment_is_counted(built):
    found = programs.programs(built[0])
    c, images = built[0].config, 1198
    student = sum(p.runs for p in found if p.name.startswith("student step"))
    lengths = definition.stage_lengths(c, built[0].facts)
    assert student == len(c.arms) * c.seeds * sum(lengths)
    names = [p.name for p in found]
    assert len(set(names)) == len(names)
    # kd_whole and the second stage of pwkd run one program; the drawn widths have their own.
    whole = next(p for p in found if p.name == "student step, teacher 1")
    assert whole.runs == c.seeds * (sum(lengths) + lengths[1])
    teacher = next(p for p in found if p.name == "teacher step")
    epochs = float(c.teacher.duration.split()[0])
    assert teacher.runs == round(epochs * images / c.teacher.batch_size)


def test_the_steps_of_a_study_are_counted_once_for_all():
    c = settings("--config.arms=alone,kd_whole,pwkd,pwkd_random", "--config.seeds=2", "--config.student.batches=shared",
                 "--config.student.study=true")  # fmt: skip
    experiment = measured._build(c, jax.devices()[:1], outline(c)[0])
    found = [p for p in programs.programs(experiment) if "students each" in p.name]
    lengths = definition.stage_lengths(c, experiment.facts)
    assert [p.name for p in found] == [
        "4 arms' step, 2 students each, from step 0", f"4 arms' step, 2 students each, from step {lengths[0]}"
    ]
    assert [p.runs for p in found] == lengths
    # The drawn width may be either; the last stage of pwkd and kd_whole hear the same.
    assert [sorted(p.kwargs["teacher"]["slimmable"]) for p in found] == [[0.5, 1.0], [0.5, 1.0]]
    assert not any(p.name.startswith(("student step", "2 students' step")) for p in programs.programs(experiment))


def test_lowered_arguments_are_those_that_training_passes(built):
    """The same step on real arrays: had a shape, a type or the tree been another, jax would compile a second program."""
    s, outlined = built[0], {p.name: p for p in programs.programs(built[0])}
    state, batch = programs.teacher_step(s, "slimmable")[0](0, None), s.batches(s.config.teacher.batch_size, 0)(0)
    frozen = teacher.freeze(s.teachers["slimmable"], state.params, state.collections)
    plan = s.plan("pwkd")
    pupil = programs.student_steps(s, plan, s.distillation("slimmable", (0.5, 1.0)))[0](0, None)
    taught = ((pupil, batch), {"teacher": {0.5: frozen[0.5]}})
    real = {"teacher step": ((state, batch), {}), "student step, teacher 0.5": taught}
    for name, passed in real.items():
        program = outlined[name]
        kinds = (jax.tree.map(lambda x: (x.shape, x.dtype), a) for a in (passed, (program.args, program.kwargs)))
        assert next(kinds) == next(kinds)
        assert program.argument_bytes == sum(x.nbytes for x in jax.tree.leaves(passed))


def test_the_work_of_a_layer_is_right():
    """2 FLOP a multiplication: a product of known size by the compiler's count, and its bytes at least its arrays."""
    a, b = jax.ShapeDtypeStruct((64, 128), np.float32), jax.ShapeDtypeStruct((128, 256), np.float32)
    sharded = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    args = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded) for x in (a, b))
    program = programs.Program("product", jax.jit(lambda x, y: x @ y), args, {}, 64, "teacher.batch_size", 1)
    found = compiler.outline(program, 1, None)
    assert found.flops == 2 * 64 * 128 * 256
    assert found.traffic >= 4 * (64 * 128 + 128 * 256 + 64 * 256)
    assert found.memory["arguments"] == 4 * (64 * 128 + 128 * 256) and found.fits is None


# The command.


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "pwkd_jax.preflight", *arguments], capture_output=True, text=True, cwd=ROOT, env=env, check=False
    )


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = preflight.main([*(a.replace("configs/", f"{ROOT}/configs/") for a in arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((*SMALL,), "--topology"),
        ((*SMALL, "--topology=v7:2x2"), "v7:2x2"),
        ((*SMALL, "--topology=v5e:2x2", "--topolgy=1"), "--topolgy=1"),
        ((*SMALL, "--topology=h100", "--only=professor"), "professor"),
        ((*SMALL, "--topology=h100", "--suggest"), "--suggest"),
        ((*SMALL, "--topology=h100", "--price=-1"), "--price"),
        (("--topology=h100",), "--config"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = command(capsys, *arguments)
    sentence = err.splitlines()[-1]
    assert code == 2 and not out and sentence.startswith("error: ")
    assert words in sentence


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(chips, "_has_libtpu", lambda: False)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", _raise)
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]"'):
        chips.describe(chips.topology("v5e:2x2"))


def _raise(*args, **kwargs):
    raise RuntimeError("no plugin")


def test_a_card_gives_what_can_be_known_and_says_what_cannot(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = (*SMALL, "--topology=h100", "--only=student evaluation", "--price=2")
    code, out, _ = command(capsys, *arguments)
    assert code == 0 and "Not known without the card" in out and "chip-h" in out and "at 2 a chip-hour" in out
    assert max(map(len, out.splitlines())) <= 100
    assert len(list(tmp_path.rglob("*.json"))) == 1  # what was found is remembered ...
    code, out, _ = command(capsys, *arguments, "--json")
    result = json.loads(out)
    assert result["fits"] is None and all(p["kept"] for p in result["programs"])  # ... and read again
    row = result["programs"][-1]
    assert math.isclose(row["step_seconds"], max(row["flops"] / 494.7e12, row["traffic"] / 3350e9))
    assert math.isclose(row["cost"], row["runs"] * row["step_seconds"] / 3600 * 2)


def a_result(**changes) -> dict:
    memory = dict(zip(compiler.KINDS, (100 << 20, 90 << 20, 3 << 30, 90 << 20, 20 << 20), strict=True))
    cost = compiler.Cost(True, memory, 0, 5e12, 9e9, {"all-reduce": (27, 10**8)}, 61.0)
    where = chips.topology("v5e:16x16")
    named = [programs.Program(n, None, (), {}, 1024, "teacher.batch_size", 187_500) for n in
             ("standard teacher 1 evaluation", "student step, teacher drawn")]  # fmt: skip
    rows = [measured._row(p, cost._replace(**changes), where, 256, "float32", 1.2) for p in named]
    data = {"name": "imagenet2012", "source": "as imagenet2012 is known", "train_images": 1_281_167, "test_images": 50_000,
            "num_classes": 1000, "image_shape": [224, 224, 3]}  # fmt: skip
    return {"config": "imagenet-resnet50-mobilenetv1-kd", "topology": where.name, "chips": 256, "devices": 256,
            "chip": where.chip._asdict(), "data": data, "dtype": "float32", "programs": rows, "partial": False, "full": False,
            "fits": cost._replace(**changes).fits, "price": 1.2, "chip_hours": measured._sum(r["chip_hours"] for r in rows),
            "cost": measured._sum(r["cost"] for r in rows)}  # fmt: skip


def test_the_page_fits_its_columns_and_says_so_when_a_program_does_not_fit():
    page = report.text(a_result())
    assert max(map(len, page.splitlines())) <= 100
    assert "Fits" in page and "27 all-reduce" in page and "3,192" in page  # 100 + 90 - 90 + 3072 + 20 MiB
    page = report.text(a_result(fits=False, limit=int(15.75 * 2**30)))
    assert "Does not fit" in page and "15.75 GiB" in page and "--suggest" in page and "too big" in page


def test_chip_hours_are_runs_times_the_roofline():
    row = a_result()["programs"][0]
    assert math.isclose(row["step_seconds"], max(5e12 / 197e12, 9e9 / 819e9, 2 * 255 / 256 * 1e8 / 200e9))
    assert math.isclose(row["chip_hours"], 187_500 * row["step_seconds"] * 256 / 3600)
    assert row["bound"] == "compute"


# What a host has to decode.


@pytest.mark.parametrize(
    "topology, host", [("v5e:1x1", (1, 24)), ("v5e:1x2", (2, None)), ("v5e:2x2", (4, 112)), ("v5e:16x16", (4, 112)),
                       ("v5p:2x2x1", (4, None)), ("h100:8", (8, None)), ("cuda", (1, None))],
)  # fmt: skip
def test_hosts_are_those_of_googles_page(topology, host):
    assert chips.topology(topology).host == host


def asked(rate: float, topology: str = "v5e:4x4", **changes) -> dict | None:
    """A teacher's step of 1024 images in 20 ms and a student's of 512 in 4 ms, the hungrier one; an evaluation is no step."""
    named = (("teacher step", 1024, "teacher.batch_size", 0.02), ("student step, teacher 1", 512, "student.batch_size", 0.004),
             ("student evaluation", 4096, "evaluation.batch_size", 0.001))  # fmt: skip
    keys = ("name", "batch", "batch_key", "step_seconds")
    return input_rate.feeding([dict(zip(keys, r, strict=True)) | changes for r in named], chips.topology(topology), rate)


def test_cores_are_a_hosts_share_of_the_batch_over_the_rate_of_one():
    found = asked(500)
    # 16 chips in 4 hosts: of 1024 / 20 ms and of 512 / 4 ms, a sixteenth and a quarter; 12,800 / 500 = 25.6 cores, and 64.
    assert [(s["chip"], s["host"], s["cores"]) for s in found["steps"]] == [(3200, 12_800, 26), (8000, 32_000, 64)]
    assert (found["chips_per_host"], found["host_cores"], found["enough"]) == (4, 112, True)
    assert asked(32_000 / 112)["enough"] and not asked(32_000 / 113)["enough"]
    assert asked(500, "v5p:2x2x4")["enough"] is None
    assert asked(500, step_seconds=None) is None  # a card that is not named, or a program that does not fit


@pytest.mark.parametrize(
    "rate, topology, words",
    [(500, "v5e:4x4", "keeps 64 cores busy: a host has 112, enough"), (250, "v5e:4x4", "a host has 112, not enough"),
     (500, "v5p:2x2x4", "no published number"), (32_000, "v5e:4x4", "keeps 1 core busy")],
)  # fmt: skip
def test_the_page_says_whether_the_host_keeps_up(rate, topology, words):
    page = report.text(a_result() | {"input": asked(rate, topology)})
    assert words in page and "8,000" in page and max(map(len, page.splitlines())) <= 100
    assert "cores" not in report.text(a_result() | {"input": None})


def test_the_command_counts_the_cores_of_streamed_images_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # 2 ms of an H100's product rate, whatever the program: nothing is compiled.
    cost = compiler.Cost(None, dict.fromkeys(compiler.KINDS, 0), 0, 2e-3 * 494.7e12, 1e6, {}, 0.0)
    monkeypatch.setattr(compiler, "outline", lambda *_: cost)
    streamed = ("--config.data.name=mine", "--config.data.num_classes=7", "--config.data.image_size=8", "--images=900",
                "--config.data.crop_padding=0", "--config.data.mean=(0.5,)", "--config.data.std=(0.25,)")  # fmt: skip
    wanted = ("--topology=h100", "--only=student step, teacher 1", "--json", "--config.student.batch_size=64")
    code, out, err = command(capsys, *SMALL, *streamed, *wanted, "--images_per_core_second=123")
    assert code == 0, err
    found = json.loads(out)["input"]
    assert math.isclose(found["steps"][0]["host"], 64 / 2e-3) and found["steps"][0]["cores"] == -(-32_000 // 123)
    assert found["images_per_core_second"] == 123 and found["enough"] is None
    code, out, _ = command(capsys, *SMALL, *wanted)
    assert code == 0 and json.loads(out)["input"] is None
    code, _, err = command(capsys, *SMALL, *streamed, *wanted, "--images-per-core-second=0")
    assert code == 2 and "--images-per-core-second" in err


# With the TPU's compiler.


@needs_libtpu
def test_a_tiny_config_compiles_for_a_pod_and_a_batch_too_large_is_found_out(tmp_path):
    arguments = (*SMALL, "--topology=v5e:2x2", "--only=student step, teacher 1", "--json")
    done = run(*arguments, XDG_CACHE_HOME=str(tmp_path))
    result = json.loads(done.stdout)
    (row,) = result["programs"]
    assert done.returncode == 0 and result["fits"] and result["devices"] == 4
    assert row["total"] == sum(row["memory"].values()) - 2 * row["memory"]["aliased"]
    assert row["memory"]["aliased"] > 0  # the state is donated
    assert row["communication"]["all-reduce"][0] >= 1 and row["flops"] > 0
    assert run(*SMALL, "--topology=v5e:2x2", "--config.student.batch_size=63").returncode == 2
    assert json.loads(run(*arguments, XDG_CACHE_HOME=str(tmp_path)).stdout)["programs"][0]["kept"]


@needs_libtpu
@pytest.mark.slow
def test_suggest_finds_a_batch_that_fits_where_the_one_asked_for_does_not(tmp_path):
    arguments = (*SMALL, "--topology=v5e:2x2", "--only=student evaluation", "--suggest", "--json")
    done = run(*arguments, "--config.evaluation.batch_size=67108864", XDG_CACHE_HOME=str(tmp_path))
    result = json.loads(done.stdout)
    (found,) = result["suggestions"]
    assert done.returncode == 1 and result["fits"] is False
    assert 65536 < found["largest"] < 67108864 and str(found["largest"]) in found["tried"]
    assert found["largest"] % 4 == 0
