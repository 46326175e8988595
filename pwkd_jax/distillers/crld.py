"""Cross-view consistency regularisation (Zhang, Liu, Cai and Ma, ACM MM 2024, arXiv 2412.16493).

A weak and a strong view of each image: either network's predictions of one view have to agree with the teacher's of the same
view and of the other, where the teacher is sure enough.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwkd_jax import slimmable
from pwkd_jax.distillers.logits import above_zero, kl, log_softmax
from pwkd_jax.distillers.taps import network
from pwkd_jax.distillers.temperature import TEMPERATURE
from pwkd_jax.errors import UserError


def crld_losses(
    weak: jax.Array, strong: jax.Array, teacher_weak: jax.Array, teacher_strong: jax.Array, temperature: float,
    sure_weak: float, sure_strong: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(same, cross): means over images of T^2 (KL of the weak views + KL of the strong ones), and of T^2 (KL of the student's
    strong view from the teacher's weak one + KL the other way round); logits [B, C].

    An image counts for `same` where the teacher's largest probability of its weak view, and for `cross` of its strong view,
    is at least `sure_weak` or `sure_strong`; others count as 0.
    """
    s_weak, s_strong, t_weak, t_strong = (
        log_softmax(z, temperature) for z in (weak, strong, teacher_weak, teacher_strong)
    )  # fmt: skip
    surest = [jnp.exp(jnp.max(log_softmax(z), axis=-1)) for z in (teacher_weak, teacher_strong)]
    same = jnp.where(surest[0] >= sure_weak, kl(t_weak, s_weak) + kl(t_strong, s_strong), 0.0)
    cross = jnp.where(surest[1] >= sure_strong, kl(t_weak, s_strong) + kl(t_strong, s_weak), 0.0)
    return temperature**2 * jnp.mean(same), temperature**2 * jnp.mean(cross)


class CRLD(nn.Module):
    """The strong view's cross entropy + same_weight * same + cross_weight * cross of `crld_losses`, beside the weak one's.

    Defaults are the authors' for every CIFAR-100 pair. The weak view is what the recipe makes of an image, the strong one the
    same anew under `data.strong`. The student's running statistics are those of the weak views alone; theirs are of both.
    """

    ce_weight: float = 1.0
    weight: float = 1.0
    same_weight: float = 2.0
    cross_weight: float = 0.5
    temperature: float = TEMPERATURE
    sure_weak: float = 0.9
    sure_strong: float = 0.2
    reruns = True
    views = True

    def __post_init__(self):
        above_zero(temperature=self.temperature)
        super().__post_init__()

    @nn.compact
    def __call__(self, student, teacher, batch, progress):
        itself, frozen = network("CRLD", "student", student), network("CRLD", "teacher", teacher)
        if "strong" not in batch:
            raise UserError(
                "student.distiller: CRLD reads batch['strong'], which this one lacks; give it a strong view of its images"
            )
        strong = itself(batch["strong"], key=self.make_rng("distiller")).logits
        logits = student.logits, strong, teacher.logits, frozen(batch["strong"]).logits
        same, cross = crld_losses(*logits, self.temperature, self.sure_weak, self.sure_strong)
        ce = jnp.mean(slimmable.cross_entropy(strong, batch.get("target", batch["label"])))
        loss = ce + self.same_weight * same + self.cross_weight * cross
        return loss, {"strong_cross_entropy": ce, "same_view": same, "cross_view": cross}
