"""Image data, from disk to the device: a data set decoded once into RAM as uint8 (`sources`), batches that are a pure
function of (seed, step), so that a resumed run needs the step counter only (`pipeline`), and the part that runs inside
the jitted step: random crops and flips on uint8, then normalisation to float32 (`augment`)."""

from pwkd_jax.data.augment import augment, channel_statistics, normalise
from pwkd_jax.data.pipeline import Pipeline, eval_batches
from pwkd_jax.data.sources import Dataset, Split, load, load_split

__all__ = ["Dataset", "Pipeline", "Split", "augment", "channel_statistics", "eval_batches", "load", "load_split", "normalise"]
