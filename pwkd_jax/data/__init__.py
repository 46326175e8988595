"""Image data, from disk to the device: a data set decoded once into RAM as uint8 (`sources`), or streamed where it does not fit
or its images have many sizes (`stream`); batches that are a pure function of (seed, step), so that a resumed run needs the step
counter only (`pipeline`); arrays and iterables of one's own (`user_data`); and the part that runs inside the jitted step:
random crops and flips on uint8, then normalisation to float32 (`augment`)."""

from pwkd_jax.data.augment import augment, channel_statistics, normalise
from pwkd_jax.data.copies import copied
from pwkd_jax.data.mixing import Mixing, balanced
from pwkd_jax.data.normalisation import check_normalisation
from pwkd_jax.data.pipeline import Pipeline
from pwkd_jax.data.policies import Policy
from pwkd_jax.data.sources import class_names, load, load_split, many_sizes
from pwkd_jax.data.splits import Dataset, Split, Streaming
from pwkd_jax.data.stream import Stream, batches, eval_batches
from pwkd_jax.data.user_data import Batches, as_split
from pwkd_jax.data.views import strong

__all__ = [
           "Batches",
           "Dataset",
           "Mixing",
           "Pipeline",
           "Policy",
           "Split",
           "Stream",
           "Streaming",
           "as_split",
           "augment",
           "balanced",
           "batches",
           "channel_statistics",
           "check_normalisation",
           "class_names",
           "copied",
           "eval_batches",
           "load",
           "load_split",
           "many_sizes",
           "normalise",
           "strong",
]  # fmt: skip
