"""Which numbers can be the mean and deviation by which images are normalised, and which were meant for pixels up to 255."""

from collections.abc import Sequence

from pwkd_jax.errors import UserError

# Between them lie 1/255, of networks that take pixels up to 255, and 1, of those that take pixels up to 1 as they are.
LEAST, MOST = 1e-3, 1.0


def check_normalisation(mean: Sequence[float], std: Sequence[float], mean_key: str, std_key: str) -> None:
    """UserError, by the names `mean_key` and `std_key`, unless each mean is in [0, 1] and each std in [0.001, 1].

    mean, std: one number a channel, of pixels in [0, 1], whose deviation is never above 1/2. Where they are in units of pixels
    up to 255, the sentence shows them divided.
    """
    for key, values, low in ((mean_key, mean, 0.0), (std_key, std, LEAST)):
        if all(low <= v <= MOST for v in values):  # so that a nan, too, is outside
            continue
        given = ",".join(f"{v:g}" for v in values)
        if any(v > MOST for v in values) and all(255 * low <= v <= 255 for v in values):
            divided = ",".join(f"{v / 255:.4g}" for v in values)
            raise UserError(
                f"{key}: {given} is in units of pixels up to 255, and should be of pixels in [0, 1]; divided by 255: {divided}"
            )
        example = "0.485,0.456,0.406" if key == mean_key else "0.229,0.224,0.225"
        raise UserError(
            f"{key}: {given} is not possible; each should be in [{low:g}, {MOST:g}], of pixels in [0, 1], as in {example}"
        )
