"""Whole methods against the numbers of their authors' code, which tests/audit/audit.py wrote: totals, gradients, connectors."""

import json
from pathlib import Path

import inputs
import jax
import numpy as np
import ours
import pytest

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_audited.json").read_text())


@pytest.mark.parametrize("name", sorted(GOLDEN.keys() - {"about"}))
def test_methods_equal_the_authors(name):
    expected = GOLDEN[name]
    with jax.enable_x64(True):
        value, grads, weights = ours.evaluate(expected, None, np.float64)
    rtol = max(expected["rtol"], 1e-8)
    np.testing.assert_allclose(value, expected["value"], rtol=rtol)
    assert grads.keys() == expected["gradients"].keys()
    for found, numbers in ((grads, expected["gradients"]), (weights, expected["weights"])):
        # Statistics of batch norms are among ours where a prediction is differentiated, and the authors' have no gradient.
        for key in numbers:
            length, product = inputs.summary(found[key], key)
            np.testing.assert_allclose([length, product], numbers[key], rtol=rtol, atol=rtol * max(numbers[key][0], 1e-9) * 10)
    assert all(k.startswith("batch_stats/") for k in weights.keys() - expected["weights"].keys())
