"""Several students in one program: they share every batch, its augmentation and the teacher's forward pass.

They differ in their initial weights and in what their distiller draws. Their states are one `State` whose arrays have a leading
axis [students], all but the step, which they share.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pwkd_jax.errors import UserError
from pwkd_jax.training.state import State

HOW = ("auto", "unroll", "scan", "vmap", "devices", "none")

AXES = State(step=None, seed=0, params=0, collections=0, opt_state=0, average=0)


def _by_axis(function: Callable, state: State) -> State:
    """function(axis, array) for every array of a stacked state."""
    fields = {f.name: getattr(AXES, f.name) for f in dataclasses.fields(State)}
    return State(**{
        name: jax.tree.map(lambda x, axis=axis: function(axis, x), getattr(state, name)) for name, axis in fields.items()
    })  # fmt: skip


def member(state: State, index: int) -> State:
    """One student's own state."""
    return _by_axis(lambda axis, x: x if axis is None else x[index], state)


def stacked(make: Callable) -> Callable:
    """make(seed, ...) -> State, as a function of the seeds of several students: [students]."""
    return lambda seeds, *rest: jax.vmap(lambda seed: make(seed, *rest), out_axes=AXES)(seeds)


@dataclasses.dataclass(frozen=True)
class Several:
    """count: of students. how: one of `HOW` but auto and none. mesh: that of `devices`."""

    count: int
    how: str
    mesh: Mesh | None = None

    @property
    def seeds(self) -> np.ndarray:
        """Seeds that stand in for those to come, [students]."""
        return np.zeros(self.count, np.uint32)

    def each(self, learn: Callable) -> Callable:
        """learn(state, index) -> (state, values) of one student, as a function of the stacked state: values [students, ...].

        index: which student it is, an int where each has its own code."""

        def unrolled(state: State):
            # On devices of their own, all run the same code.
            at = jax.lax.axis_index("seed") if self.how == "devices" else None
            parts = [learn(member(state, i), i if at is None else at + i) for i in range(len(state.seed))]
            states, values = jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
            return states.replace(step=parts[0][0].step), values

        def scanned(state: State):
            each = state.replace(step=jnp.broadcast_to(state.step, state.seed.shape))
            states, values = jax.lax.map(lambda own: learn(*own), (each, jnp.arange(len(state.seed))))
            return states.replace(step=states.step[0]), values

        if self.how == "vmap":
            return lambda state: jax.vmap(learn, (AXES, 0), (AXES, 0))(state, jnp.arange(len(state.seed)))
        return scanned if self.how == "scan" else unrolled

    def everyone(self, look: Callable, state: State):
        """look(state, index) of every student [students, ...], whichever of them are on this device."""
        found = self.each(lambda one, index: (one, look(one, index)))(state)[1]
        return jax.lax.all_gather(found, "seed", tiled=True) if self.how == "devices" else found

    def spread(self, train: Callable) -> Callable:
        """train(state, batch, teacher) -> (stacked state, values), by `devices` on all of them at once."""
        if self.how != "devices":
            return train
        state = State(**{f.name: _spec(getattr(AXES, f.name)) for f in dataclasses.fields(State)})
        # The state's own device has a leading axis of one; the batch and the teacher are whole everywhere.
        return jax.shard_map(
            train, mesh=self.mesh, axis_names={"seed"}, in_specs=(state, P(), P()), out_specs=(state, P("seed")),
            check_vma=False,
        )  # fmt: skip

    def named(self, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Values [students, ...] under names of their own, and for all: the mean loss, and the learning rate they share."""
        common = {"train_loss": jnp.mean(values["train_loss"]), "learning_rate": values["learning_rate"][0]}
        own = {k: v for k, v in values.items() if k != "learning_rate"}
        return common | names([{k: v[i] for k, v in own.items()} for i in range(self.count)])

    def layout(self, like: State) -> State:
        """The shardings of a stacked state by `devices`."""
        return _by_axis(lambda axis, x: NamedSharding(self.mesh, _spec(axis)), like)


def _spec(axis: int | None) -> P:
    return P() if axis is None else P("seed")


def several(how: str, count: int, devices: Sequence[jax.Device], arms: int = 1) -> Several | None:
    """How `count` students of each of `arms` in one program train for student.together = `how`; None for one by one.

    devices: all there are. Raises UserError for `devices` without one for each.
    """
    if count * arms < 2 or how == "none":
        return None
    if how == "devices":
        if jax.process_count() > 1:
            raise UserError("student.together: 'devices' is for one process; use 'auto' on several")
        if len(devices) < count:
            raise UserError(
                f"student.together: 'devices' needs one for each of {count} students, and here are {len(devices)}; use 'auto'"
            )
        # With axes of one device, so that batches and networks are placed here as anywhere.
        axes, types = ("seed", "data", "model"), (AxisType.Auto,) * 3
        return Several(count, how, jax.make_mesh((count, 1, 1), axes, axis_types=types, devices=devices[:count]))
    # Without a loop, or the grouped convolutions of vmap, XLA keeps its fast ones on CPU (tests/bench/seeds.py).
    return Several(count, "unroll" if how == "auto" else how)


# In metrics, and out again.


def names(found: Sequence[dict]) -> dict:
    """{name: value} of each student under names that say whose they are."""
    return {f"{key}_student{i}": value for i, values in enumerate(found) for key, value in values.items()}


def own_rows(rows: Sequence[dict], index: int, count: int) -> list[dict]:
    """Of the rows of `count` students, those that one would have written alone in its share of the time."""
    ending, result = f"_student{index}", []
    for row in rows:
        common = {key: value for key, value in row.items() if "_student" not in key}
        own = {key.removesuffix(ending): value for key, value in row.items() if key.endswith(ending)}
        times = {"images_per_second": row["images_per_second"] * count, "seconds": row["seconds"] / count}
        result.append(common | own | times)
    return result
