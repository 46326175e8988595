"""What the tests of faults share: one unbroken experiment."""

import pytest

from pwkd_jax import train
from tests.faults import kills, tiny


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The workdir of the tiny experiment, trained without a fault."""
    workdir = tmp_path_factory.mktemp("faults") / "unbroken"
    assert train.main([*tiny.OPTIONS, *kills.VARIANTS["one by one"], f"--workdir={workdir}"]) == 0
    return workdir
