"""How good predictions are, and how like a teacher's: per image, then over a split. Plain numpy in float64."""

import numpy as np

BINS = 15


def per_image(log_probabilities: np.ndarray, labels: np.ndarray, teacher: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Scores [B] of log-probabilities [B, classes] for labels [B], and beside a teacher's log-probabilities.

    top1, top5: 0 or 1; among equal scores the lower class comes first, as in argmax. nll: -log p(label), in nats.
    confidence: the largest probability. agreement: 1 where both argmaxes are one class. divergence: KL(teacher || student)
    in nats. The last two are the fidelity measures of Stanton et al., NeurIPS 2021.
    """
    z = log_probabilities.astype(np.float64)
    own = np.take_along_axis(z, labels[:, None], axis=1)
    # Put so that a score which is no number never counts as right.
    before = ~(z < own) & ((z != own) | (np.arange(z.shape[1]) < labels[:, None]))
    rank = before.sum(axis=1)
    scores = {"top1": rank < 1, "top5": rank < 5, "nll": -own[:, 0], "confidence": np.exp(z.max(axis=1))}
    if teacher is not None:
        t = teacher.astype(np.float64)
        # A probability that underflowed to 0 adds nothing, whatever the student gives that class.
        p = np.exp(t)
        terms = p * np.subtract(t, z, out=np.zeros_like(t), where=p > 0)
        scores |= {"agreement": z.argmax(axis=1) == t.argmax(axis=1), "divergence": terms.sum(axis=1)}
    return {key: np.asarray(values, np.float64) for key, values in scores.items()}


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error in [0, 1]: mean over 15 equal bins (a, b] of confidence, weighed by their images, of
    |accuracy - mean confidence| (Guo et al., ICML 2017)."""
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def summary(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Over all images: top1, top5, calibration_error and agreement in percent; nll and divergence in nats."""
    result = {key: 100 * float(scores[key].mean()) for key in ("top1", "top5")}
    result["nll"] = float(scores["nll"].mean())
    result["calibration_error"] = 100 * calibration_error(scores["confidence"], scores["top1"])
    if "agreement" in scores:
        result["agreement"] = 100 * float(scores["agreement"].mean())
        result["divergence"] = float(scores["divergence"].mean())
    return result
