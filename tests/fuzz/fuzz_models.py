"""Networks that compile at once."""

import flax.linen as nn

from pwkd_jax.models import Outputs, channels


class Net(nn.Module):
    """A convolution with batch norm and a classifier."""

    width: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(channels(8, self.width), (3, 3), strides=2, use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x))
        pooled = x.mean((1, 2))
        return Outputs(nn.Dense(self.num_classes, name="head")(pooled), pooled=pooled, stages=(x,))


class Plain(nn.Module):
    """No batch norm, and nothing but logits."""

    width: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(channels(8, self.width), name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes, name="head")(x)
