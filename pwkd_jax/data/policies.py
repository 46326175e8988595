"""RandAugment, TrivialAugment and AutoAugment of a batch inside the jitted step: each image its own operations and magnitudes.

The operations are those of Pillow, on which the papers' own code stands, to the rounding of its bytes: geometry by the nearest
pixel, with black beyond the edge. In JAX no kept library has them. An operation is one lookup of places, one table of 256
values a channel and one blend, of which all but one leave the image as it is, so that not every operation is computed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pwkd_jax.data import autoaugment
from pwkd_jax.errors import UserError

OPERATIONS = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
              "sharpness", "posterize", "solarize", "autocontrast", "equalize")  # fmt: skip
SIGNED = OPERATIONS[1:10]
BINS = 31
POLICIES = ("", "rand", "trivial", *autoaugment.TABLES)


def magnitudes(policy: str, height: int, width: int) -> np.ndarray:
    """[operations, strengths] float32: what each of 31 strengths means to an operation, for images of that size.

    rand: RandAugment (Cubuk et al., NeurIPS 2020); trivial: the wide space of TrivialAugment (Müller and Hutter, ICCV 2021);
    AutoAugment (Cubuk et al., CVPR 2019): the first one's, in 10 strengths.
    Shear as a slope, translation in pixels, rotation in degrees, blends as what is added to 1, posterize in bits, solarize as a
    threshold.
    """
    bins = autoaugment.BINS if policy in autoaugment.TABLES else BINS
    steps = np.arange(bins) / (bins - 1)
    wide = policy == "trivial"
    most = {
        "shear_x": 0.99 if wide else 0.3, "shear_y": 0.99 if wide else 0.3,
        "translate_x": 32.0 if wide else 150 / 331 * width, "translate_y": 32.0 if wide else 150 / 331 * height,
        "rotate": 135.0 if wide else 30.0, **dict.fromkeys(SIGNED[5:], 0.99 if wide else 0.9),
    }  # fmt: skip
    table = {name: most.get(name, 0.0) * steps for name in OPERATIONS}
    table["posterize"] = 8 - np.round(steps * (6 if wide else 4))
    table["solarize"] = 255 * (1 - steps)
    return np.stack([table[name] for name in OPERATIONS]).astype(np.float32)


def sub_policies(policy: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([25, 2] int32 operations, their chances, what their strengths mean, both float32) of a policy of AutoAugment."""
    meaning = dict(zip(OPERATIONS, magnitudes(policy, height, width), strict=True))
    # To invert is to solarize from 0. So it needs no operation of its own, of which the other policies would draw.
    pairs = [[("solarize", c, autoaugment.BINS - 1) if o == "invert" else (o, c, s) for o, c, s in pair]
             for pair in autoaugment.TABLES[policy]]  # fmt: skip
    operations = np.array([[OPERATIONS.index(o) for o, _, _ in pair] for pair in pairs], np.int32)
    chances = np.array([[chance for _, chance, _ in pair] for pair in pairs], np.float32)
    return operations, chances, np.array([[meaning[o][strength] for o, _, strength in pair] for pair in pairs])


@dataclasses.dataclass(frozen=True)
class Policy:
    """(key, uint8 images [B, H, W, C]) -> images of the same kind. Image i's numbers are of (key, i) alone.

    name: `rand`: `layers` operations one after another, drawn with replacement, all at `magnitude` of 30; `trivial`: one, at a
    magnitude drawn from 0 to 30; `auto_cifar10`, `auto_imagenet`: one of AutoAugment's 25 sub-policies, each of whose two
    operations happens by its chance. Signs are drawn where an operation has one. Raises UserError for what is not possible.
    """

    name: str
    layers: int = 2
    magnitude: int = 9

    def __post_init__(self):
        if self.name not in POLICIES[1:]:
            raise UserError(f"policy: {self.name!r} is not possible; it should be one of {', '.join(POLICIES[1:])}")
        if self.layers < 1 or not 0 <= self.magnitude < BINS:
            given = f"{self.layers} layers of magnitude {self.magnitude}"
            raise UserError(f"policy: {given} are not possible; give at least 1, of 0 to {BINS - 1}")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        if images.dtype != jnp.uint8:
            raise UserError(f"policy: changes uint8 images, and these are {images.dtype}")

        def one(key: jax.Array, image: jax.Array) -> jax.Array:
            for operation, value in self.drawn(key, *image.shape[:2]):
                image = apply(image, operation, value)
            return image

        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(images)))
        return jax.vmap(one)(keys, images)

    def drawn(self, key: jax.Array, height: int, width: int) -> list[tuple[jax.Array, jax.Array]]:
        """What the image of that key undergoes: (operation, value) as `apply` takes them, one after another."""
        if self.name in autoaugment.TABLES:
            which, happens, sign = jax.random.split(key, 3)
            row = jax.random.randint(which, (), 0, len(autoaugment.TABLES[self.name]))
            operations, chances, values = (jnp.asarray(x)[row] for x in sub_policies(self.name, height, width))
            happened = jnp.where(jax.random.bernoulli(happens, chances), operations, OPERATIONS.index("identity"))
            return list(zip(happened, _either_way(sign, operations, values), strict=True))
        table, found = jnp.asarray(magnitudes(self.name, height, width)), []
        for layer in range(1 if self.name == "trivial" else self.layers):
            which, strength, sign = jax.random.split(jax.random.fold_in(key, layer), 3)
            operation = jax.random.randint(which, (), 0, len(OPERATIONS))
            level = jax.random.randint(strength, (), 0, BINS) if self.name == "trivial" else self.magnitude
            found.append((operation, _either_way(sign, operation, table[operation, level])))
        return found


def _either_way(key: jax.Array, operation: jax.Array, value: jax.Array) -> jax.Array:
    """Values of whatever shape, negated by even chance where their operation has a sign."""
    signed = jnp.isin(operation, jnp.array([OPERATIONS.index(name) for name in SIGNED]))
    return jnp.where(signed & jax.random.bernoulli(key, shape=operation.shape), -value, value)


def apply(image: jax.Array, operation: jax.Array, value: jax.Array) -> jax.Array:
    """uint8 [H, W, C] under the operation of that index in OPERATIONS, at `value` in its own unit, sign included."""
    among = lambda *names: jnp.isin(operation, jnp.array([OPERATIONS.index(name) for name in names]))  # noqa: E731
    moved = _moved(image, operation, value)
    mapped = _mapped(moved, operation, value)
    flat = _degenerate(mapped, operation)
    blended = among(*SIGNED[5:])
    # Truncated, as Pillow does; of uint8 values a blend with factor 1 is the image itself.
    mixed = flat + jnp.where(blended, 1 + value, 1) * (mapped.astype(jnp.float32) - flat)
    return jnp.where(blended, jnp.clip(mixed, 0, 255).astype(jnp.uint8), mapped)


def _is(operation: jax.Array, name: str) -> jax.Array:
    return operation == OPERATIONS.index(name)


def _moved(image: jax.Array, operation: jax.Array, value: jax.Array) -> jax.Array:
    """Sheared and translated from the upper left corner, rotated about the centre."""
    height, width = image.shape[:2]
    angle = jnp.where(_is(operation, "rotate"), jnp.deg2rad(value), 0)
    shear_x, shear_y, right, down = (
        jnp.where(_is(operation, name), value, 0) for name in ("shear_x", "shear_y", "translate_x", "translate_y")
    )
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    # Where the pixel at (x, y) comes from; without rotation the centre takes no part.
    own, other = jnp.cos(angle), jnp.sin(angle)
    from_x = own * (x - width / 2) - other * (y - height / 2) + width / 2
    from_y = other * (x - width / 2) + own * (y - height / 2) + height / 2
    turned = _is(operation, "rotate")
    from_x = jnp.floor(jnp.where(turned, from_x, x + shear_x * y + jnp.trunc(right))).astype(jnp.int32)
    from_y = jnp.floor(jnp.where(turned, from_y, y + shear_y * x + jnp.trunc(down))).astype(jnp.int32)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    found = image[jnp.clip(from_y, 0, height - 1), jnp.clip(from_x, 0, width - 1)]
    return jnp.where(inside[..., None], found, 0).astype(jnp.uint8)


def _mapped(image: jax.Array, operation: jax.Array, value: jax.Array) -> jax.Array:
    """Each channel's values through a table: fewer bits, inverted from a threshold, stretched, or spread evenly."""
    shades = jnp.arange(256)
    bits = jnp.where(_is(operation, "posterize"), 8 - value.astype(jnp.int32), 0)
    posterized = (shades >> bits) << bits
    solarized = jnp.where(shades < value, shades, 255 - shades)

    def table(channel: jax.Array) -> jax.Array:
        count = jnp.zeros(256, jnp.int32).at[channel.ravel()].add(1)
        low, high = jnp.argmax(count > 0), 255 - jnp.argmax(count[::-1] > 0)
        stretched = jnp.clip((shades - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
        step = (channel.size - count[high]) // 255
        even = jnp.clip((step // 2 + jnp.cumsum(count) - count) // jnp.maximum(step, 1), 0, 255)
        chosen = jnp.where(_is(operation, "posterize"), posterized, shades)
        chosen = jnp.where(_is(operation, "solarize"), solarized, chosen)
        chosen = jnp.where(_is(operation, "autocontrast") & (high > low), stretched, chosen)
        return jnp.where(_is(operation, "equalize") & (step > 0), even, chosen)

    tables = jax.vmap(table, in_axes=-1)(image)
    return jax.vmap(lambda table, channel: table[channel], in_axes=(0, -1), out_axes=-1)(tables, image).astype(jnp.uint8)


def _degenerate(image: jax.Array, operation: jax.Array) -> jax.Array:
    """float32 [H, W, C], what a blend starts from: black, grey, the mean grey, or the image smoothed."""
    grey = grey_of(image)
    mean = jnp.floor(jnp.mean(grey) + 0.5)
    smooth = _smoothed(image)
    black = jnp.zeros_like(smooth)
    chosen = jnp.where(_is(operation, "color"), jnp.broadcast_to(grey[..., None], smooth.shape), black)
    chosen = jnp.where(_is(operation, "contrast"), mean, chosen)
    return jnp.where(_is(operation, "sharpness"), smooth, chosen)


def grey_of(image: jax.Array) -> jax.Array:
    """float32 [H, W] of uint8 [H, W, C]: luma by ITU-R 601 of three channels, in Pillow's integers; otherwise their mean."""
    if image.shape[-1] != 3:
        return jnp.floor(jnp.mean(image.astype(jnp.float32), -1))
    red, green, blue = (image[..., i].astype(jnp.int32) for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(jnp.float32)


def _smoothed(image: jax.Array) -> jax.Array:
    """The mean of 3x3 pixels, the middle one counting five times; the border as it is."""
    x = image.astype(jnp.float32)
    if min(image.shape[:2]) < 3:
        return x
    height, width = image.shape[0] - 2, image.shape[1] - 2
    around = sum(x[i : i + height, j : j + width] for i in range(3) for j in range(3))
    inner = jnp.floor((around + 4 * x[1:-1, 1:-1]) / 13 + 0.5)
    return x.at[1:-1, 1:-1].set(inner)
