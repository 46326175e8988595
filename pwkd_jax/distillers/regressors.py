"""Trained maps from the student's features to the teacher's.

Batch norm in them always uses the batch: a connector exists in training alone. Kernels end in the teacher's channels,
so that a narrow stage uses their leading block.
"""

import flax.linen as nn
import jax

from pwkd_jax.errors import UserError

# PyTorch's default for convolutions: uniform within 1 / sqrt(fan in).
uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _window(method: str, source: int, target: int) -> tuple[int, int, int]:
    """(kernel, stride, padding) of the convolution that takes `source` pixels to `target`; stride 0 doubles them."""
    if source == 2 * target:
        return 3, 2, 1
    if 2 * source == target:
        return 4, 0, 1
    if source >= target:
        return 1 + source - target, 1, 0
    raise UserError(
        f"student.distiller: {method} takes the student's map of {source} pixels a side to the teacher's of {target}, "
        "but can only shrink it, keep it or double it: choose a stage, or a student, of a higher resolution"
    )


def resized(method: str, x: jax.Array, features: int, size: tuple[int, int], side: int = 1, kernel_init=uniform) -> jax.Array:
    """[B, H, W, C] to [B, *size, features] by the calling module's layer `conv`, whose form follows from the sizes.

    3x3 with stride 2 where the map is twice the target, a transposed 4x4 with stride 2 where it is half of it, where they agree
    one of an odd `side`, else as large a kernel, without padding, as leaves `size`. Raises UserError where none does.
    """
    sides = zip(x.shape[1:3], size, strict=True)
    kernel, stride, pad = zip(*(_window(method, *pair) for pair in sides), strict=True)
    if 0 in stride:
        if any(stride):
            raise UserError(
                f"student.distiller: {method} cannot double one side of a map alone: the student's is "
                f"{x.shape[1:3]}, the teacher's {size}; choose a stage of the same proportions"
            )
        # Padding of the input spread out with zeros: 2 gives exactly twice the size, as PyTorch's 1 does.
        up = nn.ConvTranspose(features, kernel, (2, 2), padding=(2, 2), use_bias=False, kernel_init=uniform, name="conv")
        return up(x)
    if kernel == (1, 1):
        kernel, pad = (side, side), (side // 2, side // 2)
    # Explicit padding: 'SAME' with stride 2 pads on one side only, unlike the reference.
    padding = tuple((p, p) for p in pad)
    return nn.Conv(features, kernel, stride, padding=padding, use_bias=False, kernel_init=kernel_init, name="conv")(x)


class ConvReg(nn.Module):
    """FitNet's regressor: convolution, batch norm and ReLU, [B, H, W, C] to [B, *size, features].

    The convolution is that of `resized`; it has no bias, which the batch norm would take out again. method: who asks, for the
    refusal.
    """

    features: int
    size: tuple[int, int]
    method: str
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = resized(self.method, x, self.features, self.size)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name="norm")(x)
        return nn.relu(x) if self.relu else x
