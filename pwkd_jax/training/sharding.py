"""Where arrays live: one mesh over all devices, the batch split along `data`, everything else replicated.

Batch norm and losses are computed under `jax.jit` on the global batch, so they do not depend on the device count.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pwkd_jax.errors import UserError


def make_mesh() -> Mesh:
    # Said out loud: without axis_types, make_mesh would give Explicit axes.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def check_batch(mesh: Mesh, batch_size: int, key: str) -> None:
    if batch_size % mesh.size:
        raise UserError(f"{key}: a global batch of {batch_size} does not divide over {mesh.size} devices")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as global arrays sharded along the axis of the rows."""
    sharding = NamedSharding(mesh, P(*[None] * axis, "data"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def jit_step(mesh: Mesh, step):
    """`step(state, batch, **frozen)` compiled: state donated and replicated; batch sharded as it comes."""
    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
