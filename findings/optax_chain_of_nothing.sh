#!/usr/bin/env bash
# optax 0.2.8: chain() of no transformations is an error of unpacking, while named_chain() of none leaves updates as they are.
#
# A recipe chains what is switched on: clipping, decay, momentum. With all of them off, plain gradient descent, the list is empty,
# and where the empty product would be the identity, chain(*[]) says "not enough values to unpack (expected 2, got 0)", which
# names neither optax nor the option. named_chain() of an empty list, documented as chain with labels, is that identity.
# Who meets it: whoever builds an optimiser from a config, once a user turns the last part off; here momentum=0 with
# weight_decay=0 ended so. Say optax.identity() for an empty list.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax.numpy as jnp
import optax


def stepped(make):
    """What becomes of a gradient of ones."""
    try:
        transformation = make()
    except ValueError as e:
        return f"ValueError: {e}"
    params = {"w": jnp.zeros(2)}
    return transformation.update({"w": jnp.ones(2)}, transformation.init(params), params)[0]["w"].tolist()


print("optax", optax.__version__)
found = {"chain()": stepped(optax.chain), "named_chain()": stepped(optax.named_chain), "identity()": stepped(optax.identity)}
for name, value in found.items():
    print(f"{name}: {value}")
if found["chain()"] != "ValueError: not enough values to unpack (expected 2, got 0)" or found["named_chain()"] != [1.0, 1.0]:
    sys.exit("Changed: the empty chain, or the empty named chain, is another than stated.")
print("As stated: only the unnamed chain of nothing is an error.")
PYTHON
