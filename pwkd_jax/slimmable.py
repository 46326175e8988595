"""A sub-network is the leading block of every array of the full network.

`take` reads that block (sliced: real savings), `mask` zeroes everything else (masked: full shapes, any width), and both
let gradients through. For networks normalised by batch norm the two give equal logits and gradients in training and in
evaluation: a masked batch-norm scale and bias silence the inactive channels, and a zero channel adds nothing to the next
layer. What widths never share is batch-norm state (switchable batch norm, Yu et al., ICLR 2019).

    params      {"shared": tree, "batch_norm": {key: scales and biases}}     what trains
    statistics  {key: running means and variances}                           what batch norm keeps
                {"collections": {key: {name: tree}}}                         and what a model of your own does, if any

`key` names a width (or "shared", where the widths share one set); both are assembled by `Slimmable`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pwkd_jax import models
from pwkd_jax.errors import UserError
from pwkd_jax.models import contract

BATCH_NORMS = ("switchable", "private_stats", "shared")


# The leading block. `like` is a tree of anything with a .shape: the narrow member's, arrays or abstract.


def _slices(leaf) -> tuple[slice, ...]:
    return tuple(slice(0, d) for d in leaf.shape)


def take(full: Any, like: Any) -> Any:
    """full[:d0, :d1, ...] for each leaf, d being the shape of the same leaf in `like`."""
    return jax.tree.map(lambda x, n: x[_slices(n)], full, like)


def mask(full: Any, like: Any) -> Any:
    """`full`, same shapes, with everything outside the leading block set to zero."""
    return jax.tree.map(lambda x, n: embed(x[_slices(n)], x), full, like)


def embed(narrow: Any, like: Any, fill: float = 0.0) -> Any:
    """`narrow` as the leading block of arrays shaped as `like`, `fill` around it: the transpose of `take`."""
    return jax.tree.map(
        lambda x, f: _pad(x, [(0, d - n) for n, d in zip(x.shape, f.shape, strict=True)], fill), narrow, like
    )


def _pad(x: jax.Array, widths: list[tuple[int, int]], fill: float) -> jax.Array:
    return jnp.pad(x, widths, constant_values=fill) if widths else x  # jnp.pad takes no scalar


def put(full: Any, narrow: Any) -> Any:
    """`full` with its leading block replaced by `narrow`."""
    return jax.tree.map(lambda x, n: x.at[_slices(n)].set(n), full, narrow)


def misfit(full: dict, narrow: dict) -> str | None:
    """The path of an array of `narrow` that is no leading block of its namesake in `full`, or None."""
    full, narrow = flatten_dict(full), flatten_dict(narrow)
    for path in sorted(full.keys() | narrow.keys()):
        f, n = full.get(path), narrow.get(path)
        if f is None or n is None or len(n.shape) != len(f.shape) or any(a > b for a, b in zip(n.shape, f.shape, strict=True)):
            return "/".join(path)
    return None


# Batch norm: a layer is one whose path holds running statistics, whoever wrote the model.


def split_norm(params, batch_stats) -> tuple[dict, dict]:
    """(params without the scales and biases of batch-norm layers, those scales and biases)."""
    layers = {path[:-1] for path in flatten_dict(batch_stats)}
    flat = flatten_dict(params)
    shared = {path: x for path, x in flat.items() if path[:-1] not in layers}
    norm = {path: x for path, x in flat.items() if path[:-1] in layers}
    return unflatten_dict(shared), unflatten_dict(norm)


def join(shared: dict, norm: dict) -> dict:
    """The inverse of `split_norm`."""
    return unflatten_dict(flatten_dict(shared) | flatten_dict(norm))


def width_key(width: float) -> str:
    return f"{width:g}"


@dataclasses.dataclass(frozen=True)
class Slimmable:
    """One set of weights read at several widths.

    members: {width: the plain model at that width}, widest first; likes: {width: its abstract variables};
    batch_norm: `switchable` (own statistics, scale and bias per width), `private_stats` (own statistics, shared scale
    and bias) or `shared` (everything shared; needs `calibrate` before it can be evaluated).
    table: the widths that own batch-norm state; others (drawn by the sandwich rule) are trained on batch statistics only.
    """

    members: dict[float, nn.Module]
    likes: dict[float, dict]
    table: tuple[float, ...]
    batch_norm: str
    masked: bool

    def __repr__(self) -> str:
        widths = ", ".join(f"{w:g}" for w in sorted(self.widths))
        return f"Slimmable({type(self.members[self.widest]).__name__} at widths {widths}, {self.batch_norm} batch norm)"

    @property
    def widths(self) -> tuple[float, ...]:
        return tuple(self.members)

    @property
    def widest(self) -> float:
        return self.widths[0]

    def init(self, rng: jax.Array, image_shape: tuple[int, ...]) -> tuple[dict, dict]:
        """(params, statistics) freshly initialised; image_shape is [H, W, C]."""
        return self.spread(self.members[self.widest].init(rng, jnp.zeros((1, *image_shape)), train=False))

    def spread(self, full: dict) -> tuple[dict, dict]:
        """(params, statistics) that start every width from variables of the widest member; their order is kept."""
        params, statistics = self._spread(models.whole(full))
        own = models.collections(full)
        if not own:
            return params, statistics
        of = {width_key(w): take(own, models.collections(self.likes[w])) for w in self.table}
        return params, statistics | {"collections": {"shared": own} if self.batch_norm == "shared" else of}

    def _spread(self, full: dict) -> tuple[dict, dict]:
        shared, norm = split_norm(full["params"], full["batch_stats"])
        if self.batch_norm == "shared":
            return {"shared": full["params"], "batch_norm": {}}, {"shared": full["batch_stats"]}
        blocks = {width_key(w): self._norm_likes(w) for w in self.table}
        statistics = {key: take(full["batch_stats"], stats) for key, (_, stats) in blocks.items()}
        if self.batch_norm == "private_stats":
            return {"shared": full["params"], "batch_norm": {}}, statistics
        norms = {key: take(norm, affine) for key, (affine, _) in blocks.items()}
        return {"shared": shared, "batch_norm": norms}, statistics

    def _norm_likes(self, width: float) -> tuple[dict, dict]:
        like = self.likes[width]
        return split_norm(like["params"], like.get("batch_stats", {}))[1], like.get("batch_stats", {})

    def block(self, params: dict, width: float) -> dict:
        """Of `params` what the member at `width` reads, in their own layout: the other methods take it in their place."""
        key, like = width_key(width), self.likes[width]["params"]
        if self.batch_norm != "switchable":
            return {**params, "shared": take(params["shared"], like)}
        shared = split_norm(like, self._norm_likes(width)[1])[0]
        return {"shared": take(params["shared"], shared), "batch_norm": {key: params["batch_norm"][key]}}

    def extract(self, params: dict, statistics: dict, width: float) -> dict:
        """Variables {"params", "batch_stats", its own collections} of the member at `width`: a standalone narrow model's."""
        key, like = width_key(width), self.likes[width]
        stats_like = self._norm_likes(width)[1]
        if self.batch_norm == "switchable":
            shared_like, _ = split_norm(like["params"], stats_like)
            tree = join(take(params["shared"], shared_like), params["batch_norm"][key])
        else:
            tree = take(params["shared"], like["params"])
        if key in statistics:
            stats = statistics[key]
        elif "shared" in statistics:
            stats = take(statistics["shared"], stats_like)
        else:  # a drawn width without a table of its own: train-mode batch norm reads nothing from these
            stats = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats_like)
        return {"params": tree, "batch_stats": stats} | self._own(statistics, width)

    def _own(self, statistics: dict, width: float) -> dict:
        """The own collections {name: tree} of the member at `width`; a drawn one without any reads the widest one's."""
        if not (kept := statistics.get("collections")):
            return {}
        found = kept.get(width_key(width), kept.get("shared", kept.get(width_key(self.widest))))
        return take(found, models.collections(self.likes[width]))

    def extract_masked(self, params: dict, statistics: dict, width: float) -> dict:
        """The same sub-network in the full network's shapes: what `extract` gives, embedded in zeros."""
        narrow, full = self.extract(params, statistics, width), self.likes[self.widest]
        return {
            "params": embed(narrow["params"], full["params"]),
            # Inactive channels carry zero scale, so their statistics do not matter; a variance of 1 keeps them finite.
            "batch_stats": embed(narrow["batch_stats"], full.get("batch_stats", {}), fill=1.0),
            **embed(models.collections(narrow), models.collections(full)),
        }

    def draws(self, image_shape: tuple[int, ...]) -> bool:
        """Whether its members draw random numbers in training, see `models.draws`."""
        return models.draws(self.members[self.widest], image_shape)

    def forward(
        self, params: dict, statistics: dict, width: float, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[models.Outputs, dict]:
        """Outputs of the sub-network at `width` on images [B, H, W, C], and the statistics with its own updated.

        key: for a network that draws random numbers in training."""
        member, variables = self.members[width], self.extract(params, statistics, width)
        if self.masked:
            member, variables = self.members[self.widest], self.extract_masked(params, statistics, width)
        out, kept = models.forward(member, variables, images, train=train, key=key)
        stats, own, key = kept.get("batch_stats"), models.collections(kept), width_key(width)
        if own:
            own = take(own, models.collections(self.likes[width]))
            statistics = statistics | {"collections": _kept(statistics["collections"], key, own)}
        if not train or not stats:
            return out, statistics
        return out, _kept(statistics, key, take(stats, self._norm_likes(width)[1]))


def _kept(statistics: dict, key: str, new: dict) -> dict:
    """`statistics` by width, or shared, after the width of `key` left `new`; a drawn one without a place of its own leaves
    nothing."""
    if key in statistics:
        return statistics | {key: new}
    return statistics | {"shared": put(statistics["shared"], new)} if "shared" in statistics else statistics


def build(
    make: Callable[[float], nn.Module],
    widths: tuple[float, ...],
    image_shape: tuple[int, ...],
    *,
    batch_norm: str = "switchable",
    execution: str = "take",
    pool: tuple[float, ...] = (),
    num_classes: int = 0,
) -> Slimmable:
    """The slimmable network of the family `make(width)` for images [H, W, C].

    pool: further widths that sandwich sampling may draw. num_classes: of the data, 0 where not known. Raises UserError where a
    member is no such model, see `contract.check`, where a width or the images do not fit the family, and where a narrow member
    is not the leading block of the widest (the family then cannot be slimmed), by path.
    """
    for name, value, known in (("batch_norm", batch_norm, BATCH_NORMS), ("execution", execution, ("take", "mask"))):
        if value not in known:
            raise UserError(f"teacher.{name}: {value!r} is not possible; it should be one of {', '.join(known)}")
    if not widths or any(not 0 < w <= 1 for w in (*widths, *pool)) or len(set(widths)) < len(widths):
        raise UserError(f"teacher.widths: {tuple(widths)} is not possible; they should be different numbers in (0, 1]")
    ordered = sorted({*widths, *pool}, reverse=True)
    members = {w: make(w) for w in ordered}
    likes = {}
    for w in ordered:
        try:
            contract.check(members[w], image_shape, "teacher.model", num_classes)
            likes[w] = models.abstract(members[w], image_shape)
        except models.WidthError as e:
            raise UserError(f"teacher.widths: {str(e).replace('set divisor', 'set teacher.divisor')}") from e
    for w in ordered[1:]:
        if bad := misfit(likes[ordered[0]], likes[w]):
            raise UserError(
                f"teacher.model: at width {w:g} '{bad}' is not a leading block of the same array at width "
                f"{ordered[0]:g}, so this family cannot be slimmed"
            )
    if len(ordered) > 1 and _sizes(likes[ordered[0]]) == _sizes(likes[ordered[-1]]):
        raise UserError(
            f"teacher.model: has the same arrays at width {ordered[-1]:g} as at {ordered[0]:g}; a slimmable family has fewer "
            "channels where its `width` is smaller, as in channels(64, self.width)"
        )
    table = tuple(w for w in ordered if w in widths)
    net = Slimmable(members, likes, table, batch_norm, execution == "mask")
    if net.masked:
        refuse_masking(net, image_shape)
    return net


def _sizes(tree: dict) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def make_slimmable(
    model: str | Callable[..., nn.Module],
    widths: Sequence[float],
    image_shape: tuple[int, int, int],
    *,
    batch_norm: str = "switchable",
    execution: str = "take",
    pool: Sequence[float] = (),
    **options: Any,
) -> Slimmable:
    """The slimmable network of a Flax module class with a field `width`, or of a built-in model's name, for images [H, W, C].

    options: its other fields, such as num_classes=10. widths, batch_norm, execution, pool: see `build`, which raises UserError.
    """

    if isinstance(model, nn.Module) or (not callable(model) and not isinstance(model, str)):
        raise UserError(f"model: should be a Flax module's class or a built-in model's name, and this is {model!r}")
    if not isinstance(widths, Sequence) or isinstance(widths, str) or not all(isinstance(w, (int, float)) for w in widths):
        raise UserError(f"widths: {widths!r} is not possible; give several, as in (0.25, 0.5, 1.0)")
    if not isinstance(image_shape, Sequence) or len(image_shape) != 3 or any(int(n) != n or n < 1 for n in image_shape):
        raise UserError(f"image_shape: {image_shape!r} is not possible; give (height, width, channels)")

    def make(width: float) -> nn.Module:
        if isinstance(model, str):
            return models.create(model, width=width, **options)
        return models.construct(model, getattr(model, "__name__", str(model)), width=width, **options)

    return build(make, tuple(widths), tuple(image_shape), batch_norm=batch_norm, execution=execution, pool=tuple(pool))


def refuse_masking(net: Slimmable, image_shape: tuple[int, ...]) -> None:
    """UserError unless the masked network equals the sliced one, found out by running both at the narrowest width.

    Layers that look across channels see the zeroed ones: LayerNorm and its like, grouped convolutions, channel shuffles,
    and whatever reads a concatenation, whose active channels are no leading block.
    """
    if net.draws(image_shape):
        raise UserError(
            "teacher.execution: 'mask' is not possible for a model that draws random numbers in training (dropout), whose "
            "shapes follow the width; use 'take'"
        )
    rng, width = np.random.default_rng(0), net.widths[-1]
    params, statistics = net.init(jax.random.key(0), image_shape)
    # Away from the initial scales and biases, at which a leak could cancel.
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    images = rng.standard_normal((8, *image_shape), np.float32)
    sliced = dataclasses.replace(net, masked=False)
    logits = jax.jit(lambda p: [n.forward(p, statistics, width, images, train=True)[0].logits for n in (sliced, net)])
    outputs = logits(params)
    if (error := jnp.abs(outputs[0] - outputs[1]).max() / jnp.abs(outputs[0]).max()) > 1e-3:
        raise UserError(
            f"teacher.execution: 'mask' at width {width:g} is off from the narrow network by {error:.0%}, for some layer of "
            "this family sees the zeroed channels (a norm over channels, a grouped convolution, a shuffle or a "
            "concatenation); use 'take'"
        )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] per image: [B, classes], labels [B] int -> [B]; of targets [B, classes] float, their sum
    weighted by them."""
    if labels.ndim == 2:
        return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
