"""The language of splits: TFDS's slices, and slices of every class by itself.

`train[:80%]` is the first part of the stored order, which may be sorted by class. `stratified(train, 80%)` is that part of
each class, its images drawn by a seed, and `stratified(train, 80%:)` is what it leaves; `stratified(train, 20%:40%, seed=1)`
is a fold of another draw. What is cut may itself be a slice or a sum: `stratified(train[:5000]+test, 80%)`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pwkd_jax.errors import UserError

# A stretch of one stored split: (its name, first record, one past the last).
Range = tuple[str, int, int]

# How a message ends where a split of one's own would help.
OFFER = "cut one by class: data.train_split='stratified(train, 80%)', data.test_split='stratified(train, 80%:)'"

_STRATIFIED = re.compile(
    r"\s*stratified\(\s*(.+?)\s*,\s*(?:(\d*\.?\d+)\s*%)?\s*(:)?\s*(?:(\d*\.?\d+)\s*%)?\s*(?:,\s*seed\s*=\s*(\d+)\s*)?\)\s*"
)


class Stratified(NamedTuple):
    """The images of `spec` from `start` to `stop`, fractions of each class, in the order that `seed` draws."""

    spec: str
    start: float
    stop: float
    seed: int


def stratified(key: str, spec: str) -> Stratified | None:
    """`spec` read as a slice of every class; None where it is none. Raises UserError, naming `key`."""
    if not spec.strip().startswith("stratified"):
        return None
    match = _STRATIFIED.fullmatch(spec)
    if match and (match[2] or match[4]) and (match[3] or not match[4]):
        start, stop = (float(match[2] or 0), float(match[4] or 100)) if match[3] else (0.0, float(match[2]))
        if 0 <= start < stop <= 100 and int(match[5] or 0) < 2**63:
            return Stratified(match[1], start / 100, stop / 100, int(match[5] or 0))
    raise UserError(
        f"{key}: '{spec}' is not a part of each class; write stratified(train, 80%), stratified(train, 80%:) for the rest, or "
        "stratified(train, 20%:40%, seed=1), from 0% to 100% and a seed below 2^63"
    )


def asked(key: str, spec: str) -> list[str] | None:
    """The stored splits that a specification names, in order; None for all of them."""
    part = stratified(key, spec)
    names = [p.strip().partition("[")[0].strip() for p in (part.spec if part else spec).split("+")]
    return None if "all" in names else names


def length(key: str, spec: str, name: str, shards: Mapping[str, Sequence[int]]) -> int:
    """How many images a specification names, without their labels: of slices of each class up to one a class more."""
    part = stratified(key, spec)
    total = sum(b - a for _, a, b in _plain(key, part.spec if part else spec, name, shards))
    return round(total * part.stop) - round(total * part.start) if part else total


def ranges(
    key: str, spec: str, name: str, shards: Mapping[str, Sequence[int]], labels: Callable[[list[Range]], np.ndarray]
) -> list[Range]:
    """The non-empty ranges of records that a specification names, in its order; a slice of each class in the stored order.

    name: of the data set; shards: {split: records in each of its files}; labels(ranges) -> int [N], asked only where classes
    are cut. Raises UserError, naming `key`.
    """
    part = stratified(key, spec)
    if not part:
        return _plain(key, spec, name, shards)
    inner = _plain(key, part.spec, name, shards)
    chosen = choose(np.asarray(labels(inner)), part)
    if not len(chosen):
        raise UserError(f"{key}: '{spec}' of data set '{name}' is empty; name a larger part")
    return _runs(inner, chosen)


def share(one: list[Range], other: list[Range]) -> bool:
    """Whether two specifications, as ranges, name an image in common."""
    return any(a == b and max(i, k) < min(j, m) for a, i, j in one for b, k, m in other)


def choose(labels: np.ndarray, part: Stratified) -> np.ndarray:
    """The rising positions of `part` among images of these labels: int [M]. A cut of a class lies at its share rounded up, so
    that a part from 0 holds every class, and parts that meet share no image."""
    chosen = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        # Raw output is what numpy keeps stable between releases (NEP 19).
        bits = np.random.Philox(key=[part.seed, 2], counter=[0, int(label) % 2**63, 0, 0]).random_raw(len(places))
        # Shares such as 0.07 are a little more than they say in binary.
        first, last = (int(np.ceil(round(share * len(places), 6))) for share in (part.start, part.stop))
        chosen.append(places[np.argsort(bits, kind="stable")[first:last]])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, int)


def _runs(inner: list[Range], chosen: np.ndarray) -> list[Range]:
    """`inner`, laid end to end, at the rising positions `chosen`, as few ranges."""
    found, offset = [], 0
    for split, start, stop in inner:
        here = chosen[(chosen >= offset) & (chosen < offset + stop - start)] - offset + start
        offset += stop - start
        for run in np.split(here, np.flatnonzero(np.diff(here) != 1) + 1):
            if len(run):
                found.append((split, int(run[0]), int(run[-1]) + 1))
    return found


def _plain(key: str, spec: str, name: str, shards: Mapping[str, Sequence[int]]) -> list[Range]:
    """The non-empty ranges of records that a TFDS split specification names, in its order."""
    if spec in shards:  # no slice, so that the digits do not pay for importing tfds
        ranges = [(spec, 0, sum(shards[spec]))]
    else:
        import tensorflow_datasets as tfds

        try:
            instruction = tfds.core.ReadInstruction.from_spec(spec)
        except (ValueError, NotImplementedError) as e:
            raise UserError(
                f"{key}: '{spec}' is not a split; write a name with an optional slice, such as 'train', 'train[:500]', "
                "'train[10%:20%]' or a sum of these with '+'"
            ) from e
        for part in spec.split("+"):
            split = part.strip().partition("[")[0]
            if split not in shards and split != "all":
                raise UserError(f"{key}: data set '{name}' has no split '{split}'; it has {', '.join(sorted(shards))}")
        infos = {s: tfds.core.SplitInfo(name=s, shard_lengths=list(n), num_bytes=0) for s, n in shards.items()}
        try:
            absolute = instruction.to_absolute(infos)
        except ValueError as e:
            sizes = ", ".join(f"{s} {sum(n)}" for s, n in sorted(shards.items()) if sum(n))
            raise UserError(f"{key}: '{spec}' reaches beyond the images of data set '{name}', which has {sizes}") from e
        # None stands for an open end.
        ranges = [(a.splitname, a.from_ or 0, sum(shards[a.splitname]) if a.to is None else a.to) for a in absolute]
    ranges = [r for r in ranges if r[1] < r[2]]
    if not ranges:
        raise UserError(f"{key}: '{spec}' of data set '{name}' is empty; name a split or slice that holds images")
    return ranges
