"""Images a second of the streamed input at 224 pixels: python tests/bench/input.py [--rounds=N] [--json=FILE]

    opencv       a bare loop of one thread: read a file, decode, crop, resize (linear, the cheapest)
    pillow       the same of Pillow: open, convert, resize a box (bilinear)
    one area     opencv with the mean over pixels in place of linear, for what that costs
    in process   our pipeline, as a worker runs it: whole batches of this thread, which decodes only the crops where it can
                 (`pip install turbojpeg`), the same pixels
    whole        the same where no library decodes crops
    1, 2, ...    our pipeline in so many worker processes, up to the cores there are, and their hand-over

Photographs of scikit-learn, cut at random and brought to 500x375, JPEG of quality 90; images and crops are the same for all.
Rounds take turns; a ratio is of one round, given as the median with the smallest and largest. CPU is images for each second of
processor time, of workers and of the process that reads from them, which other load on the machine disturbs less than wall
time. Below the table, what a batch costs without its images, in milliseconds of processor time and as parts of what opencv
takes to make one:

    hand-over    a constant batch made by one worker and read: written once, carried, copied once
    copy         of a batch, to memory that was used before
    segment      the constant batch written to shared memory that is new, which the ring of `pwkd_jax.data.ring_buffer` saves

Linux.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import cv2
import numpy as np
import PIL.Image
from sklearn.datasets import load_sample_images

from pwkd_jax import data
from pwkd_jax.data import images, partial, prefetch, stream

SIZE, BATCH, STEPS, FILES = 224, 64, 2, 128


def make(root: Path) -> list[Path]:
    rng, photos = np.random.default_rng(0), load_sample_images().images
    for i in range(FILES):
        photo = photos[i % 2]
        part = rng.uniform(0.7, 1.0)
        height, width = int(photo.shape[0] * part), int(photo.shape[0] * part * 4 / 3)
        top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
        image = cv2.resize(photo[top : top + height, left : left + width], (500, 375), interpolation=cv2.INTER_CUBIC)
        for split in ("train", "test"):
            path = root / split / str(i % 2) / f"{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(path, quality=90)
    return sorted((root / "train").glob("*/*"))


def crops(step: int):
    """(index, top, left, height, width) of a batch, as the pipeline draws them; made before the clock starts."""
    for position in range(step * BATCH, (step + 1) * BATCH):
        index = data.pipeline.permutation(0, position // FILES, FILES)[position % FILES]
        yield int(index), *images.random_crop(stream.uniform(0, position)[0], 375, 500, (0.08, 1.0))


def opencv(paths, boxes, interpolation: int = cv2.INTER_LINEAR) -> None:
    for index, top, left, height, width in boxes:
        with open(paths[index], "rb") as file:
            image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR_RGB)
        cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE), interpolation=interpolation)


def pillow(paths, boxes) -> None:
    for index, top, left, height, width in boxes:
        with PIL.Image.open(paths[index]) as image:
            box = (left, top, left + width, top + height)
            np.asarray(image.convert("RGB").resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR, box))


def processor_seconds(pids: list[int]) -> float:
    """Used so far by processes, all their threads included: the kernel's own clock of each (clock_getcpuclockid(3))."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def settle(pids: list[int]) -> float:
    """`processor_seconds` when all workers have filled their part of the ring."""
    before = -1.0
    while (now := processor_seconds(pids)) > before + 0.005 * len(pids):
        before = now
        time.sleep(0.25)
    return now


def timed(work) -> tuple[float, float]:
    """(images a second, images a second of processor time) of STEPS batches, few, so that rounds are short."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    count = STEPS * BATCH
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def timed_whole(work) -> tuple[float, float]:
    with mock.patch.object(partial, "turbojpeg", lambda: None):
        return timed(work)


class Workers:
    """A stream read by worker processes, the same steps over and over."""

    def __init__(self, batch, count: int):
        before = set(multiprocessing.active_children())
        self.count, self._batch, self._at = count, prefetch.Reader(batch, count, STEPS), 0
        self._read(2 * count)
        self._pids = [child.pid for child in set(multiprocessing.active_children()) - before]

    def _read(self, count: int) -> None:
        for _ in range(count):
            self._batch(self._at)
            self._at = (self._at + 1) % STEPS

    def timed(self) -> tuple[float, float]:
        """As `timed`. The wall clock starts when what was made ahead is used up; processor time is from a full ring to a full
        ring, in which exactly as many batches are made as are read, and this process's share comes on top."""
        begun, own = settle(self._pids), time.process_time()
        self._read(2 * self.count)
        wall = time.perf_counter()
        self._read(6 * self.count)
        rate = 6 * self.count * BATCH / (time.perf_counter() - wall)
        own = time.process_time() - own
        return rate, 8 * self.count * BATCH / (settle(self._pids) - begun + own)


class Constant:
    """A batch that costs no more than to write it."""

    shape = (BATCH, SIZE, SIZE, 3)

    def __call__(self, number: int, out: np.ndarray) -> dict[str, np.ndarray]:
        row, numbers = np.full(self.shape[1:], 7, np.uint8), np.zeros(BATCH, np.int32)
        for i in range(BATCH):
            out[i] = row
        return {"image": out, "label": numbers, "index": numbers, "wanted": numbers}


def segment() -> None:
    memory = SharedMemory(create=True, size=BATCH * SIZE * SIZE * 3)
    Constant()(0, np.ndarray(Constant.shape, np.uint8, memory.buf))
    memory.close()
    memory.unlink()


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "cores": prefetch.cores(), "load": os.getloadavg(),
            "python": platform.python_version(), "kernel": platform.release(),
            **{name: version(name) for name in ("numpy", "opencv-python-headless", "pillow", "grain")},
            "turbojpeg": str(partial.turbojpeg() and Path(partial.turbojpeg()._name).name)}  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder))
        boxes = [box for step in range(STEPS) for box in crops(step)]
        source = data.load("folder", folder, streaming=data.Streaming(SIZE, flip=True)).train
        batch = stream._Train(source.source, 2, source.options, data.Pipeline(source.source, BATCH, 0), 0)
        ring = np.ones(batch.shape, np.uint8)  # written again and again, as the memory of a worker's ring is
        inputs = {
            "opencv": lambda: timed(lambda: opencv(paths, boxes)),
            "one area": lambda: timed(lambda: opencv(paths, boxes, cv2.INTER_AREA)),
            "pillow": lambda: timed(lambda: pillow(paths, boxes)),
            "in process": lambda: timed(lambda: [batch(step, ring) for step in range(STEPS)]),
            "whole": lambda: timed_whole(lambda: [batch(step, ring) for step in range(STEPS)]),
        }
        for count in range(1, min(prefetch.cores(), 8) + 1):
            inputs[f"{count} worker{'s' * (count > 1)}"] = Workers(batch, count).timed
        inputs["hand-over"] = Workers(Constant(), 1).timed
        used = np.ones((2, *Constant.shape), np.uint8)
        inputs["copy"] = lambda: timed(lambda: [np.copyto(*used) for _ in range(STEPS)])
        inputs["segment"] = lambda: timed(lambda: [segment() for _ in range(STEPS)])
        before, results = machine(), {name: [] for name in inputs}
        for _ in range(options.rounds):
            for name, measure in inputs.items():
                results[name].append(measure())
    rows = []
    for name, found in results.items():
        ratios = [a[1] / b[1] for a, b in zip(found, results["opencv"], strict=True)]
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        row = {"input": name, "images_per_second": wall, "images_per_cpu_second": cpu, "batch_cpu_ms": 1e3 * BATCH / cpu}
        rows.append(row | {"of_opencv": [statistics.median(ratios), min(ratios), max(ratios)]})
    print(f"{'input':<12}{'images/s':>10}{'CPU':>8}   of opencv's CPU")
    for row in rows[:-3]:
        middle, low, high = row["of_opencv"]
        rates = f"{row['images_per_second']:>10.0f}{row['images_per_cpu_second']:>8.0f}"
        print(f"{row['input']:<12}{rates}   {middle:.2f} ({low:.2f} to {high:.2f})")
    print(f"\n{f'a batch of {BATCH}':<14}{'CPU ms':>8}   of opencv's time")
    for row in rows[-3:]:
        low, middle, high = sorted(1 / x for x in row["of_opencv"])
        print(f"{row['input']:<14}{row['batch_cpu_ms']:>8.2f}   {middle:.3f} ({low:.3f} to {high:.3f})")
    if options.json:
        run = {"command": ["python", *sys.argv], "before": before, "after": machine(), "batch": BATCH, "size": SIZE}
        options.json.write_text(json.dumps(run | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
