"""Images a second of the streamed input at 224 pixels: python tests/bench/input.py [--rounds=N] [--json=FILE]

    opencv       a bare loop of one thread: read a file, decode, crop, resize (linear, the cheapest)
    pillow       the same of Pillow: open, convert, resize a box (bilinear)
    in process   our pipeline with data.workers=0: whole batches by a thread of this process
    1, 2, ...    our pipeline with so many worker processes, up to the cores there are

Photographs of scikit-learn, cut at random and brought to 500x375, JPEG of quality 90; the crops are the same for all. Rounds
take turns; a ratio is of one round, given as the median with the smallest and largest. CPU is images for each second of
processor time of this process, which other load on the machine disturbs less than wall time; workers are measured by wall time.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import cv2
import numpy as np
import PIL.Image
from sklearn.datasets import load_sample_images

from pwkd_jax import data
from pwkd_jax.data import ahead, images, stream

SIZE, BATCH, STEPS, FILES = 224, 64, 6, 128


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
        yield int(index), *images.random_crop(stream.uniform(0, position), 375, 500, (0.08, 1.0))


def opencv(paths, boxes) -> None:
    for index, top, left, height, width in boxes:
        with open(paths[index], "rb") as file:
            image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR_RGB)
        cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


def pillow(paths, boxes) -> None:
    for index, top, left, height, width in boxes:
        with PIL.Image.open(paths[index]) as image:
            box = (left, top, left + width, top + height)
            np.asarray(image.convert("RGB").resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR, box))


def timed(work) -> tuple[float, float]:
    """(images a second, images a second of processor time) of STEPS batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    count = STEPS * BATCH
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def main(arguments: list[str]) -> None:
    options = dict(a.removeprefix("--").split("=", 1) for a in arguments)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder))
        streams, at = {}, {}
        for workers in (0, *range(1, ahead.cores() + 1)[:8]):
            d = data.load("folder", folder, streaming=data.Streaming(SIZE, flip=True, workers=workers))
            name = f"{workers} worker{'s' * (workers > 1)}" if workers else "in process"
            streams[name], at[name] = data.batches(d.train, BATCH, 0), 0

        def read(name: str, count: int) -> None:
            for _ in range(count):
                streams[name](at[name])
                at[name] += 1

        boxes = [box for step in range(STEPS) for box in crops(step)]
        results = {name: [] for name in ("opencv", "pillow", *streams)}
        for _ in range(int(options.get("rounds", 7))):
            results["opencv"].append(timed(lambda: opencv(paths, boxes)))
            results["pillow"].append(timed(lambda: pillow(paths, boxes)))
            for name in streams:
                # What was made ahead costs nothing now: use it up first; afterwards let it be made again.
                read(name, 2 if name == "in process" else 3 * int(name[0]))
                results[name].append(timed(lambda name=name: read(name, STEPS)))
                time.sleep(0.4 + 0.3 * len(streams))
    rows = []
    for name, found in results.items():
        here = name in ("opencv", "pillow", "in process")
        column = 1 if here else 0
        ratios = [a[column] / b[column] for a, b in zip(found, results["opencv"], strict=True)]
        rows.append({
            "input": name, "images_per_second": statistics.median(f[0] for f in found),
            "images_per_cpu_second": statistics.median(f[1] for f in found) if here else None,
            "of_opencv": [statistics.median(ratios), min(ratios), max(ratios)], "by": "CPU" if here else "wall",
        })  # fmt: skip
    print(f"{'input':<12}{'images/s':>10}{'CPU':>8}   of opencv's loop")
    for row in rows:
        cpu = f"{row['images_per_cpu_second']:.0f}" if row["images_per_cpu_second"] else ""
        middle, low, high = row["of_opencv"]
        beside = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"{row['input']:<12}{row['images_per_second']:>10.0f}{cpu:>8}   {beside} by {row['by']}")
    if "json" in options:
        environment = {"cores": ahead.cores(), "load": os.getloadavg()[0], "opencv": cv2.__version__}
        Path(options["json"]).write_text(json.dumps({"rows": rows, **environment}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
