"""A second, strong view of a batch inside the jitted step: two random operations and a box of grey, as FixMatch has them.

Ranges are those of kekmodel/FixMatch-pytorch's RandAugment with strengths of the whole range, as CRLD's code takes them. An
image's numbers are of (key, its place in the batch) alone.
"""

import jax
import jax.numpy as jnp

from pwkd_jax.data import policies
from pwkd_jax.errors import UserError

LAYERS, MOST = 2, 0.5  # operations an image; of an image's side, the longest that a box has
GREY = (125, 123, 114)
# {operation: (least, most)} in the units of `policies.apply`; of translations, in sides of the image.
RANGES = {
    "shear_x": (-0.3, 0.3), "shear_y": (-0.3, 0.3), "translate_x": (-0.3, 0.3), "translate_y": (-0.3, 0.3),
    "rotate": (-30.0, 30.0), "brightness": (-0.95, -0.05), "color": (-0.95, -0.05), "contrast": (-0.95, -0.05),
    "sharpness": (-0.95, -0.05), "posterize": (4.0, 8.0), "solarize": (0.0, 256.0),
}  # fmt: skip


def strong(key: jax.Array, images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, C], each under two operations drawn with replacement and `box`. Raises UserError for other images."""
    if images.dtype != jnp.uint8:
        raise UserError(f"student.distiller: a method of two views changes uint8 images, and these are {images.dtype}")
    height, width = images.shape[1:3]
    sides = {"translate_x": width, "translate_y": height}
    table = jnp.array([[sides.get(name, 1) * x for x in RANGES.get(name, (0.0, 0.0))] for name in policies.OPERATIONS])

    def one(number: jax.Array, image: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, number)
        for layer in range(LAYERS):
            which, strength = jax.random.split(jax.random.fold_in(own, layer))
            operation = jax.random.randint(which, (), 0, len(policies.OPERATIONS))
            least, most = table[operation]
            image = policies.apply(image, operation, least + (most - least) * jax.random.uniform(strength))
        return box(jax.random.fold_in(own, LAYERS), image)

    return jax.vmap(one)(jnp.arange(len(images)), images)


def box(key: jax.Array, image: jax.Array) -> jax.Array:
    """uint8 [H, W, C] with a grey square, of up to half the image's width, about a drawn pixel; what lies outside is cut."""
    height, width, channels = image.shape
    size, row, column = jax.random.uniform(key, (3,)) * jnp.array([MOST * width, height, width])
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    top, left = jnp.floor(jnp.maximum(row - size / 2, 0)), jnp.floor(jnp.maximum(column - size / 2, 0))
    inside = (y >= top) & (y <= top + size) & (x >= left) & (x <= left + size)
    grey = GREY if channels == 3 else (GREY[1],) * channels
    return jnp.where(inside[..., None], jnp.array(grey, jnp.uint8), image)
