"""What is to be learnt: images to train on and to be judged by, and what happens to them on the devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from pwkd_jax import data, models, weights
from pwkd_jax.data import soundness
from pwkd_jax.errors import UserError
from pwkd_jax.training import dispatch, sharding
from pwkd_jax.training.evaluation import Evaluator


@dataclasses.dataclass(frozen=True)
class Task:
    """Made by `task`. train, test: splits, see `data.as_split`; test may be None. mean, std: per channel, of pixels in [0, 1].
    augment(key, images) -> images of the same kind, in training alone. classes: their names, () without. labels: whether
    batches carry the labels of the whole training set, which is in RAM. on_device, steps_per_dispatch: the config's keys of
    these names. validator: of images that are neither trained on nor tested by, to choose by them; None without any.
    """

    train: Any
    test: Any
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    mesh: jax.sharding.Mesh
    evaluator: Evaluator | None
    labels: bool = True
    classes: tuple[str, ...] = ()
    on_device: str = "auto"
    steps_per_dispatch: int = 0
    validator: Evaluator | None = None

    def __repr__(self) -> str:
        tests = "no test images" if self.test is None else f"{len(self.test)} test images"
        return f"Task({len(self.train)} training and {tests} of {list(self.image_shape)}, {self.num_classes} classes)"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[H, W, C]."""
        return tuple(self.train.image_shape)

    def normalise(self, images: jax.Array) -> jax.Array:
        """uint8 or float images [B, H, W, C] as the networks take them, float32."""
        return data.normalise(images, self.mean, self.std)

    def preprocess(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """What a training step does to its images: `augment`, then `normalise`."""
        return self.normalise(self.augment(key, images) if self.augment else images)

    def strong(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """`preprocess` to a strong view, see `data.strong`."""
        weak = self.augment(key, images) if self.augment else images
        return self.normalise(data.strong(jax.random.fold_in(key, 6), weak))

    @functools.cached_property
    def stored(self) -> dict[str, jax.Array]:
        """The training data on the devices, once for all runs."""
        return dispatch.store(self.mesh, self.train)

    def batches(self, batch_size: int, seed: int) -> Callable:
        """step -> the global batch of that step, on the devices: a pure function of seed and step."""
        pipeline = data.batches(self.train, batch_size, seed, jax.process_index(), jax.process_count())
        if dispatch.on_device(self.on_device, self.train):
            return dispatch.Resident(self.mesh, pipeline, self.stored, dispatch.most(self.steps_per_dispatch, True))
        if not self.labels:
            return lambda step: sharding.put_batch(self.mesh, pipeline(step))
        labels = jax.device_put(self.train.labels, sharding.replicated(self.mesh))
        return lambda step: sharding.put_batch(self.mesh, pipeline(step)) | {"dataset_label": labels}

    def held(self, batch_size: int, seed: int, step: int) -> list[int] | list[str] | None:
        """What the batch of that step holds: indices of training images, names of streamed ones, None of an iterable's."""
        if isinstance(self.train, data.Batches):
            return None
        found = data.Pipeline(self.train, batch_size, seed).index(step)[0].tolist()
        return [self.train.source.name(i) for i in found] if isinstance(self.train, data.Stream) else found

    def on(self, mesh: jax.sharding.Mesh) -> "Task":
        """The same trained on another mesh; its test images stay where they are scored."""
        return dataclasses.replace(self, mesh=mesh)

    def place(self, tree: Any, how: str = "replicated") -> Any:
        """`tree` on the devices, see `sharding.shardings`."""
        return sharding.place(self.mesh, tree, how)

    def card(self, model: nn.Module, source: dict) -> dict:
        """The card of a network trained on it, see `weights`."""
        name, width, divisor = models.name_of(model), float(getattr(model, "width", 1.0)), getattr(model, "divisor", 0)
        card = weights.card(
            name, width, divisor, self.num_classes, self.image_shape, self.mean, self.std, source, network=model
        )
        return card | {"classes": list(self.classes)}

    def scores(self, model: Any, variables: dict) -> dict[str, float]:
        """{"top1": percent, "test_loss": mean cross entropy} on the test images, and {"validation_top1"} on the validation
        images; without what there is none of."""
        found = self.evaluator(model, variables) if self.evaluator else {}
        chosen = {"validation_top1": self.validator(model, variables)["top1"]} if self.validator else {}
        return ({"top1": found["top1"], "test_loss": found["loss"]} if found else {}) | chosen


def _refuse_odd_images(train: Any, mean: Sequence[float]) -> None:
    """UserError for images that no network could learn from as they are."""
    shape = tuple(train.image_shape)
    if len(train) == 0 or min(shape) < 1:
        raise UserError(f"train: there are {len(train)} images of {list(shape)}")
    if shape[-1] > 4 and shape[0] in (1, 3):
        raise UserError(f"train: images are {list(shape)}, which looks like channels first; give [N, H, W, C]")
    if not isinstance(train, data.Split) or train.images.dtype == np.uint8:
        return
    if not np.isfinite(train.images).all():
        raise UserError("train: some pixels are not finite numbers")
    if not len(mean) and np.abs(train.images[:1000]).max() > 20:
        raise UserError(
            f"train: float pixels reach {np.abs(train.images[:1000]).max():g}; give uint8 images, pixels in [0, 1], or mean "
            "and std"
        )


def task(
    train: Any,
    test: Any = None,
    *,
    num_classes: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    evaluation_batch_size: int = 512,
    validation: Any = None,
) -> Task:
    """A `Task` of data as they come: (images, labels) arrays, any iterable of batches, or what `data.load` gives.

    num_classes: the labels' largest plus one where it is 0. mean, std: per channel, of pixels in [0, 1]; where they are not
    given, uint8 images in RAM are measured and float images stay as they are. augment(key, images): of training batches inside
    the step, such as functools.partial(pwkd_jax.augment, crop_padding=4, flip=True). mesh: of devices, all of them by default.
    validation: images to choose by, see `selection`; of a `Dataset` its own by default. Raises UserError for data that are not
    what they should be.
    """
    names = train.classes if isinstance(train, data.Dataset) else ()
    if isinstance(train, data.Dataset):
        validation = train.validation if validation is None else validation
        train, test, num_classes = train.train, train.test if test is None else test, num_classes or train.num_classes
    train, test, validation = (None if split is None else data.as_split(split) for split in (train, test, validation))
    for name, split in (("test", test), ("validation", validation)):
        if split is not None and tuple(split.image_shape) != tuple(train.image_shape):
            raise UserError(f"{name} images are {list(split.image_shape)}, and training images {list(train.image_shape)}")
    in_memory = isinstance(train, data.Split)
    _refuse_odd_images(train, mean)
    if not num_classes:
        if not in_memory:
            raise UserError("num_classes: an iterable of batches does not tell how many classes there are; give num_classes")
        num_classes = int(np.max(train.labels)) + 1
    for split in (train, test, validation):
        if isinstance(split, data.Batches):
            split.num_classes = num_classes
        if isinstance(split, data.Split) and len(split) and int(split.labels.max()) >= num_classes:
            raise UserError(f"num_classes: a label is {int(split.labels.max())}, which {num_classes} classes do not have")
    soundness.check(train, test, num_classes, names)
    dtype = train.images.dtype if in_memory else getattr(train, "dtype", np.dtype(np.uint8))
    if len(mean) and dtype == np.uint8:  # float images are not divided by 255, so theirs are in the images' own units
        data.check_normalisation(mean, std, "mean", "std")
    if not len(mean):
        channels = train.image_shape[-1]
        if dtype != np.uint8:
            mean, std = (0.0,) * channels, (1.0,) * channels
        elif in_memory:
            mean, std = data.channel_statistics(train.images)
        else:
            raise UserError("mean: uint8 images of an iterable cannot be measured; give mean and std, of pixels in [0, 1]")
    channels = train.image_shape[-1]
    if np.shape(mean) != (channels,) or np.shape(std) != (channels,) or not all(s > 0 for s in std):
        raise UserError(f"mean and std: should have {channels} numbers each, one a channel, and those of std above 0")
    mesh = mesh or sharding.make_mesh()
    normalise = functools.partial(data.normalise, mean=mean, std=std)
    evaluator = Evaluator(mesh, test, evaluation_batch_size, normalise) if test is not None else None
    validator = Evaluator(mesh, validation, evaluation_batch_size, normalise) if validation is not None else None
    if evaluator and validator:
        validator = evaluator.on(validation)  # with the same compiled programs
    return Task(
        train, test, num_classes, tuple(mean), tuple(std), augment, mesh, evaluator, labels=in_memory, classes=tuple(names),
        validator=validator,
    )  # fmt: skip
