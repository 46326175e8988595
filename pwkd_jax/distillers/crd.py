"""Contrastive representation distillation (Tian, Krishnan and Isola, ICLR 2020, arXiv 1910.10699)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.feature_maps import gram, normalise
from pwkd_jax.distillers.logits import above_zero, wide
from pwkd_jax.distillers.regressors import uniform
from pwkd_jax.distillers.taps import need
from pwkd_jax.errors import UserError


def draw_negatives(key: jax.Array, labels: jax.Array, dataset_labels: jax.Array, count: int) -> jax.Array:
    """[B, count]: places in the data set, each uniform over the samples of other classes than labels [B].

    With replacement, so that `count` may exceed their number. In an order sorted by class, a class is one block: a number
    below the size of the rest, moved past the block where it reaches it, is such a sample.
    """
    dataset_labels = jnp.asarray(dataset_labels)
    order = jnp.argsort(dataset_labels)
    in_order = dataset_labels[order]
    start, end = (jnp.searchsorted(in_order, labels, side=side)[:, None] for side in ("left", "right"))
    rest = dataset_labels.shape[0] - (end - start)
    drawn = jax.random.randint(key, (labels.shape[0], count), 0, jnp.maximum(rest, 1))
    return order[drawn + jnp.where(drawn >= start, end - start, 0)]


def tally(drawn: jax.Array, size: int) -> jax.Array:
    """[B, K] places to [B, size]: how often each was drawn."""
    return jax.vmap(lambda row: jnp.zeros(size, jnp.int32).at[row].add(1))(drawn)


def log_normaliser(scores: jax.Array, index: jax.Array, counts: jax.Array, negatives: int) -> jax.Array:
    """log(N * mean of exp(score) over the batch, each sample's own row and its negatives); arguments as in `crd_loss`."""
    own = jnp.arange(scores.shape[1]) == index[:, None]
    terms = math.log(scores.shape[0] * (1 + negatives))
    return jax.nn.logsumexp(scores, b=counts + own) + math.log(scores.shape[1]) - terms


def crd_loss(scores: jax.Array, index: jax.Array, counts: jax.Array, log_z: jax.Array, negatives: int) -> jax.Array:
    """-1/B * sum over the batch of log(P / (P + c + eps)) + sum over K negatives of log(c / (P- + c + eps)); a scalar.

    P = exp(score) / Z, c = K / N, eps = 1e-7: the chance that a pair is the true one rather than noise. scores [B, N]:
    inner products of one network's embeddings with the other's bank, over the temperature. index [B]: each sample's
    own row, whose P is the positive; counts [B, N]: how often a row is its negative, K = `negatives` in all.
    In log space: log(P / (P + c + eps)) = -softplus(log(c + eps) - log P), and likewise the other term.
    """
    c = negatives / scores.shape[1]
    odds = scores - log_z - math.log(c + 1e-7)
    own = jnp.take_along_axis(odds, index[:, None], axis=1)[:, 0]
    others = jnp.sum(counts * (math.log(c / (c + 1e-7)) - jax.nn.softplus(odds)), axis=1)
    return -jnp.mean(others - jax.nn.softplus(-own))


def last_of_each(index: jax.Array, size: int) -> jax.Array:
    """index [B] with `size`, a place that does not exist, for every entry that comes again later.

    Of a sample that is in the batch twice the last is kept: otherwise the order of writes, which accelerators leave open,
    would decide.
    """
    return jnp.where(jnp.triu(index[:, None] == index, k=1).any(axis=1), size, index)


def remember(bank: jax.Array, index: jax.Array, embedding: jax.Array, momentum: float) -> jax.Array:
    """bank [N, D] with rows index [B] moved to m * old + (1 - m) * embedding [B, D] and scaled back to length 1."""
    rows = normalise(momentum * bank[index] + (1 - momentum) * embedding)
    return bank.at[last_of_each(index, bank.shape[0])].set(rows, mode="drop")


class CRD(nn.Module):
    """`crd_loss` in both directions between embeddings of the pooled features, at RepDistiller's weights for every pair.

    Both are linear and of length 1, and each network is contrasted with a bank of the other's embeddings of the whole
    data set. RepDistiller's best variant adds KD: `kd+crd`. `negatives`: of other classes, drawn with replacement (the
    authors draw without where a data set has enough). The normalisers Z come from the first batch.
    on_new_stage: at a stage's first step, `reset` forgets the bank of the teacher, which now is another, and the
    normalisers; the student's goes on, for it is the same network. `keep` changes nothing.
    """

    ce_weight: float = 1.0
    weight: float = 0.8
    features: int = 128
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    on_new_stage: str = "reset"

    @property
    def dataset_labels(self) -> bool:
        return True

    def __post_init__(self):
        above_zero(features=self.features, negatives=self.negatives, temperature=self.temperature)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum: {self.momentum:g} is not possible; it should be from 0 to below 1")
        if self.on_new_stage not in ("reset", "keep"):
            raise UserError(f"on_new_stage: there is no '{self.on_new_stage}': it is reset or keep")
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("CRD", student, teacher, "pooled")
        size, index, labels = batch["dataset_label"].shape[0], batch["index"], batch["label"]
        embeddings = {
            name: normalise(nn.Dense(self.features, kernel_init=uniform, precision="highest", name=name)(wide(x.pooled)))
            for name, x in (("student", student), ("teacher", teacher))
        }

        def fresh(key):
            return jax.random.uniform(key, (size, self.features), minval=-1, maxval=1) / math.sqrt(self.features / 3)

        banks = {
            name: self.variable("memory", f"{name}_bank", lambda: fresh(self.make_rng("distiller"))) for name in embeddings
        }
        log_z = self.variable("memory", "log_z", lambda: jnp.zeros(2))
        started = self.variable("memory", "started", lambda: jnp.zeros((), bool))
        draws, resets = self.make_rng("distiller"), self.make_rng("distiller")
        if self.is_initializing():
            return jnp.zeros(()), {}
        old = {name: bank.value for name, bank in banks.items()}
        ready = started.value
        if self.on_new_stage == "reset":
            first = progress.step == 0
            old["teacher"] = jax.lax.cond(first, lambda _: fresh(resets), lambda bank: bank, old["teacher"])
            ready &= ~first
        # A score for every row of a bank costs less than gathering as many rows as there are negatives, until the data
        # set is `features` times their number; and counts, unlike gathered floats, add up to the same bits in any order.
        counts = tally(draw_negatives(draws, labels, batch["dataset_label"], self.negatives), size)
        scores = [
            gram(embeddings[name], old[other]) / self.temperature
            for name, other in (("student", "teacher"), ("teacher", "student"))
        ]
        measured = jnp.stack([log_normaliser(jax.lax.stop_gradient(s), index, counts, self.negatives) for s in scores])
        log_z.value = jnp.where(ready, log_z.value, measured)
        started.value = jnp.ones((), bool)
        losses = [crd_loss(s, index, counts, z, self.negatives) for s, z in zip(scores, log_z.value, strict=True)]
        for name, bank in banks.items():
            bank.value = remember(old[name], index, jax.lax.stop_gradient(embeddings[name]), self.momentum)
        return sum(losses), {"contrast_student": losses[0], "contrast_teacher": losses[1]}
