"""Whether this process is one of several, by its command line or by what a cluster says. Nothing here loads JAX."""

import glob
import importlib.util
from collections.abc import Mapping, Sequence

from pwkd_jax.errors import UserError

OPTIONS = ("--coordinator", "--processes", "--process")


def given(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({option: value} of those that name the processes, the other arguments)."""
    found = {name: value for name, _, value in (a.partition("=") for a in argv) if name in OPTIONS}
    return found, [a for a in argv if a.partition("=")[0] not in OPTIONS]


def by_hand(given: Mapping[str, str]) -> dict:
    if len(given) < len(OPTIONS):
        raise UserError("give all three of --coordinator=HOST:PORT, --processes=N and --process=I, or none of them")
    host, _, port = given["--coordinator"].rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator: '{given['--coordinator']}' should be HOST:PORT, the address of process 0")
    counts = [given[name] for name in ("--processes", "--process")]
    if not all(c.isdigit() for c in counts) or not int(counts[1]) < int(counts[0]):
        raise UserError(f"--process: '{counts[1]}' of --processes='{counts[0]}' should be one of 0 to N - 1")
    return {"coordinator_address": given["--coordinator"], "num_processes": int(counts[0]), "process_id": int(counts[1])}


def known(env: Mapping[str, str]) -> bool:
    """Whether this is one of several processes, or may be: then JAX's detectors are asked, which fail on a lone machine."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm):
        # SLURM_NTASKS may be the allocation's while this shell is a step of one task.
        return int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"])) > 1
    if "OMPI_COMM_WORLD_SIZE" in env:
        return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
    if _tpu_machine() and "tpu" in env.get("JAX_PLATFORMS", "tpu"):
        hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        if hosts is not None:
            return "," in hosts or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1
        # A Cloud TPU VM says whether it is one of several only in its metadata, which JAX reads.
        return "TPU_SKIP_MDS_QUERY" not in env
    # An indexed Job says by this variable that it may have several pods.
    return "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and _installed("kubernetes")


def _tpu_machine() -> bool:
    return _installed("libtpu") and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
