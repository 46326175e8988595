"""What works with what, derived from shapes: `python -m pwkd_jax.distillers.compatibility` prints the README's table.

Nothing here is typed by hand: each method is fitted to abstract outputs of a pair at every teacher width, as
`pwkd_jax.train` does before it compiles, and either is or gives its reason.
"""

import functools

import jax
import jax.numpy as jnp

from pwkd_jax import distillers, models
from pwkd_jax.errors import UserError
from pwkd_jax.models import again

WIDTHS, BATCH, IMAGES = (0.25, 0.5, 0.75, 1.0), 16, 64
# The student beside a resnet8 teacher on 16x16 images: (its width, its image size).
PAIRS = {"same shape": (1.0, 16), "other channels": (0.5, 16), "other size": (1.0, 8)}


@functools.cache
def _outputs(width: float, size: int, train: bool = False) -> models.Outputs:
    model = models.create("resnet8", width=width)
    variables = models.abstract(model, (size, size, 3))
    images = jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.float32)
    out = jax.eval_shape(lambda v, x: models.apply(model, v, x, train=False)[0], variables, images)
    return again.attach(out, model, variables, train)


def _batch() -> dict[str, jax.ShapeDtypeStruct]:
    ints = {"label": (BATCH,), "index": (BATCH,), "dataset_label": (IMAGES,)}
    return dict.fromkeys(("image", "strong"), jax.ShapeDtypeStruct((BATCH, 16, 16, 3), jnp.float32)) | {
        name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()
    }


@functools.cache
def verdict(name: str, pair: str) -> dict[float, str]:
    """{teacher width: '' where the method serves this kind of pair, else its reason}."""
    student = _outputs(*PAIRS[pair], train=True)

    def reason(widths: tuple[float, ...]) -> str:
        try:
            distillers.build(distillers.create(name), student, {w: _outputs(w, 16) for w in widths}, _batch())
        except UserError as e:
            return str(e).removeprefix("student.distiller: ")
        return ""

    if not reason(WIDTHS):
        return dict.fromkeys(WIDTHS, "")
    return {w: reason((w, 1.0)) for w in WIDTHS}  # a stage at this width, in a run that ends with the whole


def reads(name: str) -> list[str]:
    """The fields of `models.Outputs` that the method looks at, found by watching it."""
    seen: set[str] = set()

    class Watched:
        def __init__(self, outputs: models.Outputs):
            self._outputs = outputs

        def __getattr__(self, field: str):
            if field in models.Outputs._fields:
                seen.add(field)
            return getattr(self._outputs, field)

    def init(key, student, teacher, batch):
        rngs = {"params": key, "distiller": key}
        return distillers.create(name).init(rngs, Watched(student), Watched(teacher), batch, distillers.START)

    key, student = jax.eval_shape(lambda: jax.random.key(0)), _outputs(1.0, 16)
    jax.eval_shape(init, key, student, student, _batch())
    return [field for field in models.Outputs._fields if field in seen]


def table() -> str:
    """The table in Markdown, one row a method, with the reasons for every refusal below it."""
    lines = [f"| method | reads | trains or keeps | {' | '.join(PAIRS)} |", "|---|---|---|" + "---|" * len(PAIRS)]
    notes: dict[str, int] = {}
    for name in sorted(distillers.BUILTIN):
        fitted = distillers.build(distillers.create(name), _outputs(1.0, 16, True), {1.0: _outputs(1.0, 16)}, _batch())
        like = dict(fitted.likes[1.0])
        owns = (["connectors"] if like.pop("params", {}) else []) + (["state"] if like else [])
        owns += ["initial phase"] if hasattr(fitted.distiller, "initial") else []
        owns += ["prediction"] if fitted.predicts else []
        cells = []
        for pair in PAIRS:
            answers = verdict(name, pair)
            works = [f"{w:g}" for w, reason in answers.items() if not reason]
            reason = next((r for r in answers.values() if r), "")
            why = f" [{notes.setdefault(reason, len(notes) + 1)}]" if reason else ""
            cells.append(("yes" if len(works) == len(WIDTHS) else "at " + ", ".join(works) if works else "no") + why)
        lines.append(f"| `{name}` | {', '.join(reads(name))} | {', '.join(owns) or '-'} | {' | '.join(cells)} |")
    lines += ["", *(f"[{number}] {reason}  " for reason, number in notes.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
