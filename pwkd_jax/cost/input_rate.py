"""How many cores of a host decode images as fast as its chips consume them: what the roofline says of a streamed config."""

import math

from pwkd_jax.cost.chips import Topology

# Images that a core turns from a JPEG of 500x375 into 224x224 in a second, hand-over included: the row `2 workers` of
# `python tests/bench/input.py` (column CPU; 678, 690 and 696 in three runs) on two virtual cores of an AMD EPYC of Zen 3,
# without turbojpeg.
IMAGES_PER_CORE_SECOND = 690.0


def feeding(rows: list[dict], where: Topology, rate: float) -> dict | None:
    """What the training steps among the rows of `preflight.preflight` ask of a host, as plain data; None where no time of a
    step is known.

    rate: images/s that one core decodes. For every step "chip" and "host", the images/s that one chip and all chips of a host
    consume at the step's roofline, and "cores", how many of the host's make as many. enough: whether the host has as many
    for each; None where its number of cores is not known.
    """
    on_host, cores = where.host
    steps = []
    for row in rows:
        if row["batch_key"].startswith("evaluation") or not row["step_seconds"]:
            continue
        chip = row["batch"] / row["step_seconds"] / where.chips
        steps.append({"name": row["name"], "chip": chip, "host": chip * on_host, "cores": math.ceil(chip * on_host / rate)})
    if not steps:
        return None
    most = max(step["cores"] for step in steps)
    return {
        "images_per_core_second": rate, "chips_per_host": on_host, "host_cores": cores, "steps": steps,
        "enough": None if cores is None else most <= cores,
    }  # fmt: skip
