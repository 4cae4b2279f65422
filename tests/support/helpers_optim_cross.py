"""Every optimizer on the backend of this process, from and to files.

``python helpers_optim_cross.py OUT [IN]``: updates a small model twice with each optimizer and
writes the state after the first and the weights after the second update. With ``IN``, the folder of
another backend, the first update is not done but read from there.
"""

import sys
from pathlib import Path

import numpy as np
from helpers_contract import NAMES, host, make, small_model
from keras import ops

from kbtrain.checkpoint import (
    capture,
    name_optimizer_variables,
    name_variables,
    read_arrays,
    restore,
    write_arrays,
)


def gradients(seed, variables):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(v.shape).astype("float32") for v in variables]


def run(name, out, given):
    """One optimizer."""
    model, optimizer = small_model(), make(name, 1e-2)
    variables = model.trainable_variables
    optimizer.build(variables)

    def update(seed):
        values = [ops.convert_to_tensor(g) for g in gradients(seed, variables)]
        optimizer.apply(values, variables)

    state = name_optimizer_variables(optimizer.variables, model.variables)
    if given is None:
        update(1)
        write_arrays(out / f"{name}-state.h5", capture(state))
        write_arrays(out / f"{name}-model.h5", capture(name_variables(model.variables)))
    else:
        restore(state, read_arrays(given / f"{name}-state.h5"), what="optimizer")
        weights = read_arrays(given / f"{name}-model.h5")
        restore(name_variables(model.variables), weights, what="model")
    update(2)
    np.savez(out / f"{name}.npz", *[host(v) for v in variables])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    other = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    for each in NAMES:
        run(each, folder, other)
