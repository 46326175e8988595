"""Modules that people bring along, right and wrong, for the tests of what is made of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.models import Outputs, channels


class _Base(nn.Module):
    width: float = 1.0
    num_classes: int = 10

    def features(self, x, train):
        x = nn.Conv(channels(8, self.width), (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        return nn.relu(x)

    def head(self, h):
        return nn.Dense(self.num_classes, name="head")(h.mean((1, 2)))


class Dropout(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        pooled = self.features(x, train).mean((1, 2))
        pooled = nn.Dropout(0.2, deterministic=not train)(pooled)
        return Outputs(nn.Dense(self.num_classes, name="head")(pooled), pooled=pooled)


class Noise(_Base):
    """Random numbers from a stream of another name, and no batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(channels(8, self.width), (3, 3), name="conv")(x))
        if train:
            x = x + 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
        return self.head(x)


class Counter(_Base):
    """A collection of its own, in which a mean and a whole number move."""

    @nn.compact
    def __call__(self, x, train=False):
        h = self.features(x, train).mean((1, 2))
        mean = self.variable("ema", "mean", lambda: jnp.zeros(h.shape[-1]))
        steps = self.variable("ema", "steps", lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * h.mean(0)
            steps.value += 1
        return nn.Dense(self.num_classes, name="head")(h - mean.value)


class Both(_Base):
    """Dropout and a collection, of a name that the package's own state has too."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dropout(0.2, deterministic=not train)(self.features(x, train).mean((1, 2)))
        seen = self.variable("distiller", "seen", lambda: jnp.zeros(h.shape[-1]))
        if train and not self.is_initializing():
            seen.value += h.sum(0)
        return nn.Dense(self.num_classes, name="head")(h)


class Sows(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        h = self.features(x, train)
        self.sow("intermediates", "h", h)
        return self.head(h)


class Head5(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(5)(self.features(x, train).mean((1, 2)))


class Head20(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return Outputs(nn.Dense(20)(self.features(x, train).mean((1, 2))))


class ReturnsDict(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return {"logits": self.head(self.features(x, train))}


class ReturnsTuple(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        h = self.features(x, train)
        return self.head(h), h


class ReturnsFrozen(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.FrozenDict({"logits": self.head(self.features(x, train))})


class NoTrain(_Base):
    @nn.compact
    def __call__(self, x, training=False):
        return self.head(self.features(x, training))


class MoreArguments(_Base):
    @nn.compact
    def __call__(self, x, mask, train=False):
        return self.head(self.features(x, train) * mask)


class NoWidth(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes)(nn.Conv(8, (3, 3))(x).mean((1, 2)))


class NoClasses(nn.Module):
    width: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(nn.Conv(8, (3, 3))(x).mean((1, 2)))


class NeedsDepth(nn.Module):
    depth: int
    width: float = 1.0
    num_classes: int = 10


class Integers(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return self.head(self.features(x, train)).astype(jnp.int32)


class Maps(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Conv(self.num_classes, (1, 1))(self.features(x, train))


class NoBatch(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return self.head(self.features(x, train)).mean(0)


class Raises(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        raise ZeroDivisionError("three\nlines\nof it")


class RaisesInTraining(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        h = self.head(self.features(x, train))
        return h.reshape(7, 7) if train else h


class AlwaysDrops(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.2, deterministic=False)(self.head(self.features(x, train)))


class ChangesInEvaluation(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        self.variable("ema", "calls", lambda: jnp.zeros(())).value += 1.0
        return self.head(self.features(x, train))


class Grows(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        h = self.features(x, train)
        self.sow("losses", "h", h.mean())
        return self.head(h)


class Halves(_Base):
    """A count that a training step makes a fraction."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("ema", "count", lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            count.value = count.value + 0.5
        return self.head(self.features(x, train))


class Empty(_Base):
    """Windows larger than the images."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (9, 9), padding="VALID")(x)
        return Outputs(self.head(x), stages=(x,))


class NoParameters(_Base):
    @nn.compact
    def __call__(self, x, train=False):
        return jnp.tile(x.mean((1, 2))[:, :1], (1, self.num_classes))


class Listed(_Base):
    sizes: tuple = (8,)

    @nn.compact
    def __call__(self, x, train=False):
        return self.head(self.features(x, train))


# Distillers.


class OnlyLoss(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        return jnp.mean((student.logits - teacher.logits) ** 2)


class PerImage(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        return jnp.sum((student.logits - teacher.logits) ** 2, -1), {}


class ThreeArguments(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch):
        return jnp.mean((student.logits - teacher.logits) ** 2), {}


class MetricList(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        return jnp.mean((student.logits - teacher.logits) ** 2), [1.0]


class MatrixMetric(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        d = student.logits - teacher.logits
        return jnp.mean(d**2), {"gap": d}


class WrongField(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        return jnp.mean(student.features**2), {}


class GrowsToo(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        self.sow("history", "logits", student.logits)
        return jnp.mean((student.logits - teacher.logits) ** 2), {}


class VectorMetric(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        d = jnp.sum((student.logits - teacher.logits) ** 2, -1)
        return d.mean(), {"per_image": d}


class DropoutHint(nn.Module):
    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        guess = nn.Dropout(0.1, deterministic=False)(student.logits)
        return jnp.mean((nn.Dense(teacher.logits.shape[-1])(guess) - teacher.logits) ** 2), {}


class Counted(_Base):
    """Asks for the number of images in a way that no program for any batch can answer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(channels(8, self.width), (3, 3), name="conv")(x))
        return nn.Dense(self.num_classes, name="head")(jnp.reshape(x.mean((1, 2)), (len(x), -1)))
