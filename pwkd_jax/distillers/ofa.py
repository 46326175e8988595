"""One-for-all distillation across architectures (Hao, Guo, Han et al., NeurIPS 2023, arXiv 2310.19444)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax.distillers.logits import above_zero, chosen, log_softmax, wide
from pwkd_jax.distillers.taps import need

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def ofa_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, eps: float, temperature: float
) -> jax.Array:
    """Mean over the batch of -sum over classes of ((q_t + 1_y)^eps - 1_y) log q_s, q = softmax(z / T); a scalar.

    Logits [B, C], labels [B]. eps above 1 weighs the target class up and the others down;
    eps = 1 is cross entropy with the teacher's softmax.
    """
    label = chosen(labels, student_logits.shape[-1]).astype(jnp.float32)
    log_s, log_t = (log_softmax(z, temperature) for z in (student_logits, teacher_logits))
    return -jnp.mean(jnp.sum(((jnp.exp(log_t) + label) ** eps - label) * log_s, axis=-1))


class Halve(nn.Module):
    """[B, H, W, C] to [B, H/2, W/2, features]: two depthwise separable 3x3 convolutions with batch norm and ReLU."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        for stride, features in ((2, channels), (1, self.features)):
            # Explicit padding: 'SAME' with stride 2 pads on one side only, unlike the reference.
            depthwise = nn.Conv(
                channels, (3, 3), stride, padding=1, feature_group_count=channels, use_bias=False, kernel_init=he_normal
            )
            x = nn.Conv(features, (1, 1), use_bias=False, kernel_init=he_normal)(depthwise(x))
            x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)(x))
        return x


class Head(nn.Module):
    """A stage's map [B, H, W, C] to logits [B, classes]: `halvings` blocks (or a 1x1 convolution), pooled, linear."""

    halvings: int
    features: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        for i in range(1, self.halvings + 1):
            x = Halve(self.features if i == self.halvings else width * 2**i)(x)
        if not self.halvings:
            x = nn.Conv(self.features, (1, 1), kernel_init=he_normal)(x)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.02))(jnp.mean(x, axis=(1, 2)))


class OFA(nn.Module):
    """`ofa_loss` on the student's logits and, through a trained head each, on its stages, beside full cross entropy.

    Asks nothing of the teacher but its logits, so the two may be of any kind. `eps` is 1 to 1.5 in the paper (1.5 for
    DeiT-T to ResNet-18); the weights are the authors'. A head has as many features as the wider of the two classifiers
    reads, so where the teacher's reads more than the student's, a narrow stage trains the leading ones.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    stages_weight: float = 1.0
    eps: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        above_zero(eps=self.eps, temperature=self.temperature)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        need("OFA", student, student, "stages")
        read = [x.pooled.shape[-1] for x in (student, teacher) if x.pooled is not None]
        features = max([student.stages[-1].shape[-1], *read])
        loss = ofa_loss(student.logits, teacher.logits, batch["label"], self.eps, self.temperature)
        stages, last = 0.0, len(student.stages) - 1
        for i, x in enumerate(student.stages):
            logits = Head(last - i, features, student.logits.shape[-1], name=f"head{i + 1}")(wide(x))
            stages += ofa_loss(logits, teacher.logits, batch["label"], self.eps, self.temperature)
        return loss + self.stages_weight * stages, {"logit_level": loss, "stage_level": stages}
