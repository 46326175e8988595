"""Seeded arrays that both sides compute on: what two networks give, and weights of connectors. No torch here."""

import itertools
import zlib

import jax.numpy as jnp
import numpy as np
import staged

from pwkd_jax.models import Outputs, again

BATCH, CLASSES, IMAGES = 8, 10, 64
SHAPES = (((6, 8), (10, 8), (14, 4)), ((8, 8), (12, 8), (20, 4)))  # (channels, side) of the student's and the teacher's stages
SAME = (SHAPES[1], SHAPES[1])


def leaves(seed: int = 0, shapes=SHAPES) -> tuple[dict, dict]:
    """(student's, teacher's) arrays in float64 and torch's layout; their logits agree in part, as a trained pair's do."""
    rng = np.random.default_rng(seed)
    common, made = rng.standard_normal((BATCH, CLASSES)), []
    for stages in shapes:
        a = {"logits": 2 * (common + rng.standard_normal((BATCH, CLASSES)))}
        a["stem"] = np.maximum(rng.standard_normal((BATCH, 6, stages[0][1], stages[0][1])), 0)
        for i, (channels, side) in enumerate(stages, start=1):
            a[f"preact{i}"] = rng.standard_normal((BATCH, channels, side, side))
            a[f"preact{i}"] += 0.3 * rng.standard_normal((1, channels, 1, 1))
            a[f"stage{i}"] = np.maximum(a[f"preact{i}"], 0)
        a["pooled"] = a[f"stage{i}"].mean((2, 3))
        a["kernel"], a["bias"] = rng.standard_normal((CLASSES, channels)), rng.standard_normal(CLASSES)
        for i, (channels, _) in enumerate(stages, start=1):
            a[f"scale{i}"], a[f"shift{i}"] = 1 + 0.2 * rng.standard_normal(channels), 0.5 * rng.standard_normal(channels)
        # What SoKD's heads might say of the last map: kinds, sizes and offsets of boxes, all of them together.
        side = stages[-1][1]
        a["heat"] = rng.uniform(0.5, 1, (BATCH, 4, side, side))
        a["size"], a["offset"] = (rng.uniform(0, most, (BATCH, 2, side, side)) for most in (6, 1.5))
        a["areas"] = rng.uniform(0, 1, (BATCH, 8, side, side))
        made.append(a)
    return tuple(a | more for a, more in zip(made, staged.kernels(seed, shapes, BATCH, CLASSES), strict=True))


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100)
    labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
    index = rng.permutation(IMAGES)[:BATCH].astype(np.int32)
    views = {"image": np.zeros((BATCH, 8, 8, 3)), "strong": np.ones((BATCH, 8, 8, 3))}
    return views | {"label": labels[index], "index": index, "dataset_label": labels}


def nhwc(x):
    return jnp.transpose(x, (0, 2, 3, 1)) if jnp.ndim(x) == 4 else x


def outputs(a: dict, train: bool = False) -> Outputs:
    """Our `Outputs` of arrays in torch's layout. train: as a student's later stages run again."""
    count = sum(k.startswith("stage") for k in a)
    several = {k: tuple(nhwc(a[f"{k}{i}"]) for i in range(1, count + 1)) for k in ("stage", "preact", "scale", "shift")}
    sides = [x.shape[1] for x in several["stage"]]
    later = staged.Later(tuple(m // n for m, n in itertools.pairwise(sides)))
    made = Outputs(
        a["logits"], several["stage"], several["preact"], a["pooled"], (a["kernel"].T, a["bias"]),
        tuple(zip(several["scale"], several["shift"], strict=True)), nhwc(a["stem"]), several["stage"][-1],
    )  # fmt: skip
    return again.attach(made, later, {"params": a}, train)


def drawn(path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The weight at our `path` in our layout, by its name and shape alone; None for what stays as it begins."""
    n = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)
    rules = {
        "kernel": lambda: n / np.sqrt(np.prod(shape[:-1])), "bias": lambda: 0.3 * n, "scale": lambda: 1 + 0.3 * n,
        "mean": lambda: 0.1 * n, "var": lambda: 1 + 0.1 * np.abs(n),
        "projection": lambda: n / np.sqrt(shape[0]), "time": lambda: n, "query": lambda: n,
        "position": lambda: 0.1 * n,
    }  # fmt: skip
    rule = rules.get(path.rpartition("/")[2])
    return rule() if rule else None


def summary(gradient: np.ndarray, name: str) -> list[float]:
    """[length, product with a fixed array of the same shape]: an entry in another place or of another sign shows."""
    fixed = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(np.shape(gradient))
    return [float(np.linalg.norm(gradient)), float(np.sum(np.asarray(gradient, np.float64) * fixed))]
