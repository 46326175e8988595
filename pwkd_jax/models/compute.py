"""How Flax's layers are computed in training, whoever's model they are in: `layers`; and what a CPU's compiler is told.

Batch norm of [B, H, W, C] has its gradient in closed form on every device (see `batch_norm.serves`). The rest is for one CPU
alone: XLA's partitioner knows Flax's own layers better than these, and other devices, pre-flight's included, have kernels of
their own.
"""

import contextlib
import contextvars
import functools

import flax.linen as nn
import jax

from pwkd_jax.models import batch_norm, convolution

# jaxlib since 0.10 gives convolutions, products and sums to YNNPACK, which takes one core for most of the first and twice as
# long (tests/bench/layers.py); with this Eigen has them back. Sums stay there: XLA's own take one channel after another, each
# through all of the memory, and so many times as long.
SUMS_ALONE = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

_own = contextvars.ContextVar("own", default=True)
_innermost = contextvars.ContextVar("innermost", default=None)


@contextlib.contextmanager
def left_to_xla():
    """Context in which `layers` does nothing for a CPU: a program is lowered here to be reckoned for another device."""
    token = _own.set(False)
    try:
        yield
    finally:
        _own.reset(token)


@contextlib.contextmanager
def layers():
    """Context in which every `nn.Conv` and `nn.BatchNorm` that is traced has the form of convolution.py and batch_norm.py."""

    def intercept(call, args, kwargs, context):
        layer = context.module
        here = _own.get() and jax.default_backend() == "cpu" and jax.device_count() == 1
        # Whoever came between two of these, `freezing.as_predicting` say, is heard before the inner one.
        if context.method_name != "__call__" or _innermost.get() is not intercept:
            return call(*args, **kwargs)
        if type(layer) is nn.BatchNorm and batch_norm.serves(layer, *args, **kwargs):
            return batch_norm.train(layer, args[0] if args else kwargs["x"])
        if not here or not isinstance(layer, nn.Conv) or layer.conv_general_dilated is not None:
            return call(*args, **kwargs)
        # A layer is a frozen dataclass that may belong to the user, so it is left as it was.
        object.__setattr__(layer, "conv_general_dilated", convolution.convolve)
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(layer, "conv_general_dilated", None)

    token = _innermost.set(intercept)
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        _innermost.reset(token)


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
    """What `jax.jit` is to tell the compiler of `platform`: nothing but on a CPU, and where its jaxlib knows SUMS_ALONE."""
    if platform != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=SUMS_ALONE).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return SUMS_ALONE
